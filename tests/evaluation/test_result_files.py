"""Whose numbers are whose: images and classes that two sides number differently, and label maps."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from concat_jax.core.coco_writers import (
    MAP_CLASSES,
    InstanceWriter,
    PanopticWriter,
    SemanticWriter,
)
from concat_jax.core.mask_codes import encode_rle
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.result_files import pair_images
from concat_jax.evaluation.score_files import score_instances, score_panoptic
from concat_jax.evaluation.score_label_maps import score_semantic
from concat_jax.inference.instance import Instance
from concat_jax.inference.outputs import ResultWriter, result_files
from concat_jax.inference.panoptic import ImageSegments

NAMES = ("wall", "sky", "cat")
VOCABULARY = Vocabulary(NAMES, (False, False, True), (True, True, False), (1, 2, 3))
# As a model folder without ids numbers them.
POSITIONS = Vocabulary(NAMES, VOCABULARY.is_thing, (True,) * 3, (0, 1, 2))
# Two images of which neither is like the other, by file name.
MAPS = {
    "apple.jpg": np.repeat([[0, 0, 1, 2]], 3, axis=0),
    "zebra.jpg": np.repeat([[2, 2, 2, 0]], 3, axis=0),
}


def paired(truth, found, **rules):
    return pair_images(truth, found, "gt.json", "pred.json", **rules)


def test_images_are_paired_by_id_unless_names_contradict():
    truth = {1: "zebra.jpg", 2: "apple.jpg"}
    assert paired(truth, {2: "apple.png", 1: "in/zebra.png"}) == ({2: 2, 1: 1}, "")
    assert paired(truth, {1: None, 2: None}) == ({1: 1, 2: 2}, "")
    pairs, note = paired(truth, {1: "apple.jpg", 2: "zebra.jpg"})
    assert pairs == {1: 2, 2: 1} and "pred.json numbers its images in another way" in note
    assert paired(truth, {7: "out/apple.jpg", 8: "out/zebra.jpg"})[0] == {7: 2, 8: 1}
    # Folders tell names apart.
    cameras = {1: "cam1/1.jpg", 2: "cam2/1.jpg"}
    assert paired(cameras, {5: "cam2/1.jpg", 6: "cam1/1.jpg"})[0] == {5: 2, 6: 1}
    pairs, note = paired(cameras, {1: "val/cam2/1.png", 2: "val/cam1/1.png"})
    assert pairs == {1: 2, 2: 1} and note
    # A whole name is no end of a longer one.
    nested = {1: "1.png", 2: "cam/1.png"}
    assert paired(nested, {1: "cam/1.png", 2: "1.png"})[0] == {1: 2, 2: 1}
    assert paired(nested, {7: "/data/cam/1.png", 8: "1.png"})[0] == {7: 2, 8: 1}
    # As systems spell them.
    pairs = paired({1: "cam\\e\u0301.jpg", 2: "b.jpg"}, {1: "b.jpg", 2: "x/cam/\u00e9.png"})[0]
    assert pairs == {1: 2, 2: 1}
    # Folders of other names say nothing, and an extension may say it all.
    assert paired(cameras, {2: "left/1.png", 1: "right/1.png"}) == ({2: 2, 1: 1}, "")
    assert paired({1: "a.jpg", 2: "a.png"}, {1: "a.png", 2: "a.jpg"})[0] == {1: 2, 2: 1}
    assert paired(truth, {3: "zebra.jpg"}, may_miss=True)[0] == {3: 1}


@pytest.mark.parametrize(
    ("truth", "found", "message"),
    [
        ({1: "a.jpg", 2: "b.jpg"}, {1: "c.jpg", 2: "d.jpg"}, "image 1 'c.jpg' .* --annotations"),
        ({1: "a.jpg", 2: "b.jpg"}, {1: "b.jpg", 2: "c.jpg"}, "image 1 'b.jpg' .* --annotations"),
        ({1: "x/a.jpg", 2: "y/a.jpg"}, {1: "a.jpg", 3: "a.jpg"}, "pred.json has no image 2"),
        ({1: None, 2: None}, {1: None}, r"pred.json has no image 2, .* \(1 of 2"),
        ({1: None}, {1: None, "x": None}, "gt.json has no image x, which pred.json has"),
        ({"cam1/1": None, 2: None}, {"cam2/1": None, 2: None}, "pred.json has no image cam1/1"),
        ({"vid.001": None}, {"vid.002": None}, "pred.json has no image vid.001"),
        ({1: "vid.001"}, {2: "vid.002"}, "pred.json has no image 1"),
        ({}, {1: None}, "gt.json holds no image"),
    ],
)
def test_images_that_cannot_be_told_are_refused(truth, found, message):
    with pytest.raises(ValueError, match=message):
        paired(truth, found)


def write_panoptic(folder, ids, vocabulary=VOCABULARY):
    with PanopticWriter(folder.parent, vocabulary, name=folder.name) as writer:
        for (name, labels), number in zip(MAPS.items(), ids, strict=True):
            segments = [{"id": int(k) + 1, "label": int(k)} for k in np.unique(labels)]
            writer.add(number, name, labels + 1, segments)
    return folder.with_suffix(".json")


@pytest.mark.parametrize(("ids", "numbering"), [((1, 2), VOCABULARY), ((2, 1), POSITIONS)])
def test_perfect_predictions_score_100_whatever_their_numbers(tmp_path, ids, numbering):
    truth = write_panoptic(tmp_path / "gt", (2, 1))
    found = write_panoptic(tmp_path / "pred", ids, numbering)
    summary = score_panoptic(truth, found, VOCABULARY)
    assert summary["all"]["pq"] == 100 and summary["all"]["n"] == 3
    assert len(summary["notes"]) == 1
    summary = score_semantic(truth, found, VOCABULARY)
    assert summary["all"]["miou"] == 100
    # A list of annotations is all that others' predictions need hold; their PNGs have names, too.
    content = json.loads(found.read_text())
    del content["images"]
    found.write_text(json.dumps(content))
    assert score_panoptic(truth, found, VOCABULARY)["all"]["pq"] == 100


def test_images_are_told_by_their_own_names_not_those_of_pngs(tmp_path):
    """As of Cityscapes, whose annotations are called otherwise than the images."""
    truth = write_panoptic(tmp_path / "gt", (1, 2))
    content = json.loads(truth.read_text())
    for one in content["annotations"]:
        name = one["file_name"].replace(".png", "_gt.png")
        (tmp_path / "gt" / one["file_name"]).rename(tmp_path / "gt" / name)
        one["file_name"] = name
    truth.write_text(json.dumps(content))
    found = write_panoptic(tmp_path / "pred", (1, 2))
    maps = write_maps(tmp_path / "maps", (1, 2, 3))
    with SemanticWriter(tmp_path / "semantic", VOCABULARY) as writer:
        for number, (name, labels) in enumerate(MAPS.items()):
            writer.add(number, name, labels)
    assert score_panoptic(truth, found, VOCABULARY)["all"]["pq"] == 100
    for predictions in (found, maps, tmp_path / "semantic"):
        assert miou(truth, predictions)[0] == 100
    # Others' predictions have ids and PNGs alone.
    content = json.loads(found.read_text())
    del content["images"]
    found.write_text(json.dumps(content))
    assert miou(truth, found)[0] == score_panoptic(truth, found, VOCABULARY)["all"]["pq"] == 100


def test_a_list_of_names_says_nothing_of_things(tmp_path):
    truth = write_panoptic(tmp_path / "gt", (1, 2))
    names = Vocabulary(NAMES, (False,) * 3, (False,) * 3, (1, 2, 3))
    for score in (score_panoptic, score_semantic):
        summary = score(truth, truth, names, knows_things=False)
        things = {row["name"] for row in summary["per_class"] if row["is_thing"]}
        assert things == ({"cat"} if score is score_panoptic else things)
        with pytest.raises(ValueError, match=r"\('cat'\) is a thing in .* and stuff in the label"):
            score(truth, truth, names)


def test_ids_that_no_label_map_can_hold_take_no_memory(tmp_path):
    numbering = Vocabulary(NAMES, VOCABULARY.is_thing, (True,) * 3, (1, 2, 2**40))
    maps = write_maps(tmp_path / "gt", (1, 2, 255))
    assert score_semantic(maps, maps, numbering)["all"]["miou"] == 100
    maps = write_maps(tmp_path / "gt", (1, 2, 4))
    with pytest.raises(ValueError, match="holds the value 4, which is neither"):
        score_semantic(maps, maps, numbering)


def test_classes_of_other_names_are_refused(tmp_path):
    truth = write_panoptic(tmp_path / "gt", (2, 1))
    others = Vocabulary(("wall", "sky", "dog"), VOCABULARY.is_thing, (True,) * 3, (1, 2, 3))
    found = write_panoptic(tmp_path / "pred", (2, 1), others)
    with pytest.raises(ValueError, match=r"calls category 3 'dog', the label space 'cat'"):
        score_panoptic(truth, found, VOCABULARY)


def test_a_palette_is_read(tmp_path):
    truth = write_panoptic(tmp_path / "gt", (2, 1))
    found = write_panoptic(tmp_path / "pred", (2, 1))
    for png in (tmp_path / "pred").glob("*.png"):
        Image.open(png).quantize().save(png)
    assert score_panoptic(truth, found, VOCABULARY)["all"]["pq"] == 100


def test_the_ground_truth_is_held_to_the_same_rules(tmp_path):
    truth, found = (write_panoptic(tmp_path / name, (2, 1)) for name in ("gt", "pred"))
    content = json.loads(truth.read_text())
    content["annotations"][0]["segments_info"].pop()
    truth.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"gt/apple.png holds the segment id 3, which .*gt.json"):
        score_panoptic(truth, found, VOCABULARY)


def write_maps(folder, value_of, suffix=".png"):
    """Label maps whose pixels are value_of[class]."""
    folder.mkdir(exist_ok=True)
    for name, labels in MAPS.items():
        pixels = np.array(value_of, np.uint8)[labels]
        path = (folder / name).with_suffix(suffix)
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def miou(*paths, **options):
    summary = score_semantic(*paths, VOCABULARY, **options)
    return summary["all"]["miou"], summary["notes"]


@pytest.mark.parametrize("numbering", [VOCABULARY, POSITIONS, "large"])
def test_the_manifest_beside_label_maps_says_what_they_hold(tmp_path, numbering):
    truth = write_maps(tmp_path / "gt", (1, 2, 3))
    if numbering == "large":  # ids beyond 16 bits: the pixels are positions
        numbering = Vocabulary(NAMES, VOCABULARY.is_thing, (True,) * 3, (70000, 80000, 90000))
    with SemanticWriter(tmp_path / "semantic", numbering) as writer:
        for number, (name, labels) in enumerate(MAPS.items()):
            writer.add(number, name, labels)
    assert miou(truth, tmp_path / "semantic")[0] == 100
    # A copy without the manifest: the maps name their values themselves.
    shutil.copytree(tmp_path / "semantic", tmp_path / "copy")
    assert miou(truth, tmp_path / "copy")[0] == 100
    (tmp_path / "semantic" / "old.png").write_bytes(
        (tmp_path / "semantic" / "apple.png").read_bytes()
    )
    with pytest.raises(ValueError, match=r"semantic.json does not list .*old.png; remove"):
        miou(truth, tmp_path / "semantic")


@pytest.mark.parametrize("text", ["{", "[]", '{"one": "cat"}', '{"1": []}', '{"1": 5}'])
def test_a_map_whose_text_names_no_classes(tmp_path, text):
    truth, found = (write_maps(tmp_path / name, (1, 2, 3)) for name in ("gt", "pred"))
    said = PngInfo()
    said.add_text(MAP_CLASSES, text)
    for png in found.glob("*.png"):
        Image.open(png).save(png, pnginfo=said)
    with pytest.raises(ValueError, match=r"pred/apple.png names no classes in its text"):
        miou(truth, found)


def test_a_manifest_whose_map_is_no_name(tmp_path):
    truth = write_maps(tmp_path / "gt", (1, 2, 3))
    with SemanticWriter(tmp_path / "semantic", VOCABULARY) as writer:
        for number, (name, labels) in enumerate(MAPS.items()):
            writer.add(number, name, labels)
    manifest = tmp_path / "semantic.json"
    content = json.loads(manifest.read_text())
    content["images"][0]["map"] = []
    manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"semantic.json does not list .*apple.png; remove"):
        miou(truth, tmp_path / "semantic")


def test_pixels_that_fit_another_reading_are_asked_about(tmp_path):
    """ADE20K's annotations: ids from 1, 0 is other; predictions are often positions from 0."""
    truth = write_maps(tmp_path / "gt", (1, 2, 3))
    found = write_maps(tmp_path / "pred", (0, 1, 2))
    with pytest.raises(
        ValueError, match="value 0.* --ignore=0,255,65535 .*--prediction_values=ind"
    ):
        miou(truth, found)
    ignored = {"ignored_values": (0, 255)}
    with pytest.raises(
        ValueError,
        match=r"pred agree at 0.0 %, as positions .* 100.0 %: give --prediction_values=i",
    ):
        miou(truth, found, **ignored)
    assert miou(truth, found, prediction_values="indices", **ignored) == (100, [])
    # Who insists gets it, with a word.
    score, (note,) = miou(truth, found, prediction_values="ids", **ignored)
    assert score == 0 and "as positions in the split at 100.0 %" in note
    with pytest.raises(ValueError, match="agree at .*give --annotation_values=indices"):
        miou(found, truth, **ignored)
    score, (note, *_) = miou(
        truth, found, prediction_values="indices", annotation_values="indices", ignored_values=(3,)
    )
    assert score < 50 and "as category ids at 100.0 % (--annotation_values=ids)" in note


