"""COCO's instance files: overlaps, crowd, outlines as pycocotools draws them, and broken JSON."""

import copy
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from concat_jax.core.mask_codes import encode_rle
from concat_jax.core.vocabulary import Vocabulary
from data_pipelines.loader import SegmentationLoader
from data_pipelines.sources.coco_instances import CocoInstanceSource, paint
from data_pipelines.sources.source import DataError

mask_functions = pytest.importorskip("pycocotools.mask")

VOCABULARY = Vocabulary(
    names=("cup", "table", "dog"),
    is_thing=(True, True, True),
    is_seen=(True, True, False),
    category_ids=(47, 67, 18),
)
HEIGHT, WIDTH = 20, 30


def box(left, top, right, bottom):
    return [[left, top, right, top, right, bottom, left, bottom]]


def crowd(left, top, right, bottom):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top:bottom, left:right] = True
    flat = mask.ravel(order="F").astype(int)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1, [flat.size]])
    return {"size": [HEIGHT, WIDTH], "counts": ([0] if flat[0] else []) + np.diff(starts).tolist()}


def annotation(number, image_id, category, segmentation, iscrowd=0):
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category,
        "segmentation": segmentation,
        "iscrowd": iscrowd,
    }


CONTENT = {
    "images": [
        {"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in (9, 4, 5)
    ],
    "annotations": [
        annotation(11, 4, 47, box(6, 6, 10, 10)),  # a cup on the table, listed before it
        annotation(12, 4, 67, box(2, 4, 22, 18)),
        annotation(13, 4, 47, crowd(0, 0, 25, 8), iscrowd=1),
        annotation(14, 4, 99, box(0, 0, 4, 4)),  # of a class beyond the split
        annotation(15, 5, 18, box(1, 1, 5, 5)),
        annotation(16, 5, 47, box(8, 8, 12, 12)),
        annotation(17, 5, 47, box(8, 8, 12, 12)),  # the same place once more
    ],
    "categories": [
        {"id": 18, "name": "dog"},
        {"id": 47, "name": "cup"},
        {"id": 67, "name": "table"},
        {"id": 99, "name": "window"},
    ],
}


def load(root, content=CONTENT):
    (root / "images").mkdir(exist_ok=True)
    for image_id in (4, 5, 9):
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / "images" / f"{image_id}.jpg")
    path = root / "instances.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return CocoInstanceSource(root / "images", path, VOCABULARY)


def test_smaller_instances_lie_on_top_and_crowd_below(tmp_path):
    source = load(tmp_path)
    assert [r.image_id for r in source.records] == [4, 5, 9] and source.left_out == 1
    record = source.records[0]
    assert record.source_ids.tolist() == [11, 12, 13] and record.labels.tolist() == [0, 1, 0]
    assert record.is_crowd.tolist() == [False, False, True] and record.png_name == ""
    image, ids = source.read(record)
    assert image.mode == "RGB" and ids.shape == (HEIGHT, WIDTH) and ids.dtype == np.uint16
    expected = np.zeros((HEIGHT, WIDTH), int)
    expected[0:8, 0:25] = 3
    expected[4:18, 2:22] = 2
    expected[6:10, 6:10] = 1
    np.testing.assert_array_equal(ids, expected)
    assert not source.read(source.records[2])[1].any()  # an image without an instance
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again.read(record)[1], ids)


def test_hidden_instances_are_counted_and_vanish_from_examples(tmp_path):
    source = load(tmp_path)
    assert source.count_hidden() == 1  # 16, under 17
    options = dict(seed=0, image_size=16, max_segments=4, num_threads=1)
    data = SegmentationLoader(source, unseen_images="keep", **options)
    example = data.eval_example(1)
    assert example["segment_source_ids"].tolist() == [15, 17, 0, 0]
    assert data.training_indices.tolist() == [0, 1]
    assert SegmentationLoader(source, **options).training_indices.tolist() == [0]
    void = SegmentationLoader(source, unseen_images="void", augment="none", **options)
    assert {tuple(void.batch(step, 1)["segment_labels"][0]) for step in range(2)} == {
        (0, 1, 0, -1),
        (0, -1, -1, -1),
    }


