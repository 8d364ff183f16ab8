"""The loader: what a batch is, random access, the zero-shot rule, evaluation, captions."""

import json
import subprocess
import sys

import numpy as np
import pytest

from concat_jax.core import prefetch
from concat_jax.core.batch import IMAGE_FIELDS, batch_shapes
from concat_jax.core.files import FileError
from data_pipelines.loader import SegmentationLoader
from data_pipelines.sources.registry import open_source
from tests.data_pipelines.coco_world import (
    ALLOWED,
    CATEGORIES,
    IMAGES,
    ROAD,
    assert_equal,
    colour,
    load,
    make_world,
    segment_id,
    write_json,
)

# What a batch is.


def test_batches_keep_the_contract(world):
    for rows in (6, 256):
        batch = load(world, max_segments=rows).batch(0, 4)
        found = {name: (value.shape, value.dtype) for name, value in batch.items()}
        assert found == batch_shapes(IMAGE_FIELDS, B=4, S=32, G=rows)


def test_tables_match_the_pixels_under_jitter(world):
    data = load(world, scale_range=(0.5, 2.0))
    names = data.vocabulary.names
    rows_seen, checked = [], 0
    for step in range(25):
        batch = data.batch(step, 4)
        for b in range(4):
            image_id, ids = int(batch["image_id"][b]), batch["segment_ids"][b]
            source = batch["segment_source_ids"][b]
            n = (source > 0).sum()
            rows_seen.append(n)
            # Exactly the segments that still have pixels own a row, and rows lie in front.
            assert sorted(set(np.unique(ids)) - {0}) == list(range(1, n + 1))
            assert (source[n:] == 0).all() and (batch["segment_labels"][b, n:] == -1).all()
            assert not batch["segment_is_thing"][b, n:].any()
            assert not batch["segment_is_crowd"][b, n:].any()
            for g in range(n):
                row = (source[g] - 1 - image_id * 70_000) // 300
                category, crowd, _ = IMAGES[image_id][row]
                label = batch["segment_labels"][b, g]
                assert data.vocabulary.category_ids[label] == category
                assert batch["segment_is_thing"][b, g] == (names[label] in ("dog", "cat"))
                assert batch["segment_is_crowd"][b, g] == bool(crowd)
                # Away from borders, the picture has the colour that belongs to this segment's id.
                mask = ids == g + 1
                inner = mask.copy()
                inner[:2] = inner[-2:] = inner[:, :2] = inner[:, -2:] = False
                for dy in (-2, -1, 0, 1, 2):
                    for dx in (-2, -1, 0, 1, 2):
                        inner &= np.roll(mask, (dy, dx), (0, 1))
                checked += inner.sum()
                assert (batch["image"][b][inner] == colour(source[g])).all()
            height, width = batch["image_size"][b]
            assert (ids[height:] == 0).all() and (ids[:, width:] == 0).all()
            assert (batch["image"][b, height:] == 128).all()
            assert (batch["image"][b, :, width:] == 128).all()
    assert checked > 5000
    assert min(rows_seen) < 2 and max(rows_seen) == 3  # some crops did lose segments


def test_without_augmentation_the_whole_image_is_letterboxed(world):
    batch = load(world, augment="none", image_size=40).batch(0, 4)
    assert (batch["image_size"] == [30, 40]).all()
    for image_id, ids in zip(batch["image_id"], batch["segment_ids"], strict=True):
        for row, (_, _, (left, top, *_)) in enumerate(IMAGES[int(image_id)]):
            if not any(
                l <= left < r and t <= top < b for _, _, (l, t, r, b) in IMAGES[image_id][row + 1 :]
            ):
                assert ids[top, left] == row + 1


def test_of_too_many_segments_the_largest_stay(world):
    data = load(world, augment="none", image_size=40, max_segments=2)
    batch = data.batch(0, 6)
    b = batch["image_id"].tolist().index(17)  # sky, a cat of 4 pixels, a cat of 16
    assert batch["segment_source_ids"][b].tolist() == [segment_id(17, 0), segment_id(17, 2)]
    assert (batch["segment_ids"][b, 20:24, 20:24] == 2).all()
    assert (batch["segment_ids"][b, 1:3, 1:3] == 0).all()  # void, not given to a neighbour


# Random access.


def test_a_batch_does_not_depend_on_what_came_before(world):
    walked, jumped = load(world), load(world, num_threads=1)
    history = [walked.batch(step, 4) for step in range(7)]
    for step in (6, 2, 6):
        assert_equal(jumped.batch(step, 4), history[step])
    assert_equal(walked.batch(2, 4), history[2])
    ahead = list(
        prefetch.prefetch(lambda step: walked.batch(step, 4), 3, 4, depth=3, num_threads=3)
    )
    for step, batch in enumerate(ahead, start=3):
        assert_equal(batch, history[step])


