"""Data sets by name: where their files lie and how to open them.

    source = open_source("coco_stuff_zss", "/data/coco", "train2017")

`DATASETS` is the one table of them. A folder of one's own in COCO's panoptic layout is opened as
`panoptic_folder`, with a split file that lists its classes (see `labels`).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Literal

from concat_jax.core.files import FileError, as_path, in_bucket
from concat_jax.core.vocabulary import Vocabulary
from data_pipelines.labels import load_label_space
from data_pipelines.sources.coco_instances import CocoInstanceSource
from data_pipelines.sources.coco_panoptic import CocoPanopticSource, find_ade20k, find_layout
from data_pipelines.sources.semantic_maps import SemanticMapSource, read_list
from data_pipelines.sources.source import FolderSource, UnseenImages

OnBadExample = Literal["raise", "skip"]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A kind of data set that `open_source` knows.

    Attributes:
      tree: the files below the root, {part} being one of the parts.
      split_file: the label space unless another is given: one that ships, or below the root.
      unseen_images: what its protocol does with training images that show unseen classes.
      open: root, checked part, split file and what to do with bad examples -> the source.
    """

    tree: str
    parts: tuple[str, str]
    split_file: str
    unseen_images: UnseenImages
    open: Callable[[pathlib.Path, str, str, OnBadExample], FolderSource]


def open_source(
    dataset: str,
    root: str | os.PathLike[str],
    part: str,
    split_file: str | os.PathLike[str] | None = None,
    *,
    on_bad_example: OnBadExample = "raise",
) -> FolderSource:
    """Opens one part of a data set of `DATASETS`.

    Args:
      part: for example "train2017"; of `panoptic_folder`, any name.
      split_file: instead of the data set's own label space: a split file, a vocabulary file, or the
        name of one that ships. Of a vocabulary, which knows no split, all classes are unseen.
      on_bad_example: "skip" leaves out what is missing, and what cannot be used of label maps and
        of COCO's outlines, which are read when the source is made; others are when needed.

    Raises ValueError for an unknown data set, a label space that is not valid or a root of another
    kind of store, FileError for another layout, with what was expected, and for files that are
    missing or damaged.
    """
    _check_name(dataset)
    if in_bucket(root):
        raise FileError(
            f"{root} is in a bucket, and folders of images are read on a machine's disk alone: "
            f"gcloud storage cp -r {root} DIR copies it; give DIR."
        )
    known, root = DATASETS[dataset], as_path(root)
    if not str(part) or pathlib.Path(part).name != str(part):
        raise FileError(f"The part {part!r} of {dataset} must be a name such as {known.parts[0]}.")
    split = str(split_file or known.split_file)
    if (root / split).is_file() and not split_file:
        split = str(root / split)
    try:
        if not root.is_dir():
            what = "is a file" if root.exists() else "does not exist"
            raise FileError(f"The data set's folder {root} {what}.")
        return known.open(root, part, split, on_bad_example)
    except FileError as error:
        if root.is_dir() and _is_laid_out(root, part, known):
            raise
        tree = known.tree.format(part=part)
        raise FileError(
            f"{str(error).rstrip('.')}; {dataset} is expected as {root}/{{{tree}}}."
        ) from error


def label_space(dataset: str, split_file: str | os.PathLike[str] | None = None) -> Vocabulary:
    """The classes that `open_source` would find, where that needs no data.

    Raises:
      ValueError: as `open_source`, and where the label space lies in the data set's folder.
    """
    _check_name(dataset)
    return load_label_space(split_file or DATASETS[dataset].split_file)


def _check_name(dataset: str) -> None:
    # A folder's name is an easy slip for a data set's, so all are listed.
    if dataset not in DATASETS:
        raise ValueError(
            f"There is no data set {dataset!r}; the names are {', '.join(sorted(DATASETS))}."
        )


def _is_laid_out(root: pathlib.Path, part: str, dataset: Dataset) -> bool:
    # Files may lie in folders of their own.
    entries = dataset.tree.format(part=part).replace("/*.", "/**/*.").split(",")
    return all(
        any(any(True for _ in root.glob(pattern.strip())) for pattern in entry.split(" or "))
        for entry in entries
    )


def _open_panoptic(root, part, split_file, on_bad_example) -> FolderSource:
    layout, vocabulary = find_layout(root, part), load_label_space(split_file)
    return CocoPanopticSource(layout, vocabulary, on_bad_example=on_bad_example)


def _open_folder(root, part, split_file, on_bad_example) -> FolderSource:
    if split_file == DATASETS["panoptic_folder"].split_file:
        raise FileError(
            f"There is no split file {root / split_file}, which lists the classes of a "
            "panoptic_folder and says which are seen; write one, or give its path."
        )
    return _open_panoptic(root, part, split_file, on_bad_example)


def _open_ade20k_panoptic(root, part, split_file, on_bad_example) -> FolderSource:
    vocabulary = load_label_space(split_file)
    if split_file == DATASETS["ade20k_panoptic"].split_file:
        # Its JSON numbers classes from 0, the vocabulary as ADE20K does.
        ids = tuple(category - 1 for category in vocabulary.category_ids)
        vocabulary = dataclasses.replace(vocabulary, category_ids=ids)
    layout, rules = find_ade20k(root, part), dict(own_names=True, hidden_segments=True)
    return CocoPanopticSource(layout, vocabulary, **rules, on_bad_example=on_bad_example)


