"""COCO's instance annotations: objects as polygons or run lengths, which may overlap.

An id map gives each pixel to one segment, so an image's instances are painted into one map: crowd
regions first, then instances from the largest to the smallest, so that a cup stays visible on its
table. An instance of which nothing remains has a row and no pixel, and is counted.
"""

from __future__ import annotations

import json
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from concat_jax.core.mask_codes import checked_rle, decode_rle
from concat_jax.core.vocabulary import Vocabulary
from data_pipelines.sources.coco_layout import check_presence, open_picture
from data_pipelines.sources.source import DataError, ImageRecord, image_number

logger = logging.getLogger(__name__)

Outline = list[np.ndarray] | dict[str, Any]


class CocoInstanceSource:
    """One part of a data set in COCO's instance format; a `FolderSource`.

    What no instance covers is void. Annotations of categories that the label space lacks, as the 15
    that are in neither set of ZSI's split, are left out.

    Attributes:
      vocabulary: the label space.
      records: every image of the JSON, those without an instance included, by ascending image id.
      images_folder: folder of the images.
      left_out: number of annotations of other categories.
    """

    def __init__(self, images: pathlib.Path, json_path: pathlib.Path, vocabulary: Vocabulary):
        """Reads the JSON and checks it and the presence of every image.

        Outlines are kept in memory: about half a gigabyte for COCO's training part.

        Args:
          images: folder of the images.
          json_path: the annotation file.
          vocabulary: its ids and names must be those of the JSON's categories, which need not hold
            all of them.

        Raises:
          DataError: if a file is missing, the JSON is inconsistent, or an outline is malformed.
          ValueError: if pycocotools is not installed.
        """
        _mask_functions()
        self.vocabulary, self.images_folder, self._json_path = vocabulary, images, json_path
        content = _read_json(json_path)
        known = {}
        try:
            sizes, categories = {}, _check_categories(json_path, content["categories"], vocabulary)
            for image in content["images"]:
                if image["id"] in known:
                    raise DataError(f"{json_path} lists the image id {image['id']} more than once.")
                size = (image["height"], image["width"])
                if any(type(side) is not int or side < 1 for side in size):
                    raise DataError(
                        f"{json_path} gives the image {image['id']} the height and width {size}, "
                        "which must be positive integers."
                    )
                known[image["id"]], sizes[image["id"]] = image, size
            rows: dict[Any, list[tuple]] = {image_id: [] for image_id in known}
            used: set[int] = set()
            self.left_out = 0
            for annotation in content["annotations"]:
                number, image_id = annotation["id"], annotation["image_id"]
                if image_id not in known:
                    raise DataError(
                        f"There is no image {image_id} for the annotation {number} of {json_path}."
                    )
                if type(number) is not int or number < 1 or number in used:
                    raise DataError(
                        f"The annotation id {number!r} in {json_path} must be a positive integer "
                        "that occurs once."
                    )
                used.add(number)
                if annotation["category_id"] not in categories:
                    raise DataError(
                        f"The annotation {number} of {json_path} has the category "
                        f"{annotation['category_id']}, which the file does not list."
                    )
                label = vocabulary.index_of_category.get(annotation["category_id"], -1)
                if label < 0:
                    self.left_out += 1
                    continue
                where = f"the annotation {number} of {json_path}"
                outline = _outline(annotation["segmentation"], sizes[image_id], where)
                rows[image_id].append((number, label, bool(annotation.get("iscrowd", 0)), outline))
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{json_path} is not in COCO's instance format: after {len(known)} images, an "
                f"entry lacks or misuses {error}."
            ) from error
        if self.left_out:
            logger.warning(
                "%s: %d annotations are of categories that the split lacks",
                json_path,
                self.left_out,
            )
        self._outlines: dict[int, list] = {}
        records: dict[int, ImageRecord] = {}
        for image_id, image in known.items():
            record = _record(image, rows[image_id], sizes[image_id], json_path)
            if record.image_id in records:
                raise DataError(f"{json_path} has two images with the number {record.image_id}.")
            records[record.image_id] = record
            self._outlines[record.image_id] = [outline for *_, outline in rows[image_id]]
        self.records = [records[image_id] for image_id in sorted(records)]
        check_presence("image", images, [record.file_name for record in self.records])

    def read(self, record: ImageRecord) -> tuple[Image.Image, np.ndarray]:
        """As `Source.read`."""
        path = self.images_folder / record.file_name
        image = open_picture(path, rgb=True)
        if image.size != (record.width, record.height):
            raise DataError(
                f"The image {path} is {image.height}x{image.width} (height x width) and "
                f"{self._json_path} says {record.height}x{record.width}; both must agree."
            )
        outlines = self._outlines[record.image_id]
        return image, paint(outlines, record.is_crowd, record.height, record.width)

    def count_hidden(self) -> int:
        """How many instances have no pixel of their own; paints every image to find out."""
        count = 0
        for record in self.records:
            outlines = self._outlines[record.image_id]
            ids = paint(outlines, record.is_crowd, record.height, record.width)
            count += len(outlines) - len(np.setdiff1d(ids, 0))
        return count


