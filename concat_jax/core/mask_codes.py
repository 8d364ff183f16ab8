"""Masks as COCO encodes them: run lengths, by hotcoco, and PNGs whose colours are segment ids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from hotcoco import mask as masks
from PIL import ImageOps

from concat_jax.core.files import FileError, open_image

MAX_ID = 256**3 - 1  # of a segment: three bytes a pixel


def encode_rle(mask: np.ndarray) -> dict:
    """The compressed code {"size": [H, W], "counts": str} of a [H, W] bool mask."""
    code = masks.encode(np.asarray(mask, bool))
    return {"size": list(code["size"]), "counts": code["counts"].decode("ascii")}


def decode_rle(rle: Mapping[str, Any]) -> np.ndarray:
    """The [H, W] bool mask of a compressed code, of `encode_rle` or `checked_rle`."""
    return masks.decode(rle).astype(bool)


def checked_rle(rle: Mapping[str, Any], size: Sequence[int] | None = None) -> dict:
    """Anybody's code, compressed or a list of counts, as `encode_rle` has it.

    Raises ValueError if it is not of `size` (H, W), or the counts are damaged or do not fill it.
    """
    shape, counts = rle.get("size"), rle.get("counts")
    if (
        not isinstance(shape, list | tuple)
        or len(shape) != 2
        or not all(type(side) is int and side > 0 for side in shape)
    ):
        raise ValueError(f"its size is {shape!r:.50} and must be [height, width].")
    if size is not None and tuple(shape) != tuple(size):
        own, wanted = (f"{height}x{width}" for height, width in (shape, size))
        raise ValueError(f"it is {own} (height x width) and its image {wanted}.")
    _check_size(shape)
    height, width = shape
    if isinstance(counts, list | tuple):
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError("its counts are not whole numbers from 0 on.")
        if sum(counts) != height * width:
            raise ValueError(f"its counts hold {sum(counts)} pixels, its size {height * width}.")
        counts = masks.frPyObjects({"size": [height, width], "counts": list(counts)}, *shape)
        counts = counts["counts"]
    if not isinstance(counts, str | bytes) or not counts:
        raise ValueError("it lacks 'counts', a text or a list of numbers.")
    try:
        text = counts if isinstance(counts, str) else counts.decode("ascii")
        code = masks.rle_from_string(text, height, width)
    except ValueError as error:
        raise ValueError(f"its counts are damaged ({error}).") from error
    # The library pads counts that break off or end early; full ones overflow a pixel less.
    if code["counts"].decode("ascii") != text or not _overflows(text, height * width - 1):
        raise ValueError(f"its counts break off or do not fill its size {height}x{width}.")
    return {"size": [height, width], "counts": text}


def _check_size(size: Sequence[int]) -> None:
    if math.prod(size) >= 2**31:
        raise ValueError(f"its size is {size[0]}x{size[1]}; masks have less than 2^31 pixels.")


def _overflows(counts: str, pixels: int) -> bool:
    try:
        masks.rle_from_string(counts, 1, pixels)
    except ValueError:
        return True
    return False


def polygons_to_rle(polygons: Sequence[Sequence[float]], size: Sequence[int]) -> dict:
    """The code of a union of polygons, x and y in turn, rasterised as pycocotools does.

    Raises ValueError for a polygon of under three points, an odd number, or one that is not finite.
    """
    _check_size(size)
    arrays = []
    for polygon in polygons:
        try:
            points = np.array(polygon, np.float64)
        except (TypeError, ValueError):
            points = np.zeros(0)
        except OverflowError as error:
            raise ValueError("a polygon holds a number that is too large.") from error
        if points.ndim != 1 or len(points) < 6 or len(points) % 2:
            raise ValueError("a polygon must list at least three points, x and y in turn.")
        if not np.isfinite(points).all():
            raise ValueError("a polygon holds a number that is not finite.")
        # Edges to points far outside take for ever; clipped, the mask is the same up to where one
        # crosses the border.
        arrays.append(np.clip(points, -4 * max(size), 4 * max(size)).tolist())
    code = masks.merge(masks.frPyObjects(arrays, *size))
    return {"size": list(code["size"]), "counts": code["counts"].decode("ascii")}


def ids_to_rgb(id_map: np.ndarray) -> np.ndarray:
    """Id map [H, W] to COCO's colours [H, W, 3] uint8, R + 256G + 65536B; ValueError beyond."""
    ids = np.asarray(id_map).astype(np.int64)
    if ids.size and (ids.min() < 0 or ids.max() > MAX_ID):
        raise ValueError(
            f"Segment ids from {ids.min()} to {ids.max()} do not fit a COCO panoptic PNG; they "
            f"must lie in 0..{MAX_ID}."
        )
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)