def _open_zsi(root, part, split_file, on_bad_example, *, folds: str) -> FolderSource:
    role = {"train2014": "seen", "val2014": "gzsi"}.get(part, "seen")
    # ZSI's own files where they are; or the official ones, of which the same is made: categories
    # beyond the split are left out, and images with unseen classes are for the treatment to drop.
    choices = (
        root / "annotations" / "ZSIS" / f"instances_{part}_{role}_{folds}.json",
        root / "annotations" / f"instances_{part}.json",
    )
    path = next((path for path in choices if path.is_file()), choices[1])
    if not (root / part).is_dir():
        raise FileError(f"The images folder {root / part} does not exist.")
    vocabulary = load_label_space(split_file)
    return CocoInstanceSource(root / part, path, vocabulary, on_bad_example=on_bad_example)


def _maps(
    split_file: str,
    images: str,
    *maps: str,
    ignored: tuple[int, ...],
    suffix: str = "png",
    offset: int = 0,
    listed: str = "",
    parts: tuple[str, str] = ("training", "validation"),
    unseen_images: UnseenImages = "keep",
) -> Dataset:
    """Images and maps as folders with {part} in them, of maps the first that there is."""

    def open_maps(root, part, split, on_bad_example) -> FolderSource:
        folders = [root / folder.format(part=part) for folder in maps]
        return SemanticMapSource(
            root / images.format(part=part),
            next((folder for folder in folders if folder.is_dir()), folders[0]),
            load_label_space(split),
            offset=offset,
            ignored=ignored,
            stems=read_list(root / listed.format(part=part)) if listed else None,
            on_bad_example=on_bad_example,
        )

    trees = [f"{images}/*.jpg", " or ".join(f"{folder}/*.{suffix}" for folder in maps), listed]
    return Dataset(
        tree=", ".join(filter(None, trees)),
        parts=parts,
        split_file=split_file,
        unseen_images=unseen_images,
        open=open_maps,
    )


def _zsi(folds: str) -> Dataset:
    return Dataset(
        tree="{part}/*.jpg, annotations/instances_{part}.json or annotations/ZSIS/"
        f"instances_{{part}}_*_{folds}.json",
        parts=("train2014", "val2014"),
        split_file=f"coco_instance_{folds}",
        unseen_images="drop",  # ZSI removes the images as well
        open=functools.partial(_open_zsi, folds=folds),
    )


_PANOPTIC_TREE = (
    "{part}/*.jpg, annotations/panoptic_{part}.json, "
    "annotations/panoptic_{part}/*.png or panoptic_{part}/*.png"
)

DATASETS: Mapping[str, Dataset] = {
    "coco_panoptic_zps": Dataset(
        tree=_PANOPTIC_TREE,
        parts=("train2017", "val2017"),
        split_file="coco_panoptic_119_14",
        unseen_images="drop",
        open=_open_panoptic,
    ),
    "panoptic_folder": Dataset(
        tree=_PANOPTIC_TREE + ", split.json",
        parts=("train", "val"),
        split_file="split.json",
        unseen_images="drop",
        open=_open_folder,
    ),
    "coco_zsi_48_17": _zsi("48_17"),
    "coco_zsi_65_15": _zsi("65_15"),
    # The values of the maps are COCO's ids minus 1, which are the split's ids.
    "coco_stuff_zss": _maps(
        "coco_stuff_156_15",
        "{part}",
        "stuffthingmaps/{part}",
        "coco_stuff/annotations/{part}",
        ignored=(255,),
        parts=("train2017", "val2017"),
        unseen_images="void",  # ZegFormer, PADing
    ),
    # ADEChallengeData2016, with what Mask2Former's prepare_ade20k_pan_seg.py adds to it.
    "ade20k_panoptic": Dataset(
        tree="images/{part}/*.jpg, ade20k_panoptic_train.json or ade20k_panoptic_val.json, "
        "ade20k_panoptic_train/*.png or ade20k_panoptic_val/*.png",
        parts=("training", "validation"),
        split_file="ade20k_150",
        unseen_images="keep",
        open=_open_ade20k_panoptic,
    ),
    "ade20k_semantic": _maps("ade20k_150", "images/{part}", "annotations/{part}", ignored=(0,)),
    # ADE20K_2021_17_01, with what MaskFormer's prepare_ade20k_full_sem_seg.py adds to it.
    "ade20k_847": _maps(
        "ade20k_847",
        "images_detectron2/{part}",
        "annotations_detectron2/{part}",
        ignored=(65535,),
        suffix="tif",
        offset=1,
    ),
    # pascal_ctx_d2, made of VOC2010 by ODISE's prepare_pascal_ctx_sem_seg.py and _full_sem_seg.py.
    "pascal_context_59": _maps(
        "pascal_context_59", "images/{part}", "annotations_ctx59/{part}", ignored=(255,), offset=1
    ),
    "pascal_context_459": _maps(
        "pascal_context_459",
        "images/{part}",
        "annotations_ctx459/{part}",
        ignored=(65535,),
        suffix="tif",
        offset=1,
    ),
    # VOCdevkit/VOC2012. Background is void with 20 classes; pascal_voc_21 makes it one.
    "pascal_voc": _maps(
        "pascal_voc_20",
        "JPEGImages",
        "SegmentationClass",
        ignored=(0, 255),
        listed="ImageSets/Segmentation/{part}.txt",
        parts=("train", "val"),
    ),
}
