"""What is written is what the official tools read and our own readers honour."""

import json
import secrets

import numpy as np
import pytest
from PIL import Image

from concat_jax.core.coco import read_panoptic
from concat_jax.core.coco_writers import (
    MAP_CLASSES,
    InstanceWriter,
    PanopticWriter,
    SemanticWriter,
    StreamedJson,
)
from concat_jax.core.files import FileError
from concat_jax.core.mask_codes import encode_rle, read_id_map
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.result_files import read_manifest

VOCABULARY = Vocabulary(("cat", "sky"), (True, False), (True, False), (17, 187))
CATEGORIES = [{"id": 17, "name": "cat", "isthing": 1}, {"id": 187, "name": "sky", "isthing": 0}]
MASK = np.eye(3, dtype=bool)


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))


def test_panoptic_files(tmp_path):
    id_map = np.array([[0, 5, 5], [300, 300, 5]], np.int32)
    segments = [{"id": 5, "label": 0, "score": 0.75}, {"id": 300, "label": 1, "iscrowd": 1}]
    with PanopticWriter(tmp_path, VOCABULARY) as writer:
        writer.add(42, "cam1/42.jpg", id_map, segments)
        writer.add("x43", "43.jpg", np.zeros((2, 2), int), [])
        assert not writer.json_path.exists(), "a json that exists must be complete"
    content = json.loads((tmp_path / "panoptic_predictions.json").read_text())
    first = {"id": 5, "category_id": 17, "area": 3, "bbox": [1, 0, 2, 2], "iscrowd": 0}
    second = {"id": 300, "category_id": 187, "area": 2, "bbox": [0, 1, 2, 1], "iscrowd": 1}
    infos = [first | {"score": 0.75}, second]
    assert content == {
        "task": "panoptic",
        "pixels": "segment_ids",
        "categories": CATEGORIES,
        "annotations": [
            {"image_id": 42, "file_name": "cam1/42.png", "segments_info": infos},
            {"image_id": "x43", "file_name": "43.png", "segments_info": []},
        ],
        "images": [
            {"id": 42, "file_name": "cam1/42.jpg", "height": 2, "width": 3},
            {"id": "x43", "file_name": "43.jpg", "height": 2, "width": 2},
        ],
    }
    png = tmp_path / "panoptic_predictions" / "cam1" / "42.png"
    np.testing.assert_array_equal(read_id_map(png, writer.json_path), id_map)
    assert Image.open(png).mode == "RGB"
    assert read_panoptic(writer.json_path).annotations[42].ids == (5, 300)
    assert len(files(tmp_path)) == 3


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "list every non-zero id"),
        ([{"id": 1, "label": 0}, {"id": 2, "label": 0}], "list every non-zero id"),
        ([{"id": 1, "label": 0}, {"id": 1, "label": 0}], "list every non-zero id"),
        ([{"id": 1, "label": 2}], "outside the vocabulary"),
    ],
)
def test_segments_that_contradict_the_map_are_refused_and_no_json_is_left(
    tmp_path, segments, message
):
    with pytest.raises(ValueError, match=message), PanopticWriter(tmp_path, VOCABULARY) as writer:
        writer.add(1, "1.jpg", np.ones((2, 2), int), segments)
    assert not files(tmp_path)


def test_real_annotations_survive_a_round_trip(shared_data, tmp_path):
    source = shared_data / "coco_panoptic_mini/annotations/panoptic_val2017.json"
    file, content = read_panoptic(source), json.loads(source.read_text())
    rows = file.categories.values()
    flags = tuple(c.is_thing for c in rows)
    vocabulary = Vocabulary(
        tuple(c.name for c in rows), flags, (True,) * len(flags), tuple(file.categories)
    )
    official = content["annotations"][:5]
    with PanopticWriter(tmp_path, vocabulary) as writer:
        for entry in official:
            one = file.annotations[entry["image_id"]]
            id_map = read_id_map(source.with_suffix("") / one.file_name, source)
            labels = [vocabulary.index_of_category[c] for c in one.category_ids]
            segments = [
                {"id": i, "label": label, "iscrowd": crowd}
                for i, label, crowd in zip(one.ids, labels, one.is_crowd, strict=True)
            ]
            writer.add(one.image_id, one.file_name, id_map, segments)
    written = json.loads(writer.json_path.read_text())["annotations"]
    key = ("id", "category_id", "area", "bbox", "iscrowd")
    for ours, theirs in zip(written, official, strict=True):
        assert ours["file_name"] == theirs["file_name"]
        for mine, other in zip(ours["segments_info"], theirs["segments_info"], strict=True):
            assert {k: mine[k] for k in key} == {k: other[k] for k in key}


