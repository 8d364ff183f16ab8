"""COCO's instance files: overlaps, crowd, bad outlines and broken JSON."""

import copy
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from concat_jax.core.files import FileError
from concat_jax.core.mask_codes import encode_rle
from concat_jax.core.vocabulary import Vocabulary
from data_pipelines.loader import SegmentationLoader
from data_pipelines.sources.coco_instances import CocoInstanceSource, paint

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


def load(root, content=CONTENT, **options):
    (root / "images").mkdir(exist_ok=True)
    for image_id in (4, 5, 9):
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / "images" / f"{image_id}.jpg")
    path = root / "instances.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return CocoInstanceSource(root / "images", path, VOCABULARY, **options)


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


def test_hidden_instances_vanish_from_examples(tmp_path):
    source = load(tmp_path)  # 16 is under 17
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


def test_painting_nothing_is_void():
    assert not paint([], np.zeros(0, bool), 3, 4).any()
    mask = np.eye(3, dtype=bool)
    np.testing.assert_array_equal(paint([encode_rle(mask)], np.ones(1, bool), 3, 3), mask)


def changed(edit):
    content = copy.deepcopy(CONTENT)
    edit(content)
    return content


# What else a JSON may lack or misuse is told by the tests of `core.coco`.
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("images"), "no list of 'images'"),
        (lambda c: c.update(images=[], annotations=[]), "lists no image"),
        (lambda c: c["images"][0].update(file_name="8.jpg"), "8.jpg, which is not on disk"),
        (lambda c: c["images"][0].update(file_name="a" * 300 + "/4.jpg"), "which is not on disk"),
        (
            lambda c: c["annotations"][0].update(segmentation=[[10**400, 1, 2, 2, 5, 5]]),
            "a polygon holds a number that is too large",
        ),
        (
            lambda c: c["images"][0].update(file_name="4.JPG"),
            "4.JPG, which is not on disk; 4.jpg is, which is spelt otherwise",
        ),
        (lambda c: c["categories"][1].update(name="mug"), "47 'mug', the label space 'cup'"),
        (
            lambda c: c.update(categories=c["categories"][3:], annotations=[]),
            "lacks category 47 .*of the label space",
        ),
        (lambda c: c["annotations"][0].update(id=0), "annotation id 0; number from 1"),
        (lambda c: c["images"][0].update(file_name="4.jpg"), "names the file 4.jpg for 2 images"),
        (lambda c: c["annotations"][0].update(category_id=5), "11 .* category 5, which the file"),
    ],
)
def test_inconsistent_json(tmp_path, edit, message):
    content = changed(edit)
    with pytest.raises(FileError, match=message):
        load(tmp_path, content)


# The outline of annotation 11 of image 4, and what is said of it.
BAD_OUTLINES = [
    (None, "is missing"),
    ([], "is empty"),
    (7, "is neither a list of polygons nor run lengths"),
    ([1, 2, 3, 4, 5, 6], "is a flat list of numbers"),
    ([[1, 2, 3, 4]], "at least three points"),
    ([[1, 2, "x", 4, 5, 6]], "at least three points"),
    ({"size": [WIDTH, HEIGHT], "counts": [600]}, "it is 30x20 .* its image 20x30"),
    ({"size": [HEIGHT, WIDTH], "counts": [5, 5]}, "10 pixels"),
    ({"size": [HEIGHT, WIDTH], "counts": "]]~"}, "counts"),
    ({"size": "20x30", "counts": [600]}, "its size is"),
    ({"size": [HEIGHT, WIDTH], "counts": [600]}, "covers no pixel of its image"),
    ([*box(40, 1, 50, 9), *box(1, -9, 9, -5)], "covers no pixel of its image"),
]


@pytest.mark.parametrize(("segmentation", "message"), BAD_OUTLINES)
def test_bad_outlines_are_one_sentence_or_their_image_is_left_out(
    tmp_path, segmentation, message, caplog
):
    content = changed(lambda c: c["annotations"][0].update(segmentation=segmentation))
    with pytest.raises(FileError, match=message) as caught:
        load(tmp_path, content)
    assert "annotation 11 of" in str(caught.value) and "instances.json" in str(caught.value)
    for word in ("None", "NoneType", "ndarray", "Error"):
        assert word not in str(caught.value)
    source = load(tmp_path, content, on_bad_example="skip")
    assert [record.image_id for record in source.records] == [5, 9] and source.skipped == 1
    assert str(caught.value) in caplog.text


def test_skipping_every_image_is_told(tmp_path):
    content = changed(lambda c: [a.update(segmentation=None) for a in c["annotations"]])
    content["images"] = content["images"][1:]
    with pytest.raises(FileError, match="instances.json lists no image that can be used"):
        load(tmp_path, content, on_bad_example="skip")


def test_an_image_that_is_missing_is_left_out(tmp_path, caplog):
    content = changed(lambda c: c["images"][0].update(file_name="none.jpg"))
    with pytest.raises(FileError, match="none.jpg, which is not on disk"):
        load(tmp_path, content)
    source = load(tmp_path, content, on_bad_example="skip")
    assert len(source.records) == 2 and source.skipped == 1 and "none.jpg" in caplog.text


def test_far_away_points_do_not_take_for_ever(tmp_path):
    content = changed(lambda c: c["annotations"][0].update(segmentation=box(6, 6, 1e12, 10)))
    ids = load(tmp_path, content).read(load(tmp_path, content).records[0])[1]
    assert (ids[6:10, 6:] == 1).all()


def test_broken_files(tmp_path):
    with pytest.raises(FileError, match="instances.json is not valid JSON"):
        load(tmp_path, "{")
    with pytest.raises(FileError, match="instances.json is a list, not a COCO instances json"):
        load(tmp_path, "[]")
    with pytest.raises(FileError, match="none.json cannot be read"):
        CocoInstanceSource(tmp_path, tmp_path / "none.json", VOCABULARY)
    source = load(tmp_path)
    Image.new("RGB", (WIDTH, 7)).save(tmp_path / "images" / "4.jpg")
    with pytest.raises(FileError, match=r"^The image .*4.jpg is 7x30 .* says 20x30"):
        source.read(source.records[0])
