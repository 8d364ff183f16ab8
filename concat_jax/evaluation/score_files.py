"""Scores of prediction files against annotation files."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

from etils import epath

from concat_jax.core.coco import (
    ImageId,
    InstanceFile,
    PanopticAnnotation,
    PanopticFile,
    check_categories,
    read_instances,
    read_panoptic,
    vocabulary_of,
)
from concat_jax.core.files import FileError, as_path
from concat_jax.core.mask_codes import read_id_map, segment_rows
from concat_jax.core.prefetch import with_progress
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.average_precision import COCO_THRESHOLDS, AveragePrecision
from concat_jax.evaluation.panoptic_quality import PanopticQuality
from concat_jax.evaluation.result_files import (
    check_counts,
    check_sizes,
    classes_in,
    classes_of,
    pair_images,
    read_instance_results,
    read_manifest,
)
from concat_jax.evaluation.worst_best import Maps, WorstAndBest

Path = str | os.PathLike[str]


def score_panoptic(
    annotations: Path,
    predictions: Path,
    vocabulary: Vocabulary | None = None,
    *,
    annotation_folder: Path | None = None,
    prediction_folder: Path | None = None,
    extremes: WorstAndBest | None = None,
    knows_things: bool = True,
) -> dict:
    """Panoptic quality of files in COCO's panoptic format.

    Args:
      annotations, predictions: the jsons. Predictions must be there for every annotated image and
        for no other; panopticapi refuses the former and does not notice the latter.
      vocabulary: the label space; None takes the annotations', all of it seen.
      annotation_folder, prediction_folder: of the PNGs; by default beside each json, by its name.
      extremes: what all images are shown to.
      knows_things: whether the vocabulary says which classes are things; else the annotations do.

    Returns:
      `PanopticQuality.summarize` with "images" and "notes", sentences on how the files were read.
    """
    truth = read_panoptic(annotations)
    found = read_panoptic(predictions, prediction=True)
    folders = png_folder(truth, annotation_folder), png_folder(found, prediction_folder)
    vocabulary = label_space(truth, vocabulary, knows_things=knows_things)
    class_of, *notes = classes_of(found.path, found.categories, vocabulary)
    pairs, note = pair_files(truth, found)
    sides = (
        [(truth.annotations[i], truth.path) for i in pairs.values()],
        [(found.annotations[i], found.path) for i in pairs],
    )
    classes = vocabulary.index_of_category, class_of
    entry_of = truth.images or truth.annotations
    names = [entry_of[i].file_name for i in pairs.values()]
    quality = _count_panoptic(sides, folders, classes, len(vocabulary), names, extremes)
    right, missed, wrong = (int(n.sum()) for n in (quality.tp, quality.fn, quality.fp))
    is_told = found.categories is not None
    check_counts(right + missed, wrong, right, truth.path, found.path, is_told=is_told)
    summary = quality.summarize(vocabulary)
    return {**summary, "images": len(pairs), "notes": [*filter(None, [*notes, note])]}


def png_folder(file: PanopticFile, given: Path | None) -> epath.Path:
    """The folder of a json's PNGs, given or beside it; a FileError if there is none."""
    folder = as_path(given) if given else file.path.with_suffix("")
    if not folder.is_dir():
        raise FileError(
            f"There is no folder {folder} with the PNGs of {file.path}; say where they are."
        )
    return folder


def label_space(
    truth: PanopticFile | InstanceFile,
    vocabulary: Vocabulary | None,
    *,
    knows_things: bool = True,
    must_have_all: bool = True,
) -> Vocabulary:
    """The annotations' label space, or the given one, a FileError if it is not theirs.

    `knows_things` and `must_have_all` are of the given one: whether it says which of its classes
    are things, which the annotations do if not, and whether they must list all of its classes.
    """
    categories = truth.categories or {}
    if vocabulary is None:
        return vocabulary_of(truth.path, categories)
    if not knows_things:
        listed = (categories.get(number) for number in vocabulary.category_ids)
        flags = tuple(one is not None and one.is_thing is not False for one in listed)
        vocabulary = dataclasses.replace(vocabulary, is_thing=flags)
    check_categories(truth.path, categories, vocabulary, must_have_all=must_have_all)
    return vocabulary


def pair_files(truth: PanopticFile, found: PanopticFile) -> tuple[dict[ImageId, ImageId], str]:
    """As `pair_images`, by the names of images, or of PNGs where one of the files has none."""
    return pair_images(*_names(truth, found), truth.path, found.path)


