"""Inputs of a command as files: every one is an image to take, passed over with a word, or failed.

Of images that lie in several folders the names keep the folders below the one they share, so that
`cam1/1.jpg` and `cam2/1.jpg` stay apart; a data set's annotations give names and ids of their own.
"""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import PurePath

from etils.epath import Path

from concat_jax.core.coco import ImageId, read_images, spelt
from concat_jax.core.files import FileError, as_path, files_below, in_bucket, read_json
from concat_jax.inference.images import OVERLAY_SUFFIX, SUFFIXES


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Images to take, each once, in order; sentences on files passed over and failures."""

    paths: list[Path]
    skipped: list[tuple[str, int]]
    failures: list[str]

    @property
    def num_skipped(self) -> int:
        """Files that are passed over."""
        return sum(number for _, number in self.skipped)


def find_images(arguments: Sequence[str]) -> Inputs:
    """Files of the command line's arguments: files, folders and globs.

    A folder stands for the images directly in it. Pictures of earlier runs, and the `._` files that
    macOS leaves on foreign disks, are passed over unless they are named.
    """
    taken: dict[Path, Path] = {}
    skipped: list[tuple[str, int]] = []
    failures: list[str] = []
    folders: dict[Path, list[Path]] = {}
    for argument in arguments:
        path, is_pattern = as_path(argument), False
        found, inner = [], []
        if path.is_dir():
            files, inner = _parted(path.iterdir())
            found = [file for file in files if _is_image(file)]
            others = [file.suffix or "none" for file in files if not _is_image(file)]
            if others:
                kinds = ", ".join(sorted({*others}))
                sentence = f"{path} holds {len(others)} without an image's suffix ({kinds})"
                skipped.append((f"{sentence}; name those that are images.", len(others)))
            if not found and not inner:
                failures.append(f"{argument} holds no image.")
        elif path.exists() or os.path.islink(path):
            found = [path]
        else:
            is_pattern = glob.has_magic(argument)
            if is_pattern:
                matching = map(as_path, glob.glob(argument, recursive=True))
                if in_bucket(path):
                    matching = path.parent.glob(path.name)
                found, inner = _parted(matching)
                inner = [] if "**" in argument else inner
            if not found and not inner:
                what = "matches no file" if is_pattern else "does not exist"
                failures.append(f"{argument} {what}.")
        folders |= inner
        if path.is_dir() or is_pattern:
            for files, what in (
                ([f for f in found if f.name.startswith("._")], "a file of macOS, no image"),
                ([f for f in found if f.name.endswith(OVERLAY_SUFFIX)], "of an earlier run"),
            ):
                skipped += [(f"{file} is {what}.", 1) for file in files]
                found = [file for file in found if file not in files]
        for file in found:
            if not file.exists():
                failures.append(f"{file} is a link to nothing.")
                continue
            first = taken.setdefault(file.resolve(), file)
            if first is not file:
                skipped.append((f"{file} is the same file as {first}.", 1))
    for folder, images in folders.items():  # but for those that another argument names
        if left := [image for image in images if image.resolve() not in taken]:
            skipped.append((_folder_inside(folder, left), len(left)))
    return Inputs(list(taken.values()), skipped, failures)


def _is_image(path: PurePath) -> bool:
    return path.suffix.lower() in SUFFIXES


def _folder_inside(folder: Path, images: list[Path]) -> str:
    """What to do with a folder that nobody named, whose images a pattern of a bucket misses."""
    kinds = () if in_bucket(folder) else sorted({image.suffix for image in images})
    patterns = " ".join(f"'{glob.escape(str(folder.parent))}/**/*{kind}'" for kind in kinds)
    return f"{folder} is a folder; name it{', or give ' * bool(patterns)}{patterns}."


def _parted(paths: Iterable[Path]) -> tuple[list[Path], list[tuple[Path, list[Path]]]]:
    """Files, and folders with the images in or below them; not what is hidden."""
    paths, inside = sorted(paths), {}
    for folder in (path for path in paths if path.is_dir()):
        inside[folder] = [
            file
            for file in files_below(folder)
            if _is_image(file) and not file.match("._*") and not file.match(f"*{OVERLAY_SUFFIX}")
        ]
    files = [p for p in paths if p not in inside and (p.name[0] != "." or _is_image(p))]
    return files, [(folder, images) for folder, images in inside.items() if images]


def source_names(paths: Sequence[Path]) -> list[str]:
    """File names of images as results quote them, below the folder that all of them share."""
    parts = [path.absolute().parts for path in paths]
    shared = len(os.path.commonprefix([names[:-1] for names in parts])) if parts else 0
    return ["/".join(names[shared:]) for names in parts]


def image_ids(names: Sequence[str]) -> list[int]:
    """Ids for COCO json: the numbers that all the names are, as COCO's files', or 1, 2, 3..."""
    if all(name.isascii() and name.isdigit() for name in names):
        ids = [int(name) for name in names]
        if len(set(ids)) == len(ids) and max(ids, default=0) < 2**63:  # as readers take them
            return ids
    return list(range(1, len(names) + 1))


def data_set_names(
    paths: Sequence[Path], annotations: str | os.PathLike[str]
) -> tuple[list[str], list[ImageId]]:
    """File names and ids that a COCO json lists; FileError if one is not there or ambiguous."""
    content = read_json(annotations)
    if not isinstance(content, dict):
        raise FileError(f"{annotations} is no COCO json with 'images'.")
    images = read_images(as_path(annotations), content)
    by_end: dict[str, list[tuple[str, ImageId]]] = {}
    for image in images.values():
        by_end.setdefault(spelt(image.file_name).name, []).append((image.file_name, image.id))
    names, ids = [], []
    for path in paths:
        own = spelt(path.absolute())
        fitting = [
            (len(spelt(name).parts), name, number)
            for file in (own, own.with_suffix(""))
            for name, number in by_end.get(file.name, [])
            if file.parts[-len(spelt(name).parts) :] == spelt(name).parts
        ]
        # "a/1.png" also ends in "1.png": the longest is meant.
        longest = max((length for length, *_ in fitting), default=0)
        found = [entry for length, *entry in fitting if length == longest]
        if len(found) != 1:
            what = f"{len(found)} images" if found else "no image"
            raise FileError(
                f"{path} fits {what} of {annotations}, by the file names there; give images that "
                "it lists, or leave --annotations out."
            )
        names.append(found[0][0])
        ids.append(found[0][1])
    if len(set(ids)) < len(ids):
        double = next(number for number in ids if ids.count(number) > 1)
        first, second = (p for p, number in zip(paths, ids, strict=True) if number == double)
        raise FileError(f"{first} and {second} both fit the image {double} of {annotations}.")
    return names, ids
