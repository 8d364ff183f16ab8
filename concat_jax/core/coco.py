"""COCO's annotation files, read by one rule for training, preparing and scoring.

Format: https://cocodataset.org/#format-data and #format-results. Whatever is wrong is one sentence
that names the file and the entry; a file that passes can be used without another check.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from concat_jax.core.files import FileError, read_json
from concat_jax.core.mask_codes import MAX_ID, checked_rle, polygons_to_rle
from concat_jax.core.vocabulary import Vocabulary

ImageId = int | str


@dataclasses.dataclass(frozen=True, slots=True)
class Category:
    """A class; `is_thing` is None where a file does not say."""

    id: int
    name: str
    is_thing: bool | None


@dataclasses.dataclass(frozen=True, slots=True)
class CocoImage:
    """An entry of "images", of `height` by `width` pixels."""

    id: ImageId
    file_name: str
    height: int
    width: int


@dataclasses.dataclass(frozen=True, slots=True)
class PanopticAnnotation:
    """The segments of an image, in the file's order; ids in 1..MAX_ID, the name is the PNG's."""

    image_id: ImageId
    file_name: str
    ids: tuple[int, ...]
    category_ids: tuple[int, ...]
    is_crowd: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class PanopticFile:
    """A COCO panoptic json, by image id; a prediction may list no categories and images."""

    path: pathlib.Path
    categories: dict[int, Category] | None
    images: dict[ImageId, CocoImage]
    annotations: dict[ImageId, PanopticAnnotation]


@dataclasses.dataclass(frozen=True, slots=True)
class InstanceAnnotation:
    """One object: its compressed run-length code, and its area where the file says it."""

    id: int
    category_id: int
    is_crowd: bool
    rle: dict
    area: float | None


@dataclasses.dataclass(frozen=True)
class InstanceFile:
    """A COCO instances json, by image id; images without an object have an empty list."""

    path: pathlib.Path
    categories: dict[int, Category]
    images: dict[ImageId, CocoImage]
    annotations: dict[ImageId, list[InstanceAnnotation]]


def read_panoptic(path: str | os.PathLike[str], *, prediction: bool = False) -> PanopticFile:
    """Reads a COCO panoptic json, not its PNGs; a prediction need not list categories and images.

    Raises FileError for a json of another kind, an entry that lacks or misuses something, an id
    that occurs twice, or a reference that leads nowhere.
    """
    path = pathlib.Path(path)
    content = _content(path, "a COCO panoptic json")
    categories = None
    if content.get("categories") is not None or not prediction:
        categories = read_categories(path, content, must_say_things=not prediction)
    images: dict[ImageId, CocoImage] = {}
    if content.get("images") is not None:
        images = read_images(path, content)
    annotations: dict[ImageId, PanopticAnnotation] = {}
    for position, entry in enumerate(_list(content, "annotations", path)):
        annotation = _panoptic_annotation(entry, f"annotation {position} of {path}", categories)
        if annotation.image_id in annotations:
            raise FileError(f"{path} annotates the image {annotation.image_id} more than once.")
        if images and annotation.image_id not in images:
            raise FileError(
                f"{path} annotates the image {annotation.image_id!r}, which its 'images' lack."
            )
        annotations[annotation.image_id] = annotation
    return PanopticFile(path, categories, images, annotations)


def read_instances(
    path: str | os.PathLike[str],
    *,
    on_fault: Callable[[ImageId, FileError], None] | None = None,
) -> InstanceFile:
    """Reads a COCO instances json; polygons become run-length codes. Raises as `read_panoptic`.

    A malformed outline or area goes to `on_fault`, and its annotation is left out; None raises it.
    """
    path = pathlib.Path(path)
    content = _content(path, "a COCO instances json")
    categories = read_categories(path, content, must_say_things=False)
    images = read_images(path, content)
    annotations: dict[ImageId, list[InstanceAnnotation]] = {image_id: [] for image_id in images}
    seen: set[int] = set()
    for position, entry in enumerate(_list(content, "annotations", path)):
        where = f"annotation {position} of {path}"
        number = _whole(_object(entry, where), "id", where)
        where = f"annotation {number} of {path}"
        if number in seen:
            raise FileError(f"{path} lists the annotation id {number} more than once.")
        seen.add(number)
        image_id = _image_id(entry, "image_id", where)
        if image_id not in images:
            raise FileError(f"{_upper(where)} is of image {image_id!r}, which 'images' lack.")
        category = _known_category(entry, where, categories)
        image = images[image_id]
        is_crowd = bool(_whole(entry, "iscrowd", where, high=1, default=0))
        try:
            rle = outline(entry.get("segmentation"), (image.height, image.width), where)
            area = entry.get("area")
            if area is not None and not _is_number(area, 0):
                raise FileError(f"The area of {where} is {area!r:.50} and must be a number.")
        except FileError as error:
            if on_fault is None:
                raise
            on_fault(image_id, error)
            continue
        annotations[image_id].append(InstanceAnnotation(number, category, is_crowd, rle, area))
    return InstanceFile(path, categories, images, annotations)


def outline(segmentation: Any, size: Sequence[int], where: str) -> dict:
    """A "segmentation", polygons or run lengths, as a compressed code; FileError names `where`."""
    try:
        if isinstance(segmentation, Mapping):
            return checked_rle(segmentation, size)
        if segmentation is None:
            raise ValueError("it is missing.")
        if not isinstance(segmentation, list):
            raise ValueError("it is neither a list of polygons nor run lengths.")
        if not segmentation:
            raise ValueError("it is empty.")
        if not isinstance(segmentation[0], list):
            raise ValueError("it is a flat list of numbers; polygons are lists in a list.")
        return polygons_to_rle(segmentation, size)
    except ValueError as error:
        raise FileError(f"The segmentation of {where} cannot be used: {error}") from error


def vocabulary_of(path: pathlib.Path, categories: Mapping[int, Category] | None) -> Vocabulary:
    """An annotation file's label space, all seen; FileError for no category or a name twice."""
    if not categories:
        raise FileError(f"{path} lists no 'categories'; give --split.")
    try:
        return Vocabulary(
            names=tuple(category.name for category in categories.values()),
            is_thing=tuple(category.is_thing is not False for category in categories.values()),
            is_seen=(True,) * len(categories),
            category_ids=tuple(categories),
        )
    except ValueError as error:
        raise FileError(f"The categories of {path} are no label space: {error}") from error


