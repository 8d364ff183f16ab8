"""COCO's panoptic layout on disk: where the files are, what the JSON says, how one image is read.

Every part is checked against the others, so that a broken download or a slip in a converter is one
sentence with a file name in it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from concat_jax.text.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

# What PIL raises on files that are cut off, damaged, or not pictures.
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


class DataError(ValueError):
    """Something on disk is missing or inconsistent; the message names the file."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where one part of a data set lies: images folder, panoptic PNG folder, annotation file."""

    images: pathlib.Path
    pngs: pathlib.Path
    json_path: pathlib.Path


@dataclasses.dataclass(frozen=True, slots=True)
class ImageRecord:
    """What the JSON says of one image; the segment tables [n] are in the JSON's order.

    Attributes:
      image_id: the JSON's image id.
      file_name, png_name: names of the image and of its panoptic PNG.
      height, width: size in pixels.
      source_ids: [n] int64, the segments' ids: R + 256 G + 65536 B of their pixels in the PNG.
      labels: [n] int32, class indices into the vocabulary.
      is_crowd: [n] bool.
    """

    image_id: int
    file_name: str
    png_name: str
    height: int
    width: int
    source_ids: np.ndarray
    labels: np.ndarray
    is_crowd: np.ndarray


def find_layout(root: str | os.PathLike[str], part: str) -> Layout:
    """Finds the three places of a part; the PNG folder may lie in `annotations/` or beside it.

    Raises:
      DataError: naming the place that is missing and the layout that is expected.
    """
    root, name = pathlib.Path(root), f"panoptic_{part}"
    expected = (
        f"expected {root}/{{{part}/*.jpg, annotations/{name}.json, "
        f"annotations/{name}/*.png or {name}/*.png}}"
    )
    images, json_path = root / part, root / "annotations" / f"{name}.json"
    if not root.is_dir():
        raise DataError(f"The data set's folder {root} does not exist; {expected}.")
    if not images.is_dir():
        raise DataError(f"The images folder {images} does not exist; {expected}.")
    if not json_path.is_file():
        raise DataError(f"The annotation file {json_path} does not exist; {expected}.")
    for pngs in (root / "annotations" / name, root / name):
        # An unpacker may leave an empty folder at one place and the files at the other.
        if pngs.is_dir() and any(entry.name.endswith(".png") for entry in os.scandir(pngs)):
            return Layout(images, pngs, json_path)
    raise DataError(f"The folder {name} with the panoptic PNGs is missing or empty; {expected}.")


def read_records(layout: Layout, vocabulary: Vocabulary) -> list[ImageRecord]:
    """Reads the annotation file; one record for each annotation, by ascending image id.

    Raises:
      DataError: if the file is not COCO panoptic JSON, its categories are not the vocabulary's, an
        id occurs twice, a reference leads nowhere, or an image or PNG is not on disk.
    """
    json_path = layout.json_path
    try:
        content = json.loads(json_path.read_bytes())
    except ValueError as error:
        raise DataError(f"{json_path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{json_path} must hold a JSON object, in COCO's panoptic format.")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list) or not content[key]:
            raise DataError(f"{json_path} lacks a non-empty list under {key!r}.")
    images: dict[int, Mapping[str, Any]] = {}
    records: dict[int, ImageRecord] = {}
    try:
        _check_categories(json_path, content["categories"], vocabulary)
        for image in content["images"]:
            if image["id"] in images:
                raise DataError(f"{json_path} lists the image id {image['id']} more than once.")
            images[image["id"]] = image
        for annotation in content["annotations"]:
            record = _read_record(json_path, annotation, images, vocabulary)
            if record.image_id in records:
                raise DataError(
                    f"{json_path} annotates the image {record.image_id} more than once."
                )
            records[record.image_id] = record
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{json_path} is not in COCO's panoptic format: after {len(images)} images and "
            f"{len(records)} annotations, an entry lacks or misuses {error}."
        ) from error
    if len(images) > len(records):
        logger.warning("%s: %d images have no annotation", json_path, len(images) - len(records))
    ordered = [records[image_id] for image_id in sorted(records)]
    _check_presence("image", layout.images, [record.file_name for record in ordered])
    _check_presence("panoptic PNG", layout.pngs, [record.png_name for record in ordered])
    return ordered


