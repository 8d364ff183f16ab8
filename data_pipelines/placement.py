"""Resampling: a window of an image and its id map, resized, mirrored and padded onto a square.

Images are resized bilinearly and averaged where they shrink, as Pillow does, by which detectron2
resizes; id maps by nearest neighbour at pixel centres, so that no new id appears. Only the window
that is kept is resampled, not the whole enlarged image: at scale 2 that is a quarter of the work.
Its edges are whole pixels of the source, for the image and the id map alike.
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
from PIL import Image

from concat_jax.core.batch import FIELDS
from data_pipelines.id_runs import keep_largest_segments

# 128, as detectron2's FixedSizeCrop: close to the mean that is subtracted later.
_PADDING = FIELDS["image"].padding

# Loaders have threads of their own.
cv2.setNumThreads(1)


@dataclasses.dataclass(frozen=True)
class Placement:
    """How an image comes onto a square canvas: cut a window, resize, mirror, pad bottom and right.

    `rows` and `columns` are [begin, end) in the source; `resized` is (height, width) on the canvas.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    resized: tuple[int, int]
    mirrored: bool = False


def resize_then_cut(
    source: tuple[int, int],
    resized: tuple[int, int],
    offset: tuple[int, int],
    size: int,
    *,
    mirrored: bool = False,
) -> Placement:
    """The placement of an image that is resized as a whole and then cut at `offset` (top, left).

    The window is widened to whole source pixels; that changes its scale by less than one of them.
    """
    windows, lengths = [], []
    for old, new, begin in zip(source, resized, offset, strict=True):
        end = min(begin + size, new)
        windows.append((begin * old // new, -(-end * old // new)))
        lengths.append(end - begin)
    return Placement(*windows, resized=tuple(lengths), mirrored=mirrored)


def place(
    image: np.ndarray | Image.Image,
    segment_ids: np.ndarray,
    placement: Placement,
    size: int,
    *,
    max_segments: int,
    canvas: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Puts an image [H, W, 3] and its segments [H, W] onto a square canvas.

    Args:
      max_segments: how many segments may stay, as for `keep_largest_segments`.
      canvas: [S, S, 3] uint8 contiguous, to be written all over; None takes a new one.

    Returns:
      image [S, S, 3] uint8 (padding 128); segment_ids [h, w] of the valid area at its upper left,
      renumbered without what is not seen there, and the rows [n] that they had before: see
      `keep_largest_segments`. `pad_ids` pads them.
    """
    placed = place_image(np.asarray(image), placement, size, canvas=canvas)
    return placed, *place_segments(segment_ids, placement, max_segments)


def place_image(
    image: np.ndarray, placement: Placement, size: int, *, canvas: np.ndarray | None = None
) -> np.ndarray:
    """The image of `place`, [S, S, 3] uint8."""
    height, width = placement.resized
    if canvas is None:
        canvas = np.empty((size, size, 3), np.uint8)
    canvas[height:] = _PADDING
    canvas[:height, width:] = _PADDING
    window = _window(image, placement)
    factor = max(window.shape[0] / height, window.shape[1] / width)
    # Up to a tenth the bilinear resize alone is nearer to Pillow's, whose filter widens.
    block = max(2, round(factor)) if factor > 1.1 else 1
    # Onto the canvas without a copy in between.
    target = canvas[:height, :width]
    if block == 1:
        cv2.resize(window, (width, height), target, interpolation=cv2.INTER_LINEAR)
    else:
        # Bilinearly to a multiple of the size, then whole blocks are averaged: that is as near to
        # Pillow as OpenCV's averages over fractions of pixels, in half the time.
        multiple = (width * block, height * block)
        window = cv2.resize(window, multiple, interpolation=cv2.INTER_LINEAR)
        cv2.resize(window, (width, height), target, interpolation=cv2.INTER_AREA)
    return canvas


def place_segments(
    segment_ids: np.ndarray, placement: Placement, max_segments: int
) -> tuple[np.ndarray, np.ndarray]:
    """The segment_ids [h, w] and rows [n] of `place`."""
    ids = _window(segment_ids, placement)
    height, width = placement.resized
    # The rows that pixel centres fall into, as OpenCV finds columns: copying rows costs nothing.
    lines = (2 * np.arange(height) + 1) * len(ids) // (2 * height)
    # Enlarging loses no segment, so the smaller of the two maps tells which there are.
    if height >= ids.shape[0] and width >= ids.shape[1]:
        ids, rows = keep_largest_segments(ids, max_segments)
        return _resize_columns(ids, width)[lines], rows
    return keep_largest_segments(_resize_columns(ids[lines], width), max_segments)


def _resize_columns(ids: np.ndarray, width: int) -> np.ndarray:
    return cv2.resize(ids, (width, len(ids)), interpolation=cv2.INTER_NEAREST_EXACT)


def pad_ids(segment_ids: np.ndarray, size: int) -> np.ndarray:
    """An id map [h, w] at the upper left of [S, S] void, type kept; neither side exceeds S."""
    padded = np.zeros((size, size), segment_ids.dtype)
    padded[: segment_ids.shape[0], : segment_ids.shape[1]] = segment_ids
    return padded


def _window(pixels: np.ndarray, placement: Placement) -> np.ndarray:
    window = pixels[slice(*placement.rows), slice(*placement.columns)]
    return cv2.flip(window, 1) if placement.mirrored else window
