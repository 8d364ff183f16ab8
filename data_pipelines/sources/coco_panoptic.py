"""Data sets in COCO's panoptic layout, from a local folder.

The layout is COCO 2017's; any data set with the same three parts and a split file of its own (see
`labels`) works:

    root/train2017/*.jpg
    root/annotations/panoptic_train2017.json
    root/annotations/panoptic_train2017/*.png    or    root/panoptic_train2017/*.png

ADE20K's panoptic files, as Mask2Former's `datasets/prepare_ade20k_pan_seg.py` makes them, hold the
same in other places.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib

import numpy as np
from PIL import Image

from data_pipelines.labels import load_label_space
from data_pipelines.sources.coco_layout import Layout, find_layout, read_image, read_records
from data_pipelines.sources.source import DataError, ImageRecord


class CocoPanopticSource:
    """One part (train2017, val2017) of a data set in COCO's panoptic layout; a `FolderSource`.

    Attributes:
      vocabulary: the split's label space.
      records: every annotated image, by ascending image id; source_ids are the segments' ids, R +
        256 G + 65536 B of their pixels in the PNG.
      layout, images_folder: where the files are.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        part: str = "train2017",
        split_file: str | os.PathLike[str] = "coco_panoptic_119_14",
    ):
        """Reads the JSON and checks it, the layout and the presence of every file.

        Args:
          root: the folder with the layout of the module's docstring.
          part: name of the images folder; the other two names follow from it.
          split_file: a split or vocabulary file's path, or the name of one that ships.

        Raises:
          DataError: if a part of the layout or a file is missing, or the JSON is inconsistent, in
            itself or with the split.
          ValueError: if the split file is not valid.
        """
        self.vocabulary = load_label_space(split_file)
        self.layout = find_layout(root, part)
        self.images_folder = self.layout.images
        self.records = read_records(self.layout, self.vocabulary)

    def read(self, record: ImageRecord) -> tuple[Image.Image, np.ndarray]:
        """As `Source.read`."""
        return read_image(self.layout, record)


class Ade20kPanopticSource:
    """ADE20K's training or validation images with panoptic segments; a `FolderSource`.

    The script paints things over stuff and lists also the stuff that is hidden altogether, so a
    segment of a record may have no pixel. Its JSON names images by texts, which become numbers
    (`source.image_number`), numbers classes from 0, and has names of its own for them.

    Attributes:
      vocabulary: ADE20K's 150 classes with the JSON's category ids, 0 to 149.
      records: every annotated image, by ascending image id.
      layout, images_folder: where the files are.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        part: str = "validation",
        split_file: str | os.PathLike[str] | None = None,
    ):
        """Reads the JSON and checks it, the layout and the presence of every file.

        Args:
          root: the folder ADEChallengeData2016.
          part: "training" or "validation".
          split_file: a split whose ids are 0 to 149; None takes ADE20K's 150 classes, all unseen.

        Raises:
          DataError: if a file is missing or the JSON is inconsistent.
          ValueError: if the split file is not valid.
        """
        if split_file:
            self.vocabulary = load_label_space(split_file)
        else:
            shipped = load_label_space("ade20k_150")
            ids = tuple(category - 1 for category in shipped.category_ids)
            self.vocabulary = dataclasses.replace(shipped, category_ids=ids)
        self.layout = _find_ade20k(pathlib.Path(root), part)
        self.images_folder = self.layout.images
        self.records = read_records(self.layout, self.vocabulary, own_names=True)

    def read(self, record: ImageRecord) -> tuple[Image.Image, np.ndarray]:
        """As `Source.read`."""
        return read_image(self.layout, record, hidden_segments=True)


def _find_ade20k(root: pathlib.Path, part: str) -> Layout:
    name = {"training": "train", "validation": "val"}.get(part)
    if name is None:
        raise DataError(f"ADE20K has no part {part!r}; give training or validation.")
    pngs = root / f"ade20k_panoptic_{name}"
    layout = Layout(root / "images" / part, pngs, pngs.with_suffix(".json"))
    for place in dataclasses.astuple(layout):
        if not place.exists():
            raise DataError(
                f"{place} does not exist; expected {root}/{{images/{part}/*.jpg, {pngs.name}.json, "
                f"{pngs.name}/*.png}} as Mask2Former's datasets/prepare_ade20k_pan_seg.py makes it."
            )
    return layout
