"""Scores of files against scores in memory, and every fault in one sentence that names the file."""

import json

import numpy as np
import pytest
from PIL import Image

from concat_jax.core.coco_writers import PanopticWriter
from concat_jax.core.mask_codes import encode_rle, ids_to_rgb
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.average_precision import AveragePrecision
from concat_jax.evaluation.panoptic_quality import PanopticQuality
from concat_jax.evaluation.score_files import score_instances, score_panoptic
from concat_jax.evaluation.score_label_maps import score_semantic
from concat_jax.evaluation.semantic_iou import SemanticIoU
from tests.coco_maps import crowd_of, labels_of, panoptic_maps

VOCABULARY = Vocabulary(("cat", "sky", "cow"), (True, False, True), (True, True, False), (17, 2, 5))
SHAPE = (12, 16)
NUM_IMAGES = 12


def draw(rng, num_segments=3):
    """Id map and labels by id; every id has a pixel."""
    ids = np.zeros(SHAPE, int)
    for segment in range(1, num_segments + 1):
        top, left = rng.integers(0, 8, 2)
        ids[top : top + 5, left : left + 7] = segment * 300
    present = [int(i) for i in np.unique(ids) if i]
    return ids, {i: int(rng.integers(3)) for i in present}


def write(folder, name, images, crowd=()):
    with PanopticWriter(folder, VOCABULARY, name=name) as writer:
        for number, (ids, labels) in enumerate(images):
            segments = [
                {"id": i, "label": label, "iscrowd": int((number, i) in crowd)}
                for i, label in labels.items()
            ]
            writer.add(number, f"{number}.jpg", ids, segments)
    return folder / f"{name}.json"


def assert_close(summary, expected):
    """Equal but for the order in which IoUs are added up."""
    if isinstance(expected, dict):
        assert summary.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(summary[key], value)
    elif isinstance(expected, list):
        for one, other in zip(summary, expected, strict=True):
            assert_close(one, other)
    elif isinstance(expected, float):
        assert summary == pytest.approx(expected, abs=1e-9, nan_ok=True)
    else:
        assert summary == expected


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    truth = [draw(rng) for _ in range(NUM_IMAGES)]
    found = [
        (np.roll(ids, (0, 1), (0, 1)), labels) if rng.random() < 0.8 else draw(rng)
        for ids, labels in truth
    ]
    crowd = {(n, i) for n, (_, labels) in enumerate(truth) for i in labels if rng.random() < 0.2}
    return truth, found, crowd


