"""Predictions in COCO's formats, image by image, each with what a reader must know beside it.

Beside a result lies its manifest, the json object that says what the result holds: the task, what
the pixels mean, the categories, and which image has which id and file. `panoptic.json` is its own,
`semantic.json` lies beside the folder `semantic/`, `instances.manifest.json` beside
`instances.json`, which must be a bare list. A copy may lose it, so label maps and entries have the
names of their classes as well. `evaluation.result_files` reads both.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import secrets
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
from etils import epath
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from concat_jax.core.coco import ImageId
from concat_jax.core.files import as_path, make_folder, replacing, write_png, writing
from concat_jax.core.hosts import wait_for_hosts
from concat_jax.core.mask_codes import bounding_box, ids_to_rgb
from concat_jax.core.vocabulary import Vocabulary

# The text of a label map that says what its values are: a JSON object of names, null for void.
MAP_CLASSES = "concat_jax.classes"


class StreamedJson:
    """A json of long lists, written entry by entry, that appears when it is complete.

    Entries go to files beside it, so memory does not grow; they are removed when the `with` block
    ends, and the json is not written when it raises. Hosts with a writer each of one path that all
    of them see make one json: the first puts the entries together.
    """

    def __init__(
        self,
        json_path: str | os.PathLike[str],
        head: Mapping[str, Any] | None = None,
        lists: Sequence[str] = ("",),
    ):
        """`head` is what stands before the lists; None makes a json that is one list."""
        self.json_path = as_path(json_path)
        self._head, self._lists = head, tuple(lists)
        make_folder(self.json_path.parent)
        host = jax.process_index()
        # Of one host, whose path another process may be writing, too; hosts know no other's.
        self._own = f"{secrets.token_hex(4)}." if jax.process_count() == 1 else ""
        self._files = {
            key: self._part(key, host).open("w", encoding="utf-8") for key in self._lists
        }
        self._begun: set[str] = set()

    def _part(self, key: str, host: int) -> epath.Path:
        return self.json_path.with_name(f"{self.json_path.name}.{key}{host}.{self._own}partial")

    def append(self, entry: Mapping[str, Any], key: str = "") -> None:
        """Adds an entry to the list of that key."""
        file = self._files[key]
        with writing(self.json_path):
            file.write((",\n" if key in self._begun else "\n") + json.dumps(entry))
        self._begun.add(key)

    def close(self) -> epath.Path:
        """Puts the json together and returns its path.

        Of several hosts, each must call it and waits until the json is there.
        """
        with writing(self.json_path):
            for file in self._files.values():
                file.close()
        wait_for_hosts(f"entries of {self.json_path}")
        if jax.process_index() == 0:
            with replacing(self.json_path) as partial, partial.open("w", encoding="utf-8") as out:
                self._write(out)
            for key in self._lists:
                for host in range(jax.process_count()):
                    self._part(key, host).unlink()
        wait_for_hosts(f"{self.json_path} is there")
        return self.json_path

    def _write(self, out) -> None:
        items = () if self._head is None else self._head.items()
        start = "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in items)
        out.write("" if self._head is None else f"{{{start}")
        for number, key in enumerate(self._lists):
            name = "" if self._head is None else f"{json.dumps(key)}: "
            out.write(f"{',' * (number > 0)}{name}[")
            is_first = True
            for host in range(jax.process_count()):
                with self._part(key, host).open(encoding="utf-8") as entries:
                    first = entries.read(1)
                    out.write(("" if is_first else ",") + first if first else "")
                    is_first = is_first and not first
                    shutil.copyfileobj(entries, out)
            out.write("\n]\n")
        out.write("" if self._head is None else "}\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        try:
            if error_type is None:
                self.close()
        finally:
            for key, file in self._files.items():
                with contextlib.suppress(OSError):  # what is buffered finds no room again
                    file.close()
                self._part(key, jax.process_index()).unlink(missing_ok=True)


def inside(file_name: str) -> pathlib.PurePosixPath:
    """An image's path as one below a folder, whatever data set calls it ../b.jpg or /a/b.jpg."""
    parts = pathlib.PurePosixPath(file_name.replace("\\", "/")).parts
    return pathlib.PurePosixPath(*(part for part in parts if part not in ("..", "/")))


