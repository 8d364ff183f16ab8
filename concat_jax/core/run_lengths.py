"""COCO's run-length encoding of masks: written, read, and kept as runs where those will do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np


def encode_rle(mask: np.ndarray) -> dict:
    """COCO's compressed run-length encoding of a [H, W] bool mask.

    Runs of zeros and ones in turn, down the columns, the first of zeros; each is written as its
    difference to the run before the last in base 32, as cocoapi common/maskApi.c `rleToString`.

    Returns:
      {"size": [H, W], "counts": str}, what pycocotools and COCO results files hold.
    """
    mask = np.asarray(mask, bool)
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], changes, [flat.size]]))
    if flat.size and flat[0]:
        counts = np.concatenate([[0], counts])
    return {"size": list(mask.shape), "counts": _write_counts(counts)}


def encode_segments(id_map: np.ndarray, ids: Sequence[int]) -> list[dict]:
    """`encode_rle(id_map == i)` for each i of `ids`, in one pass over the map [H, W] of ints."""
    flat = np.asarray(id_map).ravel(order="F")
    first = np.ones(min(1, flat.size), bool)
    starts = np.flatnonzero(np.concatenate([first, flat[1:] != flat[:-1]]))
    run_ids, ends = flat[starts], np.append(starts[1:], flat.size)
    codes = []
    for wanted in ids:
        own = np.flatnonzero(run_ids == wanted)
        bounds = np.stack([starts[own], ends[own]], axis=1).ravel()
        counts = np.diff(bounds, prepend=0, append=flat.size)
        # encode_rle writes no empty run at the end.
        counts = counts[:-1] if len(own) and counts[-1] == 0 else counts
        codes.append({"size": list(np.shape(id_map)), "counts": _write_counts(counts)})
    return codes


def _write_counts(counts: np.ndarray) -> str:
    values = counts.copy()
    values[3:] -= counts[1:-2]
    digits, written, unfinished = [], [], np.ones(len(values), bool)
    while unfinished.any():
        digit = values & 31
        values = values >> 5
        # The highest bit of the last digit is the sign of what is left out.
        more = values != np.where(digit & 16, -1, 0)
        digits.append(48 + np.where(more, digit | 32, digit))
        written.append(unfinished)
        unfinished = unfinished & more
    if not digits:
        return ""
    text = np.stack(digits, axis=1)[np.stack(written, axis=1)]
    return text.astype(np.uint8).tobytes().decode("ascii")


def _read_counts(text: str | bytes) -> np.ndarray:
    letters = text.encode("ascii") if isinstance(text, str) else text
    digits = np.frombuffer(letters, np.uint8).astype(np.int64) - 48
    if not len(digits):
        return digits
    last = (digits & 32) == 0
    if not last[-1] or digits.min() < 0 or digits.max() > 63:
        raise ValueError("A run-length encoding is damaged: its counts break off or hold no code.")
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    places = np.arange(len(digits)) - np.repeat(starts, np.diff(starts, append=len(digits)))
    if places.max() > 11:
        raise ValueError("A run-length encoding is damaged: one of its counts is far too long.")
    values = np.add.reduceat((digits & 31) << 5 * places, starts)
    negative = (digits[last] & 16) != 0
    values[negative] -= np.int64(1) << 5 * (places[last][negative] + 1)
    # From the fourth on a count is the difference to the one before the last.
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values


@dataclasses.dataclass(frozen=True, slots=True)
class MaskRuns:
    """A mask as its runs of ones, down the columns.

    Attributes:
      size: (H, W).
      starts, ends: [R] int64, first pixel of each run and the one after its last, ascending.
      before: [R] int64, pixels of the mask before each run.
    """

    size: tuple[int, int]
    starts: np.ndarray
    ends: np.ndarray
    before: np.ndarray

    @property
    def area(self) -> int:
        """Pixels of the mask."""
        return int(self.before[-1] + self.ends[-1] - self.starts[-1]) if len(self.starts) else 0

    def pixels_before(self, places: np.ndarray) -> np.ndarray:
        """How many pixels of the mask lie before each of `places`, [...] int64."""
        run = np.searchsorted(self.starts, places, side="right") - 1
        reached = np.minimum(places, self.ends[run]) - self.starts[run]
        return np.where(run >= 0, self.before[run] + reached, 0)


def mask_runs(rle: Mapping) -> MaskRuns:
    """The runs of a COCO run-length encoding, compressed (str or bytes) or a plain list of counts.

    Raises:
      ValueError: if the counts are damaged or do not fill the size.
    """
    height, width = rle["size"]
    counts = rle["counts"]
    if isinstance(counts, str | bytes):
        counts = _read_counts(counts)
    counts = np.asarray(counts, np.int64)
    if (counts < 0).any() or counts.sum() != height * width:
        raise ValueError(
            f"A run-length encoding holds {counts.sum()} pixels where its size {height}x{width} "
            f"has {height * width}."
        )
    ends = counts.cumsum()
    lengths = counts[1::2]
    filled = lengths > 0
    before = lengths.cumsum() - lengths
    return MaskRuns(
        (int(height), int(width)),
        (ends[1::2] - lengths)[filled],
        ends[1::2][filled],
        before[filled],
    )


def decode_rle(rle: Mapping) -> np.ndarray:
    """The [H, W] bool mask of `encode_rle`.

    Raises:
      ValueError: as `mask_runs`.
    """
    runs = mask_runs(rle)
    steps = np.zeros(runs.size[0] * runs.size[1] + 1, np.int8)
    # Added, since a run may start where the one before it ended.
    np.add.at(steps, runs.starts, 1)
    np.add.at(steps, runs.ends, -1)
    flat = np.cumsum(steps[:-1], dtype=np.int8).astype(bool)
    return flat.reshape(runs.size[1], runs.size[0]).T