def test_outlines_are_those_of_pycocotools():
    rng = np.random.default_rng(3)
    for _ in range(20):
        polygons = [rng.uniform(0, 30, 2 * rng.integers(3, 9)).tolist() for _ in range(2)]
        code = mask_functions.merge(mask_functions.frPyObjects(polygons, HEIGHT, WIDTH))
        expected = mask_functions.decode(code)
        arrays = [np.array(p) for p in polygons]
        np.testing.assert_array_equal(paint([arrays], np.zeros(1, bool), HEIGHT, WIDTH), expected)
        compressed = encode_rle(expected.astype(bool))
        np.testing.assert_array_equal(
            paint([compressed], np.ones(1, bool), HEIGHT, WIDTH), expected
        )
    assert not paint([], np.zeros(0, bool), 3, 4).any()


def changed(edit):
    content = copy.deepcopy(CONTENT)
    edit(content)
    return content


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("images"), "instances.json is not in COCO's instance format: .*'images'"),
        (lambda c: c.update(annotations={}), "lacks a list 'annotations'"),
        (lambda c: c.update(images=[]), "instances.json lists no image"),
        (lambda c: c["images"].append(c["images"][0]), "image id 9 more than once"),
        (lambda c: c["images"][0].update(height=-3), r"image 9 the height and width \(-3, 30\)"),
        (lambda c: c["images"][0].update(width=3.5), "must be positive integers"),
        (lambda c: c["images"][0].pop("width"), "lacks or misuses 'width'"),
        (lambda c: c["images"][0].update(id="a9"), "two images with the number|no image"),
        (lambda c: c["images"][0].update(file_name="8.jpg"), "8.jpg is in the JSON but not on"),
        (lambda c: c["categories"][1].update(name="mug"), "Category 47 is 'mug' in .*'cup'"),
        (lambda c: c.update(categories=c["categories"][3:]), "no category of the split file"),
        (lambda c: c["annotations"][0].update(image_id=77), "no image 77 for the annotation 11"),
        (lambda c: c["annotations"][0].update(id=12), "annotation id 12 .* occurs once"),
        (lambda c: c["annotations"][0].update(id=0), "annotation id 0 .* positive integer"),
        (lambda c: c["annotations"][0].update(category_id=5), "11 .* category 5, which the file"),
        (lambda c: c["annotations"][0].pop("segmentation"), "lacks or misuses 'segmentation'"),
        (lambda c: c["annotations"][0].update(segmentation=[]), "annotation 11 .* has neither"),
        (lambda c: c["annotations"][0].update(segmentation=7), "annotation 11 .* has neither"),
        (
            lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4]]),
            "polygon of the annotation 11 .* three points",
        ),
        (
            lambda c: c["annotations"][0].update(segmentation=[[1, 2, "x", 4, 5, 6]]),
            "polygon of the annotation 11 .* three points",
        ),
        (
            lambda c: c["annotations"][0].update(segmentation=[[1, 2, float("nan"), 4, 5, 6]]),
            "polygon of the annotation 11 .* not finite",
        ),
        (
            lambda c: c["annotations"][2]["segmentation"].update(size=[WIDTH, HEIGHT]),
            r"run lengths of the annotation 13 .* 30x20 .* image 20x30",
        ),
        (
            lambda c: c["annotations"][2]["segmentation"].update(counts=[5, 5]),
            "run lengths of the annotation 13 .*10 pixels",
        ),
        (
            lambda c: c["annotations"][2]["segmentation"].update(counts="]]~"),
            "run lengths of the annotation 13",
        ),
    ],
)
def test_inconsistent_json(tmp_path, edit, message):
    if "number|" in message:  # two texts with the same digits
        content = changed(lambda c: (edit(c), c["images"].append(dict(c["images"][0], id="b9"))))
    else:
        content = changed(edit)
    with pytest.raises(DataError, match=message):
        load(tmp_path, content)


def test_far_away_points_do_not_take_for_ever(tmp_path):
    content = changed(lambda c: c["annotations"][0].update(segmentation=box(6, 6, 1e12, 10)))
    ids = load(tmp_path, content).read(load(tmp_path, content).records[0])[1]
    assert (ids[6:10, 6:] == 1).all()


def test_broken_files(tmp_path):
    with pytest.raises(DataError, match="instances.json is not valid JSON"):
        load(tmp_path, "{")
    with pytest.raises(DataError, match="instances.json is not in COCO's instance format"):
        load(tmp_path, "[]")
    with pytest.raises(DataError, match="annotation file .*none.json cannot be read"):
        CocoInstanceSource(tmp_path, tmp_path / "none.json", VOCABULARY)
    source = load(tmp_path)
    Image.new("RGB", (WIDTH, 7)).save(tmp_path / "images" / "4.jpg")
    with pytest.raises(DataError, match=r"4.jpg is 7x30 .* says 20x30"):
        source.read(source.records[0])
