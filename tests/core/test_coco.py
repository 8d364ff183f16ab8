"""COCO panoptic files: colours, streaming writer, reader, and what the official tool demands."""

import json

import numpy as np
import pytest
from PIL import Image

from concat_jax.core import coco as coco_format
from concat_jax.core.coco import PanopticWriter, read_panoptic
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.panoptic_quality import PanopticQuality

VOCABULARY = Vocabulary(("cat", "sky"), (True, False), (True, False), (17, 187))


def test_colours_by_hand_and_back():
    ids = np.array([[0, 1, 256, 65536, 3226956, coco_format.MAX_ID]])
    rgb = coco_format.ids_to_rgb(ids)
    assert rgb[0].tolist() == [
        [0, 0, 0],
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 1],
        [76, 61, 49],
        [255, 255, 255],
    ]
    assert rgb.dtype == np.uint8
    np.testing.assert_array_equal(coco_format.rgb_to_ids(rgb), ids)


@pytest.mark.parametrize("bad", [-1, 256**3])
def test_ids_that_do_not_fit_are_refused(bad):
    with pytest.raises(ValueError, match="do not fit"):
        coco_format.ids_to_rgb(np.array([[bad]]))


def test_greyscale_is_refused():
    with pytest.raises(ValueError, match="open it as RGB"):
        coco_format.rgb_to_ids(np.zeros((4, 4), np.uint8))


def test_written_files_hold_what_the_official_tool_reads(tmp_path):
    id_map = np.array([[0, 5, 5], [300, 300, 5]], np.int32)
    segments = [{"id": 5, "label": 0, "score": 0.75}, {"id": 300, "label": 1}]
    with PanopticWriter(tmp_path, VOCABULARY) as writer:
        writer.add(42, "folder/000000000042.jpg", id_map, segments)
        writer.add(43, "43.jpg", np.zeros((2, 2), int), [])
        assert not writer.json_path.exists(), "a json that exists must be complete"
    content = json.loads((tmp_path / "panoptic_predictions.json").read_text())
    assert content["annotations"][0] == {
        "image_id": 42,
        "file_name": "000000000042.png",
        "segments_info": [
            {
                "id": 5,
                "category_id": 17,
                "area": 3,
                "bbox": [1, 0, 2, 2],
                "iscrowd": 0,
                "score": 0.75,
            },
            {"id": 300, "category_id": 187, "area": 2, "bbox": [0, 1, 2, 1], "iscrowd": 0},
        ],
    }
    assert content["annotations"][1]["segments_info"] == []
    assert [c["id"] for c in content["categories"]] == [17, 187]
    with Image.open(tmp_path / "panoptic_predictions/000000000042.png") as png:
        assert png.mode == "RGB"
        assert np.asarray(png)[1, 0].tolist() == [44, 1, 0]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "panoptic_predictions",
        "panoptic_predictions.json",
    ]


def test_round_trip_scores_full_pq(tmp_path):
    rng = np.random.default_rng(0)
    with PanopticWriter(tmp_path, VOCABULARY, name="truth") as writer:
        for image_id in range(3):
            id_map = rng.integers(0, 4, (8, 9)) * 70000
            segments = [
                {"id": 70000 * k, "label": k % 2, "iscrowd": int(k == 3)} for k in range(1, 4)
            ]
            writer.add(image_id, f"{image_id}.jpg", id_map, segments)
    quality = PanopticQuality(2)
    images = list(read_panoptic(tmp_path / "truth.json"))
    assert [image.image_id for image in images] == [0, 1, 2]
    for image in images:
        labels, crowd = image.labels_by_id(VOCABULARY), image.crowd_by_id()
        assert crowd == {70000: False, 140000: False, 210000: True}
        quality.update(image.id_map, labels, crowd, image.id_map, labels)
    assert quality.summarize(VOCABULARY)["all"]["pq"] == 100.0
    assert quality.tp.tolist() == [3, 3]


def test_real_annotations_survive_a_round_trip(shared_data, tmp_path):
    source = shared_data / "coco_panoptic_mini/annotations/panoptic_val2017.json"
    content = json.loads(source.read_text())
    categories = content["categories"]
    vocabulary = Vocabulary(
        tuple(c["name"] for c in categories),
        tuple(bool(c["isthing"]) for c in categories),
        (True,) * len(categories),
        tuple(c["id"] for c in categories),
    )
    wanted = 5
    with PanopticWriter(tmp_path, vocabulary) as writer:
        for image, _ in zip(read_panoptic(source), range(wanted), strict=False):
            labels = image.labels_by_id(vocabulary)
            segments = [
                {"id": s["id"], "label": labels[s["id"]], "iscrowd": s["iscrowd"]}
                for s in image.segments
            ]
            writer.add(image.image_id, image.file_name, image.id_map, segments)
    written = json.loads(writer.json_path.read_text())["annotations"]
    key = ("id", "category_id", "area", "bbox", "iscrowd")
    for ours, theirs in zip(written, content["annotations"], strict=False):
        assert ours["file_name"] == theirs["file_name"]
        for mine, official in zip(ours["segments_info"], theirs["segments_info"], strict=True):
            assert {k: mine[k] for k in key} == {k: official[k] for k in key}
    assert len(written) == wanted


def test_a_failed_run_leaves_no_json(tmp_path):
    with pytest.raises(RuntimeError), PanopticWriter(tmp_path, VOCABULARY) as writer:
        writer.add(1, "1.jpg", np.ones((2, 2), int), [{"id": 1, "label": 0}])
        raise RuntimeError
    assert not list(tmp_path.glob("*.json*"))


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "list every non-zero id"),
        ([{"id": 1, "label": 0}, {"id": 2, "label": 0}], "list every non-zero id"),
        ([{"id": 1, "label": 0}, {"id": 1, "label": 0}], "list every non-zero id"),
        ([{"id": 1, "label": 2}], "outside the vocabulary"),
    ],
)
def test_segments_that_contradict_the_map_are_refused(tmp_path, segments, message):
    with PanopticWriter(tmp_path, VOCABULARY) as writer:
        with pytest.raises(ValueError, match=message):
            writer.add(1, "1.jpg", np.ones((2, 2), int), segments)


def test_the_same_png_twice_is_refused(tmp_path):
    with PanopticWriter(tmp_path, VOCABULARY) as writer:
        writer.add(1, "a/1.jpg", np.zeros((2, 2), int), [])
        with pytest.raises(ValueError, match="already written"):
            writer.add(2, "b/1.jpg", np.zeros((2, 2), int), [])


def test_reader_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="no panoptic json"):
        next(read_panoptic(tmp_path / "none.json"))
    path = tmp_path / "a.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="no 'annotations'"):
        next(read_panoptic(path))
    path.write_text('{"annotations": [{"image_id": 1, "file_name": "1.png"}]}')
    with pytest.raises(ValueError, match="give png_folder"):
        next(read_panoptic(path))


def test_unknown_category_is_refused():
    image = coco_format.PanopticAnnotation(
        1, "1.png", np.ones((1, 1), np.int32), [{"id": 1, "category_id": 3}]
    )
    with pytest.raises(ValueError, match="category 3"):
        image.labels_by_id(VOCABULARY)
