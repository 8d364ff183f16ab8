"""CLIP embeddings of a data set's images and segments on disk, and their look-up by id.

A cache is a folder with `manifest.json`, which says what the embeddings were made of, and shards of
equally many images, `00000.safetensors`, `00001.safetensors`, ... Each appears under its name only
when it is whole. `concat_jax.cache_clip_targets` writes them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from data_pipelines.sources.source import ImageRecord

FORMAT = 1
MANIFEST = "manifest.json"
COMMAND = "python -m concat_jax.cache_clip_targets"
# Half precision turns an embedding by less than 1e-7 in cosine, and halves COCO's to 1.4 GB.
DTYPE = np.float16


class ClipTargetError(ValueError):
    """Cached targets that are missing, damaged, incomplete or made of something else."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """Targets of n images with m segments in all, in the data set's order.

    Attributes:
      image_ids: [n] int64.
      images: [n, C] float16, the embedding of each whole image.
      segment_image_ids: [m] int64, the image of each segment.
      segment_source_ids: [m] int64, the segment's own id.
      segments: [m, C] float16.
    """

    image_ids: np.ndarray
    images: np.ndarray
    segment_image_ids: np.ndarray
    segment_source_ids: np.ndarray
    segments: np.ndarray


_ARRAYS = {
    "image_ids": (np.int64, 1),
    "images": (DTYPE, 2),
    "segment_image_ids": (np.int64, 1),
    "segment_source_ids": (np.int64, 1),
    "segments": (DTYPE, 2),
}


def dataset_identity(
    records: Iterable[ImageRecord], category_ids: Sequence[int]
) -> dict[str, int | str]:
    """What a cache remembers of the data: `num_images` and the fingerprint `dataset`.

    The fingerprint covers ids, file names and sizes of the images and ids and categories of their
    segments, in order. Pixels are not read, and the classes count by their category ids, so two
    splits that train on the same images share a cache.

    Args:
      records: the images that training uses.
      category_ids: of each class index.
    """
    digest, count = hashlib.sha256(), 0
    categories = np.asarray(category_ids, np.int64)
    for record in records:
        count += 1
        head = [record.image_id, record.file_name, record.height, record.width]
        segments = [record.source_ids.tolist(), categories[record.labels].tolist()]
        digest.update(json.dumps([*head, *segments]).encode() + b"\n")
    return {"num_images": count, "dataset": digest.hexdigest()}


def make_manifest(identity: Mapping[str, Any], images_per_shard: int) -> dict[str, Any]:
    """The manifest of a cache.

    Args:
      identity: what the numbers depend on: `weights`, `clip` and `crops` of the run, and the
        `dataset_identity`.
      images_per_shard: of every shard but the last.

    Raises:
      ValueError: if there is no image, or a shard would hold none.
    """
    if images_per_shard < 1:
        raise ValueError(f"images_per_shard is {images_per_shard} and must be at least 1.")
    if not identity["num_images"]:
        raise ClipTargetError("The data set has no image to train on, so there is none to embed.")
    return {
        "format": FORMAT,
        **identity,
        "images_per_shard": images_per_shard,
        "num_shards": -(-identity["num_images"] // images_per_shard),
        "dtype": np.dtype(DTYPE).name,
    }


def claim_folder(folder: Path, manifest: Mapping[str, Any], process_index: int = 0) -> None:
    """Write the manifest, whole or not at all, or check that the folder holds the same one.

    Args:
      folder: made if absent.
      manifest: of `make_manifest`.
      process_index: of this host; several may claim a shared folder at the same time.

    Raises:
      ClipTargetError: if the folder was begun with another manifest; the first field that differs
        is named with both values.
    """
    path = folder / MANIFEST
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _replace(path, f".{process_index}", json.dumps(manifest, indent=1) + "\n")
    check_manifest(folder, manifest)


def check_manifest(folder: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Read a cache's manifest and compare the fields that are expected.

    Args:
      folder: of the cache.
      expected: field -> value, nested as in the manifest; other fields may hold anything.

    Returns:
      The manifest.

    Raises:
      ClipTargetError: if there is none, it cannot be read, or a field differs.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ClipTargetError(
            f"{folder} holds no cached CLIP targets (there is no {MANIFEST}); run `{COMMAND}` with "
            "this config first."
        )
    try:
        manifest = json.loads(path.read_bytes())
        found = dict(_flat(manifest))
    except (ValueError, AttributeError) as error:
        raise ClipTargetError(
            f"{path} is damaged ({error}); delete the folder and run `{COMMAND}` again."
        ) from error
    # Through JSON, so that a tuple or a numpy number is what reading would make of it.
    for field, value in _flat({"format": FORMAT, **json.loads(json.dumps(expected))}):
        if found.get(field) != value:
            raise ClipTargetError(
                f"The cached CLIP targets in {folder} were made with {field} = "
                f"{found.get(field)!r}, now it is {value!r}; use another folder or what they were "
                "made with."
            )
    return manifest


def shard_path(folder: Path, index: int) -> Path:
    """Where shard `index` lies once it is finished."""
    return folder / f"{index:05}.safetensors"


def remove_partials(folder: Path, shards: Iterable[int]) -> int:
    """Remove what a killed process left of these shards; returns the number of files."""
    candidates = [_partial(shard_path(folder, index)) for index in shards]
    stale = [path for path in candidates if path.exists()]
    for path in stale:
        path.unlink()
    return len(stale)


def write_shard(folder: Path, index: int, shard: Shard, manifest: Mapping[str, Any]) -> None:
    """Write a shard under a temporary name and rename it, so that it is whole or absent."""
    arrays = {
        name: np.ascontiguousarray(getattr(shard, name), dtype)
        for name, (dtype, _) in _ARRAYS.items()
    }
    metadata = {"manifest": _stamp(manifest), "index": str(index), "crc32": _checksum(arrays)}
    path = shard_path(folder, index)
    _replace(path, "", safetensors.numpy.save(arrays, metadata))


def read_shard(folder: Path, index: int, manifest: Mapping[str, Any]) -> Shard:
    """Read a shard and check that it is whole and belongs to the manifest.

    Raises:
      ClipTargetError: if it is not, naming the file.
    """
    path = shard_path(folder, index)
    with _opened(path) as file:
        metadata = file.metadata() or {}
        if metadata.get("manifest") != _stamp(manifest) or metadata.get("index") != str(index):
            raise _damaged(path, "it belongs to another cache")
        arrays = {name: file.get_tensor(name) for name in _ARRAYS}
    if metadata.get("crc32") != _checksum(arrays):
        raise _damaged(path, "its checksum differs")
    return Shard(**arrays)


class ClipTargetCache:
    """All targets of a cache in memory, once for all threads, looked up by image and segment id."""

    def __init__(self, folder: str | os.PathLike[str], expected_manifest: Mapping[str, Any]):
        """Reads every shard; COCO's take 1.4 GB.

        Args:
          folder: that the command filled.
          expected_manifest: fields that must be as given, see `check_manifest`.

        Raises:
          ClipTargetError: if the cache is of something else, incomplete or damaged.
        """
        folder = Path(folder)
        manifest = check_manifest(folder, expected_manifest)
        total = manifest["num_shards"]
        missing = [i for i in range(total) if not shard_path(folder, i).is_file()]
        if missing:
            raise ClipTargetError(
                f"{len(missing)} of {total} shards of cached CLIP targets are missing in {folder}, "
                f"the first is {shard_path(folder, missing[0]).name}; run `{COMMAND}` with this "
                "config again: it fills the gaps."
            )
        self.embed_dim: int = manifest["clip"]["embed_dim"]
        counts = np.array([_shard_sizes(shard_path(folder, i)) for i in range(total)])
        ends = np.cumsum(counts, axis=0)
        images, segments = ends[-1]
        image_ids = np.empty(images, np.int64)
        segment_image_ids = np.empty(segments, np.int64)
        segment_source_ids = np.empty(segments, np.int64)
        # Filled shard by shard: a concatenation at the end would hold everything twice.
        self._images = np.empty((images, self.embed_dim), DTYPE)
        self._segments = np.empty((segments, self.embed_dim), DTYPE)
        for index, ((first, first_segment), (end, end_segment)) in enumerate(
            zip(ends - counts, ends, strict=True)
        ):
            shard = read_shard(folder, index, manifest)
            image_ids[first:end] = shard.image_ids
            self._images[first:end] = shard.images
            segment_image_ids[first_segment:end_segment] = shard.segment_image_ids
            segment_source_ids[first_segment:end_segment] = shard.segment_source_ids
            self._segments[first_segment:end_segment] = shard.segments
        self._folder = folder
        self._image_order = np.argsort(image_ids, kind="stable")
        self._image_ids = image_ids[self._image_order]
        # One number for (image, segment): the image's rank and the segment's id as two digits.
        self._base = 1 + int(segment_source_ids.max(initial=0))
        keys = np.searchsorted(self._image_ids, segment_image_ids) * self._base + segment_source_ids
        self._segment_order = np.argsort(keys, kind="stable")
        self._keys = keys[self._segment_order]

    def lookup(
        self, image_ids: np.ndarray, segment_source_ids: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Targets of a batch.

        Args:
          image_ids: [B] int64.
          segment_source_ids: [B, G] int64; 0 where padded.

        Returns:
          `clip_image_target` [B, C] and `clip_segment_targets` [B, G, C], float32 of norm 1; zeros
          where padded.

        Raises:
          ClipTargetError: naming an image, or a segment and its image, that the cache lacks.
        """
        image_ids = np.asarray(image_ids, np.int64)
        segment_ids = np.asarray(segment_source_ids, np.int64)
        rank = np.searchsorted(self._image_ids, image_ids)
        rank = np.minimum(rank, len(self._image_ids) - 1)
        absent = self._image_ids[rank] != image_ids
        if absent.any():
            raise ClipTargetError(
                f"The cached CLIP targets in {self._folder} hold nothing of image "
                f"{image_ids[absent][0]}; they belong to other images than training uses."
            )
        images = self._images[self._image_order[rank]].astype(np.float32)
        wanted = segment_ids != 0
        segments = np.zeros((*segment_ids.shape, self.embed_dim), np.float32)
        if wanted.any():
            keys = (rank[:, None] * self._base + segment_ids)[wanted]
            row = np.searchsorted(self._keys, keys)
            row = np.minimum(row, len(self._keys) - 1)
            # An id beyond the base would be read as that of another image's segment.
            unknown = (segment_ids[wanted] >= self._base) | (segment_ids[wanted] < 0)
            unknown |= self._keys[row] != keys if len(self._keys) else True
            if unknown.any():
                owner = np.broadcast_to(image_ids[:, None], wanted.shape)[wanted]
                raise ClipTargetError(
                    f"The cached CLIP targets in {self._folder} hold nothing of segment "
                    f"{segment_ids[wanted][unknown][0]} of image {owner[unknown][0]}; they belong "
                    "to other annotations than training uses."
                )
            segments[wanted] = self._segments[self._segment_order[row]]
        return {
            "clip_image_target": _normalized(images),
            "clip_segment_targets": _normalized(segments),
        }

    def add_to(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A batch with the two target fields beside its own."""
        return {**batch, **self.lookup(batch["image_id"], batch["segment_source_ids"])}


def _normalized(x: np.ndarray) -> np.ndarray:
    # Rounding to half precision has changed the norm in the fourth digit; zeros stay zero.
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(norm == 0, 1, norm)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _stamp(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    value = 0
    for name in sorted(arrays):
        value = zlib.crc32(np.ascontiguousarray(arrays[name]).view(np.uint8), value)
    return f"{value:08x}"


def _opened(path: Path):
    try:
        return safetensors.safe_open(path, framework="np")
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from error


def _shard_sizes(path: Path) -> tuple[int, int]:
    # Numbers of images and segments, from the header alone.
    with _opened(path) as file:
        names = set(file.keys())
        if names != set(_ARRAYS):
            raise _damaged(path, f"it holds {sorted(names)} instead of {sorted(_ARRAYS)}")
        return tuple(file.get_slice(name).get_shape()[0] for name in ("images", "segments"))


def _damaged(path: Path, why: str) -> ClipTargetError:
    return ClipTargetError(
        f"The shard {path} of cached CLIP targets is damaged ({why.rstrip('.')}); delete it and "
        f"run `{COMMAND}` with this config again."
    )


def _partial(path: Path, own: str = "") -> Path:
    return path.with_name(f"{path.name}{own}.partial")


def _replace(path: Path, own: str, content: str | bytes) -> None:
    partial = _partial(path, own)
    with partial.open("wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
