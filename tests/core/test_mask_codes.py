"""Run-length codes against pycocotools, and what is said of damaged ones; colours of ids."""

import numpy as np
import pytest
from PIL import Image

from concat_jax.core.mask_codes import (
    MAX_ID,
    checked_rle,
    decode_rle,
    encode_rle,
    ids_to_rgb,
    polygons_to_rle,
    read_id_map,
    segment_rows,
)


def test_codes_equal_pycocotools():
    reference = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for trial in range(60):
        mask = rng.random(rng.integers(1, 40, 2)) < rng.choice([0.0, 0.02, 0.5, 0.98, 1.0])
        if trial % 3 == 0:  # few long runs, whose counts take several digits
            mask = np.zeros((300, 400), bool)
            mask[rng.integers(300) :, rng.integers(400) :] = rng.random() < 0.9
        expected = reference.encode(np.asfortranarray(mask.astype(np.uint8)))
        code = encode_rle(mask)
        assert code == {"size": list(mask.shape), "counts": expected["counts"].decode()}
        np.testing.assert_array_equal(decode_rle(code), mask)
        assert checked_rle(expected, mask.shape) == code  # bytes, as pycocotools gives
        flat = mask.ravel(order="F").astype(int)
        starts = np.flatnonzero(np.diff(flat, prepend=1 - flat[0]))
        counts = [0] * int(flat[0]) + np.diff(starts, append=flat.size).tolist()
        assert decode_rle(checked_rle({"size": list(mask.shape), "counts": counts})).sum() == sum(
            counts[1::2]
        )


def test_polygons_equal_pycocotools():
    reference = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(3)
    for _ in range(30):
        size = rng.integers(5, 60, 2).tolist()
        polygons = [rng.uniform(-20, 80, 2 * rng.integers(3, 9)).tolist() for _ in range(2)]
        expected = reference.merge(reference.frPyObjects(polygons, *size))
        assert polygons_to_rle(polygons, size)["counts"] == expected["counts"].decode()
    # Far outside points take no time, and the mask is that of the part inside.
    mask = decode_rle(polygons_to_rle([[6, 6, 1e12, 6, 1e12, 10, 6, 10]], (20, 30)))
    assert mask[6:10, 6:].all() and mask.sum() == 4 * 24


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ("05", "counts are damaged"),
        ([1, 2], "hold 3 pixels, its size 4"),
        ([5, -1], "not whole numbers from 0"),
        ([1.5, 2.5], "not whole numbers"),
        (["4"], "not whole numbers"),
        ([True, 3], "not whole numbers"),
        ("0\x10", "damaged"),
        ("0P", "break off"),
        ("01", "do not fill its size 2x2"),
        ("o" * 14 + "0", "damaged"),
        ("é", "damaged|break off"),
        ("", "lacks 'counts'"),
        (None, "lacks 'counts'"),
        (7, "lacks 'counts'"),
    ],
)
def test_damaged_codes_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        checked_rle({"size": [2, 2], "counts": counts})


@pytest.mark.parametrize("size", [None, [4], [2.0, 2], ["2", 2], [0, 4], {"h": 2}])
def test_sizes_are_two_whole_numbers(size):
    with pytest.raises(ValueError, match="size is"):
        checked_rle({"size": size, "counts": "4"})
    for huge in ({"size": [10**6, 10**6], "counts": [10**12]}, {"size": [2**40, 1], "counts": "4"}):
        with pytest.raises(ValueError, match=r"masks have less than 2\^31 pixels"):
            checked_rle(huge)
    with pytest.raises(ValueError, match=r"masks have less than 2\^31 pixels"):
        polygons_to_rle([[0, 0, 1, 0, 1, 1]], (2**40, 5))
    with pytest.raises(ValueError, match="it is 2x2 .* its image 2x3"):
        checked_rle({"size": [2, 2], "counts": "4"}, (2, 3))


def test_colours_of_ids_and_back(tmp_path):
    ids = np.array([[0, 1, 256, 65536, 3226956, MAX_ID]])
    rgb = ids_to_rgb(ids)
    assert rgb[0, 1:5].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [76, 61, 49]]
    for mode in ("RGB", "RGBA", "P"):
        Image.fromarray(rgb).quantize().convert(mode).save(tmp_path / "a.png")
        np.testing.assert_array_equal(read_id_map(tmp_path / "a.png", tmp_path / "a.json"), ids)
    Image.fromarray(ids.astype(np.uint8)).save(tmp_path / "grey.png")
    with pytest.raises(ValueError, match=r"^\S+grey.png has the mode L"):
        read_id_map(tmp_path / "grey.png", tmp_path / "a.json")
    with pytest.raises(ValueError, match="a.json names .*none.png, which does not exist"):
        read_id_map(tmp_path / "none.png", tmp_path / "a.json")
    for bad in (-1, MAX_ID + 1):
        with pytest.raises(ValueError, match="do not fit"):
            ids_to_rgb(np.array([[bad]]))


def test_ids_become_rows(tmp_path):
    ids = np.array([[0, 900, 900], [7, 7, 0]], np.uint32)
    names = tmp_path / "a.png", tmp_path / "a.json"
    rows = segment_rows(ids, (7, 900), *names)
    assert rows.tolist() == [[0, 2, 2], [1, 1, 0]] and rows.dtype == np.uint8
    assert segment_rows(ids, (7, 8, 900), *names, may_hide=True).max() == 3
    with pytest.raises(ValueError, match="a.json lists the segment id 8, which has no pixel"):
        segment_rows(ids, (7, 8, 900), *names)
    with pytest.raises(ValueError, match="a.png holds the segment id 900, which .*a.json lacks"):
        segment_rows(ids, (7,), *names)
    many = np.arange(400, dtype=np.uint32)[None]
    assert segment_rows(many, tuple(range(1, 400)), *names).dtype == np.uint16