def check_categories(
    path: pathlib.Path,
    categories: Mapping[int, Category],
    vocabulary: Vocabulary,
    *,
    must_have_all: bool = True,
    may_have_more: bool = False,
    own_names: bool = False,
) -> None:
    """Refuses categories that are not the label space's; FileError names the first at fault.

    Args:
      must_have_all: a class that the file lacks is a fault, too.
      may_have_more: categories that the label space lacks are none.
      own_names: the file may call the classes by other names.
    """
    kind = {True: "a thing", False: "stuff", None: "either"}
    rows = zip(vocabulary.category_ids, vocabulary.names, vocabulary.is_thing, strict=True)
    ours = {number: (name, thing) for number, name, thing in rows}
    advice = "use a split made for this file."
    for number, category in categories.items():
        if number not in ours:
            if may_have_more:
                continue
            raise FileError(
                f"{path} lists category {number} ({category.name!r}), which is absent in the "
                f"split; {advice}"
            )
        name, thing = ours[number]
        if category.name != name and not own_names:
            raise FileError(
                f"{path} calls category {number} {category.name!r}, the split {name!r}; {advice}"
            )
        if category.is_thing not in (None, thing):
            raise FileError(
                f"Category {number} ({name!r}) is {kind[category.is_thing]} in {path} and "
                f"{kind[thing]} in the split; {advice}"
            )
    missing = [number for number in ours if number not in categories]
    if missing and (must_have_all or len(missing) == len(ours)):
        raise FileError(
            f"{path} lacks category {missing[0]} ({ours[missing[0]][0]!r}) of the split; {advice}"
        )


def _content(path: pathlib.Path, kind: str) -> dict:
    content = read_json(path)
    if not isinstance(content, dict):
        raise FileError(f"{path} is a {type(content).__name__}, not {kind}, which is an object.")
    return content


def _list(content: Mapping, key: str, where: Any) -> list:
    if not isinstance(content.get(key), list):
        raise FileError(f"{where} has no list of {key!r}; is it of COCO's format?")
    return content[key]


def _object(entry: Any, where: str) -> Mapping:
    if not isinstance(entry, Mapping):
        raise FileError(f"{_upper(where)} is {ascii(entry):.50} and must be an object.")
    return entry


def _upper(where: str) -> str:
    return where[0].upper() + where[1:]


def _is_number(value: Any, low: float) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= low


