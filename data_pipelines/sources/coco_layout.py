"""COCO's panoptic layout on disk: where the files are, what the JSON says, how one image is read.

Every part is checked against the others, so that a broken download or a slip in a converter is one
sentence with a file name in it.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from concat_jax.core.files import ImageError, open_image
from concat_jax.core.vocabulary import Vocabulary
from data_pipelines.id_runs import run_starts
from data_pipelines.sources.source import DataError, ImageRecord, image_number

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where one part of a data set lies: images folder, panoptic PNG folder, annotation file."""

    images: pathlib.Path
    pngs: pathlib.Path
    json_path: pathlib.Path


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


def read_records(
    layout: Layout, vocabulary: Vocabulary, *, own_names: bool = False
) -> list[ImageRecord]:
    """Reads the annotation file; one record for each annotation, by ascending image id.

    Args:
      layout: where the files are.
      vocabulary: what the JSON's categories must be.
      own_names: the JSON may call categories by other names; ids and things still must agree.

    Returns:
      Records whose image ids are the JSON's integers, or `image_number` of its strings.

    Raises:
      DataError: if the file is not COCO panoptic JSON, its categories are not the vocabulary's, an
        id occurs twice, a reference leads nowhere, or an image or PNG is not on disk.
    """
    json_path = layout.json_path
    content = read_json(json_path)
    if not isinstance(content, dict):
        raise DataError(f"{json_path} must hold a JSON object, in COCO's panoptic format.")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list) or not content[key]:
            raise DataError(f"{json_path} lacks a non-empty list under {key!r}.")
    images: dict[int | str, Mapping[str, Any]] = {}
    records: dict[int, ImageRecord] = {}
    try:
        _check_categories(json_path, content["categories"], vocabulary, own_names)
        for image in content["images"]:
            image_number(image["id"], str(json_path))
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
    for field in ("file_name", "png_name"):
        counts = collections.Counter(getattr(record, field) for record in ordered)
        name, count = counts.most_common(1)[0]
        if count > 1:
            raise DataError(f"{json_path} names the file {name} for {count} images.")
    check_presence("image", layout.images, [record.file_name for record in ordered])
    check_presence("panoptic PNG", layout.pngs, [record.png_name for record in ordered])
    return ordered


