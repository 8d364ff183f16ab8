"""COCO's instance annotations: objects as polygons or run lengths, which may overlap.

An id map gives each pixel to one segment, so an image's instances are painted into one map: crowd
regions first, then instances from the largest to the smallest, so that a cup stays visible on its
table. An instance of which nothing remains has a row and no pixel.
"""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from concat_jax.core.coco import ImageId, check_categories, read_instances
from concat_jax.core.files import FileError
from concat_jax.core.mask_codes import decode_rle
from concat_jax.core.vocabulary import Vocabulary
from data_pipelines.sources.pictures import leave_out, present, read_picture
from data_pipelines.sources.source import ImageRecord, image_numbers

logger = logging.getLogger(__name__)


class CocoInstanceSource:
    """One part of a data set in COCO's instance format; a `FolderSource`.

    What no instance covers is void. Annotations of categories that the label space lacks, as the 15
    that are in neither set of ZSI's split, are left out and counted.
    """

    def __init__(
        self,
        images: pathlib.Path,
        json_path: pathlib.Path,
        vocabulary: Vocabulary,
        *,
        on_bad_example: Literal["raise", "skip"] = "raise",
    ):
        """Reads the JSON and checks it and the presence of every image.

        Masks are kept in memory as run lengths: about half a gigabyte for COCO's training part.
        With `on_bad_example` "skip" an image that is missing, or has a malformed outline, is left
        out, logged and counted.
        """
        self.vocabulary, self.images_folder, self._json_path = vocabulary, images, json_path
        faults: dict[ImageId, FileError] = {}
        skips = on_bad_example == "skip"
        content = read_instances(json_path, on_fault=faults.setdefault if skips else None)
        check_categories(
            json_path, content.categories, vocabulary, must_have_all=False, may_have_more=True
        )
        for error in faults.values():
            leave_out(error, skips)
        self.left_out = 0
        self._masks: dict[int, list[Mapping[str, Any]]] = {}
        records = []
        numbers = image_numbers([*content.images])
        for number, image in zip(numbers, content.images.values(), strict=True):
            if image.id in faults:
                continue
            rows = []
            for annotation in content.annotations[image.id]:
                if annotation.id < 1:
                    raise FileError(f"{json_path} has the annotation id 0; number from 1.")
                label = vocabulary.index_of_category.get(annotation.category_id)
                if label is None:
                    self.left_out += 1
                else:
                    rows.append((annotation, label))
            self._masks[number] = [annotation.rle for annotation, _ in rows]
            record = ImageRecord(
                image_id=number,
                file_name=image.file_name,
                png_name="",
                height=image.height,
                width=image.width,
                source_ids=np.array([annotation.id for annotation, _ in rows], np.int64),
                labels=np.array([label for _, label in rows], np.int32),
                is_crowd=np.array([annotation.is_crowd for annotation, _ in rows], bool),
            )
            records.append(record)
        if not records:
            raise FileError(f"{json_path} lists no image that can be used.")
        if self.left_out:
            logger.warning(
                "%s: %d annotations are of categories that the split lacks",
                json_path,
                self.left_out,
            )
        records.sort(key=lambda record: record.image_id)
        self.records = present(images, records, "file_name", json_path, skips=skips)
        self.skipped = len(content.images) - len(self.records)

    def masks(self, record: ImageRecord) -> Sequence[Mapping[str, Any]]:
        """The run lengths of the record's instances, whole where others hide them."""
        return self._masks[record.image_id]

    def read(self, record: ImageRecord) -> tuple[Image.Image, np.ndarray]:
        """As `Source.read`."""
        image = read_picture(self.images_folder, record, self._json_path)
        codes = self._masks[record.image_id]
        return image, paint(codes, record.is_crowd, record.height, record.width)


def paint(
    codes: Sequence[Mapping[str, Any]], is_crowd: np.ndarray, height: int, width: int
) -> np.ndarray:
    """One id map [height, width] uint16 of instances that may overlap, r + 1 for instance r.

    Crowd regions lie below all others; then the smaller one is on top, by pixels of its whole mask;
    of two alike, the later.
    """
    ids = np.zeros((height, width), np.uint16)
    masks = [decode_rle(code) for code in codes]
    areas = [mask.sum() for mask in masks]
    for row in sorted(range(len(masks)), key=lambda row: (not is_crowd[row], -areas[row])):
        ids[masks[row]] = row + 1
    return ids