@pytest.fixture(scope="module")
def panoptic_files(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("panoptic")
    truth, found, crowd = images
    return write(folder, "truth", truth, crowd), write(folder, "found", found)


def test_panoptic_files_equal_maps_in_memory(images, panoptic_files):
    truth, found, crowd = images
    quality = PanopticQuality(3)
    for number, ((ids, labels), (pred, pred_labels)) in enumerate(zip(truth, found, strict=True)):
        quality.update(ids, labels, {i: (number, i) in crowd for i in labels}, pred, pred_labels)
    expected = {**quality.summarize(VOCABULARY), "images": NUM_IMAGES, "notes": []}
    summary = score_panoptic(*panoptic_files, VOCABULARY)
    assert summary["harmonic"]["pq"] > 0
    assert_close(summary, expected)
    # Without a split all classes of the annotations are seen.
    summary = score_panoptic(*panoptic_files)
    assert summary["seen"] == summary["all"] and "confusion" not in summary
    assert_close(summary["all"], expected["all"])
    assert tuple(row["name"] for row in summary["per_class"]) == VOCABULARY.names


def test_semantic_files_equal_maps_in_memory(images, panoptic_files, tmp_path, capsys):
    truth, found, _ = images
    iou = SemanticIoU(3)
    for (ids, labels), (pred, pred_labels) in zip(truth, found, strict=True):
        iou.update(
            *(np.vectorize({0: -1, **m}.get)(i) for i, m in ((ids, labels), (pred, pred_labels)))
        )
    expected = {**iou.summarize(VOCABULARY), "images": NUM_IMAGES, "notes": []}
    summary = score_semantic(*panoptic_files, VOCABULARY)
    np.testing.assert_equal(summary, expected)
    assert f"{NUM_IMAGES}/{NUM_IMAGES}" in capsys.readouterr().out
    # As label maps: ids of the split in one folder, positions in the other.
    for name, values, maps in (("ids", (255, 17, 2, 5), truth), ("places", (9, 0, 1, 2), found)):
        (tmp_path / name).mkdir()
        for number, (ids, labels) in enumerate(maps):
            of_id = {0: values[0], **{i: values[1 + label] for i, label in labels.items()}}
            pixels = np.vectorize(of_id.get)(ids).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    summary = score_semantic(
        tmp_path / "ids",
        tmp_path / "places",
        VOCABULARY,
        prediction_values="indices",
        ignored_values=(255, 9),
    )
    np.testing.assert_equal(summary, expected)
    with pytest.raises(ValueError, match=r"places/.*png holds the value 9.*--ignore"):
        score_semantic(
            tmp_path / "ids", tmp_path / "places", VOCABULARY, prediction_values="indices"
        )
    with pytest.raises(ValueError, match="give --split"):
        score_semantic(tmp_path / "ids", tmp_path / "places")


def instance_content(images):
    truth, found, crowd = images
    annotations, results = [], []
    for number, ((ids, labels), (pred, pred_labels)) in enumerate(zip(truth, found, strict=True)):
        for i, label in labels.items():
            entry = {"id": len(annotations) + 1, "image_id": number}
            entry |= {"category_id": VOCABULARY.category_ids[label]}
            entry |= {"iscrowd": int((number, i) in crowd), "area": int((ids == i).sum())}
            annotations.append(entry | {"segmentation": encode_rle(ids == i)})
        for rank, (i, label) in enumerate(pred_labels.items()):
            entry = {"image_id": number, "category_id": VOCABULARY.category_ids[label]}
            entry |= {"score": 0.9 - 0.1 * rank, "segmentation": encode_rle(pred == i)}
            results.append(entry)
    height, width = SHAPE
    truth_json = {
        "images": [
            {"id": n, "file_name": f"{n}.jpg", "height": height, "width": width}
            for n in range(NUM_IMAGES)
        ],
        "annotations": annotations,
        "categories": [
            {"id": i, "name": n}
            for i, n in zip(VOCABULARY.category_ids, VOCABULARY.names, strict=True)
        ],
    }
    return truth_json, results


def write_instances(folder, truth, results):
    paths = folder / "instances.json", folder / "results.json"
    for path, content in zip(paths, (truth, results), strict=True):
        path.write_text(json.dumps(content))
    return paths


def test_instance_files_equal_masks_in_memory(images, tmp_path):
    truth, results = instance_content(images)
    precision = AveragePrecision(3)
    for number in range(NUM_IMAGES):
        gt = [a for a in truth["annotations"] if a["image_id"] == number]
        found = [r for r in results if r["image_id"] == number]
        index_of = VOCABULARY.index_of_category
        precision.update(
            number,
            [a["segmentation"] for a in gt],
            [index_of[a["category_id"]] for a in gt],
            [a["iscrowd"] for a in gt],
            [r["segmentation"] for r in found],
            [index_of[r["category_id"]] for r in found],
            [r["score"] for r in found],
        )
    expected = {**precision.summarize(VOCABULARY), "images": NUM_IMAGES, "notes": []}
    assert expected["harmonic"]["ap"] > 0
    summary = score_instances(*write_instances(tmp_path, truth, results), VOCABULARY)
    np.testing.assert_equal(summary, expected)


def test_polygons_are_pycocotools(tmp_path):
    coco_mask = pytest.importorskip("pycocotools.mask")
    polygons = [[1.0, 1.0, 9.0, 2.0, 5.0, 9.0], [11.0, 8.0, 14.5, 8.0, 14.5, 11.0, 11.0, 11.0]]
    mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *SHAPE))).astype(bool)
    truth = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": SHAPE[0], "width": SHAPE[1]}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 17, "segmentation": polygons}],
        "categories": [{"id": 17, "name": "cat"}],
    }
    result = {"image_id": 1, "category_id": 17, "score": 1.0, "segmentation": encode_rle(mask)}
    summary = score_instances(*write_instances(tmp_path, truth, [result]))
    assert summary["all"]["ap"] == pytest.approx(100)
    truth["annotations"][0]["segmentation"] = [[1.0, 1.0]]
    with pytest.raises(ValueError, match=r"annotation 1 of .*instances.json .*three points"):
        score_instances(*write_instances(tmp_path, truth, [result]))