def test_seed_and_epoch_change_order_and_jitter(world):
    data = load(world)
    first, second = data.batch(0, 6), data.batch(1, 6)
    assert first["image_id"].tolist() != second["image_id"].tolist()
    assert load(world, seed=4).batch(0, 6)["image_id"].tolist() != first["image_id"].tolist()
    sizes = {tuple(size) for step in range(5) for size in data.batch(step, 6)["image_size"]}
    assert len(sizes) > 15  # the same image is not jittered the same way every epoch


def test_order_is_the_documented_generator(world):
    data = load(world)
    for epoch in (0, 1, 5):
        order = np.random.default_rng([3, epoch]).permutation(6)
        expected = np.array(sorted(ALLOWED))[order]
        assert data.batch(epoch, 6)["image_id"].tolist() == expected.tolist()


def test_every_epoch_visits_each_training_image_once_even_across_batches(world):
    data = load(world)  # 6 images: every other batch straddles two epochs
    stream = np.concatenate([data.batch(step, 4)["image_id"] for step in range(6)])
    for epoch in range(4):
        assert set(stream[epoch * 6 : epoch * 6 + 6].tolist()) == ALLOWED


# The zero-shot rule.


def test_images_with_an_unseen_segment_never_train(world):
    data = load(world)
    assert {data.records[i].image_id for i in data.training_indices} == ALLOWED
    for step in range(4):
        labels = data.batch(step, 6)["segment_labels"]
        assert not np.isin(labels, data.vocabulary.unseen).any()


def test_keep_trains_on_everything(world):
    data = load(world, unseen_images="keep")
    batch = data.batch(0, 8)
    assert set(batch["image_id"].tolist()) == set(IMAGES)
    assert (batch["segment_labels"] == 1).any()


def test_a_leak_is_refused_with_the_image(world):
    for on_bad_example in ("raise", "skip"):
        data = load(world, on_bad_example=on_bad_example)
        data.training_indices = np.arange(8)
        with pytest.raises(FileError, match="Image 1[35] .* is in training but holds .*'road'"):
            data.batch(0, 8)


def test_nothing_to_train_on(world):
    content = json.loads((world / "annotations" / "panoptic_train2017.json").read_text())
    for annotation in content["annotations"]:
        annotation["segments_info"][0]["category_id"] = ROAD
    write_json(world, content)
    data = load(world)
    assert len(list(data.eval_examples())) == 8
    with pytest.raises(FileError, match="nothing to train on"):
        data.batch(0, 4)
    with pytest.raises(FileError, match="no seen segment"):
        data.caption_batch(0, 4, 8)


# Evaluation.


def test_eval_examples_are_all_images_as_they_are(tmp_path):
    make_world(tmp_path, part="val2017")
    data = load(tmp_path, part="val2017")
    examples = list(data.eval_examples())
    assert [e["image_id"] for e in examples] == sorted(IMAGES)  # unseen included
    assert [e["file_name"] for e in examples] == [f"{i}.jpg" for i in sorted(IMAGES)]
    first = examples[0]
    assert first["image"].shape == (30, 40, 3) and first["image_size"].tolist() == [30, 40]
    assert first["segment_ids"].dtype == np.uint8 and first["segment_ids"].shape == (30, 40)
    assert first["segment_labels"].tolist() == [0, 2, 3, -1, -1, -1]
    assert first["segment_is_crowd"].tolist() == [False, False, True, False, False, False]
    for row in range(3):
        mask = first["segment_ids"] == row + 1
        assert (first["image"][mask] == colour(segment_id(11, row))).all()
        assert mask.sum() == {0: 40 * 15 - 18 * 5 - 14 * 3, 1: 18 * 18, 2: 14 * 18}[row]


def test_eval_limit_and_no_segment_left_out(world):
    data = load(world, num_eval_images=2, max_segments=2)
    examples = list(data.eval_examples())
    assert [e["image_id"] for e in examples] == [11, 12] and data.num_eval_images == 2
    assert [len(e["segment_labels"]) for e in examples] == [3, 2]
    assert load(world, num_eval_images=99).num_eval_images == 8


# Captions.


