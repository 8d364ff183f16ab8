"""Jitter, crop, pad and flip: image and id map stay aligned, and PIL is the reference."""

import numpy as np
import pytest
from PIL import Image

from data_pipelines import augment


def _random_image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _blocks(height=60, width=80):
    """Twelve segments as 4 x 3 blocks, and an image painted in a colour for each."""
    ids = (1 + np.arange(height)[:, None] * 3 // height * 4 + np.arange(width) * 4 // width).astype(
        np.uint16
    )
    colours = np.random.default_rng(1).integers(0, 256, (13, 3), dtype=np.uint8)
    return colours[ids], ids, colours


def _interior(ids, margin):
    """[H, W] bool: every pixel within `margin` has the same id (bilinear cannot have mixed)."""
    inside = np.zeros(ids.shape, bool)
    h, w = ids.shape
    core = ids[margin : h - margin, margin : w - margin]
    same = np.ones(core.shape, bool)
    for dy in range(-margin, margin + 1):
        for dx in range(-margin, margin + 1):
            same &= core == ids[margin + dy : h - margin + dy, margin + dx : w - margin + dx]
    inside[margin : h - margin, margin : w - margin] = same
    return inside


@pytest.mark.parametrize("seed", range(12))
def test_jitter_keeps_image_and_ids_aligned(seed):
    image, ids, colours = _blocks()
    out, out_ids, (height, width) = augment.large_scale_jitter(
        np.random.default_rng(seed), image, ids, 64, scale_range=(0.5, 2.0)
    )
    assert out.shape == (64, 64, 3) and out_ids.shape == (64, 64) and out_ids.dtype == np.uint16
    assert (out[height:] == 128).all() and (out[:, width:] == 128).all()
    assert (out_ids[height:] == 0).all() and (out_ids[:, width:] == 0).all()
    assert (out_ids[:height, :width] > 0).all()
    inside = _interior(out_ids, 2) & (out_ids > 0)
    assert inside.sum() > 100
    np.testing.assert_array_equal(out[inside], colours[out_ids[inside]])


def test_crop_of_the_window_equals_resize_then_crop():
    # detectron2 resizes the whole image, then cuts; cutting first must give the same numbers.
    image, (new_height, new_width) = _random_image(30, 41), (71, 97)
    ids = np.random.default_rng(2).integers(0, 200, (30, 41)).astype(np.uint16)
    whole = np.asarray(Image.fromarray(image).resize((new_width, new_height), 2))
    whole_ids = np.asarray(Image.fromarray(ids).resize((new_width, new_height), 0))
    for top, left in [(0, 0), (7, 33), (7, 13)]:
        placement = augment.Placement((new_height, new_width), (top, left))
        out, out_ids, valid = augment.place(image, ids, placement, 64)
        assert valid == (64, 64)
        np.testing.assert_array_equal(out_ids, whole_ids[top : top + 64, left : left + 64])
        difference = np.abs(out.astype(int) - whole[top : top + 64, left : left + 64])
        assert difference.max() <= 2  # rounding


def test_mirroring_reverses_the_valid_area_and_pads_at_the_same_corner():
    image, ids, _ = _blocks()
    plain = augment.place(image, ids, augment.Placement((20, 30), (0, 0)), 48)
    mirrored = augment.place(image, ids, augment.Placement((20, 30), (0, 0), True), 48)
    assert plain[2] == mirrored[2] == (20, 30)
    np.testing.assert_array_equal(mirrored[0][:20, :30], plain[0][:20, :30][:, ::-1])
    np.testing.assert_array_equal(mirrored[1][:20, :30], plain[1][:20, :30][:, ::-1])
    assert (mirrored[0][:20, 30:] == 128).all()


def test_same_size_placement_is_the_identity_and_takes_pil_images():
    image, ids = _random_image(32, 32), np.arange(1024, dtype=np.uint16).reshape(32, 32)
    for given in (image, Image.fromarray(image)):
        out, out_ids, valid = augment.place(given, ids, augment.Placement((32, 32)), 32)
        np.testing.assert_array_equal(out, image)
        np.testing.assert_array_equal(out_ids, ids)
        assert valid == (32, 32)


def test_place_refuses_sizes_that_differ():
    with pytest.raises(ValueError, match="30x40 RGB and its id map is 30x41"):
        augment.place(_random_image(30, 40), np.zeros((30, 41)), augment.Placement((3, 4)), 8)


