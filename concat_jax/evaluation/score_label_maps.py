"""Semantic IoU of label maps in folders, or of what panoptic files say of each pixel's class.

Whether a map's pixels are category ids or positions no map says: the manifest beside ours does, a
flag may, and where neither does the pixels themselves are asked.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from concat_jax.core.coco import ImageId, PanopticFile, read_panoptic, vocabulary_of
from concat_jax.core.files import FileError, as_path, files_below
from concat_jax.core.mask_codes import read_id_map, read_label_map, segment_rows
from concat_jax.core.prefetch import with_progress
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.result_files import (
    bare_name,
    check_counts,
    check_sizes,
    classes_in,
    classes_of,
    manifest_in,
    pair_images,
    read_manifest,
)
from concat_jax.evaluation.score_files import Path, label_space, pair_files, png_folder
from concat_jax.evaluation.semantic_iou import SemanticIoU

LABEL_FILES = (".png", ".tif", ".tiff", ".bmp")
# What label maps hold for "no class" when nothing else is said: the last value of 8 and 16 bits.
IGNORED_VALUES = (255, 65535)
VOID = -1
_UNKNOWN = -2
# No label map holds more, see `read_label_map`; ids of other files may be larger.
_MAX_PIXEL = 65535


@dataclasses.dataclass
class _Maps:
    """Label maps of one side, by whatever keys.

    Attributes:
      namings: key to the name it is paired by; where there are several, the first is tried first.
      read: map to its labels [H, W]: classes, `VOID`, or `_UNKNOWN` where a pixel means nothing.
      reread: the same read in the other way, ids as positions or positions as ids; None where a
        file says how they are meant.
      flag: of the other reading.
      is_told: a flag or a file says which classes the numbers are.
    """

    path: epath.Path
    namings: list[dict[Any, str]]
    read: Callable[[Any], np.ndarray]
    png: Callable[[Any], epath.Path]
    reread: Callable[[Any], np.ndarray] | None = None
    flag: str = ""
    is_told: bool = False


def score_semantic(
    annotations: Path,
    predictions: Path,
    vocabulary: Vocabulary | None = None,
    *,
    annotation_folder: Path | None = None,
    prediction_folder: Path | None = None,
    annotation_values: str = "",
    prediction_values: str = "",
    ignored_values: Sequence[int] = IGNORED_VALUES,
    knows_things: bool = True,
) -> dict:
    """Semantic IoU of label maps, or of what panoptic files say of each pixel's class.

    Args:
      annotations, predictions: each a folder of label maps, whose names are the images', or a COCO
        panoptic json. Both must hold the same images.
      vocabulary: the label space; None takes that of the annotations, where they are a panoptic
        json or have a manifest beside them.
      annotation_values, prediction_values: whether a folder's pixels are category ids ("ids") or
        positions in the vocabulary ("indices"). "" reads the manifest beside the folder, and
        without one takes them for ids, unless they agree better as positions: that is refused.
      ignored_values: pixel values that are no class: ignored in annotations, nothing predicted in
        predictions. A class of that value remains a class.
      knows_things: as of `score_panoptic`.

    Returns `SemanticIoU.summarize` with "images" and "notes".
    """
    notes: list[str] = []
    files: list[PanopticFile] = []
    if not as_path(annotations).is_dir():
        files.append(read_panoptic(annotations))
        vocabulary = label_space(files[0], vocabulary, knows_things=knows_things)
        truth = _panoptic_maps(files[0], annotation_folder, vocabulary.index_of_category)
    else:
        if vocabulary is None:
            manifest = read_manifest(annotations, "semantic")
            if manifest is None:
                raise FileError(f"No json beside {annotations} names its classes; give --split.")
            vocabulary = vocabulary_of(manifest.path, manifest.categories)
        truth = _folder_maps(
            annotations, "annotation", annotation_values, vocabulary, ignored_values, notes
        )
    if as_path(predictions).is_dir():
        found = _folder_maps(
            predictions, "prediction", prediction_values, vocabulary, ignored_values, notes
        )
    else:
        files.append(file := read_panoptic(predictions, prediction=True))
        class_of, note = classes_of(file.path, file.categories, vocabulary)
        notes.append(note)
        found = _panoptic_maps(file, prediction_folder, class_of)
    if len(files) == 2:
        paired, note = pair_files(*files)
        pairs = [(own, other) for other, own in paired.items()]
        notes.append(note)
    else:
        pairs = _pair_maps(truth, found)
    counts, agreement = SemanticIoU(len(vocabulary)), Counter()

    def score(number: int) -> tuple[SemanticIoU, dict[str, int]]:
        one, other = pairs[number]
        labels = truth.read(one), found.read(other)
        shapes = (one.shape for one in labels)
        check_sizes(*shapes, truth.png(one), found.png(other))
        own = SemanticIoU(len(vocabulary))
        own.update(*labels)
        agree = {"": int(np.trace(own.confusion))}
        for side, key, fixed in ((truth, one, labels[1]), (found, other, labels[0])):
            if side.reread:
                again = side.reread(key)
                agree[side.flag] = int(((again == fixed) & (fixed >= 0)).sum())
        return own, agree

    for own, agree in with_progress("semantic", score, len(pairs)):
        counts.merge(own)
        agreement.update(agree)
    right, named = agreement[""], int(counts.confusion.sum())
    annotated = named + int(counts.unnamed.sum())
    for side in (truth, found):
        other, pixels = agreement[side.flag] if side.reread else 0, annotated + int(counts.ignored)
        if other > right:
            notes.append(_better_reading(side, right / pixels, other / pixels))
    check_counts(annotated, named, right, truth.path, found.path, is_told=found.is_told)
    summary = counts.summarize(vocabulary)
    return {**summary, "images": len(pairs), "notes": [*filter(None, notes)]}


def _better_reading(side: _Maps, own: float, better: float) -> str:
    """Refuses a reading where another one agrees better, or notes it where it was asked for."""
    words = ("positions in the split", "category ids")
    words = words if side.flag.endswith("ids") else words[::-1]
    sentence = (
        f"Read as {words[0]}, the pixels of {side.path} agree at {100 * own:.1f} %, as "
        f"{words[1]} at {100 * better:.1f} %"
    )
    if not side.is_told:
        insist = side.flag.replace("indices", "ids")
        raise FileError(f"{sentence}: give {side.flag}, or {insist} to insist.")
    return f"{sentence} ({side.flag})."


def _pair_maps(truth: _Maps, found: _Maps) -> list[tuple[Any, Any]]:
    """Keys of both sides, by the first names that pair them; what the first are at fault for."""
    fault = None
    for namings in itertools.product(truth.namings, found.namings):
        try:
            return _pair_named((truth, found), namings)
        except FileError as error:
            fault = fault or error
    raise fault


def _pair_named(
    sides: Sequence[_Maps], namings: Sequence[Mapping[Any, str]]
) -> list[tuple[Any, Any]]:
    keys = [{bare_name(name): key for key, name in naming.items()} for naming in namings]
    for side, key_of, naming in zip(sides, keys, namings, strict=True):
        if len(key_of) < len(naming):
            raise FileError(f"Two maps of {side.path} differ in their extension only.")
    names = ({bare_name(name): name for name in naming.values()} for naming in namings)
    pairs, _ = pair_images(*names, *(side.path for side in sides))
    own, other = keys
    return sorted(((own[one], other[two]) for two, one in pairs.items()), key=str)


def _panoptic_maps(file: PanopticFile, folder: Path | None, class_of: Mapping[int, int]) -> _Maps:
    pngs = png_folder(file, folder)

    def png(image_id: ImageId) -> epath.Path:
        return pngs / file.annotations[image_id].file_name

    def read(image_id: ImageId) -> np.ndarray:
        one, path = file.annotations[image_id], png(image_id)
        rows = segment_rows(read_id_map(path, file.path), one.ids, path, file.path)
        what = f"A segment of {path} in {file.path}"
        return np.array([VOID, *classes_in(one.category_ids, class_of, what)])[rows]

    namings = [{i: a.file_name for i, a in file.annotations.items()}]
    if file.images:
        namings.insert(0, {i: file.images[i].file_name for i in file.annotations})
    return _Maps(file.path, namings, read, png, is_told=file.categories is not None)


def _folder_maps(
    folder: Path,
    side: str,
    values: str,
    vocabulary: Vocabulary,
    ignored: Sequence[int],
    notes: list[str],
) -> _Maps:
    """Label maps of a folder and the folders in it; `notes` gets how the manifest was read."""
    folder = as_path(folder)
    files = sorted(
        file
        for file in files_below(folder)
        if file.suffix.lower() in LABEL_FILES and not file.name.startswith("._")
    )
    if not files:
        raise FileError(f"The folder {folder} holds no label map ({', '.join(LABEL_FILES)}).")
    names = {file: file.relative_to(folder).as_posix() for file in files}
    namings = [names]
    opposite = "ids" if values == "indices" else "indices"
    flag = f"--{side}_values={opposite}"
    positions = dict(enumerate(range(len(vocabulary))))
    ids = vocabulary.index_of_category
    manifest = None
    if not values:
        manifest = read_manifest(folder, "semantic") or manifest_in(folder, [*names.values()])
    if manifest is not None:
        class_of, note = classes_of(manifest.path, manifest.categories, vocabulary)
        notes.append(note)
        lookup = _lookup(class_of, [manifest.void])
        unlisted = [file for file, name in names.items() if name not in manifest.maps]
        if unlisted:
            raise FileError(
                f"{manifest.path} does not list {unlisted[0]}; remove what earlier runs left."
            )
        namings.insert(0, {f: manifest.maps[n] for f, n in names.items()})
        flag = ""
    else:
        lookup = _lookup(positions if values == "indices" else ids, ignored)
    other = _lookup(ids if values == "indices" else positions, ignored)

    def read(file: epath.Path) -> np.ndarray:
        pixels = read_label_map(file)
        labels = _look_up(lookup, pixels)
        wrong = labels == _UNKNOWN
        if wrong.any():
            value = int(pixels[wrong][0])
            fits = flag and not (_look_up(other, pixels) == _UNKNOWN).any()
            what = "a position in" if values == "indices" else "a category id of"
            remedy = f"{flag} if the pixels mean that" if fits else "check the split"
            more = ",".join(map(str, [value, *ignored]))
            raise FileError(
                f"{file} holds the value {value}, which is neither {what} the split nor ignored; "
                f"give --ignore={more} if it is no class, or {remedy}."
            )
        return labels

    def reread(file: epath.Path) -> np.ndarray:
        return _look_up(other, read_label_map(file))

    again, is_told = reread if manifest is None else None, bool(values or manifest)
    return _Maps(folder, namings, read, lambda file: file, again, flag, is_told)


def _lookup(class_of: Mapping[int, int], ignored: Sequence[int | None]) -> np.ndarray:
    """Pixel value to class index or `VOID`; `_UNKNOWN` where a value means nothing."""
    meant = {**dict.fromkeys(ignored, VOID), **class_of}
    meant = {value: k for value, k in meant.items() if value is not None and value <= _MAX_PIXEL}
    lookup = np.full(max(meant, default=0) + 2, _UNKNOWN, np.int32)
    lookup[list(meant)] = list(meant.values())
    return lookup


def _look_up(lookup: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    # The last entry is unknown.
    return lookup[np.where((pixels >= 0) & (pixels < len(lookup)), pixels, len(lookup) - 1)]