def test_nothing_is_no_score(tmp_path):
    """Ground truth that shows nothing; predictions of which nothing is right, nobody knows why."""
    truth, found = (write_maps(tmp_path / name, (1, 2, 3)) for name in ("gt", "pred"))
    void = write_maps(tmp_path / "void", (255, 255, 255))
    with pytest.raises(ValueError, match="void shows no class that is scored"):
        miou(void, found)
    turned = write_maps(tmp_path / "turned", (3, 255, 1))
    with pytest.raises(ValueError, match="Nothing in .*turned is right"):
        miou(truth, turned)
    truth, found = (write_panoptic(tmp_path / f"{name}_p", (1, 2)) for name in ("gt", "pred"))
    content = json.loads(found.read_text())
    for one in content["annotations"]:
        for segment in one["segments_info"]:
            segment["category_id"] = segment["category_id"] % 3 + 1
    for score in (score_panoptic, score_semantic):
        found.write_text(json.dumps(content))
        summary = score(truth, found, VOCABULARY)  # its categories say which is which
        assert summary["all"]["pq" if score is score_panoptic else "miou"] == 0
        found.write_text(json.dumps({"annotations": content["annotations"]}))
        with pytest.raises(ValueError, match="Nothing in .*pred_p.json is right"):
            score(truth, found, VOCABULARY)
    content["annotations"] = [{**one, "segments_info": []} for one in content["annotations"]]
    for png in (tmp_path / "gt_p").iterdir():
        Image.new("RGB", (4, 3)).save(png)
    truth.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="gt_p.json shows no class that is scored"):
        score_panoptic(truth, found, VOCABULARY)


