"""Which images CLIP sees together when targets are cached: few shapes, few empty rows."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Sequence

from data_pipelines.sources.source import ImageRecord

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
    """Images to embed together: their bucket, and positions in the list of training images."""

    bucket: Bucket
    positions: tuple[int, ...]


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
        plan.append(PlannedBatch(bucket, tuple(queues.pop(bucket))))

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