def damaged_panoptic(folder, damage):
    """Two small files, of which the prediction is damaged."""
    rng = np.random.default_rng(5)
    images = [draw(rng) for _ in range(2)]
    truth, found = write(folder, "truth", images), write(folder, "found", images)
    content = json.loads(found.read_text())
    png = folder / "found" / "1.png"
    annotation = content["annotations"][1]
    if damage == "another kind":
        content = [{"image_id": 1, "category_id": 17, "segmentation": {}, "score": 1.0}]
    if damage == "instances":
        content = {"images": [], "annotations": [{"image_id": 1, "segmentation": []}]}
    if damage == "missing image":
        content["annotations"].pop()
    if damage == "extra image":
        content["annotations"].append({**annotation, "image_id": 9})
    if damage == "missing png":
        png.unlink()
    if damage == "cut png":
        png.write_bytes(png.read_bytes()[:40])
    if damage == "grey png":
        Image.fromarray(np.zeros(SHAPE, np.uint8)).save(png)
    if damage == "id not in json":
        annotation["segments_info"].pop()
    if damage == "id not in png":
        annotation["segments_info"].append({"id": 7, "category_id": 17})
    if damage == "id twice":
        annotation["segments_info"].append(annotation["segments_info"][0])
    if damage == "size":
        Image.fromarray(ids_to_rgb(np.pad(images[1][0], 1))).save(png)
    if damage == "category":
        annotation["segments_info"][0]["category_id"] = 99
    if damage == "categories":
        content["categories"][0]["name"] = "dog"
    found.write_text(json.dumps(content))
    if damage == "no json":
        found.write_text("{")
    return truth, found


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("another kind", r"found.json is a list, not a COCO panoptic json"),
        ("instances", r"'file_name' of annotation 0 of .*found.json is missing"),
        ("missing image", r"found.json has no image 1, which .*truth.json has"),
        ("extra image", r"found.json annotates the image 9, which its 'images' lack"),
        ("missing png", r"found.json names .*found/1.png, which does not exist"),
        ("cut png", r"found/1.png cannot be read as an image"),
        ("grey png", r"found/1.png has the mode L"),
        ("id not in json", r"found/1.png holds the segment id \d+, which .*found.json lacks"),
        ("id not in png", r"found.json lists the segment id 7, which has no pixel in .*1.png"),
        ("id twice", r"found.json lists the segment id \d+ more than once"),
        ("size", r"found/1.png is 14x18 \(height x width\) and its ground truth .* 12x16"),
        ("category", r"found.json has the category 99, which the file does not list"),
        ("categories", r"found.json calls category 17 'dog', the label space 'cat'"),
        ("no json", r"found.json is not valid JSON"),
    ],
)
def test_damaged_panoptic_files_are_one_sentence(tmp_path, damage, message):
    with pytest.raises(ValueError, match=message) as error:
        score_panoptic(*damaged_panoptic(tmp_path, damage), VOCABULARY)
    assert "\n" not in str(error.value)


