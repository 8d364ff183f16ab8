"""Data sets in COCO's panoptic layout, from a local folder.

The layout is COCO 2017's; any data set with the same three parts and a split file of its own (see
`labels`) works:

    root/train2017/*.jpg
    root/annotations/panoptic_train2017.json
    root/annotations/panoptic_train2017/*.png    or    root/panoptic_train2017/*.png

ADE20K's panoptic files, as Mask2Former's `datasets/prepare_ade20k_pan_seg.py` makes them, hold the
same in other places. Every file is checked against the others, so that a broken download or a slip
in a converter is one sentence with a file name in it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
from typing import Literal

import numpy as np
from PIL import Image

from concat_jax.core.coco import PanopticFile, check_categories, read_panoptic
from concat_jax.core.files import FileError
from concat_jax.core.mask_codes import read_id_map, segment_rows
from concat_jax.core.vocabulary import Vocabulary
from data_pipelines.sources.pictures import check_end, present, read_picture
from data_pipelines.sources.source import ImageRecord, image_numbers

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where one part of a data set lies: images folder, panoptic PNG folder, annotation file."""

    images: pathlib.Path
    pngs: pathlib.Path
    json_path: pathlib.Path


class CocoPanopticSource:
    """One part of a data set in COCO's panoptic format; a `FolderSource`.

    Image ids are the JSON's integers, or `image_numbers` of its texts; source ids are the segments'
    ids, R + 256 G + 65536 B of their pixels.
    """

    def __init__(
        self,
        layout: Layout,
        vocabulary: Vocabulary,
        *,
        own_names: bool = False,
        hidden_segments: bool = False,
        on_bad_example: Literal["raise", "skip"] = "raise",
    ):
        """Reads the JSON and checks it, against the vocabulary too, and the presence of every file.

        Args:
          own_names: the JSON may call categories by other names.
          hidden_segments: segments of the JSON without a pixel in the PNG are not a fault: what
            made the files painted others over them.
          on_bad_example: "skip" leaves out images whose file or PNG is missing, logged and counted.
        """
        self.vocabulary, self.layout, self.images_folder = vocabulary, layout, layout.images
        self._hidden_segments = hidden_segments
        content = read_panoptic(layout.json_path)
        check_categories(layout.json_path, content.categories, vocabulary, own_names=own_names)
        records = self.records = _records(content, vocabulary)
        skips = on_bad_example == "skip"
        for folder, field in ((layout.images, "file_name"), (layout.pngs, "png_name")):
            self.records = present(folder, self.records, field, layout.json_path, skips=skips)
        self.skipped = len(records) - len(self.records)

    def read(self, record: ImageRecord) -> tuple[Image.Image, np.ndarray]:
        """As `Source.read`."""
        png, json_path = self.layout.pngs / record.png_name, self.layout.json_path
        image = read_picture(self.images_folder, record, json_path)
        id_map = read_id_map(png, json_path)
        check_end(png)
        if id_map.shape != (record.height, record.width):
            height, width = id_map.shape
            raise FileError(
                f"The panoptic PNG {png} is {height}x{width} (height x width) and {json_path} says "
                f"{record.height}x{record.width}; both must agree."
            )
        ids = record.source_ids.tolist()
        return image, segment_rows(id_map, ids, png, json_path, may_hide=self._hidden_segments)


def find_layout(root: str | os.PathLike[str], part: str) -> Layout:
    """Finds the three places of a part; the PNG folder may lie in `annotations/` or beside it.

    Raises FileError naming the place that is missing.
    """
    root, name = pathlib.Path(root), f"panoptic_{part}"
    images, json_path = root / part, root / "annotations" / f"{name}.json"
    if not images.is_dir():
        raise FileError(f"The images folder {images} does not exist.")
    if not json_path.is_file():
        raise FileError(f"The annotation file {json_path} does not exist.")
    for pngs in (root / "annotations" / name, root / name):
        # An unpacker may leave an empty folder at one place and the files at the other.
        entries = os.scandir(pngs) if pngs.is_dir() else ()
        if any(entry.name.lower().endswith(".png") or entry.is_dir() for entry in entries):
            return Layout(images, pngs, json_path)
    raise FileError(f"The folder {root / name} with the panoptic PNGs is missing or empty.")


def find_ade20k(root: str | os.PathLike[str], part: str) -> Layout:
    """Finds the places of ADEChallengeData2016's "training" or "validation".

    The script paints things over stuff and lists also the stuff that is hidden altogether. Its JSON
    numbers classes from 0 and has names of its own for them.
    """
    name = {"training": "train", "validation": "val"}.get(part)
    if name is None:
        raise FileError(f"ADE20K has no part {part!r}; give training or validation.")
    pngs = pathlib.Path(root) / f"ade20k_panoptic_{name}"
    layout = Layout(pathlib.Path(root) / "images" / part, pngs, pngs.with_suffix(".json"))
    for place in dataclasses.astuple(layout):
        if not place.exists():
            raise FileError(f"{place} does not exist.")
    return layout


def _records(content: PanopticFile, vocabulary: Vocabulary) -> list[ImageRecord]:
    path, index_of = content.path, vocabulary.index_of_category
    records: list[ImageRecord] = []
    numbers = image_numbers([*content.annotations])
    for number, annotation in zip(numbers, content.annotations.values(), strict=True):
        image = content.images.get(annotation.image_id)
        if image is None:
            raise FileError(f"{path} annotates the image {annotation.image_id!r} and lists none.")
        record = ImageRecord(
            image_id=number,
            file_name=image.file_name,
            png_name=annotation.file_name,
            height=image.height,
            width=image.width,
            source_ids=np.array(annotation.ids, np.int64),
            labels=np.array([index_of[k] for k in annotation.category_ids], np.int32),
            is_crowd=np.array(annotation.is_crowd, bool),
        )
        records.append(record)
    if not records:
        raise FileError(f"{path} annotates no image.")
    if len(content.images) > len(records):
        missing = len(content.images) - len(records)
        logger.warning("%s: %d images have no annotation", path, missing)
    return sorted(records, key=lambda record: record.image_id)
