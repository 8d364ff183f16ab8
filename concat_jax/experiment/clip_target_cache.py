"""CLIP's targets of all training images, computed once into the folder that training reads."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import ml_collections
import numpy as np
from etils.epath import Path
from jax.sharding import Mesh

from concat_jax.core.batch import TARGET_FIELDS
from concat_jax.core.files import FileError, as_path
from concat_jax.core.prefetch import prefetch
from concat_jax.core.progress import Progress
from concat_jax.experiment.batches import clip_target_identity
from concat_jax.experiment.experiment import open_experiment
from concat_jax.models.clip import CLIP
from concat_jax.stages.clip_targets import CropConfig, clip_targets
from concat_jax.training.sharding import along_batch, mesh_of, replicated
from data_pipelines.clip_target_cache import DTYPE, dataset_identity, target_store
from data_pipelines.datasets import training_part
from data_pipelines.loader import SegmentationLoader
from data_pipelines.sources.source import ImageRecord

logger = logging.getLogger(__name__)

# Canvases are squares of 640, 960, 1280, 1920, 2560, ... pixels. COCO's longest side is 640, and
# the resize of a canvas that is mostly empty costs little beside a pass of ViT-B/16.
SMALLEST_SIDE = 640
# Tables are of 8, 16, 32, ... segments: every row costs a pass of CLIP, empty or not.
FEWEST_SEGMENTS = 8


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Shapes of one program: the canvas's side in pixels, and the rows of the segment table."""

    side: int
    num_segments: int


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """Images to embed together: positions in the list of training images, and rows of a batch."""

    bucket: Bucket
    positions: tuple[int, ...]
    num_rows: int


