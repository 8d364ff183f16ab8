"""Id maps as runs: what is read is what was written, and nothing else is taken for a map."""

import zlib

import numpy as np
import pytest

from data_pipelines.id_runs import decode_runs, encode_runs


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (17, 23)])
def test_a_map_comes_back(shape, dtype):
    rng = np.random.default_rng(0)
    for limit in (1, 3, 250):
        ids = rng.integers(0, limit, shape).astype(dtype)
        found = decode_runs(encode_runs(ids), *shape, dtype)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, ids)


def test_the_bytes_are_lengths_and_then_ids():
    ids = np.array([[7, 7, 0], [0, 300, 300]], np.uint16)
    expected = np.array([2, 2, 2], "<u4").tobytes() + np.array([7, 0, 300], "<u2").tobytes()
    assert zlib.decompress(encode_runs(ids)) == expected


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"no runs", "runs cannot be read"),
        (encode_runs(np.zeros((3, 5), np.uint8)), "not those of 4x4 pixels"),
        (zlib.compress(b"1234567"), "not those of 4x4 pixels"),
    ],
)
def test_other_bytes_are_refused(content, sentence):
    with pytest.raises(ValueError, match=sentence):
        decode_runs(content, 4, 4, np.uint8)