def test_annotations_of_other_classes_are_refused(panoptic_files):
    things = (*VOCABULARY.is_thing, False)
    other = Vocabulary((*VOCABULARY.names, "fog"), things, (True,) * 4, (17, 2, 5, 6))
    with pytest.raises(ValueError, match=r"truth.json lacks category 6 \('fog'\)"):
        score_panoptic(*panoptic_files, other)
    fewer = Vocabulary(("cat",), (True,), (True,), (17,))
    with pytest.raises(ValueError, match=r"truth.json lists category 2 .'sky'., which is absent"):
        score_panoptic(*panoptic_files, fewer)
    with pytest.raises(ValueError, match="nowhere.json cannot be read"):
        score_panoptic("/nowhere.json", panoptic_files[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t, r: r[3].update(score=float("nan")),
            r"Entry 3 of .*results.json has the score nan",
        ),
        (lambda t, r: r[3].update(category_id=99), r"results.json has the category 99"),
        (
            lambda t, r: r[3].update(image_id=99),
            r"instances.json has no image 99, which .*results.json has",
        ),
        (lambda t, r: r[3].pop("segmentation"), r"Entry 3 .*lacks 'segmentation'"),
        (lambda t, r: r[0].update(segmentation=encode_rle(np.ones((3, 3), bool))), "is 3x3"),
        (
            lambda t, r: r[0].update(segmentation={"size": list(SHAPE), "counts": "05"}),
            r"segmentation of Entry 0 of .*results.json .*counts",
        ),
        (
            lambda t, r: t["annotations"][0].update(image_id=99),
            r"Annotation 1 of .* is of image 99, which 'images' lack",
        ),
        (
            lambda t, r: t["annotations"][0].update(category_id=99),
            r"has the category 99, which the file does not list",
        ),
        (lambda t, r: t.pop("images"), r"instances.json has no list of 'images'"),
        (
            lambda t, r: t["categories"][0].update(name="dog"),
            r"calls category 17 'dog', the label space 'cat'",
        ),
    ],
)
def test_damaged_instance_files_are_one_sentence(images, tmp_path, change, message):
    truth, results = instance_content(images)
    change(truth, results)
    with pytest.raises(ValueError, match=message) as error:
        score_instances(*write_instances(tmp_path, truth, results), VOCABULARY)
    assert "\n" not in str(error.value)


def test_golden_predictions_from_files(shared_data, tmp_path):
    """The official numbers again, through files: the ground truth moved by 4 rows, 8 columns."""
    expected = json.loads((shared_data / "panoptic_golden/expected.json").read_text())
    annotations = shared_data / "coco_panoptic_mini/annotations/panoptic_val2017.json"
    categories = json.loads(annotations.read_text())["categories"]
    vocabulary = Vocabulary(
        tuple(c["name"] for c in categories),
        tuple(bool(c["isthing"]) for c in categories),
        (True,) * len(categories),
        tuple(c["id"] for c in categories),
    )
    with PanopticWriter(tmp_path, vocabulary, name="moved") as writer:
        for image, id_map in panoptic_maps(annotations):
            crowd = [i for i, flag in crowd_of(image).items() if flag]
            moved = np.roll(np.where(np.isin(id_map, crowd), 0, id_map), (4, 8), (0, 1))
            labels = labels_of(image, vocabulary)
            segments = [{"id": i, "label": labels[i]} for i in labels if (moved == i).any()]
            writer.add(image.image_id, image.file_name, moved, segments)
    summary = score_panoptic(annotations, tmp_path / "moved.json")
    numbers = expected["coco_panoptic_mini"]["val2017"]["roll_rows4_cols8"]
    for group in ("All", "Things", "Stuff"):
        for key, value in numbers[group].items():
            assert summary[group.lower()][key] == pytest.approx(value, abs=1e-6), (group, key)
