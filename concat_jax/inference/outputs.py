"""Results as files: COCO's formats for programs, overlay pictures for people."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from concat_jax.core.coco_writers import InstanceWriter, PanopticWriter, SemanticWriter, inside
from concat_jax.core.files import cut_name, write_png
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.inference.images import OVERLAY_SUFFIX
from concat_jax.inference.instance import Instance
from concat_jax.inference.panoptic import ImageSegments
from concat_jax.visualize import overlay as pictures
from concat_jax.visualize.contact_sheet import ContactSheet

# Longer sides are shrunk: a picture to look at, where nobody sees more and names would be tiny.
OVERLAY_SIDE = 1600
JSONS = {
    "panoptic": ("panoptic.json",),
    "semantic": ("semantic.json",),
    "instance": ("instances.json", "instances.manifest.json"),
}
SHEET = "contact_sheet"


def result_names(file_names: Sequence[str]) -> list[str]:
    """A name for the results of each image, its path without the extension, that no other shares.

    Names that differ in nothing or in case only, for some file systems, get -2, -3 and so on. That
    of a very long file ends early, and one that is a contact sheet's gets an underscore.
    """
    stems = [_stem(name) for name in file_names]
    reserved = {stem.casefold() for stem in stems}
    taken: set[str] = set()
    names = []
    for stem in stems:
        name, number = stem, 1
        while name.casefold() in taken or (number > 1 and name.casefold() in reserved):
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def _stem(file_name: str) -> str:
    path = inside(file_name)
    name = path.stem if path.stem.strip(".") else path.name
    stem = path.with_name(cut_name(name)).as_posix()
    return f"{stem}_" if re.fullmatch(rf"{SHEET}(-\d+)?", stem, re.IGNORECASE) else stem


def result_files(folder: Path, task: str, names: Sequence[str]) -> Iterator[Path]:
    """The files that `ResultWriter` writes, of images of these names."""
    yield from (folder / name for name in (*JSONS[task], f"{SHEET}{OVERLAY_SUFFIX}"))
    for name in names:
        yield folder / f"{name}{OVERLAY_SUFFIX}"
        if task != "instance":
            yield folder / task / f"{name}.png"


def overlay(
    image: np.ndarray, ids: np.ndarray, labels: Mapping[int, int], vocabulary: Vocabulary
) -> Image.Image:
    """The overlay picture of an id map [H, W], 0 void, with the class of every id."""
    image, ids = pictures.shrink(image, ids, OVERLAY_SIDE)
    return pictures.panoptic_overlay(
        image, ids, labels, vocabulary.names, vocabulary.is_thing, is_seen=vocabulary.is_seen
    )


def summary(vocabulary: Vocabulary, labels: Sequence[int], what: str) -> str:
    """How many there are of `what` and of which classes: "3 segments: 2 cat, sky"."""
    kinds, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    names = [vocabulary.names[k] for k in kinds[order]] if len(labels) else []
    parts = [
        f"{count} {name}" if count > 1 else name
        for name, count in zip(names[:5], counts[order], strict=False)
    ]
    more = ", ..." if len(names) > 5 else ""
    colon = ": " if parts else ""
    return f"{len(labels)} {what}{'s' * (len(labels) != 1)}{colon}{', '.join(parts)}{more}"


class ResultWriter(contextlib.ExitStack):
    """Writes the results of one task, image by image. A context manager.

    panoptic: `panoptic/NAME.png` in COCO's id colours and `panoptic.json`; instance:
    `instances.json`, a COCO results list with compressed masks, and `instances.manifest.json`;
    semantic: `semantic/NAME.png` of category ids and `semantic.json`, which says so. Each also
    `NAME.overlay.png`, and of several `contact_sheet.overlay.png`. A json appears when all is
    written.
    """

    def __init__(self, folder: Path, task: str, vocabulary: Vocabulary):
        """Makes the folder.

        Args:
          task: "panoptic", "instance" or "semantic".
        """
        super().__init__()
        self._folder, self._vocabulary = folder, vocabulary
        sheet = ContactSheet(folder / f"{SHEET}{OVERLAY_SUFFIX}")
        self._sheet = self.enter_context(sheet)
        if task == "panoptic":
            self._panoptic = self.enter_context(PanopticWriter(folder, vocabulary, name=task))
        if task == "instance":
            writer = InstanceWriter(folder / JSONS[task][0], vocabulary)
            self._instance = self.enter_context(writer)
        if task == "semantic":
            self._semantic = self.enter_context(SemanticWriter(folder / task, vocabulary))

    def add(
        self,
        name: str,
        image_id: int,
        source: str,
        image: np.ndarray,
        result: ImageSegments | Sequence[Instance] | np.ndarray,
    ) -> str:
        """Writes one image's files; what was found, in a few words, never nothing."""
        if isinstance(result, ImageSegments):
            self._panoptic.add(image_id, source, result.id_map, result.segments, result=name)
            ids, labels = result.id_map, result.labels_by_id()
            found = summary(self._vocabulary, [s["label"] for s in result.segments], "segment")
            found = found if result.segments else result.explain()
        elif isinstance(result, np.ndarray):
            self._semantic.add(image_id, source, result, result=name)
            present, areas = np.unique(result, return_counts=True)
            ids, labels = result.astype(np.int32) + 1, {int(k) + 1: int(k) for k in present}
            order = present[np.argsort(-areas)]
            shown = ", ".join(self._vocabulary.names[k] for k in order[:5])
            more = ", ..." if len(order) > 5 else ""
            found = f"{len(order)} class{'es' * (len(order) != 1)}: {shown}{more}"
        else:
            classes = [instance.label for instance in result]
            scores = [instance.score for instance in result]
            codes = [instance.rle for instance in result]
            self._instance.add(image_id, source, image.shape[:2], classes, scores, codes)
            # The best on top, as far as they overlap.
            ids = np.zeros(image.shape[:2], np.int32)
            for rank in range(len(result) - 1, -1, -1):
                ids[result[rank].mask] = rank + 1
            labels = {rank + 1: label for rank, label in enumerate(classes)}
            found = summary(self._vocabulary, classes, "instance")
            if not result:
                found = "No instance above the score threshold; lower score_threshold to see more."
        picture = overlay(image, ids, labels, self._vocabulary)
        write_png(self._folder / f"{name}{OVERLAY_SUFFIX}", picture)
        self._sheet.add(picture, source, found)
        return found
