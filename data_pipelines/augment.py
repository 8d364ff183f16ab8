"""Geometry of training and evaluation images: pure functions of arrays and an explicit generator.

Large-scale jitter is that of Mask2Former's `coco_panoptic_new_baseline_dataset_mapper.py`
(detectron2 `ResizeScale`, `FixedSizeCrop`, `RandomFlip`; Ghiasi et al., arXiv 2012.07177). The
image is resized with PIL's bilinear filter, which averages over the source pixels when it shrinks
(antialiasing), and the id map by nearest neighbour at pixel centres, so that no new id appears.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

# detectron2's FixedSizeCrop pads images with 128, close to the mean that is subtracted later.
IMAGE_PADDING = 128


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


def sample_jitter(
    rng: np.random.Generator,
    height: int,
    width: int,
    size: int,
    *,
    scale_range: tuple[float, float] = (0.1, 2.0),
    flip_probability: float = 0.5,
) -> Placement:
    """Draws a large-scale jitter for an image of `height` x `width` on a canvas `size` x `size`.

    A scale is drawn uniformly from `scale_range`; the image is resized, aspect kept, to the largest
    that fits into a square of scale x size; a window of the canvas's size is cut uniformly where
    the image is larger than the canvas.

    Raises:
      ValueError: if the range is not 0 < low <= high.
    """
    low, high = scale_range
    if not 0 < low <= high:
        raise ValueError(f"scale_range is {scale_range} and must be 0 < low <= high.")
    # The draws are made in a fixed order and number, whatever the image's size.
    scale = rng.uniform(low, high)
    where = rng.uniform(size=2)
    mirrored = bool(rng.uniform() < flip_probability)
    resized = _fit(height, width, scale * size)
    offset = tuple(int(u * (max(r - size, 0) + 1)) for u, r in zip(where, resized, strict=True))
    return Placement(resized, offset, mirrored)


def letterbox_placement(height: int, width: int, size: int) -> Placement:
    """Whole image, aspect kept, its longest side equal to the canvas: no crop, no flip."""
    return Placement(_fit(height, width, size))


def place(
    image: np.ndarray | Image.Image, segment_ids: np.ndarray, placement: Placement, size: int
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Puts an image and its id map onto a canvas.

    Only the window is resampled, not the whole enlarged image: at scale 2 that is a quarter of the
    work, and the same numbers, because PIL's filter still sees the pixels beyond the cut.

    Args:
      image: [H, W, 3] uint8, or an RGB PIL image (which saves two copies of a decoded file).
      segment_ids: [H, W], any integer type.
      placement: where it goes.
      size: side S of the canvas.

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
    (new_height, new_width), (top, left) = placement.resized, placement.offset
    bottom, right = min(top + size, new_height), min(left + size, new_width)
    valid = (bottom - top, right - left)
    window = image.resize(
        valid[::-1],
        Image.Resampling.BILINEAR,
        # In source pixels; the integer product keeps the far edge from exceeding the image.
        box=(
            left * width / new_width,
            top * height / new_height,
            right * width / new_width,
            bottom * height / new_height,
        ),
    )
    rows = _nearest(height, new_height, top, bottom)
    columns = _nearest(width, new_width, left, right)
    pixels, ids = np.asarray(window), segment_ids[rows[:, None], columns]
    if placement.mirrored:
        pixels, ids = flip(pixels, ids)
    canvas = np.full((size, size, 3), IMAGE_PADDING, np.uint8)
    canvas[: valid[0], : valid[1]] = pixels
    canvas_ids = np.zeros((size, size), segment_ids.dtype)
    canvas_ids[: valid[0], : valid[1]] = ids
    return canvas, canvas_ids, valid


def large_scale_jitter(
    rng: np.random.Generator,
    image: np.ndarray | Image.Image,
    segment_ids: np.ndarray,
    size: int,
    *,
    scale_range: tuple[float, float] = (0.1, 2.0),
    flip_probability: float = 0.5,
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """`sample_jitter` and `place` in one; arguments and results are theirs."""
    height, width = segment_ids.shape
    placement = sample_jitter(
        rng, height, width, size, scale_range=scale_range, flip_probability=flip_probability
    )
    return place(image, segment_ids, placement, size)


def letterbox(
    image: np.ndarray | Image.Image, segment_ids: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """The whole image on the canvas, longest side equal to `size`; results as `place`."""
    return place(image, segment_ids, letterbox_placement(*segment_ids.shape, size), size)


def flip(image: np.ndarray, segment_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mirrors image [H, W, 3] and id map [H, W] left to right."""
    return image[:, ::-1], segment_ids[:, ::-1]


def keep_largest_segments(
    segment_ids: np.ndarray, max_segments: int
) -> tuple[np.ndarray, np.ndarray]:
    """Renumbers an id map after a crop so that 1..n are the segments which still have pixels.

    Segments without a pixel are gone. Of more than `max_segments`, the largest stay (by pixels on
    this map; the lower id wins a tie) and the pixels of the others become void.

    Args:
      segment_ids: [H, W] unsigned integers, 0 void, small (they index a table).
      max_segments: how many may stay, 1 to 65535.

    Returns:
      The new map [H, W], uint8 if max_segments <= 255 and uint16 otherwise, and rows [n] int64
      ascending: new id i+1 was id rows[i]+1, that is, row rows[i] of the tables.
    """
    counts = np.bincount(segment_ids.ravel(), minlength=1)
    rows = np.flatnonzero(counts[1:])
    if len(rows) > max_segments:
        by_area = np.argsort(-counts[1:][rows], kind="stable")
        rows = np.sort(rows[by_area[:max_segments]])
    renumber = np.zeros(len(counts), np.uint8 if max_segments <= 255 else np.uint16)
    renumber[rows + 1] = np.arange(1, len(rows) + 1)
    return renumber[segment_ids], rows


def resize_longest(example: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Letterboxes an evaluation example to a fixed size, for batches of one shape.

    Args:
      example: fields of a single example at native size: image [H, W, 3] uint8, segment_ids
        [H, W], segment tables [G]; other fields are handed on as they are.
      size: side S of the result; the image's longest side becomes S, also if it was smaller.

    Returns:
      The example with image [S, S, 3], segment_ids [S, S], image_size [2] int32 the valid area,
      and tables still [G], from which segments that lost their last pixel are removed.
    """
    image, ids, valid = letterbox(example["image"], example["segment_ids"], size)
    ids, rows = keep_largest_segments(ids, len(example["segment_labels"]))
    resized = dict(example, image=image, segment_ids=ids, image_size=np.array(valid, np.int32))
    for name, padding in TABLE_PADDING.items():
        resized[name] = pad_table(example[name][rows], len(example[name]), padding)
    return resized


# The tables of an example, one row a segment, and what fills the rows without a segment.
TABLE_PADDING: Mapping[str, int | bool] = {
    "segment_labels": -1,
    "segment_is_thing": False,
    "segment_is_crowd": False,
    "segment_source_ids": 0,
}


def pad_table(values: np.ndarray, length: int, padding: int | bool) -> np.ndarray:
    """Lengthens `values` [n] to [length] with `padding`, type kept; n must not exceed length."""
    padded = np.full(length, padding, values.dtype)
    padded[: len(values)] = values
    return padded


def _fit(height: int, width: int, side: float) -> tuple[int, int]:
    factor = min(side / height, side / width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def _nearest(source: int, resized: int, start: int, stop: int) -> np.ndarray:
    # floor((i + 1/2) * source / resized) in integers: exact, and what PIL's NEAREST computes.
    return (2 * np.arange(start, stop) + 1) * source // (2 * resized)
