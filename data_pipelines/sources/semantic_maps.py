"""Data sets of label maps: a folder of images, and for each a picture whose pixels are classes.

COCO-Stuff, ADE20K, Pascal Context and Pascal VOC come like this. A map does not tell one object
from the next, so each class that occurs is one segment, and no class counts as a thing: what a
model predicts is merged by class as well.

No list says which classes an image shows, and the zero-shot rule must know. So all maps are read
once when a source is made, in threads (COCO's 118,287 take minutes; `data_pipelines.prepare` keeps
the answer in its shards), and the classes are kept in memory.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import numpy as np
from PIL import Image

from concat_jax.core.files import FileError, read_text
from concat_jax.core.mask_codes import read_label_map
from concat_jax.core.prefetch import with_progress
from concat_jax.core.vocabulary import Vocabulary
from data_pipelines.sources.pictures import check_end, leave_out, read_picture
from data_pipelines.sources.source import ImageRecord, image_numbers

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
MAP_SUFFIXES = (".png", ".tif", ".tiff")


class SemanticMapSource:
    """One part of a data set of label maps; a `FolderSource`. Every class is stuff.

    A record's source ids are pixel values plus 1, because an id of 0 means void.
    """

    def __init__(
        self,
        images: pathlib.Path,
        maps: pathlib.Path,
        vocabulary: Vocabulary,
        *,
        offset: int = 0,
        ignored: Collection[int] = (255,),
        stems: Sequence[str] | None = None,
        on_bad_example: Literal["raise", "skip"] = "raise",
    ):
        """Pairs images with maps, and reads all maps for the classes they show.

        Args:
          maps: folder of the maps; a map has its image's name up to the suffix.
          vocabulary: its category ids are pixel values plus `offset`.
          stems: names of the images that are part of this, without suffixes; None takes all maps.
          on_bad_example: "skip" leaves out what is missing or unusable, logged and counted.
        """
        self.vocabulary = dataclasses.replace(vocabulary, is_thing=(False,) * len(vocabulary))
        self.images_folder, self._maps = images, maps
        self._label_of_value = {
            category - offset: label for category, label in vocabulary.index_of_category.items()
        }
        self._ignored = frozenset(ignored) - self._label_of_value.keys()
        image_names, map_names = _by_stem(images, IMAGE_SUFFIXES), _by_stem(maps, MAP_SUFFIXES)
        stems = sorted(map_names if stems is None else stems)
        skips, pairs = on_bad_example == "skip", []
        for stem in stems:
            if stem not in map_names:
                leave_out(FileError(f"There is no map {stem}.png (or .tif) in {maps}."), skips)
            elif stem not in image_names:
                path = maps / map_names[stem]
                leave_out(FileError(f"There is no image for the map {path} in {images}."), skips)
            else:
                pairs.append((image_names[stem], map_names[stem]))
        if len(image_names) > len(map_names):
            logger.warning("%s: %d images have no map", images, len(image_names) - len(map_names))
        numbers = image_numbers([pathlib.Path(image).stem for image, _ in pairs])
        rows = [(number, *pair) for number, pair in zip(numbers, pairs, strict=True)]

        def scan(index: int) -> ImageRecord | None:
            return self._scan(*rows[index], skips=skips)

        found = list(with_progress(f"Maps of {maps}", scan, len(rows)))
        self.skipped = len(stems) - len(pairs) + found.count(None)
        self.records = sorted(filter(None, found), key=lambda record: record.image_id)
        if not self.records:
            raise FileError(f"Not one map of {maps} can be used.")

    def read(self, record: ImageRecord) -> tuple[Image.Image, np.ndarray]:
        """As `Source.read`."""
        path = self._maps / record.png_name
        values = _read_map(path)
        rows = np.zeros(65536 if values.dtype == np.uint16 else 256, np.uint16)
        rows[record.source_ids - 1] = np.arange(1, len(record.source_ids) + 1)
        present = self._classes(values, path)
        same = values.shape == (record.height, record.width)
        if present != (record.source_ids - 1).tolist() or not same:
            raise FileError(f"The map {path} is not what it was when the data set was opened.")
        return read_picture(self.images_folder, record, path), rows[values]

    def _scan(
        self, number: int, image_name: str, map_name: str, *, skips: bool
    ) -> ImageRecord | None:
        path = self._maps / map_name
        try:
            values = _read_map(path)
            present = self._classes(values, path)
        except FileError as error:
            leave_out(error, skips)
            return None
        return ImageRecord(
            image_id=number,
            file_name=image_name,
            png_name=map_name,
            height=values.shape[0],
            width=values.shape[1],
            source_ids=np.array(present, np.int64) + 1,
            labels=np.array([self._label_of_value[value] for value in present], np.int32),
            is_crowd=np.zeros(len(present), bool),
        )

    def _classes(self, values: np.ndarray, path: pathlib.Path) -> list[int]:
        # Pixel values that are classes, ascending.
        present = np.flatnonzero(np.bincount(values.ravel())).tolist()
        classes = [value for value in present if value not in self._ignored]
        for value in classes:
            if value not in self._label_of_value:
                raise FileError(
                    f"The map {path} holds the value {value}, which is neither a class nor one of "
                    f"the ignored values {sorted(self._ignored)}."
                )
        return classes


def read_list(path: str | os.PathLike[str]) -> list[str]:
    """Names without suffixes in a text file, one a line; of a line with several words, the first.

    Raises FileError if the file is missing, is not text or is empty, or names an image twice.
    """
    lines = read_text(path).splitlines()
    words = [os.path.splitext(line.split()[0]) for line in lines if line.strip()]
    names = [stem if end.lower() in IMAGE_SUFFIXES else stem + end for stem, end in words]
    if not names:
        raise FileError(f"The list of images {path} is empty.")
    name, count = collections.Counter(names).most_common(1)[0]
    if count > 1:
        raise FileError(f"The list of images {path} names {name} {count} times; take one out.")
    return names


def _by_stem(folder: pathlib.Path, suffixes: Collection[str]) -> Mapping[str, str]:
    if not folder.is_dir():
        raise FileError(f"The folder {folder} does not exist.")
    names: dict[str, str] = {}
    for name in sorted(os.listdir(folder)):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() not in suffixes or name.startswith("."):
            continue
        if stem in names:
            raise FileError(f"{folder} holds both {names[stem]} and {name}; remove one.")
        names[stem] = name
    if not names:
        raise FileError(f"The folder {folder} holds no file that ends in {', '.join(suffixes)}.")
    return names


def _read_map(path: pathlib.Path) -> np.ndarray:
    values = read_label_map(path)
    if path.suffix.lower() == ".png":
        check_end(path)
    if values.dtype == np.uint8:
        return values
    if values.size and not 0 <= values.min() <= values.max() <= 65535:
        raise FileError(f"The map {path} holds values beyond 0 to 65535.")
    return values.astype(np.uint16)
