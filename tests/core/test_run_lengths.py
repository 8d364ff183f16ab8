"""Run-length codes against pycocotools and by hand."""

import numpy as np
import pytest

from concat_jax.core.run_lengths import decode_rle, encode_rle, encode_segments, mask_runs


def random_masks():
    rng = np.random.default_rng(0)
    for trial in range(200):
        shape = rng.integers(1, 40, 2)
        mask = rng.random(shape) < rng.choice([0.0, 0.02, 0.5, 0.98, 1.0])
        if trial % 3 == 0:  # few long runs, whose counts take several digits
            mask = np.zeros((300, 400), bool)
            mask[rng.integers(300) :, rng.integers(400) :] = rng.random() < 0.9
        yield mask


def test_codes_equal_pycocotools():
    reference = pytest.importorskip("pycocotools.mask")
    for mask in random_masks():
        expected = reference.encode(np.asfortranarray(mask.astype(np.uint8)))
        code = encode_rle(mask)
        assert code == {"size": expected["size"], "counts": expected["counts"].decode()}
        np.testing.assert_array_equal(decode_rle(expected), mask)  # bytes, as pycocotools gives


def test_runs_count_pixels():
    mask = np.array([[0, 1, 1], [1, 1, 0]], bool)  # down the columns: 0 1 1 1 1 0
    runs = mask_runs(encode_rle(mask))
    assert (runs.starts.tolist(), runs.ends.tolist(), runs.area) == ([1], [5], 4)
    assert runs.pixels_before(np.arange(7)).tolist() == [0, 0, 1, 2, 3, 4, 4]


def test_plain_counts_and_empty_runs_are_read():
    runs = mask_runs({"size": [2, 3], "counts": [1, 2, 0, 1, 2, 0]})
    assert runs.area == 3
    np.testing.assert_array_equal(
        decode_rle({"size": [2, 3], "counts": [1, 2, 0, 1, 2, 0]}), [[0, 1, 0], [1, 1, 0]]
    )
    assert mask_runs({"size": [2, 3], "counts": [6]}).area == 0


def test_all_segments_of_a_map_at_once():
    rng = np.random.default_rng(1)
    for _ in range(20):
        ids = rng.integers(0, 4, rng.integers(1, 30, 2))
        wanted = [2, 0, 3, 9]
        assert encode_segments(ids, wanted) == [encode_rle(ids == i) for i in wanted]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ("05", "size 2x2 has 4"),
        ([1, 2], "holds 3 pixels"),
        ([5, -1], "holds 4 pixels"),
        ("0\x10", "damaged"),
        ("0P", "break off"),
        ("o" * 14 + "0", "far too long"),
    ],
)
def test_damaged_codes_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        mask_runs({"size": [2, 2], "counts": counts})