class _Writer(contextlib.ExitStack):
    """What the writers share: the label space, the names taken, the images of the manifest."""

    def __init__(self, vocabulary: Vocabulary):
        super().__init__()
        self._vocabulary = vocabulary
        self._taken: set[str] = set()

    def _open(self, json_path: epath.Path, head: dict | None, *lists: str) -> StreamedJson:
        return self.enter_context(StreamedJson(json_path, head, lists or ("",)))

    def _png(self, folder: epath.Path, file_name: str) -> str:
        """Takes the name of an image's PNG, relative to the folder, and makes its folder."""
        path = inside(file_name)
        name = path.with_suffix(".png").as_posix()
        # Two images may differ in their extension only.
        name = f"{path.as_posix()}.png" if name in self._taken else name
        if name in self._taken:
            raise ValueError(f"{name} was already written by this writer; rename {file_name}.")
        self._taken.add(name)
        make_folder((folder / name).parent)
        return name


def head(task: str, pixels: str, vocabulary: Vocabulary) -> dict[str, Any]:
    """What a manifest says before its lists: the task, what pixels mean, the categories."""
    rows = zip(vocabulary.category_ids, vocabulary.names, vocabulary.is_thing, strict=True)
    categories = [{"id": int(i), "name": n, "isthing": int(t)} for i, n, t in rows]
    return {"task": task, "pixels": pixels, "categories": categories}


def _category(label: int, vocabulary: Vocabulary, image_id: ImageId) -> int:
    if not 0 <= label < len(vocabulary):
        raise ValueError(
            f"Image {image_id}: class index {label} is outside the vocabulary of {len(vocabulary)}."
        )
    return int(vocabulary.category_ids[label])


def image_entry(image_id: ImageId, file_name: str, size: Sequence[int]) -> dict[str, Any]:
    """An image of size (height, width) in COCO's list of them."""
    height, width = (int(side) for side in size)
    return {"id": image_id, "file_name": str(file_name), "height": height, "width": width}


def segments_info(
    id_map: np.ndarray,
    segments: Sequence[Mapping[str, Any]],
    vocabulary: Vocabulary,
    image_id: ImageId,
) -> list[dict[str, Any]]:
    """COCO's list of an image's segments; areas and boxes are measured on its map [H, W], 0 void.

    `segments` have "id" and "label" (class index), optionally "score" and "iscrowd". Raises
    ValueError if their ids are not the map's (the official tool refuses such files) or a label is
    no class.
    """
    listed = [int(segment["id"]) for segment in segments]
    ids, areas = np.unique(id_map, return_counts=True)
    area_of = {int(i): int(a) for i, a in zip(ids, areas, strict=True) if i != 0}
    if sorted(listed) != sorted(area_of):
        raise ValueError(
            f"Image {image_id}: the map holds the ids {sorted(area_of)[:8]} but {listed[:8]} "
            "are listed; list every non-zero id of the map exactly once."
        )
    infos = []
    for segment in segments:
        info = {
            "id": int(segment["id"]),
            "category_id": _category(int(segment["label"]), vocabulary, image_id),
            "area": area_of[int(segment["id"])],
            "bbox": bounding_box(id_map == segment["id"]),
            "iscrowd": int(segment.get("iscrowd", 0)),
        }
        if "score" in segment:
            info["score"] = round(float(segment["score"]), 5)
        infos.append(info)
    return infos