def read_json(path: pathlib.Path) -> Any:
    """The content of a JSON file.

    Raises:
      DataError: if the file cannot be read, or is not JSON; NaN and Infinity are not.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    try:
        return json.loads(path.read_bytes(), parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}.") from error


def read_image(
    layout: Layout, record: ImageRecord, *, hidden_segments: bool = False
) -> tuple[Image.Image, np.ndarray]:
    """Decodes an image and its id map at native size, and checks one against the other.

    Args:
      layout: where the files are.
      record: of the image.
      hidden_segments: segments of the JSON without a pixel in the PNG are not a fault: what made
        the files painted others over them.

    Returns:
      The RGB image, with EXIF rotation applied, and the id map [H, W], uint8 or for more than 255
      segments uint16: 0 void, r + 1 where the segment of row r of the record's tables is.

    Raises:
      DataError: if a file cannot be decoded, the sizes of image, PNG and JSON differ, or PNG and
        JSON do not hold the same segment ids.
    """
    image_path, png_path = layout.images / record.file_name, layout.pngs / record.png_name
    image, png = open_picture(image_path, rgb=True), open_picture(png_path)
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
    return image, _rows_of_pixels(png, record.source_ids, png_path, hidden_segments)


def open_picture(path: pathlib.Path, *, rgb: bool = False) -> Image.Image:
    """Decodes an image file, EXIF rotation applied, in the mode that it has or as RGB.

    Raises:
      DataError: if that is not possible; the sentence names the file.
    """
    try:
        with open_image(path) as picture:
            picture.load()
            # Annotators saw the rotated picture; detectron2's `read_image` applies EXIF as well.
            ImageOps.exif_transpose(picture, in_place=True)
            # PIL does not look beyond the pixels, so a PNG cut off after them would pass.
            if picture.format == "PNG" and not _has_end(path):
                raise ImageError(f"{path} is cut off: it lacks the end of a PNG.")
            return picture.convert("RGB") if rgb and picture.mode != "RGB" else picture
    except ImageError as error:
        raise DataError(str(error)) from error


def _has_end(path: pathlib.Path) -> bool:
    # Whether a PNG has its last chunk, wherever: some programs write a few bytes behind it.
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        return b"IEND\xaeB`\x82" in file.read()


def _check_categories(
    json_path: pathlib.Path,
    categories: Sequence[Mapping[str, Any]],
    vocabulary: Vocabulary,
    own_names: bool,
) -> None:
    listed = {}
    for category in categories:
        where = f"the category {category['id']} of {json_path}"
        number = _whole_number(category, "id", where)
        if number in listed:
            raise DataError(f"{json_path} lists the category id {number} more than once.")
        listed[number] = (category["name"], bool(_whole_number(category, "isthing", where, 0, 1)))
    ids, names, things = vocabulary.category_ids, vocabulary.names, vocabulary.is_thing
    if own_names:
        names = [listed.get(i, (name,))[0] for i, name in zip(ids, names, strict=True)]
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
    images: Mapping[int | str, Mapping[str, Any]],
    vocabulary: Vocabulary,
) -> ImageRecord:
    png_name = _file_name(annotation, f"an annotation of {json_path}")
    where = f"the annotation {png_name!r} of {json_path}"
    image = images.get(annotation["image_id"])
    if image is None:
        raise DataError(f"There is no image {annotation['image_id']} for {where}.")
    segments = annotation["segments_info"]
    if not isinstance(segments, list):
        raise DataError(f"The segments_info of {where} must be a list.")
    # 0 is void; three bytes hold no more.
    of_segment = f"a segment of {where}"
    source_ids = [_whole_number(segment, "id", of_segment, 1, 0xFFFFFF) for segment in segments]
    for segment in segments:
        _whole_number(segment, "category_id", of_segment)
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
    is_crowd = [
        "iscrowd" in segment and _whole_number(segment, "iscrowd", of_segment, 0, 1)
        for segment in segments
    ]
    of_image = f"the image {image['id']} of {json_path}"
    return ImageRecord(
        image_id=image_number(image["id"], str(json_path)),
        file_name=_file_name(image, of_image),
        png_name=png_name,
        height=_whole_number(image, "height", of_image, 1),
        width=_whole_number(image, "width", of_image, 1),
        source_ids=np.array(source_ids, np.int64),
        labels=np.array(labels, np.int32),
        is_crowd=np.array(is_crowd, bool),
    )


def _whole_number(
    entry: Mapping[str, Any], key: str, where: str, low: int = 0, high: int = 2**63 - 1
) -> int:
    # JSON's true and false are integers to Python; converters write them for 1 and 0.
    value = entry[key]
    if not isinstance(value, int) or not low <= value <= high:
        # Cut, because a fault may be as long as the file.
        raise DataError(
            f"The {key} in {where} is {ascii(value)[:50]} and must be an integer from {low} to "
            f"{high}."
        )
    return int(value)


def _file_name(entry: Mapping[str, Any], where: str) -> str:
    name = entry["file_name"]
    # Of other characters, no file system has a name, and no terminal can show it.
    if not isinstance(name, str) or not name or not name.replace(" ", "_").isprintable():
        raise DataError(
            f"The file_name in {where} is {ascii(name)[:50]} and must be a file's name."
        )
    return name


def check_presence(what: str, folder: pathlib.Path, names: Sequence[str]) -> None:
    """Raises a DataError that names the first of `names` that is not in `folder`."""
    # One listing: asking for each of COCO's 240,000 files takes minutes on a network disk.
    listed = set(os.listdir(folder))
    for name in names:
        if name not in listed and not (folder / name).is_file():
            raise DataError(f"The {what} {folder / name} is in the JSON but not on disk.")


def _rows_of_pixels(
    png: Image.Image, source_ids: np.ndarray, png_path: pathlib.Path, hidden_segments: bool
) -> np.ndarray:
    # Segments are long runs of one id: a look-up for each run instead of each pixel is far faster.
    # PIL keeps four bytes a pixel, so this is a copy; the fourth is masked out of the runs only.
    packed = (png if png.mode == "RGB" else png.convert("RGB")).tobytes("raw", "RGBX")
    flat = np.frombuffer(packed, "<u4")
    starts = run_starts(flat)
    present, run_ids = np.unique(flat[starts] & 0xFFFFFF, return_inverse=True)
    row_of = {0: 0} | {source_id: row + 1 for row, source_id in enumerate(source_ids.tolist())}
    unknown = sorted(set(present.tolist()) - row_of.keys())
    if unknown:
        raise DataError(f"{png_path} holds the segment id {unknown[0]}, which the JSON lacks.")
    absent = sorted(row_of.keys() - {0} - set(present.tolist()))
    if absent and not hidden_segments:
        raise DataError(f"The JSON's segment id {absent[0]} has no pixel in {png_path}.")
    dtype = np.uint8 if len(source_ids) <= 255 else np.uint16
    rows = np.array([row_of[source_id] for source_id in present.tolist()], dtype)
    lengths = np.diff(starts, append=flat.size)
    return np.repeat(rows[run_ids], lengths).reshape(png.height, png.width)