def read_image(layout: Layout, record: ImageRecord) -> tuple[Image.Image, np.ndarray]:
    """Decodes an image and its id map at native size, and checks one against the other.

    Returns:
      The RGB image, with EXIF rotation applied, and the id map [H, W] uint16: 0 void, r + 1 where
      the segment of row r of the record's tables is.

    Raises:
      DataError: if a file cannot be decoded, the sizes of image, PNG and JSON differ, or PNG and
        JSON do not hold the same segment ids.
    """
    image_path, png_path = layout.images / record.file_name, layout.pngs / record.png_name
    image, png = _open(image_path), _open(png_path)
    sizes = (image.size, png.size, (record.width, record.height))
    if len(set(sizes)) > 1:
        in_image, in_png, in_json = (f"{height}x{width}" for width, height in sizes)
        raise DataError(
            f"The image {image_path} is {in_image} (height x width), its PNG {png_path} {in_png} "
            f"and the JSON says {in_json}; all must agree."
        )
    if png.mode not in ("RGB", "RGBA", "P"):
        raise DataError(
            f"The panoptic PNG {png_path} has the mode {png.mode} and must be RGB, with segment "
            "ids as R + 256 G + 65536 B."
        )
    colours = np.asarray(png.convert("RGBA")).view("<u4")[..., 0] & 0xFFFFFF
    return image.convert("RGB"), _rows_of_pixels(colours, record.source_ids, png_path)


def _check_categories(
    json_path: pathlib.Path, categories: Sequence[Mapping[str, Any]], vocabulary: Vocabulary
) -> None:
    listed = {c["id"]: (c["name"], bool(c["isthing"])) for c in categories}
    ids, names, things = vocabulary.category_ids, vocabulary.names, vocabulary.is_thing
    split = {i: (name, thing) for i, name, thing in zip(ids, names, things, strict=True)}
    for category in sorted(listed.keys() | split.keys()):
        if listed.get(category) != split.get(category):
            raise DataError(
                f"Category {category} (name, is thing) is {listed.get(category, 'absent')} in "
                f"{json_path} and {split.get(category, 'absent')} in the split file; use a split "
                "file made for this data set."
            )


def _read_record(
    json_path: pathlib.Path,
    annotation: Mapping[str, Any],
    images: Mapping[int, Mapping[str, Any]],
    vocabulary: Vocabulary,
) -> ImageRecord:
    where = f"the annotation {annotation['file_name']!r} of {json_path}"
    image = images.get(annotation["image_id"])
    if image is None:
        raise DataError(f"There is no image {annotation['image_id']} for {where}.")
    segments = annotation["segments_info"]
    source_ids = [segment["id"] for segment in segments]
    labels = [vocabulary.index_of_category.get(segment["category_id"], -1) for segment in segments]
    if -1 in labels:
        segment = segments[labels.index(-1)]
        raise DataError(
            f"Segment {segment['id']} in {where} has the category {segment['category_id']}, which "
            "is not in the split file."
        )
    if len(set(source_ids)) < len(source_ids):
        double = next(i for i in source_ids if source_ids.count(i) > 1)
        raise DataError(f"The segment id {double} occurs more than once in {where}.")
    if source_ids and not 0 < min(source_ids) <= max(source_ids) <= 0xFFFFFF:
        raise DataError(f"The segment ids in {where} must lie in 1 to 16777215; 0 is void.")
    return ImageRecord(
        image_id=image["id"],
        file_name=image["file_name"],
        png_name=annotation["file_name"],
        height=image["height"],
        width=image["width"],
        source_ids=np.array(source_ids, np.int64),
        labels=np.array(labels, np.int32),
        is_crowd=np.array([segment.get("iscrowd", 0) for segment in segments], bool),
    )


def _check_presence(what: str, folder: pathlib.Path, names: Sequence[str]) -> None:
    # One listing: asking for each of COCO's 240,000 files takes minutes on a network disk.
    listed = set(os.listdir(folder))
    for name in names:
        if name not in listed and not (folder / name).is_file():
            raise DataError(f"The {what} {folder / name} is in the JSON but not on disk.")


def _open(path: pathlib.Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            picture.load()
            # Annotators saw the rotated picture; detectron2's `read_image` applies EXIF as well.
            ImageOps.exif_transpose(picture, in_place=True)
            return picture
    except _UNREADABLE as error:
        raise DataError(f"{path} cannot be read as an image: {error}.") from error


def _rows_of_pixels(
    colours: np.ndarray, source_ids: np.ndarray, png_path: pathlib.Path
) -> np.ndarray:
    # Segments are long runs of one id: a look-up for each run instead of each pixel is far faster.
    flat = colours.ravel()
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    present, run_ids = np.unique(flat[starts], return_inverse=True)
    row_of = {0: 0} | {source_id: row + 1 for row, source_id in enumerate(source_ids.tolist())}
    unknown = sorted(set(present.tolist()) - row_of.keys())
    if unknown:
        raise DataError(f"{png_path} holds the segment id {unknown[0]}, which the JSON lacks.")
    absent = sorted(row_of.keys() - {0} - set(present.tolist()))
    if absent:
        raise DataError(f"The JSON's segment id {absent[0]} has no pixel in {png_path}.")
    rows = np.array([row_of[source_id] for source_id in present.tolist()], np.uint16)
    return np.repeat(rows[run_ids], np.diff(starts, append=flat.size)).reshape(colours.shape)
