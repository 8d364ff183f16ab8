"""Resampling: a window of an image and its id map, resized, mirrored and padded onto a square.

Images are enlarged bilinearly and shrunk by averaging over the source pixels; id maps by nearest
neighbour at pixel centres, so that no new id appears. Only the window that is kept is resampled,
not the whole enlarged image: at scale 2 that is a quarter of the work. Its edges are whole pixels
of the source, for the image and the id map alike.
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
from PIL import Image

# detectron2's FixedSizeCrop pads images with 128, close to the mean that is subtracted later.
IMAGE_PADDING = 128

# Loaders have threads of their own.
cv2.setNumThreads(1)


@dataclasses.dataclass(frozen=True)
class Placement:
    """How an image comes onto a square canvas: cut a window, resize, mirror, pad bottom and right.

    Attributes:
      rows: [begin, end) of the window in the source.
      columns: likewise.
      resized: (height, width) of the window on the canvas, each >= 1.
      mirrored: whether the window is mirrored left to right.
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
    """The placement of an image that is resized as a whole and then cut to the canvas.

    The window is widened to whole source pixels; that changes its scale by less than one of them.

    Args:
      source: (height, width) of the image.
      resized: likewise, of the whole image after the resize.
      offset: (top, left) of the canvas within the resized image, which is as large as the canvas
        from there on, or ends there.
      size: side of the canvas.
      mirrored: whether the window is mirrored left to right.
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
    canvas: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Puts an image and its id map onto a canvas.

    Args:
      image: [H, W, 3] uint8, or an RGB PIL image.
      segment_ids: [H, W] uint8 or uint16.
      placement: where it goes.
      size: side S of the canvas.
      canvas: [S, S, 3] uint8 contiguous, to be written all over; None takes a new one.

    Returns:
      image [S, S, 3] uint8 (padding 128), segment_ids [S, S] of the input's type (padding 0), and
      the (height, width) of the valid area at the upper left.

    Raises:
      ValueError: if image and id map differ in size.
    """
    image = np.asarray(image)
    if image.shape != (*segment_ids.shape, 3):
        raise ValueError(
            f"The image is {image.shape} and its id map is {segment_ids.shape}; give an RGB image "
            "[H, W, 3] and an id map of the same size."
        )
    return (
        place_image(image, placement, size, canvas=canvas),
        place_ids(segment_ids, placement, size),
        placement.resized,
    )


def place_image(
    image: np.ndarray, placement: Placement, size: int, *, canvas: np.ndarray | None = None
) -> np.ndarray:
    """The image of `place`, [S, S, 3] uint8."""
    height, width = placement.resized
    if canvas is None:
        canvas = np.empty((size, size, 3), np.uint8)
    canvas[height:] = IMAGE_PADDING
    canvas[:height, width:] = IMAGE_PADDING
    (top, bottom), (left, right) = placement.rows, placement.columns
    shrinks = height < bottom - top or width < right - left
    _resample(image, placement, cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR, canvas)
    return canvas


def place_ids(segment_ids: np.ndarray, placement: Placement, size: int) -> np.ndarray:
    """The id map of `place`, [S, S]."""
    canvas = np.zeros((size, size), segment_ids.dtype)
    _resample(segment_ids, placement, cv2.INTER_NEAREST_EXACT, canvas)
    return canvas


def _resample(pixels: np.ndarray, placement: Placement, method: int, canvas: np.ndarray) -> None:
    # Writes the window at the upper left of the canvas, without a copy in between.
    window = pixels[slice(*placement.rows), slice(*placement.columns)]
    if placement.mirrored:
        window = cv2.flip(window, 1)
    height, width = placement.resized
    cv2.resize(window, (width, height), dst=canvas[:height, :width], interpolation=method)


def run_starts(values: np.ndarray) -> np.ndarray:
    """Where runs of equal values begin: positions [R] int64 ascending in `values` [N], N >= 1."""
    return np.concatenate([[0], np.flatnonzero(values[1:] != values[:-1]) + 1])