def test_instances_are_what_pycocotools_loads(tmp_path):
    coco_mask = pytest.importorskip("pycocotools.mask")
    code = encode_rle(MASK)
    with InstanceWriter(tmp_path / "deep" / "results.json", VOCABULARY) as writer:
        writer.add(42, "42.jpg", (3, 3), [0, 1], [0.123456789, 0.5], [code, code])
        writer.add(43, "43.jpg", (4, 5), [], [], [])
        assert not writer.json_path.exists(), "a json that exists must be complete"
    entries = json.loads(writer.json_path.read_text())
    assert [(e["image_id"], e["category_id"], e["score"]) for e in entries] == [
        (42, 17, 0.123456789),
        (42, 187, 0.5),
    ]
    np.testing.assert_array_equal(coco_mask.decode(entries[0]["segmentation"]), MASK)
    # A box would be taken for the mask's area.
    assert "bbox" not in entries[0]
    manifest = read_manifest(writer.json_path, "instance")
    assert {i: image.file_name for i, image in manifest.images.items()} == {
        42: "42.jpg",
        43: "43.jpg",
    }
    assert files(tmp_path) == ["deep/results.json", "deep/results.manifest.json"]


@pytest.mark.parametrize(
    ("label", "score", "message"), [(2, 0.5, "class index 2"), (0, float("nan"), "score nan")]
)
def test_wrong_instances_are_refused_and_no_file_is_left(tmp_path, label, score, message):
    with (
        pytest.raises(ValueError, match=message),
        InstanceWriter(tmp_path / "results.json", VOCABULARY) as writer,
    ):
        writer.add(1, "1.jpg", (3, 3), [0, label], [0.5, score], [encode_rle(MASK)] * 2)
    assert not files(tmp_path)


def test_nothing_at_all_is_an_empty_list(tmp_path):
    with InstanceWriter(tmp_path / "results.json", VOCABULARY) as writer:
        pass
    assert json.loads(writer.json_path.read_text()) == []


def test_label_maps_hold_category_ids_and_say_so(tmp_path):
    with SemanticWriter(tmp_path / "maps", VOCABULARY) as writer:
        writer.add(7, "folder/1.jpg", np.array([[0, 1], [-1, 0]]))
        writer.add(8, "folder/1.bmp", np.array([[1]]))  # differs in its extension only
        with pytest.raises(ValueError, match="already written"):
            writer.add(9, "folder/1.bmp", np.array([[1]]))
        with pytest.raises(ValueError, match="from 2 to 2"):
            writer.add(10, "2.png", np.full((1, 1), 2))
    image = Image.open(tmp_path / "maps/folder/1.png")
    assert np.asarray(image).tolist() == [[17, 187], [255, 17]]
    manifest = read_manifest(tmp_path / "maps", "semantic")
    assert {k: c.name for k, c in manifest.categories.items()} == {17: "cat", 187: "sky"}
    assert manifest.void == 255
    assert manifest.maps == {"folder/1.png": "folder/1.jpg", "folder/1.bmp.png": "folder/1.bmp"}
    assert json.loads(image.text[MAP_CLASSES]) == {"17": "cat", "187": "sky", "255": None}
    content = json.loads((tmp_path / "maps.json").read_text())
    assert content["images"][0]["classes"] == [
        {"id": 17, "name": "cat", "area": 2},
        {"id": 187, "name": "sky", "area": 1},
    ]


def test_large_ids_take_two_bytes_and_larger_ones_positions(tmp_path):
    vocabulary = Vocabulary(("a", "b"), (True, True), (True, True), (255, 3000))
    with SemanticWriter(tmp_path / "maps", vocabulary) as writer:
        writer.add(1, "1.jpg", np.array([[0, 1, -1]]))
    assert np.asarray(Image.open(tmp_path / "maps/1.png")).tolist() == [[255, 3000, 65535]]
    vocabulary = Vocabulary(("a", "b"), (True, True), (True, True), (70000, 3))
    with SemanticWriter(tmp_path / "more", vocabulary) as writer:
        writer.add(1, "1.jpg", np.array([[0, 1, -1]]))
    assert np.asarray(Image.open(tmp_path / "more/1.png")).tolist() == [[0, 1, 255]]
    categories = read_manifest(tmp_path / "more", "semantic").categories
    assert {value: category.id for value, category in categories.items()} == {0: 70000, 1: 3}


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda _: "ab")
    (tmp_path / "a.json.0.ab.partial").symlink_to("/dev/full")
    with pytest.raises(FileError, match=r"/a\.json cannot be written: No space left on device"):
        with StreamedJson(tmp_path / "a.json") as writer:
            writer.append({"id": 1})
    assert not list(tmp_path.iterdir())


def test_two_processes_of_one_path_write_a_whole_json_each(tmp_path):
    """Of two that predict into one folder the last one's stays, and it is a json."""
    first, second = StreamedJson(tmp_path / "a.json"), StreamedJson(tmp_path / "a.json")
    for number in range(3):
        first.append({"id": number, "text": "x" * 20_000})
        second.append({"id": 10 + number})
    with second:
        pass
    assert [entry["id"] for entry in json.loads((tmp_path / "a.json").read_text())] == [10, 11, 12]
    with first:
        pass
    assert [entry["id"] for entry in json.loads((tmp_path / "a.json").read_text())] == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
