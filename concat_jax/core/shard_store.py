"""Arrays on disk in shards that appear whole or not at all, and what they were made of.

A store is a folder with a manifest, which says what its content depends on, and the shards
`00000.safetensors`, ... Whoever was killed goes on with those that are missing, and hosts that see
one folder fill disjoint ones. A shard carries the hash of its manifest, its number and a checksum.
Safetensors, not npz, because its arrays can be mapped into memory; of a store in a bucket a copy in
the machine's temporary folder is mapped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import safetensors
import safetensors.numpy
from etils.epath import Path

from concat_jax.core.config import flat
from concat_jax.core.files import FileError, as_path, on_disk, read_json, replacing, write_json

_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
# Metadata that holds the manifest's hash; query banks called it so before they had checksums.
_STAMPS = ("manifest", "bank")


class StoreError(ValueError):
    """A store that is missing, incomplete, damaged or made of something else, in one sentence."""


@dataclasses.dataclass(frozen=True)
class StoreKind:
    """What is stored, for file names and sentences; `again` brings back what was deleted."""

    content: str
    arrays: tuple[str, ...]
    again: str
    manifest: str = "manifest.json"


class ShardStore:
    """The shards of one manifest, whose sha256 is the stamp, in one folder.

    Of the fields that it `keeps` a folder that was begun has its own values.
    """

    def __init__(
        self,
        folder: Path,
        kind: StoreKind,
        manifest: Mapping[str, Any],
        *,
        keeps: Collection[str] = (),
    ):
        self._folder, self._kind = as_path(folder), kind
        begun = (keeps and self._read_manifest()) or {}
        kept = {key: begun[key] for key in keeps if key in begun}
        self.manifest: dict[str, Any] = json.loads(json.dumps({**manifest, **kept}))
        content = json.dumps(self.manifest, sort_keys=True)
        self.stamp = hashlib.sha256(content.encode()).hexdigest()

    @classmethod
    def found(cls, folder: Path, kind: StoreKind, expected: Mapping[str, Any]) -> Self:
        """The store that somebody filled; StoreError if there is none or `expected` differs."""
        store = cls(folder, kind, expected)
        theirs = store._read_manifest()
        if theirs is None:
            raise StoreError(
                f"{folder} does not hold {kind.content} (it has no {kind.manifest}); {kind.again}."
            )
        store._check(theirs, flat(store.manifest))
        return cls(folder, kind, theirs)

    def claim(self, *, leads: bool = True) -> None:
        """Writes the manifest if there is none (not `leads`: another host does), or compares it.

        Raises StoreError naming the first field that differs, with both values.
        """
        theirs = self._read_manifest()
        if theirs is not None:
            self._check(theirs, flat(self.manifest) | flat(theirs))
        elif leads:
            write_json(self._folder / self._kind.manifest, self.manifest)

    def path(self, index: int) -> Path:
        """Where shard `index` lies once it is finished."""
        return self._folder / f"{index:05}.safetensors"

    def missing(self, shards: Iterable[int]) -> list[int]:
        return [index for index in shards if not self.path(index).is_file()]

    def write(self, index: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes a shard; FileError if the disk does not take it; then nothing of it is left."""
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        metadata = {
            "manifest": self.stamp,
            "index": str(index),
            "arrays": _described(arrays),
            "crc32": _checksum(arrays),
        }
        for stale in self._folder.glob(f"{self.path(index).name}*.partial"):  # of a killed process
            stale.unlink(missing_ok=True)
        with replacing(self.path(index)) as partial:
            partial.write_bytes(safetensors.numpy.save(arrays, metadata))

    def load(self, count: int) -> dict[str, np.ndarray]:
        """The arrays of shards 0 .. count - 1 one after the other, in memory; errors as `open`."""
        if missing := self.missing(range(count)):
            raise StoreError(
                f"{len(missing)} of {count} shards of {self._kind.content} are missing in "
                f"{self._folder}, the first is {self.path(missing[0]).name}; {self._kind.again}."
            )
        # First the sizes alone: a mapped shard holds its file open.
        sizes, ends = dict.fromkeys(self._kind.arrays, 0), dict.fromkeys(self._kind.arrays, 0)
        for index in range(count):
            shard = self.open(index, verify=False)
            sizes = {name: size + len(shard[name]) for name, size in sizes.items()}
        whole = {k: np.empty((sizes[k], *a.shape[1:]), a.dtype) for k, a in shard.items()}
        for index in range(count):
            for name, array in self.open(index).items():
                begin, ends[name] = ends[name], ends[name] + len(array)
                whole[name][begin : ends[name]] = array
        return whole

    def open(self, index: int, *, verify: bool = True) -> dict[str, np.ndarray]:
        """A shard mapped into memory; StoreError if it is missing, damaged or another store's.

        Unless told to `verify`, it is taken for what its header says, and its arrays are not read.
        """
        path = self.path(index)
        try:
            # Refuses a file whose length is not what its header says.
            with on_disk(path) as local:
                with safetensors.safe_open(local, framework="np") as file:
                    metadata = file.metadata() or {}
                with local.open("rb") as file:
                    begin = 8 + int.from_bytes(file.read(8), "little")
                    header = json.loads(file.read(begin - 8))
                content = np.zeros(0, np.uint8)
                if local.stat().st_size > begin:  # nothing cannot be mapped
                    content = np.memmap(local, np.uint8, "r", begin)
            header.pop("__metadata__", None)
            arrays = {
                name: content[slice(*entry["data_offsets"])]
                .view(_DTYPES[entry["dtype"]])
                .reshape(entry["shape"])
                for name, entry in header.items()
            }
        except OSError as error:
            raise StoreError(
                f"The shard {path} of {self._kind.content} cannot be read: "
                f"{error.strerror or error}."
            ) from error
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise self.damaged(index, str(error)) from error
        if self.stamp not in (metadata.get(name) for name in _STAMPS):
            raise self.damaged(index, f"it does not belong to {self._kind.manifest} beside it")
        if metadata.get("index") != str(index):
            raise self.damaged(index, f"it is shard {metadata.get('index')} under another name")
        described = _described(arrays)
        if set(arrays) != set(self._kind.arrays) or metadata.get("arrays", described) != described:
            raise self.damaged(index, f"it holds {described}")
        if verify and "crc32" in metadata and metadata["crc32"] != _checksum(arrays):
            raise self.damaged(index, "its checksum differs")
        return arrays

    def damaged(self, index: int, why: str) -> StoreError:
        """The error of a shard that is to be made anew."""
        return StoreError(
            f"The shard {self.path(index)} of {self._kind.content} is damaged "
            f"({' '.join(why.split()).rstrip('.')}); delete it and {self._kind.again}."
        )

    def damaged_manifest(self, why: str) -> StoreError:
        """The error of a manifest that says nothing of use."""
        return StoreError(
            f"{self._folder / self._kind.manifest} is damaged ({why.rstrip('.')}); delete the "
            f"folder and {self._kind.again}."
        )

    def _read_manifest(self) -> dict[str, Any] | None:
        path = self._folder / self._kind.manifest
        if not path.exists():
            return None
        try:
            return dict(read_json(path))
        except (FileError, TypeError, ValueError) as error:
            raise self.damaged_manifest(str(error)) from error

    def _check(self, theirs: Mapping[str, Any], fields: Iterable[str]) -> None:
        now, then = flat(self.manifest), flat(theirs)
        for field in fields:
            if then.get(field) != now.get(field):
                raise StoreError(
                    f"{self._folder} holds {self._kind.content} made with {field} = "
                    f"{then.get(field)!r}, now it is {now.get(field)!r}; use another folder, or "
                    f"delete this one and {self._kind.again}."
                )