class PanopticWriter(_Writer):
    """`<folder>/<name>/*.png` in COCO's colours and `<folder>/<name>.json`, as for panopticapi."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        vocabulary: Vocabulary,
        *,
        name: str = "panoptic_predictions",
    ):
        super().__init__(vocabulary)
        self.png_folder = as_path(folder) / name
        self.json_path = self.png_folder.with_name(f"{name}.json")
        make_folder(self.png_folder)
        start = head("panoptic", "segment_ids", vocabulary)
        self._json = self._open(self.json_path, start, "annotations", "images")

    def add(
        self,
        image_id: ImageId,
        file_name: str,
        id_map: np.ndarray,
        segments: Sequence[Mapping[str, Any]],
        *,
        result: str = "",
    ) -> None:
        """Writes one image's map and segments, see `segments_info`.

        Raises ValueError as it does, or if the PNG name was written before.
        """
        infos = segments_info(id_map, segments, self._vocabulary, image_id)
        png = self._png(self.png_folder, f"{result}.png" if result else file_name)
        write_png(self.png_folder / png, Image.fromarray(ids_to_rgb(id_map)))
        entry = {"image_id": image_id, "file_name": png, "segments_info": infos}
        self._json.append(entry, "annotations")
        self._json.append(image_entry(image_id, file_name, np.shape(id_map)), "images")


class InstanceWriter(_Writer):
    """COCO's list of results, with the names of images and categories, and its manifest.

    Without boxes: pycocotools' `loadRes` would take their areas for those of the masks.
    """

    def __init__(self, json_path: str | os.PathLike[str], vocabulary: Vocabulary):
        """Opens the files; their folder is made."""
        super().__init__(vocabulary)
        self.json_path = as_path(json_path)
        manifest = self.json_path.with_suffix(".manifest.json")
        self._manifest = self._open(manifest, head("instance", "run_lengths", vocabulary), "images")
        self._json = self._open(self.json_path, None)

    def add(
        self,
        image_id: ImageId,
        file_name: str,
        size: Sequence[int],
        labels: Sequence[int],
        scores: Sequence[float],
        codes: Sequence[Mapping[str, Any]],
    ) -> None:
        """Writes the n instances of one image; scores keep all digits, as ties decide AP.

        `codes` are of `encode_rle`. Raises ValueError for a label that is no class or a score not
        finite.
        """
        for label, score, code in zip(labels, scores, codes, strict=True):
            category = _category(int(label), self._vocabulary, image_id)
            if not math.isfinite(score):
                raise ValueError(f"Image {image_id} has an instance of score {score}.")
            entry = {"image_id": image_id, "file_name": file_name, "category_id": category}
            entry["category_name"] = self._vocabulary.names[label]
            self._json.append(entry | {"segmentation": dict(code), "score": float(score)})
        self._manifest.append(image_entry(image_id, file_name, size), "images")


class SemanticWriter(_Writer):
    """Label maps `<folder>/*.png` of one channel, and the manifest `<folder>.json`.

    Pixels are the data set's category ids, uint8 with 255 for void where every id is below 255,
    else uint16 with 65535; of ids that do not fit, positions in the list of categories.
    """

    def __init__(self, folder: str | os.PathLike[str], vocabulary: Vocabulary):
        """Makes the folder."""
        super().__init__(vocabulary)
        self.folder = as_path(folder)
        make_folder(self.folder)
        values: Sequence[int] = vocabulary.category_ids
        fits = min(values) >= 0 and max(values) < 65535
        values = values if fits else range(len(vocabulary))
        dtype = np.uint8 if max(values) < 255 else np.uint16
        # The last entry is void, which index -1 reads.
        self._values = np.array([*values, np.iinfo(dtype).max], dtype)
        start = head("semantic", "category_ids" if fits else "indices", vocabulary)
        manifest = self.folder.with_name(f"{self.folder.name}.json")
        self._json = self._open(manifest, {**start, "void": int(self._values[-1])}, "images")

    def add(
        self, image_id: ImageId, file_name: str, labels: np.ndarray, *, result: str = ""
    ) -> None:
        """Writes [H, W] class indices, -1 void; ValueError if one is no class or it was written."""
        labels = np.asarray(labels)
        present, areas = np.unique(labels, return_counts=True)
        if labels.size and not -1 <= present[0] <= present[-1] < len(self._vocabulary):
            raise ValueError(
                f"{file_name} has labels from {present[0]} to {present[-1]}; they must be class "
                f"indices of the vocabulary of {len(self._vocabulary)}, or -1."
            )
        png = self._png(self.folder, f"{result}.png" if result else file_name)
        names, said = (*self._vocabulary.names, None), PngInfo()
        text = json.dumps({int(self._values[k]): names[k] for k in (-1, *present.tolist())})
        said.add_text(MAP_CLASSES, text)
        write_png(self.folder / png, Image.fromarray(self._values[labels]), pnginfo=said)
        classes = [
            {"id": int(self._vocabulary.category_ids[k]), "name": self._vocabulary.names[k]}
            | {"area": int(area)}
            for k, area in zip(present.tolist(), areas, strict=True)
            if k >= 0
        ]
        entry = image_entry(image_id, file_name, labels.shape) | {"map": png, "classes": classes}
        self._json.append(entry, "images")