def test_caption_pairs_are_boxes_of_seen_segments(world):
    data = load(world)
    total = sum(len(IMAGES[image_id]) for image_id in ALLOWED)
    batch = data.caption_batch(0, total, 16)
    assert batch["image"].shape == (total, 16, 16, 3) and batch["image"].dtype == np.uint8
    expected = sorted(
        {c["id"]: c["name"] for c in CATEGORIES}[category]
        for image_id in ALLOWED
        for category, *_ in IMAGES[image_id]
    )
    assert sorted(batch["captions"]) == expected  # one epoch: each segment once
    again = load(world, num_threads=1).caption_batch(0, total, 16)
    np.testing.assert_array_equal(again["image"], batch["image"])
    assert again["captions"] == batch["captions"]
    assert data.caption_batch(1, total, 16)["captions"] != batch["captions"]
    # The cat of image 14 fills its box; the dog on image 12's sky is a 4 x 4 box of its own.
    flat = {tuple(i[0, 0]) for i in batch["image"] if (i == i[0, 0]).all()}
    assert {tuple(colour(segment_id(14, 0))), tuple(colour(segment_id(12, 1)))} <= flat
    # The sky of image 12 is a rectangle with the dog left in it, not cut out.
    sky, dog = colour(segment_id(12, 0)), colour(segment_id(12, 1))
    large = data.caption_batch(0, total, 120)
    assert any(
        (i[0, 0] == sky).all() and (i[24:32, 18:24] == dog).all()
        for i, name in zip(large["image"], large["captions"], strict=True)
        if name == "sky"
    )


def test_captions_are_shared_among_processes(world):
    whole = load(world).caption_batch(2, 4, 8)
    parts = [load(world, process_index=i, process_count=2).caption_batch(2, 4, 8) for i in range(2)]
    assert parts[0]["captions"] + parts[1]["captions"] == whole["captions"]


def test_captions_skip_bad_files_as_well(world):
    data = load(world, on_bad_example="skip")
    (world / "train2017" / "16.jpg").write_text("<html>404</html>")
    batch = data.caption_batch(0, 13, 8)
    assert len(batch["captions"]) == 13 and len(data.skipped) == 1


def test_skipping_ends_when_nothing_is_left(world):
    data = load(world, on_bad_example="skip")
    for image_id in IMAGES:
        (world / "train2017" / f"{image_id}.jpg").write_bytes(b"")
    with pytest.raises(FileError, match="Not one of the training images can be used"):
        data.batch(0, 4)
    assert len(data.skipped) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"image_size": 0}, "image_size is 0"),
        ({"max_segments": 0}, "max_segments is 0"),
        ({"max_segments": 65536}, "max_segments is 65536"),
        ({"num_eval_images": 0}, "num_eval_images is 0"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"augment": "lsi"}, "augment cannot be 'lsi'; did you mean 'lsj'"),
        ({"unseen_images": "hide"}, "unseen_images is 'hide'"),
        ({"on_bad_example": "ignore"}, "on_bad_example cannot be 'ignore'; there are raise, skip"),
        ({"scale_range": (0, 1)}, "scale_range is"),
        ({"split_file": "none_such"}, "no file of classes 'none_such'"),
    ],
)
def test_bad_arguments(world, options, message):
    with pytest.raises(ValueError, match=message):
        load(world, **options)


def test_bad_steps(world):
    data = load(world, process_count=2)
    with pytest.raises(ValueError, match="step -1"):
        data.batch(-1, 4)
    for batch_size in (0, 3):
        with pytest.raises(ValueError, match=f"batch_size {batch_size} must be a positive multip"):
            data.batch(0, batch_size)
    with pytest.raises(ValueError, match="batch_size 3"):
        data.caption_batch(0, 3, 8)


def test_import_brings_no_framework():
    code = (
        "import sys, data_pipelines.sources.coco_panoptic, data_pipelines.loader; "
        "print(sorted({'tensorflow', 'torch', 'jax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Real images.


@pytest.fixture(scope="module")
def mini(shared_data):
    return shared_data / "coco_panoptic_mini"


def test_mini_epoch_holds_exactly_the_images_without_unseen_ids(mini):
    content = json.loads((mini / "annotations" / "panoptic_train2017.json").read_text())
    unseen = {21, 25, 33, 34, 41, 57, 87, 100, 145, 148, 149, 184, 187, 193}
    expected = {
        a["image_id"]
        for a in content["annotations"]
        if not unseen & {s["category_id"] for s in a["segments_info"]}
    }
    source = open_source("coco_panoptic_zps", mini, "train2017")
    data = SegmentationLoader(source, seed=1, image_size=64)
    batch = data.batch(0, 31)
    assert len(expected) == 31 and set(batch["image_id"].tolist()) == expected
    assert set(data.caption_batch(0, 31, 16)["captions"]) <= {
        data.vocabulary.names[k] for k in data.vocabulary.seen
    }