def bucket_of(record: ImageRecord) -> Bucket:
    """The smallest bucket that holds an image with all its segments."""
    doublings = [2**k for k in range(32)]
    sides = (share * n // 2 for n in doublings for share in (2 * SMALLEST_SIDE, 3 * SMALLEST_SIDE))
    rows = (FEWEST_SEGMENTS * n for n in doublings)
    return Bucket(
        side=next(side for side in sides if side >= max(record.height, record.width)),
        num_segments=next(n for n in rows if n >= len(record.source_ids)),
    )


def plan_batches(
    records: Sequence[ImageRecord],
    shards: Sequence[int],
    images_per_shard: int,
    pictures: int,
    multiple: int,
) -> list[PlannedBatch]:
    """Which images go together, so that few rows stay empty and shards finish one after another.

    A batch of at most `pictures` segments over all devices takes images of several shards where one
    alone does not fill it, but waits only so long as about four least batches are waiting in all.
    """
    rows_of = functools.partial(batch_rows, pictures=pictures, multiple=multiple)
    patience = 4 * rows_of(Bucket(SMALLEST_SIDE, FEWEST_SEGMENTS)) // images_per_shard
    queues: dict[Bucket, list[int]] = defaultdict(list)
    plan = []

    def emit(bucket: Bucket) -> None:
        plan.append(PlannedBatch(bucket, tuple(queues.pop(bucket)), rows_of(bucket)))

    for number, shard in enumerate(shards):
        first = shard * images_per_shard
        for position in range(first, min(first + images_per_shard, len(records))):
            bucket = bucket_of(records[position])
            queues[bucket].append(position)
            if len(queues[bucket]) == rows_of(bucket):
                emit(bucket)
        due = shards[number - patience] if number >= patience else -1
        for bucket in [b for b, queue in queues.items() if queue[0] // images_per_shard <= due]:
            emit(bucket)
    for bucket in list(queues):
        emit(bucket)
    return plan


def batch_rows(bucket: Bucket, *, pictures: int, multiple: int) -> int:
    """Images of a batch: about the same number of pictures for CLIP in every bucket."""
    return multiple * max(1, pictures // (bucket.num_segments * multiple))


@dataclasses.dataclass(frozen=True)
class FillReport:
    """Shards that a call skipped and wrote, and images left out as unreadable, as training does."""

    skipped: int
    written: int
    bad_images: int


# An image's id, its segments' ids [n], and its targets [C] and [n, C].
_Targets = tuple[int, np.ndarray, np.ndarray, np.ndarray]


# A batch on the host: of each image its id and its segments' ids, or None; the rows of its table;
# and images, segment ids and image sizes, padded.
_Loaded = tuple[list[tuple[int, np.ndarray] | None], int, tuple[np.ndarray, ...]]


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
    """Writes the shards that this host owns and that are not there yet.

    A killed command loses at most the shards it was working on. A host owns the shards whose index
    leaves `process_index` modulo `process_count`. Raises StoreError if the folder holds another
    cache, FileError for an image that cannot be read or a shard that cannot be written.
    """
    records = [data.records[i] for i in data.training_indices]
    described = dataset_identity(records, data.vocabulary.category_ids)
    store = target_store(folder, {**identity, **described}, images_per_shard)
    if pictures_per_device < 1:
        raise ValueError(f"pictures_per_device is {pictures_per_device} and must be at least 1.")
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index is {process_index} and must be 0 to process_count - 1, which is "
            f"{process_count - 1}."
        )
    store.claim()
    own = range(process_index, store.manifest["num_shards"], process_count)
    todo = store.missing(own)
    print(
        f"{folder}: {len(own) - len(todo)} of {len(own)} shards of this host are finished and "
        f"skipped, {len(todo)} to do.",
        flush=True,
    )
    sizes = {index: min(images_per_shard, len(records) - index * images_per_shard) for index in own}
    left = {index: sizes[index] for index in todo}
    done = sum(sizes.values()) - sum(left.values())
    progress = Progress("images", done, sum(sizes.values()))
    pictures = pictures_per_device * mesh.size
    plan = plan_batches(records, todo, images_per_shard, pictures, mesh.size)
    finished: dict[int, dict[int, _Targets]] = {index: {} for index in todo}
    bad = 0
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(futures.ThreadPoolExecutor(num_threads, "cache_clip_targets"))
        load = functools.partial(_load, data, pool, skip_bad)
        batches = prefetch(lambda step: load(plan[step]), 0, len(plan), depth=2, num_threads=1)
        # Closed before the pool: what stops this loop stops the loading, too.
        stack.enter_context(contextlib.closing(batches))
        for planned, targets in zip(plan, _embed(clip, params, crops, batches, mesh), strict=True):
            for position, target in zip(planned.positions, targets, strict=True):
                index = position // images_per_shard
                left[index] -= 1
                if target is None:
                    bad += 1
                else:
                    finished[index][position] = target
            for index in [index for index in finished if not left[index]]:
                store.write(index, _shard(finished.pop(index), clip.embed_dim))
            done += len(planned.positions)
            progress.tick(done)
    return FillReport(len(own) - len(todo), len(todo), bad)


def _load(
    data: SegmentationLoader, pool: futures.Executor, skip_bad: bool, planned: PlannedBatch
) -> _Loaded:
    def read(position: int) -> Mapping[str, Any] | None:
        try:
            return data.eval_example(data.training_indices[position])
        except FileError as error:
            if not skip_bad:
                raise
            logger.warning("Left out a training image: %s", error)
            return None

    num_rows, side, ids = planned.num_rows, planned.bucket.side, []
    images = np.zeros((num_rows, side, side, 3), np.uint8)
    segment_ids = np.zeros((num_rows, side, side), np.uint16)
    image_size = np.ones((num_rows, 2), np.int32)  # an empty row is a picture of one pixel
    for row, example in enumerate(pool.map(read, planned.positions)):
        if example is None:
            ids.append(None)
            continue
        height, width = image_size[row] = example["image_size"]
        images[row, :height, :width] = example["image"]
        segment_ids[row, :height, :width] = example["segment_ids"]
        sources = example["segment_source_ids"][example["segment_labels"] >= 0]
        ids.append((int(example["image_id"]), sources))
    return ids, planned.bucket.num_segments, (images, segment_ids, image_size)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _embed_batch(clip: CLIP, crops: CropConfig, num_segments: int, params, images, ids, image_size):
    return clip_targets(clip, params, images, ids, num_segments, crops, image_size=image_size)


def _embed(
    clip: CLIP, params: Any, crops: CropConfig, batches: Iterator[_Loaded], mesh: Mesh
) -> Iterator[list[_Targets | None]]:
    def fetch(ids, outputs) -> list[_Targets | None]:
        images, segments = jax.device_get(outputs)
        return [own and (*own, images[i], segments[i, : len(own[1])]) for i, own in enumerate(ids)]

    params = jax.device_put(params, replicated(mesh))
    waiting: deque[tuple[Any, Any]] = deque()
    with jax.set_mesh(mesh):
        for ids, num_segments, arrays in batches:
            inputs = jax.device_put(arrays, along_batch(mesh))
            waiting.append((ids, _embed_batch(clip, crops, num_segments, params, *inputs)))
            if len(waiting) > 1:  # the devices work on one batch while the last is fetched
                yield fetch(*waiting.popleft())
        while waiting:
            yield fetch(*waiting.popleft())


def _shard(targets: Mapping[int, _Targets], width: int) -> dict[str, np.ndarray]:
    """A shard's arrays, of image position -> targets."""
    ordered = [targets[position] for position in sorted(targets)]
    counts = [len(ids) for _, ids, _, _ in ordered]
    image_ids = np.array([image_id for image_id, *_ in ordered], np.int64)
    nothing = np.zeros((0, width), DTYPE)
    return {
        "image_ids": image_ids,
        "images": np.concatenate(
            [nothing, *(image[None] for _, _, image, _ in ordered)], dtype=DTYPE
        ),
        "segment_image_ids": np.repeat(image_ids, counts),
        "segment_source_ids": np.concatenate([image_ids[:0], *(ids for _, ids, _, _ in ordered)]),
        "segments": np.concatenate([nothing, *(rows for *_, rows in ordered)], dtype=DTYPE),
    }


def cache(config: ml_collections.ConfigDict, workdir: str = "", **options: int) -> FillReport:
    """Fills `config.data.clip_targets` with what the config's CON stage would compute.

    `workdir` is of the run that trained CLIP, where it is not a file. Options and errors are those
    of `fill_cache`: shards, pictures, and which host of how many this is.
    """
    if config.data.kind == "synthetic":
        raise ValueError(
            "config.data.kind is 'synthetic': its pictures are drawn without end, so there is "
            "nothing to cache; their targets are computed online."
        )
    folder = config.data.get("clip_targets", "")
    if not folder:
        raise ValueError("Nowhere to write: set config.data.clip_targets to the cache's folder.")
    run = open_experiment(config, workdir or folder, trains=False)
    stages = {name: run.setup.make_stage(name) for name in run.setup.stages}
    learn = [name for name in stages if set(TARGET_FIELDS) <= set(stages[name].batch_fields)]
    sources = {run.setup.stages[name].takes["clip"] for name in learn}
    if len(sources) != 1:
        found = " and ".join(sorted(sources)) or "nowhere"
        raise ValueError(
            f"The stages that learn from cached targets take CLIP from {found}; a cache holds the "
            "targets of one CLIP."
        )
    (source,) = sources
    if source != "init" and not workdir:
        raise ValueError(
            f"This config's CLIP is trained by its stage {source!r}; give --workdir=DIR of the run "
            "that did."
        )
    if source != "init" and not run.parameters.is_finished(source):
        raise ValueError(
            f"Stage {source!r}, which gives CLIP, has not finished in {workdir}; train it first."
        )
    return fill_cache(
        as_path(folder),
        training_part(config.data, seed=config.seed),
        run.setup.networks.clip,
        jax.device_get(run.parameters.whole("clip", source)),
        run.setup.context.crops,
        clip_target_identity(run, source),
        mesh=mesh_of(run.mesh.local_devices),
        num_threads=config.data.num_threads,
        skip_bad=config.data.on_bad_example == "skip",
        **options,
    )
