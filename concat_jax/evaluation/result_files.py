"""Annotation and prediction files as they are scored: read whole, checked, one sentence a fault."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from concat_jax.core.files import open_image
from concat_jax.core.vocabulary import Vocabulary

VOID = -1


@dataclasses.dataclass(frozen=True)
class PanopticFile:
    """A COCO panoptic json, ground truth or prediction.

    Attributes:
      path: of the json.
      folder: of its PNGs.
      categories: its category list; None where it has none, as predictions may.
      annotations: image id to its annotation, in the json's order.
    """

    path: pathlib.Path
    folder: pathlib.Path
    categories: list[dict] | None
    annotations: dict[int, dict]


@dataclasses.dataclass(frozen=True)
class InstanceFile:
    """A COCO instances json: ground truth.

    Attributes:
      path: of the json.
      categories: its category list.
      images: image id to (height, width).
      annotations: image id to its annotations; images without one have an empty list.
    """

    path: pathlib.Path
    categories: list[dict]
    images: dict[int, tuple[int, int]]
    annotations: dict[int, list[dict]]


def read_json(path: str | os.PathLike) -> Any:
    """A json file's content.

    Raises:
      ValueError: if it is missing or not valid.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}; check the path.")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error


def read_panoptic_file(
    path: str | os.PathLike, folder: str | os.PathLike | None = None
) -> PanopticFile:
    """Reads a COCO panoptic json; its PNGs are not touched.

    Args:
      path: of the json.
      folder: of its PNGs; by default the folder beside the json with its name, as panopticapi.

    Raises:
      ValueError: if it is a json of another kind, an image id or a segment id occurs twice, or the
        folder is missing.
    """
    path = pathlib.Path(path)
    content = read_json(path)
    wanted = "--task=panoptic needs a COCO panoptic json, with 'segments_info'"
    if isinstance(content, list):
        raise ValueError(f"{path} is a list, as instance results are; {wanted}.")
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise ValueError(f"{path} has no list of 'annotations'; {wanted}.")
    annotations: dict[int, dict] = {}
    for annotation in content["annotations"]:
        try:
            image_id, segments = annotation["image_id"], annotation["segments_info"]
            ids = [(segment["id"], segment["category_id"])[0] for segment in segments]
            pathlib.PurePath(annotation["file_name"])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"An annotation of {path} lacks or misuses {error}; {wanted}."
            ) from error
        if image_id in annotations:
            raise ValueError(f"{path} annotates the image {image_id} more than once.")
        if len(set(ids)) < len(ids):
            double = next(i for i in ids if ids.count(i) > 1)
            raise ValueError(
                f"{path} lists the segment id {double} of image {image_id} more than once."
            )
        annotations[image_id] = annotation
    folder = pathlib.Path(folder) if folder else path.with_suffix("")
    if not folder.is_dir():
        raise ValueError(
            f"There is no folder {folder} with the PNGs of {path}; say where they are."
        )
    return PanopticFile(path, folder, content.get("categories"), annotations)


def read_instance_file(path: str | os.PathLike) -> InstanceFile:
    """Reads a COCO instances json.

    Raises:
      ValueError: if it is a json of another kind, or an annotation's image is not listed.
    """
    path = pathlib.Path(path)
    content = read_json(path)
    wanted = "--task=instance needs a COCO instances json as annotations"
    if isinstance(content, list):
        raise ValueError(f"{path} is a list, as predictions are; {wanted}.")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path} has no list of {key!r}; {wanted}.")
    try:
        images = {
            image["id"]: (int(image["height"]), int(image["width"])) for image in content["images"]
        }
        annotations: dict[int, list[dict]] = {image_id: [] for image_id in images}
        for annotation in content["annotations"]:
            if annotation["image_id"] not in images:
                raise ValueError(
                    f"{path} annotates the image {annotation['image_id']}, which its 'images' lack."
                )
            area = annotation.get("area", 0.0)
            if not math.isfinite(area):
                raise ValueError(f"{path}: annotation {annotation.get('id')} has the area {area}.")
            annotation["segmentation"], annotation["category_id"]
            annotations[annotation["image_id"]].append(annotation)
    except (KeyError, TypeError) as error:
        raise ValueError(f"An entry of {path} lacks or misuses {error}; {wanted}.") from error
    return InstanceFile(path, content["categories"], images, annotations)


