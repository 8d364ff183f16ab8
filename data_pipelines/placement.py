"""Resampling: an image and its id map, resized, cut, mirrored and padded onto a square canvas.

Images are resized bilinearly as PIL does, which averages over the source pixels when it shrinks
(antialiasing), and id maps by nearest neighbour at pixel centres, so that no new id appears. Only
the window that is kept is resampled, not the whole enlarged image: at scale 2 that is a quarter of
the work, and the same numbers, because the filter still sees the pixels beyond the cut.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

# detectron2's FixedSizeCrop pads images with 128, close to the mean that is subtracted later.
IMAGE_PADDING = 128
# Rows that are blended at a time, so that the intermediate values stay in a core's cache.
_BLOCK = 32


@dataclasses.dataclass(frozen=True)
class Placement:
    """How an image comes onto a square canvas: resize, cut a window, mirror, pad bottom and right.

    Attributes:
      resized: (height, width) of the whole image after the resize, each >= 1.
      offset: (top, left) of the window within the resized image; the window is as large as the
        canvas or as what is left of the image, whichever is smaller.
      mirrored: whether the window is mirrored left to right.
    """

    resized: tuple[int, int]
    offset: tuple[int, int] = (0, 0)
    mirrored: bool = False


def place(
    image: np.ndarray | Image.Image,
    segment_ids: np.ndarray,
    placement: Placement,
    size: int,
    *,
    canvas: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Puts an image and its id map onto a canvas.

    Args:
      image: [H, W, 3] uint8, or an RGB PIL image (which saves two copies of a decoded file).
      segment_ids: [H, W], any integer type.
      placement: where it goes.
      size: side S of the canvas.
      canvas: [S, S, 3] uint8 contiguous, to be written all over; None takes a new one.

    Returns:
      image [S, S, 3] uint8 (padding 128), segment_ids [S, S] of the input's type (padding 0), and
      the (height, width) of the valid area at the upper left.

    Raises:
      ValueError: if image and id map differ in size.
    """
    height, width = segment_ids.shape
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if image.size != (width, height) or image.mode != "RGB":
        raise ValueError(
            f"The image is {image.height}x{image.width} {image.mode} and its id map is "
            f"{height}x{width}; give an RGB image and an id map of the same size."
        )
    valid = tuple(stop - start for start, stop in _window(placement, size))
    return (
        place_image(image, placement, size, canvas=canvas),
        place_ids(segment_ids, placement, size),
        valid,
    )


def place_image(
    image: Image.Image, placement: Placement, size: int, *, canvas: np.ndarray | None = None
) -> np.ndarray:
    """The image of `place`, [S, S, 3] uint8."""
    rows, columns = _window(placement, size)
    height, width = rows[1] - rows[0], columns[1] - columns[0]
    if canvas is None:
        canvas = np.empty((size, size, 3), np.uint8)
    # Seen as rows of bytes, in which a window's rows are contiguous.
    lines = canvas.reshape(size, 3 * size)
    lines[height:] = IMAGE_PADDING
    lines[:height, 3 * width :] = IMAGE_PADDING
    _resample(image, placement, rows, columns, lines[:height, : 3 * width])
    return canvas


def place_ids(segment_ids: np.ndarray, placement: Placement, size: int) -> np.ndarray:
    """The id map of `place`, [S, S]."""
    indices = [
        window_indices(source, resized, *window)
        for source, resized, window in zip(
            segment_ids.shape, placement.resized, _window(placement, size), strict=True
        )
    ]
    rows, columns = indices[0], indices[1][:: -1 if placement.mirrored else 1]
    canvas = np.zeros((size, size), segment_ids.dtype)
    canvas[: len(rows), : len(columns)] = pick(segment_ids, rows, columns)
    return canvas


def _window(placement: Placement, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    # Rows and columns [begin, end) of the resized image that come onto the canvas.
    (height, width), (top, left) = placement.resized, placement.offset
    return (top, min(top + size, height)), (left, min(left + size, width))


def _resample(
    image: Image.Image,
    placement: Placement,
    rows: tuple[int, int],
    columns: tuple[int, int],
    out: np.ndarray,
) -> None:
    # Writes rows and columns [begin, end) of the resized image into `out` [rows, 3 * columns].
    height, (new_height, new_width) = image.height, placement.resized
    # In source pixels; the integer product keeps the far edge from exceeding the image.
    left, right = (column * image.width / new_width for column in columns)
    top, bottom = (row * height / new_height for row in rows)
    num_rows, num_columns = rows[1] - rows[0], columns[1] - columns[0]
    enlarges = new_height > height
    if enlarges:
        # Bilinear enlargement of rows is a blend of two neighbours, which numpy does several times
        # faster than PIL: PIL resizes the columns of the source rows that are needed.
        centres = (np.arange(*rows) + 0.5) * height / new_height - 0.5
        first = max(int(centres[0]), 0)
        last = min(int(centres[-1]) + 2, height)
        image = image.crop((0, first, image.width, last))
        top, bottom, num_rows = 0, last - first, last - first
    window = image.resize(
        (num_columns, num_rows), Image.Resampling.BILINEAR, box=(left, top, right, bottom)
    )
    if placement.mirrored:
        window = window.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(window).reshape(num_rows, -1)
    if enlarges:
        _blend_rows(pixels, centres - first, out)
    else:
        out[:] = pixels


def _blend_rows(pixels: np.ndarray, positions: np.ndarray, out: np.ndarray) -> None:
    # Writes the rows of pixels [n, m] uint8 at fractional positions [r] into out [r, m] uint8;
    # beyond the first and the last row these two are repeated.
    positions = np.clip(positions, 0, len(pixels) - 1)
    upper = positions.astype(np.intp)
    weights = np.rint(256 * (positions - upper)).astype(np.uint16)[:, None]
    for start in range(0, len(out), _BLOCK):
        block = upper[start : start + _BLOCK]
        # (256 a + 128 + w (b - a)) / 256 = a (256 - w) + b w, rounded; it lies in 0 to 65535, so
        # that arithmetic modulo 2^16 gives it, although b - a may be negative.
        source = pixels[block[0] : block[-1] + 2].astype(np.uint16)
        step = np.zeros_like(source)
        np.subtract(source[1:], source[:-1], out=step[:-1])
        source <<= 8
        source += 128
        rows = step.take(block - block[0], axis=0)
        rows *= weights[start : start + _BLOCK]
        rows += source.take(block - block[0], axis=0)
        rows >>= 8
        out[start : start + _BLOCK] = rows


def pick(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """values[rows[:, None], columns], of [H, W] and two lists of positions, but faster."""
    # The axis that shrinks first; whole rows are copied as such.
    if len(rows) < len(values):
        return values.take(rows, axis=0).take(columns, axis=1)
    return values.take(columns, axis=1).take(rows, axis=0)


def run_starts(values: np.ndarray) -> np.ndarray:
    """Where runs of equal values begin: positions [R] int64 ascending in `values` [N], N >= 1."""
    return np.concatenate([[0], np.flatnonzero(values[1:] != values[:-1]) + 1])


def window_indices(source: int, resized: int, start: int, stop: int) -> np.ndarray:
    """The source positions [stop - start] int64 of a window [start, stop) of a resized axis."""
    # floor((i + 1/2) * source / resized) in integers: exact, and what PIL's NEAREST computes.
    return (2 * np.arange(start, stop) + 1) * source // (2 * resized)
