"""Writes a source's shards in parallel processes, and goes on where a killed run stopped."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import types
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from concat_jax.core.files import FileError
from concat_jax.core.progress import Progress
from data_pipelines.leak_test import check_no_leak
from data_pipelines.shards import files as shard_files
from data_pipelines.shards.files import Identity, ShardIndex, index_path, manifest_path
from data_pipelines.sources.source import (
    FolderSource,
    ImageRecord,
    Source,
    UnseenImages,
    treat_unseen,
)

logger = logging.getLogger(__name__)

# Of a shard by default: 100 MB of COCO, as TFDS advises; half a minute's work to lose to a kill.
IMAGES_PER_SHARD = 500


@dataclasses.dataclass(frozen=True)
class BuildReport:
    """Shards that were finished before and that this call wrote, images in all, left out -> why."""

    finished_before: int
    written: int
    images: int
    skipped: dict[str, str]


def build_shards(
    folder: str | os.PathLike[str],
    source: FolderSource,
    *,
    dataset: str,
    part: str,
    unseen: UnseenImages,
    num_shards: int | None = None,
    workers: int = 2,
    skip_bad: bool = False,
) -> BuildReport:
    """Writes the shards of one part that are not there yet.

    Images lie in the shards by ascending id, equally many in each. With `unseen` "drop" or "void"
    the shards hold what training may see and nothing else, and the leak test is run on the source
    before and on the finished shards after.

    Args:
      folder: for all parts of one data set; made if absent.
      source: of `open_source`; it must be picklable if workers > 1, processes.
      num_shards: None: as the folder was begun, or else one for every 500 images.
      skip_bad: leave out images that cannot be used, count and name them, instead of raising.

    Raises FileError as well if the folder was begun with another data set or setting.
    """
    for name, value in (("data set", dataset), ("part", part)):
        if not value.isidentifier():
            raise ValueError(
                f"The {name} {value!r} cannot be part of a shard's name; it must be letters, "
                "digits and _, and begin with a letter."
            )
    for name, value in (("shards", num_shards), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"The number of {name} is {value} and must be at least 1.")
    folder = Path(folder)
    treated, positions = treat_unseen(source, unseen)
    if unseen == "keep":  # for evaluations too, which count what a model finds where nothing is
        positions = np.arange(len(source.records))
    if not len(positions):
        raise FileError(f"Of {part}, no image is left to write with unseen images {unseen!r}.")
    if unseen != "keep":
        check_no_leak(treated, positions)
    identity = _claim(folder, source, len(positions), dataset, part, unseen, num_shards)
    shard_files.remove_partials(folder, identity)
    finished = _finished(folder, identity)
    before = {name: why for index in finished.values() for name, why in index.skipped.items()}
    if before and not skip_bad:
        name, why = next(iter(before.items()))
        raise FileError(
            f"The finished shards in {folder} leave out {len(before)} bad images, the first is "
            f"{name}: {why.rstrip('.')}; go on with --on_bad_example=skip or begin another folder."
        )
    jobs = [
        (i, positions[identity.bounds[i] : identity.bounds[i + 1]])
        for i in range(identity.num_shards)
        if i not in finished
    ]
    print(
        f"{part}: {len(finished)} of {identity.num_shards} shards are finished, {len(jobs)} to do.",
        flush=True,
    )
    work = _Work(folder, identity, source, treated, skip_bad)
    try:
        _run(work, jobs, min(workers, len(jobs)))
    finally:
        shard_files.remove_partials(folder, identity)  # of workers that were interrupted
    indices = [shard_files.read_index(folder, identity, i) for i in range(identity.num_shards)]
    records = [record for index in indices for record in index.records]
    if not records:
        raise FileError(f"Not one of the {len(positions)} images of {part} can be used.")
    if unseen != "keep":
        written = types.SimpleNamespace(vocabulary=source.vocabulary, records=records)
        check_no_leak(written, range(len(records)))
    skipped = {name: why for index in indices for name, why in index.skipped.items()}
    result = {
        "shard_lengths": [len(index.records) for index in indices],
        "shard_bytes": [index.shard_bytes for index in indices],
        "skipped": skipped,
    }
    shard_files.write_manifest(folder, identity, result)
    return BuildReport(len(finished), len(jobs), len(records), skipped)


def _claim(
    folder: Path,
    source: Source,
    num_images: int,
    dataset: str,
    part: str,
    unseen: str,
    num_shards: int | None,
) -> Identity:
    # The identity of this build, written down in the folder or compared with what is there.
    folder.mkdir(parents=True, exist_ok=True)
    others = {identity.part: identity for identity, _ in shard_files.manifests(folder)}
    begun = others.pop(part, None)
    bits = 8 if max(len(record.labels) for record in source.records) <= 255 else 16
    if num_shards is None:
        num_shards = begun.num_shards if begun else -(-num_images // IMAGES_PER_SHARD)
    identity = Identity(
        dataset=dataset,
        part=part,
        unseen=unseen,
        source=shard_files.fingerprint(source),
        num_images=num_images,
        num_shards=min(num_shards, num_images),
        # TFDS decodes all parts of a folder alike.
        id_bits=max([bits, *(other.id_bits for other in others.values())]),
        vocabulary=shard_files.as_json(dataclasses.asdict(source.vocabulary)),
    )
    if begun is not None:
        _check_same(manifest_path(folder, part), begun, identity, _FIELDS)
    for other in others.values():
        of_all_parts = ("dataset", "vocabulary", "id_bits")
        _check_same(manifest_path(folder, other.part), other, identity, of_all_parts)
    if begun is None:
        shard_files.write_manifest(folder, identity, None)
    return identity


# Fields of an identity in the order they are compared, and how to call those too long to show.
_FIELDS = ("dataset", "part", "unseen", "vocabulary", "source", "num_images", "num_shards")
_FIELDS += ("id_bits",)
_TOO_LONG = {"vocabulary": "another split file", "source": "other annotations"}


def _check_same(path: Path, begun: Identity, now: Identity, fields: Sequence[str]) -> None:
    for name in fields:
        then, value = getattr(begun, name), getattr(now, name)
        if then != value:
            difference = _TOO_LONG.get(name, f"{name} {then!r}, now it is {value!r}")
            raise FileError(
                f"The shards of {path} were begun with {difference}; use another folder for --out, "
                "or the setting they were begun with."
            )


def _finished(folder: Path, identity: Identity) -> dict[int, ShardIndex]:
    finished = {}
    for index in range(identity.num_shards):
        try:
            finished[index] = shard_files.read_index(folder, identity, index)
        except FileError as error:
            # Without its index a shard was not finished, which is no cause for alarm.
            if index_path(folder, identity, index).exists():
                logger.warning("%s; it is made anew.", str(error).partition("; delete")[0])
    return finished


@dataclasses.dataclass
class _Work:
    """What every process needs to write any shard."""

    folder: Path
    identity: Identity
    source: FolderSource
    treated: Source
    skip_bad: bool

    def write(self, index: int, positions: Sequence[int], on_record: Callable[[], None]) -> None:
        shard_files.write_shard(
            self.folder,
            self.identity,
            index,
            [self.treated.records[position] for position in positions],
            self._read,
            skip_bad=self.skip_bad,
            on_record=on_record,
        )

    def _read(self, record: ImageRecord) -> tuple[bytes, np.ndarray]:
        _, ids = self.treated.read(record)
        return (self.source.images_folder / record.file_name).read_bytes(), ids


def _run(work: _Work, jobs: list[tuple[int, np.ndarray]], workers: int) -> None:
    progress = Progress(work.identity.part, 0, sum(len(p) for _, p in jobs), every=5.0)
    if workers > 1:
        _run_in_processes(work, jobs, workers, progress)
        return
    done = itertools.count(1)
    for number, job in enumerate(jobs):
        work.write(*job, lambda shards=number: progress.tick(next(done), {"shards": shards}))


def _run_in_processes(
    work: _Work, jobs: list[tuple[int, np.ndarray]], workers: int, progress: Progress
) -> None:
    # A new interpreter for each: a fork would copy the locks of threads that do not come along.
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    arguments = (pickle.dumps(work), counter)
    try:
        with futures.ProcessPoolExecutor(workers, context, _start_worker, arguments) as pool:
            pending = {pool.submit(_write_in_worker, *job) for job in jobs}
            try:
                while pending:
                    done, pending = futures.wait(pending, 0.5, futures.FIRST_COMPLETED)
                    for future in done:
                        future.result()
                    progress.tick(counter.value, {"shards": len(jobs) - len(pending)})
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenProcessPool as error:
        raise FileError(
            "A process that wrote shards was killed, perhaps for want of memory; finished shards "
            "are kept: run the same command again, with fewer --workers."
        ) from error


# What a worker process keeps from its start to its end: the work, and the count of images.
_worker: tuple[_Work, Any]


def _start_worker(content: bytes, counter: Any) -> None:
    global _worker
    # Ctrl-C reaches every process of a terminal; this one has nothing to tell.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    # A parent that is killed outright cannot end its workers, and they would write on.
    threading.Thread(target=end_with_parent, daemon=True).start()
    _worker = (pickle.loads(content), counter)


def _write_in_worker(index: int, positions: np.ndarray) -> None:
    work, counter = _worker

    def on_record() -> None:
        with counter.get_lock():
            counter.value += 1

    work.write(index, positions, on_record)
