"""COCO's annotation files, read by one rule for training, preparing and scoring.

Format: https://cocodataset.org/#format-data and #format-results. Whatever is wrong is one sentence
that names the file and the entry; a file that passes can be used without another check.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from hotcoco.mask import area

from concat_jax.core.files import FileError, as_path, read_json
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

    path: epath.Path
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

    path: epath.Path
    categories: dict[int, Category]
    images: dict[ImageId, CocoImage]
    annotations: dict[ImageId, list[InstanceAnnotation]]


def read_panoptic(path: str | os.PathLike[str], *, prediction: bool = False) -> PanopticFile:
    """Reads a COCO panoptic json, not its PNGs; a prediction need not list categories and images.

    Raises FileError for a json of another kind, an entry that lacks or misuses something, an id
    that occurs twice, or a reference that leads nowhere.
    """
    path = as_path(path)
    content = _content(path, "a COCO panoptic json")
    categories = None
    if content.get("categories") is not None or not prediction:
        categories = read_categories(path, content, must_say_things=not prediction)
    images: dict[ImageId, CocoImage] = {}
    if content.get("images") is not None:
        images = read_images(path, content)
    annotations: dict[ImageId, PanopticAnnotation] = {}
    for entry in _entries(content, "annotations", "annotation", path):
        annotation = _panoptic_annotation(entry, categories)
        if annotation.image_id in annotations:
            raise FileError(f"{path} annotates the image {annotation.image_id} more than once.")
        if images and annotation.image_id not in images:
            raise FileError(
                f"{path} annotates the image {annotation.image_id!r}, which its 'images' lack."
            )
        annotations[annotation.image_id] = annotation
    return PanopticFile(path, categories, images, annotations)


def read_instances(
    path: str | os.PathLike[str], *, on_fault: Callable[[ImageId, FileError], None] | None = None
) -> InstanceFile:
    """Reads a COCO instances json; polygons become run-length codes. Raises as `read_panoptic`.

    A malformed outline or area goes to `on_fault`, and its annotation is left out; None raises it.
    """
    path = as_path(path)
    content = _content(path, "a COCO instances json")
    categories = read_categories(path, content, must_say_things=False)
    images = read_images(path, content)
    annotations: dict[ImageId, list[InstanceAnnotation]] = {image_id: [] for image_id in images}
    seen: dict[int, None] = {}
    for entry in _entries(content, "annotations", "annotation", path):
        number = entry.whole("id")
        entry.where = f"annotation {number} of {path}"
        _put(seen, number, None, "annotation", path)
        if (image_id := entry.image_id("image_id")) not in images:
            raise entry.fault(f"is of image {image_id!r}, which 'images' lack")
        category, is_crowd = entry.category(categories), entry.flag("iscrowd", 0)
        image, area = images[image_id], entry.content.get("area")
        try:
            segmentation = entry.content.get("segmentation")
            rle = outline(segmentation, (image.height, image.width), entry.where)
            is_number = isinstance(area, int | float) and not isinstance(area, bool)
            if area is not None and not (is_number and 0 <= area < math.inf):
                raise FileError(f"The area of {entry.where} is {area!r:.50} and must be a number.")
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
            code = checked_rle(segmentation, size)
        elif segmentation is None:
            raise ValueError("it is missing.")
        elif not isinstance(segmentation, list):
            raise ValueError("it is neither a list of polygons nor run lengths.")
        elif not segmentation:
            raise ValueError("it is empty.")
        elif not isinstance(segmentation[0], list):
            raise ValueError("it is a flat list of numbers; polygons are lists in a list.")
        else:
            code = polygons_to_rle(segmentation, size)
        if not area(code):
            # A polygon in the image, or rounded to its border, may be too small; COCO has such.
            polygons = segmentation if isinstance(segmentation, list) else ([],)
            corners = np.concatenate(polygons).reshape(-1, 2)
            near = (corners >= -1) & (corners <= np.add(size[::-1], 1))
            if not near.all(axis=1).any():
                raise ValueError("it covers no pixel of its image.")
        return code
    except ValueError as error:
        raise FileError(f"The segmentation of {where} cannot be used: {error}") from error


def vocabulary_of(path: epath.Path, categories: Mapping[int, Category] | None) -> Vocabulary:
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
    path: epath.Path,
    categories: Mapping[int, Category],
    vocabulary: Vocabulary,
    *,
    must_have_all: bool = True,
    may_have_more: bool = False,
    own_names: bool = False,
    remedy: str = "use a split made for this file",
) -> None:
    """Refuses categories that are not the label space's; FileError names the first at fault.

    Args:
      must_have_all: a class that the file lacks is a fault, too.
      may_have_more: categories that the label space lacks are none.
      own_names: the file may call the classes by other names.
      remedy: how the error ends.
    """
    kind = {True: "a thing", False: "stuff", None: "either"}
    rows = zip(vocabulary.category_ids, vocabulary.names, vocabulary.is_thing, strict=True)
    ours = {number: (name, thing) for number, name, thing in rows}
    for number, category in categories.items():
        if number not in ours:
            if may_have_more:
                continue
            raise FileError(
                f"{path} lists category {number} ({category.name!r}), which is absent in the "
                f"label space; {remedy}."
            )
        name, thing = ours[number]
        if category.name != name and not own_names:
            raise FileError(
                f"{path} calls category {number} {category.name!r}, the label space {name!r}; "
                f"{remedy}."
            )
        if category.is_thing not in (None, thing):
            raise FileError(
                f"Category {number} ({name!r}) is {kind[category.is_thing]} in {path} and "
                f"{kind[thing]} in the label space; {remedy}."
            )
    missing = [number for number in ours if number not in categories]
    if missing and (must_have_all or len(missing) == len(ours)):
        raise FileError(
            f"{path} lacks category {missing[0]} ({ours[missing[0]][0]!r}) of the label space; "
            f"{remedy}."
        )


def read_categories(
    path: epath.Path, content: Mapping, *, must_say_things: bool
) -> dict[int, Category]:
    """The list "categories" of a json's content, by id; faults as of `read_panoptic`."""
    categories: dict[int, Category] = {}
    for entry in _entries(content, "categories", "category", path):
        number, name = entry.whole("id"), entry.content.get("name")
        entry.where = f"category {number} ({ascii(name):.50}) of {path}"
        if not isinstance(name, str) or not name.strip():
            raise FileError(f"The 'name' of {entry.where} must be a text.")
        says = must_say_things or "isthing" in entry.content
        is_thing = entry.flag("isthing") if says else None
        _put(categories, number, Category(number, name, is_thing), "category", path)
    return categories


