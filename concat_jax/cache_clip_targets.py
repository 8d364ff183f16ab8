"""Computes CLIP's embedding of every training image and segment once, for stage 1 to learn from.

python -m concat_jax.cache_clip_targets --config=configs/coco_zps.py \\
    --config.data.clip_targets=FOLDER --config.data.root=/path/to/coco --config.init.clip=...

Takes the flags of the training run that shall use the targets. Where that run trains its own CLIP,
--workdir names the run whose CLIP stage is finished. Images are embedded as they are, at native
size. A command that was stopped goes on where it stood when started again. Several hosts share the
work in a folder that all of them see: with --distributed, or each on its own when told which one of
how many it is (--process_index=1 --process_count=4), since they have nothing to say to each other.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from concat_jax.core import cli
from concat_jax.core.batch import TARGET_FIELDS
from concat_jax.core.prefetch import prefetch
from concat_jax.core.progress import Progress
from concat_jax.experiment.clip_target_batches import PlannedBatch, batch_rows, plan_batches
from concat_jax.experiment.experiment import Run
from concat_jax.models.clip import CLIP
from concat_jax.stages.clip_targets import CropConfig, clip_targets
from concat_jax.training.sharding import AXES, along_batch, replicated
from data_pipelines import clip_target_cache as storage
from data_pipelines.datasets import make_datasets, training_part
from data_pipelines.loader import SegmentationLoader
from data_pipelines.sources.source import DataError

logger = logging.getLogger(__name__)

# Seconds after which a line of progress is due, however long a shard takes.
REPORT_EVERY = 30.0


@dataclasses.dataclass(frozen=True)
class FillReport:
    """What a call did.

    Attributes:
      skipped: shards that were finished before.
      written: shards that it finished.
      bad_images: images left out because they cannot be read, as training leaves them out.
    """

    skipped: int
    written: int
    bad_images: int


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """A batch on the host: padded arrays, and of each row that holds an image (position, image id,
    segment ids)."""

    rows: tuple[tuple[int, int, np.ndarray] | None, ...]
    num_segments: int
    images: np.ndarray
    segment_ids: np.ndarray
    image_size: np.ndarray


def fill_cache(
    folder: Path,
    data: SegmentationLoader,
    clip: CLIP,
    params: Any,
    crops: CropConfig,
    identity: Mapping[str, Any],
    *,
    images_per_shard: int = 256,
    pictures_per_device: int = 128,
    mesh: Mesh,
    num_threads: int = 8,
    skip_bad: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> FillReport:
    """Write the shards that this host owns and that are not there yet.

    Args:
      folder: of the cache; made if absent, refused if it holds another cache.
      data: the part of the data set; its training images are embedded.
      clip: the CLIP module.
      params: its parameters.
      crops: how a segment becomes a picture.
      identity: `weights`, `clip` and `crops`, as `Run.clip_target_identity` gives them.
      images_per_shard: a killed command loses at most the shards it was working on.
      pictures_per_device: segments CLIP takes at once, on each device.
      mesh: this host's devices; hosts do not talk to each other.
      num_threads: threads that decode images.
      skip_bad: leave out an image that cannot be read instead of raising.
      process_index: shards whose index leaves this remainder by `process_count` are this host's.
      process_count: number of hosts.

    Raises:
      ClipTargetError: if the folder holds another cache.
      DataError: for an image that cannot be read.
    """
    records = [data.records[i] for i in data.training_indices]
    described = storage.dataset_identity(records, data.vocabulary.category_ids)
    manifest = storage.make_manifest({**identity, **described}, images_per_shard)
    if pictures_per_device < 1:
        raise ValueError(f"pictures_per_device is {pictures_per_device} and must be at least 1.")
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index is {process_index} and must be 0 to process_count - 1, which is "
            f"{process_count - 1}."
        )
    storage.claim_folder(folder, manifest, process_index)
    own = range(process_index, manifest["num_shards"], process_count)
    storage.remove_partials(folder, own)
    todo = [index for index in own if not storage.shard_path(folder, index).exists()]
    print(
        f"{folder}: {len(own) - len(todo)} of {len(own)} shards of this host are finished and "
        f"skipped, {len(todo)} to do.",
        flush=True,
    )
    sizes = {index: min(images_per_shard, len(records) - index * images_per_shard) for index in own}
    done = sum(sizes[index] for index in own if index not in set(todo))
    progress = Progress("images", done, sum(sizes.values()), 1)
    last_report = time.monotonic()
    pictures = pictures_per_device * mesh.size
    plan = plan_batches(records, todo, images_per_shard, pictures, mesh.size)
    left = {index: sizes[index] for index in todo}
    finished: dict[int, dict[int, tuple]] = {index: {} for index in todo}
    bad = 0
    with futures.ThreadPoolExecutor(num_threads, thread_name_prefix="cache_clip_targets") as pool:
        load = functools.partial(_load, data, pool, skip_bad)
        batches = prefetch(
            lambda step: load(
                plan[step], batch_rows(plan[step].bucket, pictures=pictures, multiple=mesh.size)
            ),
            0,
            len(plan),
            depth=2,
            num_threads=1,
        )
        for planned, rows in zip(plan, _embed(clip, params, crops, batches, mesh), strict=True):
            for position, row in zip(planned.positions, rows, strict=True):
                index = position // images_per_shard
                left[index] -= 1
                if row is None:
                    bad += 1
                else:
                    finished[index][position] = row
            done += len(planned.positions)
            whole = [index for index in {p // images_per_shard for p in planned.positions}]
            whole = sorted(index for index in whole if not left[index])
            for index in whole:
                storage.write_shard(folder, index, _shard(finished.pop(index), clip), manifest)
            if whole or time.monotonic() - last_report > REPORT_EVERY:
                progress.report(done, {})
                last_report = time.monotonic()
    return FillReport(len(own) - len(todo), len(todo), bad)


def _load(
    data: SegmentationLoader,
    pool: futures.Executor,
    skip_bad: bool,
    planned: PlannedBatch,
    num_rows: int,
) -> _Loaded:
    def read(position: int) -> Mapping[str, Any] | None:
        try:
            return data.eval_example(data.training_indices[position])
        except DataError as error:
            if not skip_bad:
                raise
            logger.warning("Left out a training image: %s", error)
            return None

    side, rows = planned.bucket.side, []
    images = np.zeros((num_rows, side, side, 3), np.uint8)
    segment_ids = np.zeros((num_rows, side, side), np.uint16)
    image_size = np.ones((num_rows, 2), np.int32)  # an empty row is a picture of one pixel
    examples = pool.map(read, planned.positions)
    for row, (position, example) in enumerate(zip(planned.positions, examples, strict=True)):
        if example is None:
            rows.append(None)
            continue
        height, width = image_size[row] = example["image_size"]
        images[row, :height, :width] = example["image"]
        segment_ids[row, :height, :width] = example["segment_ids"]
        sources = example["segment_source_ids"][example["segment_labels"] >= 0]
        rows.append((position, int(example["image_id"]), sources))
    return _Loaded(tuple(rows), planned.bucket.num_segments, images, segment_ids, image_size)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _embed_batch(clip: CLIP, crops: CropConfig, num_segments: int, params, images, ids, image_size):
    return clip_targets(clip, params, images, ids, num_segments, crops, image_size=image_size)


def _embed(
    clip: CLIP, params: Any, crops: CropConfig, batches: Iterator[_Loaded], mesh: Mesh
) -> Iterator[list[tuple | None]]:
    # Of each batch the rows that hold an image: (image id, segment ids, [C] and [n, C] targets).
    def fetch(loaded: _Loaded, outputs) -> list[tuple | None]:
        image_targets, segment_targets = jax.device_get(outputs)
        return [
            row and (*row[1:], image_targets[i], segment_targets[i, : len(row[2])])
            for i, row in enumerate(loaded.rows)
        ]

    params = jax.device_put(params, replicated(mesh))
    waiting: deque[tuple[_Loaded, Any]] = deque()
    with jax.set_mesh(mesh):
        for loaded in batches:
            arrays = (loaded.images, loaded.segment_ids, loaded.image_size)
            inputs = jax.device_put(arrays, along_batch(mesh))
            waiting.append(
                (loaded, _embed_batch(clip, crops, loaded.num_segments, params, *inputs))
            )
            if len(waiting) > 1:  # the devices work on one batch while the last is fetched
                yield fetch(*waiting.popleft())
        while waiting:
            yield fetch(*waiting.popleft())


def _shard(rows: Mapping[int, tuple], clip: CLIP) -> storage.Shard:
    ordered = [rows[position] for position in sorted(rows)]
    ids = [np.full(len(sources), image_id) for image_id, sources, _, _ in ordered]
    none, nothing = np.zeros(0, np.int64), np.zeros((0, clip.embed_dim), storage.DTYPE)
    return storage.Shard(
        image_ids=np.array([row[0] for row in ordered], np.int64),
        images=np.array([row[2] for row in ordered], storage.DTYPE).reshape(-1, clip.embed_dim),
        segment_image_ids=np.concatenate([none, *ids]),
        segment_source_ids=np.concatenate([none, *(row[1] for row in ordered)]),
        segments=np.concatenate([nothing, *(row[3].astype(storage.DTYPE) for row in ordered)]),
    )


def clip_source(run: Run) -> str:
    """The stage that gives CLIP to the stages that learn from cached targets, or "init".

    Raises:
      ValueError: if there is no such stage, or they take different ones.
    """
    stages = {name: run.make_stage(name) for name in run.stages}
    learn = [name for name in stages if set(TARGET_FIELDS) <= set(stages[name].batch_fields)]
    sources = {run.clip_source(name) for name in learn}
    if len(sources) != 1:
        found = " and ".join(sorted(sources)) or "nowhere"
        raise ValueError(
            f"The stages that learn from cached targets take CLIP from {found}; a cache holds the "
            "targets of one CLIP."
        )
    return sources.pop()


def cache(
    config: ml_collections.ConfigDict,
    workdir: str = "",
    *,
    images_per_shard: int = 256,
    pictures_per_device: int = 128,
    process_index: int = 0,
    process_count: int = 1,
) -> FillReport:
    """Fill `config.data.clip_targets` with what the config's CON stage would compute.

    Args:
      config: of the training run.
      workdir: of the run that trained CLIP, where it is not a file.
      images_per_shard, pictures_per_device, process_index, process_count: see `fill_cache`.

    Raises:
      ValueError: for a config with nothing to cache, and as `fill_cache` and `Run`.
    """
    if config.data.kind == "synthetic":
        raise ValueError(
            "config.data.kind is 'synthetic': its pictures are drawn without end, so there is "
            "nothing to cache; their targets are computed online."
        )
    folder = config.data.get("clip_targets", "")
    if not folder:
        raise ValueError("Nowhere to write: set config.data.clip_targets to the cache's folder.")
    datasets = make_datasets(config.data, seed=config.seed)
    run = Run(config, Path(workdir or folder), datasets, trains=False)
    source = clip_source(run)
    if source != "init" and not workdir:
        raise ValueError(
            f"This config's CLIP is trained by its stage {source!r}; give --workdir=DIR of the run "
            "that did."
        )
    if source != "init" and not run.is_finished(source):
        raise ValueError(
            f"Stage {source!r}, which gives CLIP, has not finished in {workdir}; train it first."
        )
    local = np.asarray(run.mesh.local_devices).reshape(-1, 1)
    data = training_part(config.data, seed=config.seed)
    report = fill_cache(
        Path(folder),
        data,
        run.networks.clip,
        jax.device_get(run.give("clip", source)),
        run.crops,
        run.clip_target_identity(source),
        images_per_shard=images_per_shard,
        pictures_per_device=pictures_per_device,
        mesh=Mesh(local, AXES, axis_types=run.mesh.axis_types),
        num_threads=config.data.num_threads,
        skip_bad=config.data.on_bad_example == "skip",
        process_index=process_index,
        process_count=process_count,
    )
    left_out = f" {report.bad_images} unreadable images are left out." if report.bad_images else ""
    print(f"Done: {report.written} shards written, {report.skipped} skipped.{left_out}")
    return report


def define_flags(flags: cli.Flags) -> None:
    """The flags of this command, besides those of a config."""
    flags.integer("images_per_shard", 256, "What a kill can cost, at least.")
    flags.integer("pictures_per_device", 128, "CLIP takes at once.")
    flags.integer("process_index", None, "This host; JAX's own by default.")
    flags.integer("process_count", None, "Hosts; JAX's own by default.")


def command(given: cli.Flags, arguments: Sequence[str]) -> None:
    """What the flags ask for."""
    config = cli.config_of(given)
    cli.join_hosts(given)
    index, count = given.process_index, given.process_count
    cache(
        config,
        given.workdir or "",
        images_per_shard=given.images_per_shard,
        pictures_per_device=given.pictures_per_device,
        process_index=jax.process_index() if index is None else index,
        process_count=jax.process_count() if count is None else count,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    cli.main(__doc__, define_flags, command, argv, with_config=True)


if __name__ == "__main__":
    main()
