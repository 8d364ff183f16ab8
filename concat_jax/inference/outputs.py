"""Results as files: COCO's formats for programs, overlay pictures for people."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from concat_jax.core.coco import PanopticWriter, bounding_box
from concat_jax.core.files import write_json
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.inference.images import OVERLAY_SUFFIX
from concat_jax.inference.instance import Instance
from concat_jax.inference.segments import ImageSegments
from concat_jax.visualize import overlay as pictures

# Longer sides are shrunk: a picture to look at, where nobody sees more and names would be tiny.
OVERLAY_SIDE = 1600


def output_names(paths: Sequence[Path]) -> list[str]:
    """A name for each input that no other shares: its stem, or stem-2, stem-3 and so on.

    Case does not tell names apart, as on some file systems.
    """
    stems = {path.stem.casefold() for path in paths}
    taken: set[str] = set()
    names = []
    for path in paths:
        name, number = path.stem, 1
        while name.casefold() in taken or (number > 1 and name.casefold() in stems):
            number += 1
            name = f"{path.stem}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def image_ids(names: Sequence[str]) -> list[int]:
    """Ids for COCO json: the numbers that all the names are, as COCO's files', or 1, 2, 3..."""
    if all(name.isascii() and name.isdigit() for name in names):
        ids = [int(name) for name in names]
        if len(set(ids)) == len(ids):
            return ids
    return list(range(1, len(names) + 1))


def _shrink(
    image: np.ndarray, segment_ids: np.ndarray, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Image [H, W, 3] uint8 and its id map [H, W], shrunk until no side exceeds `longest`.

    Colours are averaged, ids taken at the nearest pixel centre; small ones are left as they are.
    """
    height, width = segment_ids.shape
    factor = longest / max(height, width)
    if factor >= 1:
        return image, segment_ids
    height_to, width_to = max(1, round(height * factor)), max(1, round(width * factor))
    small = Image.fromarray(image).resize((width_to, height_to), Image.Resampling.BOX)
    rows = ((np.arange(height_to) + 0.5) * height / height_to).astype(int)
    columns = ((np.arange(width_to) + 0.5) * width / width_to).astype(int)
    return np.asarray(small), segment_ids[rows[:, None], columns[None]]


class ResultWriter:
    """Writes the results of one task, image by image. A context manager.

    panoptic: `panoptic/NAME.png` in COCO's id colours and `panoptic.json`; instance:
    `instances.json`, a COCO results list with compressed masks; semantic: `semantic/NAME.png` of
    class indices and `semantic.json` with their names. Each also `NAME.overlay.png`. A json
    appears when all is written; with the panoptic PNGs it is what panopticapi takes.
    """

    def __init__(self, folder: Path, task: str, vocabulary: Vocabulary, is_thing: Sequence[bool]):
        """Makes the folder.

        Args:
          folder: that everything is written to.
          task: "panoptic", "instance" or "semantic".
          vocabulary: names and category ids.
          is_thing: K flags, for colours.
        """
        self._folder, self._task = folder, task
        self._vocabulary, self._is_thing = vocabulary, is_thing
        self._entries: list[dict] = []
        self._stack = contextlib.ExitStack()
        folder.mkdir(parents=True, exist_ok=True)
        if task == "panoptic":
            writer = PanopticWriter(folder, vocabulary, name="panoptic")
            self._panoptic = self._stack.enter_context(writer)
        if task == "semantic":
            (folder / "semantic").mkdir(exist_ok=True)

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)
        if error[0] is not None:
            return
        if self._task == "instance":
            write_json(self._folder / "instances.json", self._entries)
        if self._task == "semantic":
            names, ids = self._vocabulary.names, self._vocabulary.category_ids
            categories = [
                {"index": k, "id": category, "name": name}
                for k, (category, name) in enumerate(zip(ids, names, strict=True))
            ]
            report = {"categories": categories, "annotations": self._entries}
            write_json(self._folder / "semantic.json", report)

    def add(
        self,
        name: str,
        image_id: int,
        source: str,
        image: np.ndarray,
        result: ImageSegments | Sequence[Instance] | np.ndarray,
    ) -> str:
        """Writes one image's files.

        Args:
          name: of `output_names`.
          image_id: of `image_ids`.
          source: the image's own file name.
          image: [H, W, 3] uint8.
          result: of `Predictor`.

        Returns:
          What was found, in a few words; never nothing.
        """
        if isinstance(result, ImageSegments):
            self._panoptic.add(
                image_id, f"{name}.png", result.id_map, result.segments, source=source
            )
            ids, labels = result.id_map, result.labels_by_id()
            found = self._summary([s["label"] for s in result.segments], "segment")
            found = found if result.segments else result.explain()
        elif isinstance(result, np.ndarray):
            present, areas = np.unique(result, return_counts=True)
            self._add_semantic(name, image_id, source, result, present, areas)
            ids, labels = result.astype(np.int32) + 1, {int(k) + 1: int(k) for k in present}
            order = present[np.argsort(-areas)]
            shown = ", ".join(self._vocabulary.names[k] for k in order[:5])
            more = ", ..." if len(order) > 5 else ""
            found = f"{len(order)} class{'es' * (len(order) != 1)}: {shown}{more}"
        else:
            self._add_instances(image_id, source, result)
            # The best on top, as far as they overlap.
            ids = np.zeros(image.shape[:2], np.int32)
            for rank in range(len(result) - 1, -1, -1):
                ids[result[rank].mask] = rank + 1
            labels = {rank + 1: instance.label for rank, instance in enumerate(result)}
            found = self._summary([i.label for i in result], "instance")
            if not result:
                found = "No instance above the score threshold; lower score_threshold to see more."
        self.overlay(image, ids, labels).save(self._folder / f"{name}{OVERLAY_SUFFIX}")
        return found

    def overlay(self, image: np.ndarray, ids: np.ndarray, labels: Mapping[int, int]) -> Image.Image:
        """The overlay picture of an id map, 0 void, with the class of every id."""
        image, ids = _shrink(image, ids, OVERLAY_SIDE)
        names, is_thing = self._vocabulary.names, self._is_thing
        return pictures.panoptic_overlay(image, ids, labels, names, is_thing)

    def _summary(self, labels: Sequence[int], what: str) -> str:
        kinds, counts = np.unique(labels, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        names = [self._vocabulary.names[k] for k in kinds[order]] if len(labels) else []
        parts = [
            f"{count} {name}" if count > 1 else name
            for name, count in zip(names[:5], counts[order], strict=False)
        ]
        more = ", ..." if len(names) > 5 else ""
        return f"{len(labels)} {what}{'s' * (len(labels) != 1)}: {', '.join(parts)}{more}"

    def _add_instances(self, image_id: int, source: str, instances: Sequence[Instance]) -> None:
        for instance in instances:
            entry = {
                "image_id": image_id,
                "file_name": source,
                "category_id": self._vocabulary.category_ids[instance.label],
                "score": round(instance.score, 5),
                "bbox": bounding_box(instance.mask),
                "segmentation": instance.rle,
            }
            self._entries.append(entry)

    def _add_semantic(self, name, image_id, source, classes, present, areas) -> None:
        Image.fromarray(classes).save(self._folder / "semantic" / f"{name}.png")
        found = [
            {"index": int(k), "name": self._vocabulary.names[k], "area": int(area)}
            for k, area in zip(present, areas, strict=True)
        ]
        self._entries.append(
            {
                "image_id": image_id,
                "file_name": f"{name}.png",
                "source": source,
                "classes": found,
            }
        )