def paint(
    outlines: Sequence[Outline],
    is_crowd: np.ndarray,
    height: int,
    width: int,
) -> np.ndarray:
    """One id map of instances that may overlap.

    Args:
      outlines: n lists of polygons [2 P] of x and y in turn, or run-length codes of the map's size.
      is_crowd: [n] bool; crowd regions lie below all others.
      height, width: of the map.

    Returns:
      [height, width] uint16: 0 where there is no instance, r + 1 where instance r is on top. The
      smaller one is, by pixels of its whole mask; of two alike, the later.
    """
    ids = np.zeros((height, width), np.uint16)
    masks = [_mask(outline, height, width) for outline in outlines]
    areas = [mask.sum() for mask in masks]
    for row in sorted(range(len(masks)), key=lambda row: (not is_crowd[row], -areas[row])):
        ids[masks[row]] = row + 1
    return ids


def _mask(outline: Outline, height: int, width: int) -> np.ndarray:
    if isinstance(outline, dict):
        return decode_rle(outline)
    functions = _mask_functions()
    return functions.decode(functions.merge(functions.frPyObjects(outline, height, width))) > 0


def _mask_functions():
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ValueError(
            "COCO's instance files need pycocotools; install it, or requirements-data.txt."
        ) from error
    return mask


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"The annotation file {path} cannot be read: {error}.") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}.") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{path} is not in COCO's instance format: it lacks a list {key!r}.")
    if not content["images"]:
        raise DataError(f"{path} lists no image.")
    return content


def _check_categories(
    json_path: pathlib.Path, categories: list[Mapping[str, Any]], vocabulary: Vocabulary
) -> set[int]:
    listed = {category["id"]: category["name"] for category in categories}
    common = [c for c in vocabulary.category_ids if c in listed]
    for category in common:
        name = vocabulary.names[vocabulary.index_of_category[category]]
        if listed[category] != name:
            raise DataError(
                f"Category {category} is {listed[category]!r} in {json_path} and {name!r} in the "
                "split file; use a split file made for this data set."
            )
    if not common:
        raise DataError(f"{json_path} has no category of the split file; use one made for it.")
    return set(listed)


def _outline(segmentation: Any, size: tuple[int, int], where: str) -> Outline:
    """Checks an outline, since pycocotools trusts what it is given, and packs its numbers."""
    if isinstance(segmentation, list) and segmentation:
        polygons = []
        for polygon in segmentation:
            try:
                points = np.array(polygon, np.float64)
            except (TypeError, ValueError):
                points = np.zeros(0)
            # pycocotools takes four numbers for a box.
            if points.ndim != 1 or len(points) < 6 or len(points) % 2:
                raise DataError(
                    f"A polygon of {where} must list at least three points, x and y in turn."
                )
            if not np.isfinite(points).all():
                raise DataError(f"A polygon of {where} holds a number that is not finite.")
            # Far outside points would make pycocotools walk for ever; clipped, the mask is the same
            # up to where an edge crosses the border.
            polygons.append(np.clip(points, -4 * max(size), 4 * max(size)))
        return polygons
    if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), list | str):
        try:
            return checked_rle(segmentation, size)
        except ValueError as error:
            raise DataError(f"The run lengths of {where} are wrong: {error}") from error
    raise DataError(f"{where[0].upper()}{where[1:]} has neither polygons nor run lengths.")


def _record(
    image: Mapping[str, Any], rows: list[tuple], size: tuple[int, int], json_path: pathlib.Path
) -> ImageRecord:
    return ImageRecord(
        image_id=image_number(image["id"], str(json_path)),
        file_name=image["file_name"],
        png_name="",
        height=size[0],
        width=size[1],
        source_ids=np.array([number for number, *_ in rows], np.int64),
        labels=np.array([label for _, label, *_ in rows], np.int32),
        is_crowd=np.array([crowd for _, _, crowd, _ in rows], bool),
    )