class ShardedRows:
    """Arrays one after the other along axis 0, each of which may lie on disk.

    Indexed by an integer array of rows, or by a tuple of such for the first axes, all of one shape;
    the answer is an ordinary array. Safe to read from several threads.
    """

    def __init__(self, parts: Sequence[np.ndarray]):
        """At least one part, all of the same dtype and the same shape but for axis 0."""
        self._parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in self._parts])
        self.shape = (int(self._ends[-1]), *self._parts[0].shape[1:])
        self.dtype = self._parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: np.ndarray | tuple[np.ndarray, ...]) -> np.ndarray:
        rows, *others = index if isinstance(index, tuple) else (index,)
        rows = np.asarray(rows)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"A row of {rows.min()} to {rows.max()} is not among {len(self)}.")
        out = np.empty((*rows.shape, *self.shape[1 + len(others) :]), self.dtype)
        owners = np.searchsorted(self._ends, rows, side="right")
        for owner in np.unique(owners):
            own, part = owners == owner, self._parts[owner]
            begin = self._ends[owner] - len(part)
            out[own] = part[(rows[own] - begin, *(np.asarray(axis)[own] for axis in others))]
        return out


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    value = 0
    for name in sorted(arrays):
        value = zlib.crc32(arrays[name].reshape(-1).view(np.uint8), value)
    return f"{value:08x}"


def _described(arrays: Mapping[str, np.ndarray]) -> str:
    parts = (f"{name} {a.dtype.name}{list(a.shape)}" for name, a in sorted(arrays.items()))
    return ", ".join(parts)