def _whole(
    entry: Mapping,
    key: str,
    where: Any,
    *,
    low: int = 0,
    high: int = 2**63 - 1,
    default: int | None = None,
) -> int:
    # Converters write true and false, integers to Python, for 1 and 0.
    value = entry.get(key, default)
    if isinstance(value, int) and low <= value <= high and (high == 1 or value is not True):
        return int(value)
    wanted = "0 or 1" if high == 1 else f"a whole number from {low} on"
    raise FileError(f"The {key!r} of {where} {_has(entry, key)}; it must be {wanted}.")


def _has(entry: Mapping, key: str) -> str:
    return f"is {ascii(entry[key]):.50}" if key in entry else "is missing"


def _image_id(entry: Mapping, key: str, where: str) -> ImageId:
    value = entry.get(key)
    return value if isinstance(value, str) and value else _whole(entry, key, where)


def _file_name(entry: Mapping, where: str) -> str:
    name = entry.get("file_name")
    # Of other characters, no file system has a name, and no terminal can show it.
    if not isinstance(name, str) or not name or not name.replace(" ", "_").isprintable():
        has = _has(entry, "file_name")
        raise FileError(f"The 'file_name' of {where} {has}; it must be a file's name.")
    return name


def _known_category(entry: Mapping, where: str, categories: Mapping | None) -> int:
    number = _whole(entry, "category_id", where)
    if categories is not None and number not in categories:
        raise FileError(f"{_upper(where)} has the category {number}, which the file does not list.")
    return number


def read_categories(
    path: pathlib.Path, content: Mapping, *, must_say_things: bool
) -> dict[int, Category]:
    """The list "categories" of a json's content, by id; faults as of `read_panoptic`."""
    categories: dict[int, Category] = {}
    for position, entry in enumerate(_list(content, "categories", path)):
        where = f"category {position} of {path}"
        number = _whole(_object(entry, where), "id", where)
        name = entry.get("name")
        where = f"category {number} ({ascii(name):.50}) of {path}"
        if not isinstance(name, str) or not name.strip():
            raise FileError(f"The 'name' of {where} must be a text.")
        if number in categories:
            raise FileError(f"{path} lists the category id {number} more than once.")
        is_thing = None
        if must_say_things or "isthing" in entry:
            is_thing = bool(_whole(entry, "isthing", where, high=1))
        categories[number] = Category(number, name, is_thing)
    return categories


def read_images(path: pathlib.Path, content: Mapping) -> dict[ImageId, CocoImage]:
    """The list "images" of a json's content, by id; faults as of `read_panoptic`."""
    images: dict[ImageId, CocoImage] = {}
    for position, entry in enumerate(_list(content, "images", path)):
        where = f"image {position} of {path}"
        image_id = _image_id(_object(entry, where), "id", where)
        where = f"image {image_id!r} of {path}"
        if image_id in images:
            raise FileError(f"{path} lists the image id {image_id!r} more than once.")
        height, width = (_whole(entry, side, where, low=1) for side in ("height", "width"))
        images[image_id] = CocoImage(image_id, _file_name(entry, where), height, width)
    return images


def _panoptic_annotation(
    entry: Any, where: str, categories: Mapping[int, Category] | None
) -> PanopticAnnotation:
    name = _file_name(_object(entry, where), where)
    where = where.replace(" of ", f" ({ascii(name)}) of ", 1)
    image_id = _image_id(entry, "image_id", where)
    segments = entry.get("segments_info")
    if not isinstance(segments, list):
        raise FileError(f"{_upper(where)} has no list of 'segments_info'.")
    ids, labels, crowd = [], [], []
    for segment in segments:
        of_segment = f"a segment of {where}"
        number = _whole(_object(segment, of_segment), "id", of_segment)
        of_segment = f"segment {number} of {where}"
        if not 1 <= number <= MAX_ID:
            why = "0 is void; number segments from 1" if number == 0 else f"ids end at {MAX_ID}"
            raise FileError(f"{_upper(of_segment)} cannot be told in a PNG: {why}.")
        ids.append(number)
        labels.append(_known_category(segment, of_segment, categories))
        crowd.append(bool(_whole(segment, "iscrowd", of_segment, high=1, default=0)))
    if len(set(ids)) < len(ids):
        double = next(number for number in ids if ids.count(number) > 1)
        raise FileError(f"{_upper(where)} lists the segment id {double} more than once.")
    return PanopticAnnotation(image_id, name, tuple(ids), tuple(labels), tuple(crowd))
