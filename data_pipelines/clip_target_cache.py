"""CLIP embeddings of a data set's images and segments on disk, and their look-up by id.

A cache is a `ShardStore` of equally many images a shard, which `concat_jax.cache_clip_targets`
fills.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils.epath import Path

from concat_jax.core.arrays import unit
from concat_jax.core.files import as_path
from concat_jax.core.prefetch import Batches, prefetch
from concat_jax.core.shard_store import ShardStore, StoreError, StoreKind
from data_pipelines.sources.source import ImageRecord

FORMAT = 1
# Half precision turns an embedding by less than 1e-7 in cosine, and halves COCO's to 1.4 GB.
DTYPE = np.float16
KIND = StoreKind(
    "cached CLIP targets",
    ("image_ids", "images", "segment_image_ids", "segment_source_ids", "segments"),
    "run `python -m concat_jax.cache_clip_targets` with this config again",
)


def dataset_identity(
    records: Iterable[ImageRecord], category_ids: Sequence[int]
) -> dict[str, int | str]:
    """What a cache remembers of the data: `num_images` and the fingerprint `dataset`.

    The fingerprint covers ids, names and sizes of the images and ids and categories of their
    segments, in order, but not pixels: two splits that train on the same images share a cache.
    """
    digest, count = hashlib.sha256(), 0
    categories = np.asarray(category_ids, np.int64)
    for record in records:
        count += 1
        head = [record.image_id, record.file_name, record.height, record.width]
        segments = [record.source_ids.tolist(), categories[record.labels].tolist()]
        digest.update(json.dumps([*head, *segments]).encode() + b"\n")
    return {"num_images": count, "dataset": digest.hexdigest()}


def target_store(folder: Path, identity: Mapping[str, Any], images_per_shard: int) -> ShardStore:
    """The store of a cache that is to be filled, with `num_shards` in its manifest.

    A shard of n images with m segments in all, in the data set's order, is `image_ids` [n] int64
    and `images` [n, C] float16; `segment_image_ids` and `segment_source_ids` [m] int64 and
    `segments` [m, C] float16. `identity` is what they depend on, `dataset_identity` included.
    """
    if images_per_shard < 1:
        raise ValueError(f"images_per_shard is {images_per_shard} and must be at least 1.")
    if not identity["num_images"]:
        raise ValueError("The data set has no image to train on, so there is none to embed.")
    manifest = {
        "format": FORMAT,
        **identity,
        "images_per_shard": images_per_shard,
        "num_shards": -(-identity["num_images"] // images_per_shard),
        "dtype": np.dtype(DTYPE).name,
    }
    return ShardStore(folder, KIND, manifest)


def find_targets(folder: str | os.PathLike[str], expected: Mapping[str, Any]) -> ShardStore:
    """The store of a cache that was begun; StoreError if there is none or not with `expected`."""
    return ShardStore.found(as_path(folder), KIND, {"format": FORMAT, **expected})


class ClipTargetCache:
    """All targets of a cache in memory, once for all threads, looked up by image and segment id."""

    def __init__(self, folder: str | os.PathLike[str], expected: Mapping[str, Any]):
        """Reads every shard (COCO's take 1.4 GB); StoreError as `find_targets`, or for one."""
        store = find_targets(folder, expected)
        count = store.manifest.get("num_shards")
        if not isinstance(count, int) or count < 1:
            raise store.damaged_manifest(f"num_shards is {count!r}")
        arrays = store.load(count)
        self._folder = folder
        self._images, self._segments = arrays["images"], arrays["segments"]
        self._image_order = np.argsort(arrays["image_ids"], kind="stable")
        self._image_ids = arrays["image_ids"][self._image_order]
        # One number for (image, segment): the image's rank and the segment's id as two digits.
        segment_ids = arrays["segment_source_ids"]
        self._base = 1 + int(segment_ids.max(initial=0))
        ranks = np.searchsorted(self._image_ids, arrays["segment_image_ids"])
        keys = ranks * self._base + segment_ids
        self._segment_order = np.argsort(keys, kind="stable")
        self._keys = keys[self._segment_order]

    def lookup(
        self, image_ids: np.ndarray, segment_source_ids: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Targets [B, C] of images [B] and [B, G, C] of segments [B, G], float32, 0 where padded.

        Raises StoreError naming an image, or a segment and its image, that the cache lacks.
        """
        image_ids = np.asarray(image_ids, np.int64)
        segment_ids = np.asarray(segment_source_ids, np.int64)
        rank = np.searchsorted(self._image_ids, image_ids)
        rank = np.minimum(rank, len(self._image_ids) - 1)
        absent = self._image_ids[rank] != image_ids
        if absent.any():
            raise StoreError(
                f"The cached CLIP targets in {self._folder} hold nothing of image "
                f"{image_ids[absent][0]}; they belong to other images than training uses."
            )
        images = self._images[self._image_order[rank]].astype(np.float32)
        wanted = segment_ids != 0
        segments = np.zeros((*segment_ids.shape, self._images.shape[1]), np.float32)
        if wanted.any():
            keys = (rank[:, None] * self._base + segment_ids)[wanted]
            row = np.searchsorted(self._keys, keys)
            row = np.minimum(row, len(self._keys) - 1)
            # An id beyond the base would be read as that of another image's segment.
            unknown = (segment_ids[wanted] >= self._base) | (segment_ids[wanted] < 0)
            unknown |= self._keys[row] != keys if len(self._keys) else True
            if unknown.any():
                owner = np.broadcast_to(image_ids[:, None], wanted.shape)[wanted]
                raise StoreError(
                    f"The cached CLIP targets in {self._folder} hold nothing of segment "
                    f"{segment_ids[wanted][unknown][0]} of image {owner[unknown][0]}; they belong "
                    "to other annotations than training uses."
                )
            segments[wanted] = self._segments[self._segment_order[row]]
        return {"clip_image_target": unit(images), "clip_segment_targets": unit(segments)}

    def add_to(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {**batch, **self.lookup(batch["image_id"], batch["segment_source_ids"])}

    def added_to(self, batches: Batches) -> Batches:
        """The same batches with their targets, which a thread looks up ahead."""

        def with_targets(steps: Sequence[int]) -> Generator[dict[str, np.ndarray]]:
            with contextlib.closing(batches(steps)) as given:
                yield from prefetch(
                    lambda _: self.add_to(next(given)), 0, len(steps), num_threads=1
                )

        return with_targets