def read_instance_results(
    path: str | os.PathLike, truth: InstanceFile, index_of_category: Mapping[int, int]
) -> dict[int, list[dict]]:
    """Reads COCO instance results and groups them by image.

    Args:
      path: of the json.
      truth: whose images they are for.
      index_of_category: the known category ids.

    Returns:
      image id to its entries; images without one are absent.

    Raises:
      ValueError: if it is a json of another kind or an entry has an unknown image or category, no
        mask, or a score that is no finite number.
    """
    path = pathlib.Path(path)
    content = read_json(path)
    wanted = "--task=instance needs a list of {image_id, category_id, segmentation, score}"
    if not isinstance(content, list):
        raise ValueError(f"{path} is not a list; {wanted}.")
    by_image: dict[int, list[dict]] = {}
    for position, entry in enumerate(content):
        try:
            image_id, category, score = entry["image_id"], entry["category_id"], entry["score"]
            entry["segmentation"]["size"], entry["segmentation"]["counts"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"Entry {position} of {path} lacks or misuses {error}; {wanted}, masks run-length "
                "encoded."
            ) from error
        if image_id not in truth.images:
            raise ValueError(
                f"Entry {position} of {path} is for the image {image_id}, which {truth.path} lacks."
            )
        if category not in index_of_category:
            raise ValueError(
                f"Entry {position} of {path} has the category {category}, which is not among the "
                f"{len(index_of_category)} classes that are scored."
            )
        if not isinstance(score, int | float) or not math.isfinite(score):
            raise ValueError(
                f"Entry {position} of {path}, of image {image_id}, has the score {score}; it must "
                "be a finite number."
            )
        by_image.setdefault(image_id, []).append(entry)
    return by_image


def vocabulary_of(path: pathlib.Path, categories: Sequence[Mapping] | None) -> Vocabulary:
    """The label space of an annotation file, in which every class is seen.

    Raises:
      ValueError: if it lists no category, or one without id or name.
    """
    if not categories:
        raise ValueError(f"{path} lists no 'categories'; give --split.")
    try:
        return Vocabulary(
            names=tuple(str(category["name"]) for category in categories),
            is_thing=tuple(bool(category.get("isthing", 1)) for category in categories),
            is_seen=(True,) * len(categories),
            category_ids=tuple(int(category["id"]) for category in categories),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"A category of {path} lacks or misuses {error}.") from error


def check_categories(
    path: pathlib.Path,
    categories: Sequence[Mapping] | None,
    vocabulary: Vocabulary,
    *,
    must_have_all: bool,
) -> None:
    """Refuses a file whose category list is not that of the label space.

    Args:
      path: of the file.
      categories: its list; None, as predictions may have, passes.
      vocabulary: the label space.
      must_have_all: whether a class that the file lacks is a fault, too.

    Raises:
      ValueError: naming the first category that differs.
    """
    if categories is None:
        return
    theirs = vocabulary_of(path, categories) if categories else None
    listed = dict(zip(theirs.category_ids, theirs.names, strict=True)) if theirs else {}
    ours = dict(zip(vocabulary.category_ids, vocabulary.names, strict=True))
    for category, name in listed.items():
        if ours.get(category) != name:
            raise ValueError(
                f"{path} calls category {category} {name!r}; in the split it is "
                f"{ours.get(category, 'absent')!r}: use the split of these files."
            )
    missing = [category for category in ours if category not in listed]
    if missing and must_have_all:
        raise ValueError(
            f"{path} lacks category {missing[0]} ({ours[missing[0]]!r}) of the split; use the "
            "split of this file."
        )


def read_id_map(path: pathlib.Path, json_path: pathlib.Path) -> np.ndarray:
    """Decodes a COCO panoptic PNG to its ids, [H, W] uint32.

    Raises:
      ValueError: if it is missing or damaged, or has no colours.
    """
    image = _open(path, f"{json_path} names {path}, which does not exist; say where the PNGs are.")
    if image.mode not in ("RGB", "RGBA", "P"):
        raise ValueError(
            f"{path} has the mode {image.mode}; a panoptic PNG is RGB, with segment ids as "
            "R + 256 G + 65536 B."
        )
    # Four bytes a pixel are the number itself; channel by channel it takes ten times as long.
    rgba = np.array(image.convert("RGBA"))
    ids = rgba.view("<u4")[..., 0]
    ids &= 0xFFFFFF
    return ids


def read_label_map(path: pathlib.Path) -> np.ndarray:
    """Decodes a map of labels, 8 or 16 bits a pixel (a palette's indices, not its colours).

    Returns:
      [H, W] integers.

    Raises:
      ValueError: if it is missing or damaged, or has colours.
    """
    image = _open(path, f"The label map {path} does not exist.")
    labels = np.asarray(image)
    if labels.ndim != 2 or not (labels.dtype == bool or np.issubdtype(labels.dtype, np.integer)):
        raise ValueError(
            f"{path} has the mode {image.mode}; a label map has one channel of 8 or 16 bits."
        )
    return labels.astype(np.uint8) if labels.dtype == bool else labels


def check_ids(
    id_map: np.ndarray, segments: Sequence[Mapping], png: pathlib.Path, json_path
) -> None:
    """Refuses a PNG and a json that do not hold the same segment ids, as panopticapi does.

    Raises:
      ValueError: naming the id and both files.
    """
    flat = id_map.ravel()
    runs = flat[np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))]
    present = set(np.unique(runs).tolist()) - {0}
    listed = {segment["id"] for segment in segments}
    if present - listed:
        raise ValueError(
            f"{png} holds the segment id {min(present - listed)}, which {json_path} lacks."
        )
    if listed - present:
        raise ValueError(
            f"{json_path} lists the segment id {min(listed - present)}, which has no pixel in "
            f"{png}."
        )


def _open(path: pathlib.Path, if_missing: str) -> Image.Image:
    if not path.is_file():
        raise ValueError(if_missing)
    with open_image(path) as image:
        image.load()
        return image