def read_images(path: epath.Path, content: Mapping) -> dict[ImageId, CocoImage]:
    """The list "images" of a json's content, by id; faults as of `read_panoptic`."""
    images: dict[ImageId, CocoImage] = {}
    for entry in _entries(content, "images", "image", path):
        image_id = entry.image_id("id")
        entry.where = f"image {image_id!r} of {path}"
        height, width = (entry.whole(side, low=1) for side in ("height", "width"))
        image = CocoImage(image_id, entry.file_name(), height, width)
        _put(images, image_id, image, "image", path)
    return images


def _panoptic_annotation(
    entry: _Entry, categories: Mapping[int, Category] | None
) -> PanopticAnnotation:
    name = entry.file_name()
    entry.where = entry.where.replace(" of ", f" ({ascii(name)}) of ", 1)
    image_id, segments = entry.image_id("image_id"), entry.content.get("segments_info")
    if not isinstance(segments, list):
        raise entry.fault("has no list of 'segments_info'")
    rows: dict[int, tuple[int, bool]] = {}
    for content in segments:
        segment = _Entry(content, f"a segment of {entry.where}")
        number = segment.whole("id")
        segment.where = f"segment {number} of {entry.where}"
        if not 1 <= number <= MAX_ID:
            why = "0 is void; number segments from 1" if number == 0 else f"ids end at {MAX_ID}"
            raise segment.fault(f"cannot be told in a PNG: {why}")
        row = segment.category(categories), segment.flag("iscrowd", 0)
        _put(rows, number, row, "segment", _upper(entry.where))
    labels, crowd = (tuple(row[column] for row in rows.values()) for column in (0, 1))
    return PanopticAnnotation(image_id, name, tuple(rows), labels, crowd)


def spelt(path: str | os.PathLike[str]) -> pathlib.PurePosixPath:
    """A path as names of files are compared: Windows' backslashes as slashes, Unicode in form C."""
    return pathlib.PurePosixPath(unicodedata.normalize("NFC", os.fspath(path).replace("\\", "/")))


def _content(path: epath.Path, kind: str) -> dict:
    content = read_json(path)
    if not isinstance(content, dict):
        what = "a list" if isinstance(content, list) else "one value"
        raise FileError(f"{path} is {what}, not {kind}, which is an object.")
    return content


def _put(table: dict, number: ImageId, value: Any, what: str, where: Any) -> None:
    """Adds an entry whose id must be new."""
    if number in table:
        raise FileError(f"{where} lists the {what} id {number!r} more than once.")
    table[number] = value


def _upper(where: str) -> str:
    return where[0].upper() + where[1:]


def _entries(content: Mapping, key: str, what: str, path: epath.Path) -> Iterator[_Entry]:
    """The objects of a list of a file, called by their position."""
    if not isinstance(content.get(key), list):
        raise FileError(f"{path} has no list of {key!r}; is it of COCO's format?")
    for position, entry in enumerate(content[key]):
        yield _Entry(entry, f"{what} {position} of {path}")


class _Entry:
    """An object of a json, read key by key; `where` is what a FileError calls it."""

    __slots__ = ("content", "where")

    def __init__(self, content: Any, where: str):
        self.content, self.where = content, where
        if not isinstance(content, Mapping):
            raise self.fault(f"is {ascii(content):.50} and must be an object")

    def fault(self, what: str) -> FileError:
        return FileError(f"{_upper(self.where)} {what}.")

    def _wrong(self, key: str, wanted: str) -> FileError:
        has = f"is {ascii(self.content[key]):.50}" if key in self.content else "is missing"
        return FileError(f"The {key!r} of {self.where} {has}; it must be {wanted}.")

    def whole(self, key: str, low: int = 0) -> int:
        value = self.content.get(key)
        if isinstance(value, int) and value is not True and low <= value < 2**63:
            return int(value)  # of false, which converters write for 0
        raise self._wrong(key, f"a whole number from {low} on")

    def flag(self, key: str, default: int | None = None) -> bool:
        value = self.content.get(key, default)
        if isinstance(value, int) and value in (0, 1):  # or true and false
            return bool(value)
        raise self._wrong(key, "0 or 1")

    def image_id(self, key: str) -> ImageId:
        value = self.content.get(key)
        return value if isinstance(value, str) and value else self.whole(key)

    def file_name(self) -> str:
        name = self.content.get("file_name")
        # No file system has the name 0, and surrogates are no text.
        if not isinstance(name, str) or not name or re.search("[\0\ud800-\udfff]", name):
            raise self._wrong("file_name", "a file's name")
        return name

    def category(self, categories: Mapping[int, Category] | None) -> int:
        number = self.whole("category_id")
        if categories is not None and number not in categories:
            raise self.fault(f"has the category {number}, which the file does not list")
        return number