def _names(*files: PanopticFile) -> list[dict[ImageId, str | None]]:
    """File names of the annotated images, of each of two files; None where they cannot be told."""
    if all(file.images for file in files):
        return [{i: file.images[i].file_name for i in file.annotations} for file in files]
    # The PNGs may be called alike on both sides, or have nothing to do with each other.
    names = [{i: a.file_name for i, a in file.annotations.items()} for file in files]
    if len({frozenset(pathlib.PurePath(name).stem for name in n.values()) for n in names}) == 1:
        return names
    return [dict.fromkeys(n) for n in names]


def _count_panoptic(
    sides: Sequence[Sequence[tuple[PanopticAnnotation, epath.Path]]],
    folders: Sequence[epath.Path],
    classes: Sequence[Mapping[int, int]],
    num_classes: int,
    names: Sequence[str],
    extremes: WorstAndBest | None,
) -> PanopticQuality:
    """Counts of pairs of annotations, ground truth first, each with the json it is of."""
    quality = PanopticQuality(num_classes)

    def count(number: int) -> tuple[PanopticQuality, list[Maps]]:
        maps, pngs = [], []
        for side, folder, class_of in zip(sides, folders, classes, strict=True):
            annotation, json_path = side[number]
            pngs.append(folder / annotation.file_name)
            id_map = read_id_map(pngs[-1], json_path)
            rows = segment_rows(id_map, annotation.ids, pngs[-1], json_path)
            what = f"A segment of {annotation.file_name} in {json_path}"
            maps.append((rows, classes_in(annotation.category_ids, class_of, what)))
        (truth, labels), found = maps
        check_sizes(truth.shape, found[0].shape, *pngs)
        own = PanopticQuality(num_classes)
        own.update(truth, labels, list(sides[0][number][0].is_crowd), *found)
        return own, maps

    results = with_progress("panoptic", count, len(names))
    for name, (own, maps) in zip(names, results, strict=True):
        quality.merge(own)
        if extremes:
            extremes.add(own, name, *maps)
    return quality


def score_instances(
    annotations: Path,
    predictions: Path,
    vocabulary: Vocabulary | None = None,
    *,
    thresholds: Sequence[float] = COCO_THRESHOLDS,
    knows_things: bool = True,
) -> dict:
    """Mask AP of a COCO results list against a COCO instances json; returns as `score_panoptic`.

    An image without a result has no detection; annotations may lack classes of the vocabulary
    (stuff).
    """
    truth = read_instances(annotations)
    vocabulary = label_space(truth, vocabulary, knows_things=knows_things, must_have_all=False)
    predictions = as_path(predictions)
    found, names, categories = read_instance_results(predictions)
    manifest = read_manifest(predictions, "instance")
    if manifest is not None:
        names = {i: image.file_name for i, image in manifest.images.items()}
        categories = manifest.categories
    class_of, note = classes_of(predictions, categories, vocabulary)
    own_names = {i: image.file_name for i, image in truth.images.items()}
    pairs, other_note = pair_images(
        own_names, names, truth.path, predictions, may_miss=manifest is None
    )
    found_of = {own: found.get(other, []) for other, own in pairs.items()}
    counts = AveragePrecision(len(vocabulary), thresholds=thresholds)
    # Ids may be texts; what breaks ties between images is their order.
    for number, image_id in enumerate(sorted(truth.images, key=lambda i: (str(type(i)), i))):
        image, results = truth.images[image_id], found_of.get(image_id, [])
        what = f"A mask of image {image_id} in {predictions}"
        labels = classes_in([result.category_id for result in results], class_of, what)
        for result in results:
            check_sizes((image.height, image.width), result.rle["size"], truth.path, what)
        annotated = truth.annotations[image_id]
        counts.update(
            number,
            [one.rle for one in annotated],
            [vocabulary.index_of_category[one.category_id] for one in annotated],
            [one.is_crowd for one in annotated],
            [one.rle for one in results],
            labels,
            [one.score for one in results],
            gt_areas=[one.area for one in annotated],
        )
    summary = counts.summarize(vocabulary)
    numbers = counts.num_gt.sum(), counts.detections.sum(), summary["all"]["ar"]
    check_counts(*numbers, truth.path, predictions, is_told=categories is not None)
    notes = [*filter(None, (note, other_note))]
    return {**summary, "images": len(truth.images), "notes": notes}