def test_jitter_geometry_over_many_draws():
    size, mirrored, longest = 100, 0, []
    for seed in range(2000):
        p = augment.sample_jitter(np.random.default_rng(seed), 60, 120, size)
        height, width = p.resized
        assert abs(height - width / 2) <= 1  # aspect kept
        assert 0 <= p.offset[0] <= max(height - size, 0)
        assert 0 <= p.offset[1] <= max(width - size, 0)
        longest.append(width / size)
        mirrored += p.mirrored
    assert min(longest) >= 0.1 and max(longest) <= 2.0
    assert np.mean(longest) == pytest.approx(1.05, abs=0.04)  # uniform over [0.1, 2]
    assert np.std(longest) == pytest.approx(1.9 / 12**0.5, abs=0.03)
    assert 900 < mirrored < 1100


def test_crop_offsets_reach_both_ends():
    lefts = {
        augment.sample_jitter(np.random.default_rng(s), 4, 12, 10, scale_range=(1.2, 1.2)).offset[1]
        for s in range(200)
    }
    assert lefts == {0, 1, 2}


def test_jitter_is_a_function_of_the_generator():
    draw = [augment.sample_jitter(np.random.default_rng(5), 60, 80, 64) for _ in range(2)]
    assert draw[0] == draw[1]
    assert draw[0] != augment.sample_jitter(np.random.default_rng(6), 60, 80, 64)


def test_jitter_never_loses_the_whole_image():
    p = augment.sample_jitter(np.random.default_rng(0), 2, 500, 10, scale_range=(0.1, 0.1))
    assert p.resized == (1, 1)


@pytest.mark.parametrize("scale_range", [(0, 1), (2, 1), (-1, 1)])
def test_bad_scale_range(scale_range):
    with pytest.raises(ValueError, match="0 < low <= high"):
        augment.sample_jitter(np.random.default_rng(0), 3, 3, 3, scale_range=scale_range)


def test_keep_largest_segments_by_hand():
    ids = np.array([[0, 2, 2, 2], [5, 5, 4, 4], [7, 0, 0, 2]], np.uint16)  # 2: 4, 5: 2, 4: 2, 7: 1
    new, rows = augment.keep_largest_segments(ids, 10)
    assert rows.tolist() == [1, 3, 4, 6] and new.dtype == np.uint8
    assert new.tolist() == [[0, 1, 1, 1], [3, 3, 2, 2], [4, 0, 0, 1]]
    new, rows = augment.keep_largest_segments(ids, 2)
    assert rows.tolist() == [1, 3]  # 4 wins the tie against 5
    assert new.tolist() == [[0, 1, 1, 1], [0, 0, 2, 2], [0, 0, 0, 1]]
    assert augment.keep_largest_segments(ids, 256)[0].dtype == np.uint16
    new, rows = augment.keep_largest_segments(np.zeros((2, 2), np.uint8), 3)
    assert rows.tolist() == [] and not new.any()


def test_more_than_255_segments_survive_in_sixteen_bits():
    ids = np.arange(400, dtype=np.uint16).reshape(20, 20)
    new, rows = augment.keep_largest_segments(ids, 400)
    np.testing.assert_array_equal(new, ids)
    assert len(rows) == 399


def test_resize_longest_letterboxes_and_drops_what_vanishes():
    ids = np.full((40, 80), 1, np.uint8)
    ids[0, 0] = 2  # one pixel, gone at an eighth of the size
    ids[20:, 40:] = 3
    example = {
        "image": _random_image(40, 80),
        "segment_ids": ids,
        "segment_labels": np.array([5, 6, 7, -1], np.int32),
        "segment_is_thing": np.array([False, True, True, False]),
        "segment_is_crowd": np.array([False, False, True, False]),
        "segment_source_ids": np.array([50, 60, 70, 0]),
        "image_id": np.int64(9),
        "image_size": np.array([40, 80], np.int32),
        "file_name": "a.jpg",
    }
    small = augment.resize_longest(example, 10)
    assert small["image"].shape == (10, 10, 3)
    assert small["image_size"].tolist() == [5, 10] and small["image_size"].dtype == np.int32
    assert small["segment_labels"].tolist() == [5, 7, -1, -1]
    assert small["segment_is_thing"].tolist() == [False, True, False, False]
    assert small["segment_is_crowd"].tolist() == [False, True, False, False]
    assert small["segment_source_ids"].tolist() == [50, 70, 0, 0]
    expected = np.zeros((10, 10), int)
    expected[:5] = 1
    expected[2:5, 5:] = 2
    # Row centres of the small map are 4, 12, 20, 28, 36 in the large one.
    assert small["segment_ids"].tolist() == expected.tolist()
    assert small["file_name"] == "a.jpg" and small["image_id"] == 9
    assert example["image_size"].tolist() == [40, 80]  # the input is left alone
    assert augment.resize_longest(example, 160)["image_size"].tolist() == [80, 160]