def test_label_maps_lie_in_folders_too(tmp_path):
    for side, values in (("gt", (1, 2, 3)), ("pred", (1, 2, 3))):
        for camera in ("cam1", "cam2"):
            (tmp_path / side / camera).mkdir(parents=True)
            write_maps(tmp_path / side / camera, values)
        (tmp_path / side / "._apple.png").write_bytes(b"\0")
    summary = score_semantic(tmp_path / "gt", tmp_path / "pred", VOCABULARY)
    assert summary["images"] == 4 and summary["all"]["miou"] == 100
    (tmp_path / "pred" / "cam2" / "apple.png").rename(tmp_path / "pred" / "cam2" / "pear.png")
    with pytest.raises(ValueError, match="pred has no image cam2/apple, which .*gt has"):
        miou(tmp_path / "gt", tmp_path / "pred")


def test_numbers_of_frames_are_no_extensions(tmp_path):
    for side, frame in (("gt", "001"), ("pred", "002")):
        (tmp_path / side).mkdir()
        Image.new("L", (2, 2), 1).save(tmp_path / side / f"street.{frame}.png")
    with pytest.raises(ValueError, match=r"pred has no image street\.001"):
        miou(tmp_path / "gt", tmp_path / "pred")


@pytest.mark.parametrize("numbering", [VOCABULARY, POSITIONS])
def test_instances_are_told_by_name(tmp_path, numbering):
    masks = {"apple.jpg": MAPS["apple.jpg"] == 2, "zebra.jpg": MAPS["zebra.jpg"] == 2}
    truth = {
        "images": [
            {"id": number, "file_name": name, "height": 3, "width": 4}
            for name, number in (("zebra.jpg", 1), ("apple.jpg", 2))
        ],
        "categories": [{"id": 3, "name": "cat"}],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 3, "segmentation": encode_rle(masks[name])}
            for name, n in (("zebra.jpg", 1), ("apple.jpg", 2))
        ],
    }
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    with InstanceWriter(tmp_path / "instances.json", numbering) as writer:
        for number, (name, mask) in enumerate(masks.items(), start=1):
            writer.add(number, name, mask.shape, [2], [0.9], [encode_rle(mask)])
    files = tmp_path / "gt.json", tmp_path / "instances.json"
    summary = score_instances(*files, VOCABULARY)
    assert summary["all"]["ap"] == pytest.approx(100)
    # A copy has no manifest; the entries name images and categories as well.
    files[1].rename(tmp_path / "copy.json")
    files = files[0], tmp_path / "copy.json"
    for vocabulary in (VOCABULARY, Vocabulary(("cat",), (True,), (True,), (3,))):
        assert score_instances(*files, vocabulary)["all"]["ap"] == pytest.approx(100)
    entries = json.loads(files[1].read_text())
    entries.append({**entries[0], "category_name": "dog"})
    files[1].write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="calls the class . both 'cat' and 'dog'"):
        score_instances(*files, VOCABULARY)
    # Others' entries may say nothing: ids may be texts, a score of 0 of unknown classes is none.
    keys = ("image_id", "category_id", "segmentation", "score")
    bare = [{key: entry[key] for key in keys} for entry in entries[:2]]
    bare = [{**one, "category_id": 3, "image_id": str(3 - one["image_id"])} for one in bare]
    files[1].write_text(json.dumps(bare))
    assert score_instances(*files, VOCABULARY)["all"]["ap"] == pytest.approx(100)
    files[1].write_text(json.dumps([{**one, "category_id": 2} for one in bare]))
    with pytest.raises(ValueError, match="Nothing in .*copy.json is right.* as .*gt.json does"):
        score_instances(*files, VOCABULARY)
    files[0].write_text(json.dumps({**truth, "annotations": []}))
    with pytest.raises(ValueError, match="gt.json shows no class that is scored"):
        score_instances(*files, VOCABULARY)


