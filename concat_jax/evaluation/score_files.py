"""Scores of prediction files against annotation files, several processes sharing the images.

Every process counts a chunk of images and hands back the counts alone: memory does not grow with
the images beyond the parsed json.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from concat_jax.core.run_lengths import mask_runs
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.average_precision import COCO_THRESHOLDS, AveragePrecision
from concat_jax.evaluation.panoptic_quality import PanopticQuality
from concat_jax.evaluation.result_files import (
    VOID,
    PanopticFile,
    check_categories,
    check_ids,
    read_id_map,
    read_instance_file,
    read_instance_results,
    read_label_map,
    read_panoptic_file,
    vocabulary_of,
)
from concat_jax.evaluation.semantic_iou import SemanticIoU
from concat_jax.evaluation.shared_counting import accumulate

LABEL_FILES = (".png", ".tif", ".tiff", ".bmp")
# What label maps hold for "no class" when nothing else is said: the last value of 8 and 16 bits.
IGNORED_VALUES = (255, 65535)

Path = str | os.PathLike
Progress = Callable[[int, int], None]


def score_panoptic(
    annotations: Path,
    predictions: Path,
    vocabulary: Vocabulary | None = None,
    *,
    annotation_folder: Path | None = None,
    prediction_folder: Path | None = None,
    workers: int = 1,
    on_progress: Progress | None = None,
) -> tuple[dict, Vocabulary]:
    """Panoptic quality of files in COCO's panoptic format.

    Args:
      annotations, predictions: the jsons. Predictions must be there for every annotated image and
        for no other; panopticapi refuses the former and does not notice the latter.
      vocabulary: the label space; None takes the annotations', all of it seen.
      annotation_folder, prediction_folder: of the PNGs; by default beside each json, by its name.
      workers: processes; 1 works in this one.
      on_progress: called with (images done, images in all).

    Returns:
      `PanopticQuality.summarize` with "images", and the vocabulary.

    Raises:
      ValueError: if files are missing, damaged, of another kind or do not fit together.
    """
    truth = read_panoptic_file(annotations, annotation_folder)
    found = read_panoptic_file(predictions, prediction_folder)
    vocabulary = _panoptic_vocabulary(truth, vocabulary)
    check_categories(found.path, found.categories, vocabulary, must_have_all=False)
    _same_keys(truth.annotations, found.annotations, "image", truth.path, found.path)
    jobs = [(truth.annotations[i], found.annotations[i]) for i in truth.annotations]
    paths = (truth.path, truth.folder), (found.path, found.folder)
    score = functools.partial(_score_panoptic, vocabulary.index_of_category, paths)
    total = PanopticQuality(len(vocabulary))
    accumulate(total, score, jobs, workers=workers, on_progress=on_progress)
    return {**total.summarize(vocabulary), "images": len(jobs)}, vocabulary


def _panoptic_vocabulary(truth: PanopticFile, vocabulary: Vocabulary | None) -> Vocabulary:
    if vocabulary is None:
        return vocabulary_of(truth.path, truth.categories)
    check_categories(truth.path, truth.categories, vocabulary, must_have_all=True)
    return vocabulary


def _score_panoptic(index_of: Mapping, paths: tuple, chunk: Sequence[tuple]) -> PanopticQuality:
    counts = PanopticQuality(len(index_of))
    for pair in chunk:
        maps, tables, files = [], [], []
        for annotation, (json_path, folder) in zip(pair, paths, strict=True):
            png = folder / annotation["file_name"]
            id_map = read_id_map(png, json_path)
            check_ids(id_map, annotation["segments_info"], png, json_path)
            maps.append(id_map)
            tables.append(_labels_by_id(annotation["segments_info"], index_of, png, json_path))
            files.append(png)
        _check_sizes(*maps, *files)
        crowd = {s["id"]: bool(s.get("iscrowd", 0)) for s in pair[0]["segments_info"]}
        counts.update(maps[0], tables[0], crowd, maps[1], tables[1])
    return counts


def _labels_by_id(segments: Sequence[Mapping], index_of: Mapping[int, int], png, json_path) -> dict:
    for segment in segments:
        if segment["category_id"] not in index_of:
            raise ValueError(
                f"Segment {segment['id']} of {png} has the category {segment['category_id']} in "
                f"{json_path}, which is not among the {len(index_of)} classes that are scored."
            )
    return {segment["id"]: index_of[segment["category_id"]] for segment in segments}


def _check_sizes(truth: np.ndarray, found: np.ndarray, truth_path, found_path) -> None:
    if truth.shape != found.shape:
        sizes = (f"{height}x{width}" for height, width in (found.shape, truth.shape))
        raise ValueError(
            f"{found_path} is {next(sizes)} (height x width) and its ground truth {truth_path} "
            f"{next(sizes)}; predictions must have the images' own size."
        )


def score_semantic(
    annotations: Path,
    predictions: Path,
    vocabulary: Vocabulary | None = None,
    *,
    annotation_folder: Path | None = None,
    prediction_folder: Path | None = None,
    annotation_values: str = "ids",
    prediction_values: str = "ids",
    ignored_values: Sequence[int] = IGNORED_VALUES,
    workers: int = 1,
    on_progress: Progress | None = None,
) -> tuple[dict, Vocabulary]:
    """Semantic IoU of label maps, or of what panoptic files say of each pixel's class.

    Args:
      annotations, predictions: each a folder of label maps, whose stems are the images', or a COCO
        panoptic json. Both must hold the same images.
      vocabulary: the label space; may be None where the annotations are a panoptic json.
      annotation_folder, prediction_folder: of a panoptic json's PNGs.
      annotation_values, prediction_values: whether a folder's pixels are category ids ("ids") or
        positions in the vocabulary ("indices").
      ignored_values: pixel values that are no class: ignored in annotations, nothing predicted in
        predictions. A class of that value remains a class.
      workers, on_progress: as of `score_panoptic`.

    Returns:
      `SemanticIoU.summarize` with "images", and the vocabulary.

    Raises:
      ValueError: as `score_panoptic`, or if a pixel is neither a class nor ignored.
    """
    truth = _read_maps(annotations, annotation_folder)
    found = _read_maps(predictions, prediction_folder)
    if isinstance(truth, PanopticFile):
        vocabulary = _panoptic_vocabulary(truth, vocabulary)
    if vocabulary is None:
        raise ValueError(f"Label maps as those in {annotations} name no classes; give --split.")
    if isinstance(found, PanopticFile):
        check_categories(found.path, found.categories, vocabulary, must_have_all=False)
    sides = []
    for side, values in ((truth, annotation_values), (found, prediction_values)):
        lookup = _lookup(vocabulary, values, ignored_values)
        sides.append((side, lookup) if isinstance(side, dict) else (side, None))
    by_stem = [_by_stem(truth), _by_stem(found)]
    _same_keys(*by_stem, "image", annotations, predictions)
    jobs = [(by_stem[0][stem], by_stem[1][stem]) for stem in sorted(by_stem[0])]
    readers = tuple(
        functools.partial(_read_labels_of_segments, vocabulary.index_of_category, side.path)
        if lookup is None
        else functools.partial(_read_labels, lookup)
        for side, lookup in sides
    )
    total = SemanticIoU(len(vocabulary))
    score = functools.partial(_score_semantic, len(vocabulary), readers)
    accumulate(total, score, jobs, workers=workers, on_progress=on_progress)
    return {**total.summarize(vocabulary), "images": len(jobs)}, vocabulary


def _read_maps(path: Path, folder: Path | None) -> PanopticFile | dict[str, tuple]:
    path = pathlib.Path(path)
    if not path.is_dir():
        return read_panoptic_file(path, folder)
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in LABEL_FILES)
    if not files:
        raise ValueError(f"The folder {path} holds no label map ({', '.join(LABEL_FILES)}).")
    maps = {file.stem: (file,) for file in files}
    if len(maps) < len(files):
        raise ValueError(f"Two label maps in {path} differ in their extension only.")
    return maps


def _by_stem(maps: PanopticFile | dict[str, tuple]) -> dict[str, tuple]:
    if isinstance(maps, dict):
        return maps
    return {
        pathlib.PurePath(annotation["file_name"]).stem: (
            maps.folder / annotation["file_name"],
            annotation["segments_info"],
        )
        for annotation in maps.annotations.values()
    }


def _lookup(vocabulary: Vocabulary, values: str, ignored: Sequence[int]) -> np.ndarray:
    """Pixel value to class index or `VOID`; -2 where a value means nothing."""
    if values not in ("ids", "indices"):
        raise ValueError(f"Pixels of label maps are 'ids' or 'indices', not {values!r}.")
    known = vocabulary.category_ids if values == "ids" else range(len(vocabulary))
    lookup = np.full(max(*known, *ignored, 0) + 1, -2, np.int32)
    lookup[list(ignored)] = VOID
    lookup[list(known)] = np.arange(len(vocabulary))
    return lookup


def _read_labels(lookup: np.ndarray, path: pathlib.Path) -> np.ndarray:
    values = read_label_map(path)
    inside = (values >= 0) & (values < len(lookup))
    labels = lookup[np.where(inside, values, 0)]
    wrong = ~inside | (labels < VOID)
    if wrong.any():
        raise ValueError(
            f"{path} holds the value {values[wrong][0]}, which is neither a class of the split nor "
            "ignored; check the split, or add it to --ignore."
        )
    return labels


def _read_labels_of_segments(
    index_of: Mapping[int, int], json_path: pathlib.Path, png: pathlib.Path, segments: Sequence
) -> np.ndarray:
    id_map = read_id_map(png, json_path)
    check_ids(id_map, segments, png, json_path)
    labels = {0: VOID} | _labels_by_id(segments, index_of, png, json_path)
    ids = np.array(sorted(labels), np.int64)
    flat = id_map.ravel()
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    classes = np.array([labels[i] for i in ids.tolist()])[np.searchsorted(ids, flat[starts])]
    return np.repeat(classes, np.diff(starts, append=flat.size)).reshape(id_map.shape)


def _score_semantic(num_classes: int, readers: tuple, chunk: Sequence[tuple]) -> SemanticIoU:
    counts = SemanticIoU(num_classes)
    for pair in chunk:
        truth, found = (read(*job) for read, job in zip(readers, pair, strict=True))
        _check_sizes(truth, found, pair[0][0], pair[1][0])
        counts.update(truth, found, void=VOID)
    return counts


def score_instances(
    annotations: Path,
    predictions: Path,
    vocabulary: Vocabulary | None = None,
    *,
    thresholds: Sequence[float] = COCO_THRESHOLDS,
    workers: int = 1,
    on_progress: Progress | None = None,
) -> tuple[dict, Vocabulary]:
    """Mask AP of COCO instance results against a COCO instances json.

    Polygons of the annotations are rasterised by pycocotools, whose pixels the published numbers
    rest on; it is needed for them only.

    Args:
      annotations: instances json.
      predictions: results json, a list with run-length encoded masks. An image without a result
        has no detection.
      vocabulary: the label space, of which the annotations may lack classes (stuff); None takes
        the annotations', all of it seen.
      thresholds: as of `AveragePrecision`.
      workers, on_progress: as of `score_panoptic`.

    Returns:
      `AveragePrecision.summarize` with "images", and the vocabulary.

    Raises:
      ValueError: as `score_panoptic`, or if polygons are met and pycocotools is not installed.
    """
    truth = read_instance_file(annotations)
    if vocabulary is None:
        vocabulary = vocabulary_of(truth.path, truth.categories)
    check_categories(truth.path, truth.categories, vocabulary, must_have_all=False)
    index_of = vocabulary.index_of_category
    found = read_instance_results(predictions, truth, index_of)
    total = AveragePrecision(len(vocabulary), thresholds=thresholds)
    jobs = [(i, truth.images[i], truth.annotations[i], found.get(i, [])) for i in truth.images]
    score = functools.partial(
        _score_instances, index_of, total.thresholds, (truth.path, pathlib.Path(predictions))
    )
    accumulate(total, score, jobs, workers=workers, on_progress=on_progress)
    return {**total.summarize(vocabulary), "images": len(jobs)}, vocabulary


def _score_instances(
    index_of: Mapping[int, int], thresholds: Sequence[float], paths: tuple, chunk: Sequence[tuple]
) -> AveragePrecision:
    counts = AveragePrecision(len(index_of), thresholds=thresholds)
    for image_id, size, annotated, results in chunk:
        for annotation in annotated:
            if annotation["category_id"] not in index_of:
                raise ValueError(
                    f"Annotation {annotation.get('id')} of {paths[0]} has the category "
                    f"{annotation['category_id']}, which is not among the {len(index_of)} classes "
                    "that are scored."
                )
        for result in results:
            if tuple(result["segmentation"]["size"]) != size:
                raise ValueError(
                    f"A mask of image {image_id} in {paths[1]} is "
                    f"{'x'.join(map(str, result['segmentation']['size']))} (height x width) and "
                    f"the image in {paths[0]} {size[0]}x{size[1]}; predictions must have the "
                    "images' own size."
                )
        try:
            masks = [_annotated_mask(one["segmentation"], size, paths[0]) for one in annotated]
            areas = [
                one.get("area", mask_runs(mask).area)
                for one, mask in zip(annotated, masks, strict=True)
            ]
            counts.update(
                image_id,
                masks,
                [index_of[one["category_id"]] for one in annotated],
                [bool(one.get("iscrowd", 0)) for one in annotated],
                [one["segmentation"] for one in results],
                [index_of[one["category_id"]] for one in results],
                [one["score"] for one in results],
                gt_areas=areas,
            )
        except ValueError as error:
            raise ValueError(f"{paths[1]} against {paths[0]}, image {image_id}: {error}") from error
    return counts


def _annotated_mask(segmentation: Any, size: tuple[int, int], path: pathlib.Path) -> Mapping:
    if isinstance(segmentation, Mapping):
        return segmentation
    if not segmentation or not all(isinstance(p, list) and len(p) >= 6 for p in segmentation):
        raise ValueError("an annotation is neither polygons of three points or more nor a mask.")
    try:
        from pycocotools import mask as coco_mask
    except ImportError as error:
        raise ValueError(
            f"{path} holds polygons, which pycocotools must rasterise: pip install pycocotools."
        ) from error
    return coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))


def _same_keys(truth: Mapping, found: Mapping, what: str, truth_path: Path, found_path: Path):
    missing, extra = truth.keys() - found.keys(), found.keys() - truth.keys()
    for keys, has, lacks in ((missing, truth_path, found_path), (extra, found_path, truth_path)):
        if keys:
            raise ValueError(
                f"{lacks} has no {what} {min(keys)}, which {has} has ({len(keys)} of "
                f"{max(len(truth), len(found))} are missing); both must hold the same images."
            )
    if not truth:
        raise ValueError(f"{truth_path} holds no image; there is nothing to score.")