def bounding_box(mask: np.ndarray) -> list[int]:
    """COCO box [x, y, width, height] of a non-empty [H, W] bool mask, in pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1]


def read_id_map(path: epath.Path, json_path: epath.Path) -> np.ndarray:
    """Ids R + 256G + 65536B of a panoptic PNG, [H, W] uint32; FileError if damaged or grey."""
    if not path.is_file():
        raise FileError(f"{json_path} names {path}, which does not exist; say where the PNGs are.")
    with open_image(path) as image:
        image.load()
        if image.format in ("JPEG", "MPO", "WEBP"):
            raise FileError(
                f"{path} is a {image.format}, which may change segment ids; save it as a PNG from "
                "where it was made."
            )
        if image.mode not in ("RGB", "RGBA", "P"):
            raise FileError(
                f"{path} has the mode {image.mode}; a panoptic PNG is RGB, with segment ids as "
                "R + 256 G + 65536 B."
            )
        # Four bytes a pixel are the number itself; channel by channel it takes ten times as long.
        packed = (image if image.mode == "RGB" else image.convert("RGB")).tobytes("raw", "RGBX")
        size = image.size
    return (np.frombuffer(packed, "<u4") & MAX_ID).reshape(size[::-1])


def read_label_map(path: epath.Path) -> np.ndarray:
    """Labels [H, W] of up to 16 bits a pixel, a palette's indices; FileError for colours."""
    with open_image(path) as image:
        image.load()
        labels = np.asarray(ImageOps.exif_transpose(image))
    if labels.ndim != 2 or labels.dtype.kind not in "bui":
        raise FileError(
            f"{path} has the mode {image.mode}; a label map has one channel of 8 or 16 bits."
        )
    return labels.astype(np.uint8) if labels.dtype == bool else labels


def segment_rows(
    id_map: np.ndarray,
    ids: Sequence[int],
    png: epath.Path,
    json_path: epath.Path,
    *,
    may_hide: bool = False,
) -> np.ndarray:
    """A PNG's ids [H, W] as rows of the json's list, r + 1 for row r, uint8 or uint16, 0 void.

    Raises FileError if PNG and json do not hold the same ids, as panopticapi demands; with
    `may_hide` a segment without a pixel is no fault: others were painted over it.
    """
    flat = id_map.ravel()
    # Segments are long runs: a look-up for each run instead of each pixel is far faster.
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    present, run_ids = np.unique(flat[starts], return_inverse=True)
    row_of = {0: 0} | {number: row + 1 for row, number in enumerate(ids)}
    unknown = [number for number in present.tolist() if number not in row_of]
    if unknown:
        raise FileError(f"{png} holds the segment id {unknown[0]}, which {json_path} lacks.")
    absent = row_of.keys() - {0} - set(present.tolist())
    if absent and not may_hide:
        raise FileError(
            f"{json_path} lists the segment id {min(absent)}, which has no pixel in {png}."
        )
    dtype = np.uint8 if len(ids) <= 255 else np.uint16
    rows = np.array([row_of[number] for number in present.tolist()], dtype)
    return np.repeat(rows[run_ids], np.diff(starts, append=flat.size)).reshape(id_map.shape)