@pytest.mark.parametrize("task", ["panoptic", "semantic", "instance"])
def test_what_predict_writes_is_what_evaluate_reads(tmp_path, task):
    """Images of one name in two folders; the model numbers its classes from 0."""
    with ResultWriter(tmp_path, task, POSITIONS) as writer:
        for number, (camera, labels) in enumerate(zip("ab", MAPS.values(), strict=True), start=1):
            segments = [
                {"id": int(k) + 1, "label": int(k), "score": 1.0, "area": 1}
                for k in np.unique(labels)
            ]
            cat = Instance(0, 2, 0.9, encode_rle(labels == 2))
            result = {
                "panoptic": ImageSegments(labels + 1, segments, {}, 1.0),
                "semantic": labels.astype(np.uint8),
                "instance": [cat],
            }[task]
            image = np.zeros((*labels.shape, 3), np.uint8)
            writer.add(f"cam_{camera}/1", number, f"cam_{camera}/1.jpg", image, result)
    written = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {*result_files(tmp_path, task, ["cam_a/1", "cam_b/1"])}
    if task == "panoptic":
        path = tmp_path / "panoptic.json"
        assert score_panoptic(path, path)["all"]["pq"] == 100
    if task == "semantic":
        for camera, labels in zip("ab", MAPS.values(), strict=True):
            (tmp_path / "gt" / f"cam_{camera}").mkdir(parents=True)
            pixels = np.array((1, 2, 3), np.uint8)[labels]
            Image.fromarray(pixels).save(tmp_path / "gt" / f"cam_{camera}" / "1.png")
        assert miou(tmp_path / "gt", tmp_path / "semantic")[0] == 100
    if task == "instance":
        entries = json.loads((tmp_path / "instances.json").read_text())
        assert [entry["file_name"] for entry in entries] == ["cam_a/1.jpg", "cam_b/1.jpg"]
