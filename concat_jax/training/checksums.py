"""Whether the files of a checkpoint are those that were written.

Orbax's manifests and trees carry checksums, its data does not: a flipped bit in a weight is read
back as another weight. So each checkpoint keeps the size and CRC-32 of its files beside them. In a
bucket it is the size alone: the store has checksums of its own, which it watches over.
"""

from __future__ import annotations

import functools
import json
import os
import re
import zlib
from collections.abc import Sequence

import tensorstore
from etils.epath import Path

from concat_jax.core.files import files_below, in_bucket, read_json, read_text, write_json

NAME = "checksums.json"
_CHUNK = 1 << 22


def write_checksums(folder: Path) -> None:
    """Writes sizes and sums of all files in the subfolders of a checkpoint to its `NAME`."""
    sums = {}
    for item in sorted(path for path in folder.iterdir() if path.is_dir()):
        for path, size in files_below(item).items():
            sums[path.relative_to(folder).as_posix()] = [size, _crc(path)]
    write_json(folder / NAME, sums)


def damage(folder: Path, items: Sequence[str]) -> str:
    """What is wrong with a checkpoint, "" where nothing is. Asked again, it reads changes alone.

    Returns:
      The file and what it has, as "params/_METADATA is missing". Without `NAME`, in a checkpoint
      that an earlier version wrote, flipped bits of array data go unnoticed.
    """
    try:
        if not in_bucket(folder):  # what may not be listed would look empty
            for path in (folder, *map(folder.joinpath, items)):
                if path.is_dir():
                    os.listdir(path)
        found = files_below(folder)
    except OSError as error:
        return f"{folder.name} cannot be read ({error.strerror})"
    stamps = [
        (
            path.relative_to(folder).as_posix(),
            size,
            0 if in_bucket(path) else path.stat().st_mtime_ns,
        )
        for path, size in found.items()
    ]
    return _damage(folder, tuple(items), tuple(stamps))


@functools.cache
def _damage(folder: Path, items: tuple[str, ...], stamps: tuple) -> str:
    sizes = {name: size for name, size, _ in stamps}
    for item in items:
        if not any(name.startswith(f"{item}/") for name in sizes):
            return f"{item} is missing"
    if NAME not in sizes:
        return next(filter(None, (_unreadable(folder, item) for item in items)), "")
    try:
        sums = {name: (size, crc) for name, (size, crc) in read_json(folder / NAME).items()}
    except (ValueError, TypeError, AttributeError):
        return f"{NAME} cannot be read"
    sums = {name: sums[name] for name in sums if name.split("/")[0] in items}
    if lost := {*items} - {name.split("/")[0] for name in sums}:
        return f"{NAME} says nothing of {min(lost)}"
    for name, (size, crc) in sums.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != size:
            return f"{name} has {sizes[name]} bytes instead of {size}"
        try:
            found = _crc(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if None not in (crc, found) and found != crc:
            return f"{name} has another checksum than when it was written"
    return ""


def _unreadable(folder: Path, item: str) -> str:
    """The first file of an item that Orbax could not read, and why."""
    path = folder / item
    files = files_below(path / "array_metadatas")
    shapes = [file.relative_to(path).as_posix() for file in files]
    try:
        for name in ("_METADATA", "_sharding", *shapes):
            content = json.loads(read_text(path / name))
            if name == "_METADATA":
                entries = content["tree_metadata"].values()
                named = {".".join(str(k["key"]) for k in e["key_metadata"]) for e in entries}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{item}/{name} {'cannot be read' if (path / name).exists() else 'is missing'}"
    if not (path / "manifest.ocdbt").is_file():  # TensorStore would take it for an empty store
        return f"{item}/manifest.ocdbt is missing"
    key = b""
    try:
        base = f"{path}/" if in_bucket(path) else f"file://{path}/"
        spec = {"driver": "ocdbt", "base": base}
        store = tensorstore.KvStore.open(spec, context=tensorstore.Context()).result()
        keys = store.list().result()
        for key, read in [(key, store.read(key)) for key in keys]:
            if not read.result().value:  # so it reads what points into a file that is not there
                return f"{item} lacks the file that holds {key.decode()}"
    except Exception as error:  # TensorStore raises ValueError and Exception itself
        found = re.search(rf'"{re.escape(str(path))}/([^"]*[^"/])"', str(error))
        at = f"{item}/{found[1]}" if found else f"{item}: {key.decode() or 'manifest.ocdbt'}"
        return f"{at} cannot be read"
    if not {key.decode().rsplit("/", 1)[0] for key in keys} <= named:
        return f"{item}/_METADATA names other arrays than there are"
    return ""


def _crc(path: Path) -> int | None:
    if in_bucket(path):
        return None
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc
