"""The query bank on disk: shards of equally many images, memory-mapped when they are read.

A bank is a folder with `bank.json`, which says what the queries were made of, and the shards
`00000.safetensors`, `00001.safetensors`, ... Each appears under its name only when it is whole, so
an extraction that was killed goes on with the shards that are missing.

Several hosts see one folder, as they do for checkpoints. Every host holds the queries of a batch
once they are extracted, and writes those of its own shards: index modulo the number of hosts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils

from concat_jax.core.config import check_choice

FORMAT = 1
MANIFEST = "bank.json"
DTYPES = ("float16", "float32")
LABEL_DTYPE = np.int16
# Seconds after which a line of progress is due, however long a shard takes.
REPORT_EVERY = 30.0

Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class BankConfig:
    """`config.bank`, how queries lie on disk.

    Attributes:
      dtype: "float32" keeps what the segmentor gives. "float16" halves the bank: a query leaves a
        LayerNorm, so its numbers are near 1 and are moved by a few ten-thousandths, where those of
        one class differ by tenths. bfloat16 would take as much room and move them eight times as
        far.
      images_per_shard: rounded up to whole batches; a kill costs as many at most.

    Raises:
      ValueError: for another dtype, or shards of nothing.
    """

    dtype: str = "float32"
    images_per_shard: int = 1024

    def __post_init__(self):
        check_choice(self.dtype, DTYPES, "config.bank.dtype is")
        if self.images_per_shard < 1:
            raise ValueError(
                f"config.bank.images_per_shard is {self.images_per_shard} and must be at least 1."
            )


def bank_bytes(num_images: int, num_queries: int, width: int, dtype: str) -> int:
    """Bytes of a bank on disk, less a hundred or so of header a shard.

    COCO's 44,912 training images with 100 queries of 256 numbers are 2.31 GB as float16 and
    4.61 GB as float32:

        python -c "from concat_jax.stages.bank_files import bank_bytes; \\
            print(bank_bytes(44_912, 100, 256, 'float16') / 1e9)"

    Args:
      num_images: M.
      num_queries: N of an image.
      width: D of a query.
      dtype: of the queries; the class of each takes two bytes more.
    """
    of_query = width * np.dtype(dtype).itemsize + np.dtype(LABEL_DTYPE).itemsize
    return num_images * num_queries * of_query


class ShardedRows:
    """Arrays one after the other along axis 0, each of which may lie on disk.

    Indexed by an integer array of rows, or by a tuple of such arrays for the first axes, all of the
    same shape; the answer is an ordinary array. Safe to read from several threads.

    Attributes:
      shape: of the whole.
      dtype: of the parts.
    """

    def __init__(self, parts: Sequence[np.ndarray]):
        """Args:
        parts: at least one, of the same dtype and the same shape but for axis 0.
        """
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


def fill_bank(
    folder: Path,
    identity: Mapping[str, Any],
    extract: Callable[[Batch], tuple[np.ndarray, np.ndarray]],
    batches: Callable[[Sequence[int]], Iterable[Batch]],
    *,
    num_batches: int,
    batch_size: int,
    config: BankConfig,
    progress: Callable[[int, int], Callable[[int], object]],
    process_index: int = 0,
    process_count: int = 1,
) -> tuple[ShardedRows, np.ndarray]:
    """Open the bank in `folder`, after extracting the shards that it lacks, on all hosts together.

    Args:
      folder: of the bank, the same for all hosts; made if absent.
      identity: what the queries depend on; a bank with another identity is refused.
      extract: batch of images -> queries [B, N, D] and labels [B, N] of the global batch, class
        index or -1, on every host. All hosts call it as often.
      batches: steps -> this host's batch of images of each.
      num_batches: steps 0 .. num_batches - 1 make the bank.
      batch_size: B.
      config: how it lies on disk.
      progress: (images done, images in all) -> what is told how many are done from then on.
      process_index: this host.
      process_count: number of hosts.

    Returns:
      queries [M, N, D] of the config's dtype, on disk, and labels [M, N] int16, in memory. Row
      s·B + b is image b of step s.

    Raises:
      ValueError: if the folder holds another bank or a damaged one, there is nothing to extract, or
        a query cannot be stored.
    """
    if num_batches < 1:
        raise ValueError(
            "The query bank is to hold no image; set bank_images of the stage to the number of "
            "images whose queries it learns from."
        )
    plan = _Plan(num_batches, batch_size, config)
    manifest = {"format": FORMAT, **identity, **dataclasses.asdict(config), "batch": batch_size}
    manifest = json.loads(json.dumps(manifest))
    _claim(folder, manifest, leads=process_index == 0)
    missing = np.array([not shard_path(folder, i).is_file() for i in range(plan.num_shards)])
    # Extraction is one program of all hosts: they must agree on what there is to extract.
    missing = np.asarray(multihost_utils.broadcast_one_to_all(missing))
    todo = [int(index) for index in np.flatnonzero(missing)]
    if todo:
        if process_index == 0:
            print(
                f"Query bank {folder}: {plan.num_shards - len(todo)} of {plan.num_shards} shards "
                f"are finished, {len(todo)} to extract.",
                flush=True,
            )
        _write_shards(
            folder,
            manifest,
            plan,
            todo,
            extract,
            batches,
            progress,
            own=lambda index: index % process_count == process_index,
        )
        multihost_utils.sync_global_devices("query bank")
    return open_bank(folder, manifest, plan.num_shards)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Which steps make which shard."""

    num_batches: int
    batch_size: int
    config: BankConfig

    @property
    def _steps_per_shard(self) -> int:
        return -(-self.config.images_per_shard // self.batch_size)

    @property
    def num_shards(self) -> int:
        return -(-self.num_batches // self._steps_per_shard)

    def steps(self, index: int) -> range:
        begin = index * self._steps_per_shard
        return range(begin, min(begin + self._steps_per_shard, self.num_batches))


def _write_shards(
    folder: Path,
    manifest: Mapping[str, Any],
    plan: _Plan,
    todo: Sequence[int],
    extract: Callable[[Batch], tuple[np.ndarray, np.ndarray]],
    batches: Callable[[Sequence[int]], Iterable[Batch]],
    progress: Callable[[int, int], Callable[[int], object]],
    own: Callable[[int], bool],
) -> None:
    """Extract the shards `todo` and write those that are `own`."""
    ahead = iter(batches([step for index in todo for step in plan.steps(index)]))
    total = plan.num_batches * plan.batch_size
    done = total - plan.batch_size * sum(len(plan.steps(index)) for index in todo)
    report, reported = progress(done, total), time.monotonic()
    try:
        for index in todo:
            parts = []
            for step in plan.steps(index):
                part = _converted(*extract(next(ahead)), plan.config.dtype, step)
                if own(index):
                    parts.append(part)
                done += plan.batch_size
                last = step == plan.steps(index)[-1]
                if last and parts:
                    queries, labels = (np.concatenate(x) for x in zip(*parts, strict=True))
                    _write_shard(folder, index, queries, labels, manifest)
                if last or time.monotonic() - reported > REPORT_EVERY:
                    report(done)
                    reported = time.monotonic()
    finally:
        close = getattr(ahead, "close", None)
        if close:
            close()


def _converted(
    queries: np.ndarray, labels: np.ndarray, dtype: str, step: int
) -> tuple[np.ndarray, np.ndarray]:
    queries = np.asarray(queries)
    if not np.isfinite(queries).all():
        raise ValueError(
            f"The segmentor gives vision queries that are not finite for batch {step} of the "
            "training images; train it again with a smaller learning rate."
        )
    with np.errstate(over="ignore"):
        stored = queries.astype(dtype)
    if not np.isfinite(stored).all():
        raise ValueError(
            f"A vision query holds {np.abs(queries).max():g}, too large for {dtype}; set "
            "config.bank.dtype to 'float32'."
        )
    return stored, np.asarray(labels).astype(LABEL_DTYPE)


def shard_path(folder: Path, index: int) -> Path:
    """Where shard `index` lies once it is finished."""
    return folder / f"{index:05}.safetensors"


def open_bank(
    folder: Path, manifest: Mapping[str, Any], num_shards: int
) -> tuple[ShardedRows, np.ndarray]:
    """Map all shards of a finished bank into memory.

    Returns:
      queries [M, N, D], on disk, and labels [M, N] int16, in memory: COCO's take 9 MB.

    Raises:
      ValueError: for a shard that is missing, damaged or of another bank, naming the file.
    """
    shards = [_open_shard(folder, index, manifest) for index in range(num_shards)]
    queries, labels = zip(*shards, strict=True)
    return ShardedRows(queries), np.concatenate(labels)


def _claim(folder: Path, manifest: Mapping[str, Any], *, leads: bool) -> None:
    """Write the manifest if there is none, or refuse a folder that was begun with another."""
    path = folder / MANIFEST
    if not path.exists():
        if leads:
            folder.mkdir(parents=True, exist_ok=True)
            _replace(path, json.dumps(manifest, indent=1).encode() + b"\n")
        return
    try:
        theirs = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); delete the folder, and the queries are extracted anew."
        ) from error
    if theirs != manifest:
        key = min(k for k in theirs | manifest if theirs.get(k) != manifest.get(k))
        raise ValueError(
            f"The query bank {folder} was made from {key} {theirs.get(key)!r}, not from "
            f"{manifest.get(key)!r}; delete it or use another workdir."
        )


