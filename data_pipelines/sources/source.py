"""What every data set on disk looks like to the loader: records of its images, and how to read one.

A source is one part (training or evaluation) of a data set in some layout. The layouts are files
beside this one; `registry` opens one by name. What training does with images that show
unseen classes is decided here, for all alike.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from concat_jax.core.config import check_choice
from concat_jax.core.vocabulary import Vocabulary

UnseenImages = Literal["drop", "void", "keep"]
UNSEEN_IMAGES: tuple[str, ...] = ("drop", "void", "keep")


@dataclasses.dataclass(frozen=True, slots=True)
class ImageRecord:
    """What the annotation says of one image; the segment tables [n] are in the annotation's order.

    Attributes:
      image_id: unique within the part.
      png_name: "" where a layout has no such file.
      source_ids: [n] int64, the segments' ids in the data set's own files, each once.
      labels: [n] int32, class indices into the vocabulary.
    """

    image_id: int
    file_name: str
    png_name: str
    height: int
    width: int
    source_ids: np.ndarray
    labels: np.ndarray
    is_crowd: np.ndarray


class Source(Protocol):
    """One part (training or evaluation) of a data set on disk; records by ascending image id."""

    vocabulary: Vocabulary
    records: Sequence[ImageRecord]

    def read(self, record: ImageRecord) -> tuple[Image.Image, np.ndarray]:
        """The RGB image, EXIF rotation applied, and its id map [H, W] uint8 or uint16.

        0 is void, r + 1 the segment of row r of the record's tables. A segment that others hide has
        a row and no pixel. Raises FileError for files that do not fit together or to the record.
        """
        ...


class FolderSource(Source, Protocol):
    """A source whose images are files, as all but prepared ones are.

    Attributes:
      images_folder: what the records' file names are relative to.
    """

    images_folder: pathlib.Path


def image_numbers(image_ids: Sequence[int | str]) -> list[int]:
    """A number for each image of a part: its id, of a text the digits in it, read as one.

    "ADE_val_00000017" is 17 and "2007_000032" is 2007000032. Where that gives a text none that has
    63 bits, or two images one, all have their places, from 1.
    """
    numbers = []
    for image_id in image_ids:
        digits = "".join(re.findall("[0-9]", str(image_id)))
        # Python reads no text of thousands of digits.
        numbers.append(int(digits) if 0 < len(digits) < 20 else -1)
    if len({*numbers}) == len(numbers) and all(0 <= number < 2**63 for number in numbers):
        return numbers
    return list(range(1, len(numbers) + 1))


def treat_unseen(source: Source, treatment: UnseenImages) -> tuple[Source, np.ndarray]:
    """What training may see of a source.

    "drop" leaves out every image with a segment, crowd included, of an unseen class (PADing
    `datasets/get_zsp_json.py`). "void" keeps the image, but the pixels of its unseen segments,
    crowd included, become void and their rows vanish (ZegFormer
    `prepare_coco_stuff_sem_seg_seen.py`); an image of which nothing is left is left out. "keep"
    takes all images and all classes: not zero-shot, but what supervised reference runs need.

    Returns:
      The source to train from, which is `source` itself unless segments vanish, and the positions
      in its records that training may use, [M] int64 ascending. Positions are the same in both.
      An image without any segment teaches nothing and is never among them.
    """
    check_choice(treatment, UNSEEN_IMAGES, "unseen_images is")
    is_seen = np.array(source.vocabulary.is_seen)
    if treatment == "void":
        source = _WithoutUnseen(source)
    usable = [
        len(record.labels) > 0 and (treatment != "drop" or is_seen[record.labels].all())
        for record in source.records
    ]
    return source, np.flatnonzero(usable)


class _WithoutUnseen:
    """A source whose segments of unseen classes have become void."""

    def __init__(self, source: Source):
        self.vocabulary = source.vocabulary
        self._source = source
        is_seen = np.array(source.vocabulary.is_seen)
        self.records = [_select_rows(record, is_seen[record.labels]) for record in source.records]
        self._originals = {record.image_id: record for record in source.records}

    def read(self, record: ImageRecord) -> tuple[Image.Image, np.ndarray]:
        """As `Source.read`, without the unseen segments."""
        original = self._originals[record.image_id]
        image, ids = self._source.read(original)
        return image, keep_rows(ids, np.array(self.vocabulary.is_seen)[original.labels])


def keep_rows(segment_ids: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """An id map whose segments of other rows than `kept` [n] bool are void, the others in a row."""
    if kept.all():
        return segment_ids
    renumber = np.zeros(len(kept) + 1, segment_ids.dtype)
    renumber[1:][kept] = np.arange(1, kept.sum() + 1)
    return renumber[segment_ids]


def _select_rows(record: ImageRecord, rows: np.ndarray) -> ImageRecord:
    if rows.all():
        return record
    tables = ("source_ids", "labels", "is_crowd")
    return dataclasses.replace(record, **{name: getattr(record, name)[rows] for name in tables})