def _write_shard(
    folder: Path,
    index: int,
    queries: np.ndarray,
    labels: np.ndarray,
    manifest: Mapping[str, Any],
) -> None:
    arrays = {"queries": np.ascontiguousarray(queries), "labels": np.ascontiguousarray(labels)}
    metadata = {"bank": _stamp(manifest), "index": str(index)}
    _replace(shard_path(folder, index), safetensors.numpy.save(arrays, metadata))


def _open_shard(
    folder: Path, index: int, manifest: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    path = shard_path(folder, index)
    try:
        # Refuses a file whose length is not what its header says.
        with safetensors.safe_open(path, framework="np") as file:
            metadata, labels = file.metadata() or {}, file.get_tensor("labels")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(length))["queries"]
    except (safetensors.SafetensorError, OSError, KeyError) as error:
        raise _damaged(path, str(error)) from error
    if metadata.get("bank") != _stamp(manifest) or metadata.get("index") != str(index):
        raise _damaged(path, "it belongs to another bank")
    shape, begin = tuple(entry["shape"]), entry["data_offsets"][0]
    dtype = np.dtype(manifest["dtype"])
    if shape[:-1] != labels.shape or math.prod(shape) * dtype.itemsize != (
        entry["data_offsets"][1] - begin
    ):
        raise _damaged(path, f"it holds {shape} queries and {labels.shape} labels")
    return np.memmap(path, dtype, "r", offset=8 + length + begin, shape=shape), labels


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(
        f"The shard {path} of the query bank cannot be read ({why.rstrip('.')}); delete it and "
        "start again: it is extracted anew."
    )


def _stamp(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
