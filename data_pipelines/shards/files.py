"""The files of a data set in TFRecord shards: what they hold, how they are written and checked.

One folder holds the parts of one data set. Of each part:

    train2017.manifest.json               what the shards were made of and how long they are
    coco_panoptic_zps-train2017.tfrecord-00003-of-00090           `tf.train.Example` records
    train2017-00003.index.safetensors     their tables, byte offsets and checksums

The index makes a shard a random-access file: `shards.ShardSource` reads any image by its offset,
without parsing records. Every file appears under its name only when it is whole, the index last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from PIL import Image

from concat_jax.core.files import FileError, replacing
from data_pipelines.id_runs import encode_runs
from data_pipelines.shards import tfrecord
from data_pipelines.sources.source import ImageRecord, Source

FORMAT = 2
COMMAND = "python -m data_pipelines.prepare"

# The index of n records with m segments in all: tensor -> type and shape.
_INDEX = {
    "image_ids": (np.int64, ("n",)),
    "sizes": (np.int64, ("n", 2)),
    # Of the record's payload in the shard: where it begins, how long it is, its CRC-32.
    "payloads": (np.int64, ("n", 3)),
    # Within the payload, (begin, end) of the image file and of the id map's PNG.
    "images": (np.int64, ("n", 2)),
    "id_maps": (np.int64, ("n", 2)),
    "num_segments": (np.int64, ("n",)),
    "source_ids": (np.int64, ("m",)),
    "labels": (np.int32, ("m",)),
    "is_crowd": (np.bool_, ("m",)),
    # File names of images and maps in turn, UTF-8, each ended by a zero byte.
    "names": (np.uint8, ("b",)),
}


@dataclasses.dataclass(frozen=True)
class Identity:
    """What shards depend on; two builds with the same identity give the same bytes.

    Attributes:
      source: fingerprint of all the part's tables, of `fingerprint`.
      num_images: how many images the shards hold, bad ones included.
      id_bits: of the id maps, 8 or 16.
      vocabulary: the split's label space, as `dataclasses.asdict` gives it.
    """

    dataset: str
    part: str
    unseen: str
    source: str
    num_images: int
    num_shards: int
    id_bits: int
    vocabulary: Mapping[str, Any]

    @property
    def stamp(self) -> str:
        """Hash of everything, kept in each index."""
        return hashlib.sha256(_json(dataclasses.asdict(self)).encode()).hexdigest()

    @property
    def bounds(self) -> np.ndarray:
        """[num_shards + 1] positions among the images: shard i holds bounds[i] to bounds[i + 1]."""
        return np.arange(self.num_shards + 1) * self.num_images // self.num_shards


def fingerprint(source: Source) -> str:
    """SHA-256 of what the annotation says of every image of a source; pixels are not read."""
    digest = hashlib.sha256()
    categories = np.array(source.vocabulary.category_ids, np.int64)
    for record in source.records:
        head = [record.image_id, record.file_name, record.png_name, record.height, record.width]
        tables = (record.source_ids, categories[record.labels], record.is_crowd)
        digest.update(_json([*head, *(table.tolist() for table in tables)]).encode() + b"\n")
    return digest.hexdigest()


def manifest_path(folder: Path, part: str) -> Path:
    """Where a part's manifest lies."""
    return folder / f"{part}.manifest.json"


def shard_path(folder: Path, identity: Identity, index: int) -> Path:
    """Where shard `index` lies; the name is one that TFDS reads."""
    name = f"{identity.dataset}-{identity.part}.tfrecord-{index:05}-of-{identity.num_shards:05}"
    return folder / name


def index_path(folder: Path, identity: Identity, index: int) -> Path:
    """Where the index of shard `index` lies."""
    return folder / f"{identity.part}-{index:05}.index.safetensors"


def read_manifest(folder: Path, part: str) -> tuple[Identity, dict[str, Any] | None]:
    """What a part's shards were begun with, and how they ended; None before they are finished.

    The end is `shard_lengths` and `shard_bytes`, a number a shard, and `skipped`, file name -> why.
    Raises FileError if there is no manifest, or it cannot be understood.
    """
    path = manifest_path(folder, part)
    if not path.is_file():
        raise FileError(
            f"{folder} holds no shards of the part {part!r} (there is no {path.name}); make them "
            f"with `{COMMAND} DATASET --root=... --part={part} --out={folder}`."
        )
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise FileError(
                f"{path} has the format {content['format']}, and this version reads {FORMAT}; make "
                f"the shards again with `{COMMAND}`."
            )
        return Identity(**content["identity"]), content["result"]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(
            f"{path} is not a manifest of shards ({type(error).__name__}: {error}); delete the "
            f"folder and run `{COMMAND}` again."
        ) from error


def manifests(folder: Path) -> list[tuple[Identity, dict[str, Any] | None]]:
    """`read_manifest` of every part that a folder holds, by name."""
    suffix = ".manifest.json"
    names = sorted(path.name for path in folder.glob(f"*{suffix}"))
    return [read_manifest(folder, name.removesuffix(suffix)) for name in names]


def write_manifest(folder: Path, identity: Identity, result: Mapping[str, Any] | None) -> None:
    """Writes what `read_manifest` returns, whole or not at all."""
    content = {"format": FORMAT, "identity": dataclasses.asdict(identity), "result": result}
    with replacing(manifest_path(folder, identity.part)) as partial:
        partial.write_bytes(json.dumps(content, indent=1).encode() + b"\n")


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """The index of one shard of n records.

    Attributes:
      payloads: [n, 3] int64, of each record's payload: offset in the file, length, CRC-32.
      images, id_maps: [n, 2] int64, begin and end within the payload of the image file and of
        the id map's runs.
      skipped: file name of each image that was left out -> why.
    """

    records: tuple[ImageRecord, ...]
    payloads: np.ndarray
    images: np.ndarray
    id_maps: np.ndarray
    shard_bytes: int
    skipped: Mapping[str, str]


def write_shard(
    folder: Path,
    identity: Identity,
    index: int,
    records: Sequence[ImageRecord],
    read: Callable[[ImageRecord], tuple[bytes, np.ndarray]],
    *,
    skip_bad: bool = False,
    on_record: Callable[[], None] = lambda: None,
) -> None:
    """Writes one shard and then its index, each under a temporary name first.

    `read` gives a record's image file and id map [H, W] of rows + 1; where it raises, `skip_bad`
    notes the image in the index and leaves it out.
    """
    kept, payloads, images, id_maps, skipped = [], [], [], [], {}
    path = shard_path(folder, identity, index)
    with replacing(path) as partial, partial.open("wb") as file:
        for record in records:
            try:
                image, ids = read(record)
            except FileError as error:
                if not skip_bad:
                    raise
                skipped[record.file_name] = str(error)
                on_record()
                continue
            ids = ids.astype(np.uint8 if identity.id_bits == 8 else np.uint16)
            runs = encode_runs(ids)
            example = _example(record, image, ids, runs, identity.vocabulary)
            payload = tfrecord.encode_example(example)
            kept.append(record)
            payloads.append((file.tell() + tfrecord.HEADER, len(payload), zlib.crc32(payload)))
            # Wherever the search finds these bytes, they are these bytes.
            images.append(_span(payload, image))
            id_maps.append(_span(payload, runs))
            file.write(tfrecord.frame(payload))
            on_record()
        shard_bytes = file.tell()
    names = [name for r in kept for name in (r.file_name, r.png_name)]
    tables = {
        name: np.concatenate([getattr(r, name) for r in kept] or [np.empty(0)])
        for name in ("source_ids", "labels", "is_crowd")
    }
    values = dict(
        image_ids=[r.image_id for r in kept],
        sizes=[(r.height, r.width) for r in kept],
        payloads=payloads,
        images=images,
        id_maps=id_maps,
        num_segments=[len(r.labels) for r in kept],
        names=np.frombuffer("".join(f"{name}\0" for name in names).encode(), np.uint8),
        **tables,
    )
    arrays = {
        name: np.ascontiguousarray(values[name], dtype).reshape(-1, *shape[1:])
        for name, (dtype, shape) in _INDEX.items()
    }
    # One text: safetensors shuffles its entries, and equal builds shall be equal files.
    metadata = {
        "stamp": identity.stamp,
        "index": index,
        "shard_bytes": shard_bytes,
        "skipped": skipped,
        "crc32": _checksum(arrays),
    }
    with replacing(index_path(folder, identity, index)) as partial:
        partial.write_bytes(safetensors.numpy.save(arrays, {"shard": _json(metadata)}))


def read_index(folder: Path, identity: Identity, index: int) -> ShardIndex:
    """Reads the index of a finished shard and compares it with the shard's size.

    Raises:
      FileError: naming the file that is missing, damaged, or of another build.
    """
    path, shard = index_path(folder, identity, index), shard_path(folder, identity, index)
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = json.loads((file.metadata() or {})["shard"])
            arrays = {name: file.get_tensor(name) for name in _INDEX}
        owner = (metadata["stamp"], metadata["index"])
        checksum, expected, skipped = (metadata[k] for k in ("crc32", "shard_bytes", "skipped"))
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error
    if owner != (identity.stamp, index):
        raise damaged(path, "it belongs to other shards")
    if checksum != _checksum(arrays):
        raise damaged(path, "its checksum differs")
    found = shard.stat().st_size if shard.is_file() else None
    if found != expected:
        why = "it is missing" if found is None else f"it has {found} bytes instead of {expected}"
        raise damaged(shard, why)
    names = arrays["names"].tobytes().decode().split("\0")
    ends = np.cumsum(arrays["num_segments"])
    records = []
    for row, (image_id, (height, width), end, count) in enumerate(
        zip(
            arrays["image_ids"].tolist(),
            arrays["sizes"].tolist(),
            ends.tolist(),
            arrays["num_segments"].tolist(),
            strict=True,
        )
    ):
        rows = slice(end - count, end)
        tables = {name: arrays[name][rows] for name in ("source_ids", "labels", "is_crowd")}
        file_name, png_name = names[2 * row : 2 * row + 2]
        records.append(ImageRecord(image_id, file_name, png_name, height, width, **tables))
    return ShardIndex(
        records=tuple(records),
        shard_bytes=expected,
        skipped=skipped,
        **{name: arrays[name] for name in ("payloads", "images", "id_maps")},
    )


def _example(
    record: ImageRecord, image: bytes, ids: np.ndarray, runs: bytes, vocabulary: Mapping[str, Any]
) -> dict[str, Any]:
    # The loader's fields; `tfds_metadata.features` describes the same. The id map is there twice:
    # as a PNG, which TensorFlow reads, and as its runs, which are read much faster here.
    is_thing = np.array(vocabulary["is_thing"])
    return {
        "image": image,
        "segment_ids": _png(ids),
        "segment_runs": runs,
        "segment_labels": record.labels,
        "segment_is_thing": is_thing[record.labels],
        "segment_is_crowd": record.is_crowd,
        "segment_source_ids": record.source_ids,
        "image_id": [record.image_id],
        "image_size": [record.height, record.width],
        "file_name": record.file_name.encode(),
    }


def _png(ids: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(ids).save(buffer, "PNG")
    return buffer.getvalue()


def _span(payload: bytes, content: bytes) -> tuple[int, int]:
    begin = payload.index(content)
    return begin, begin + len(content)


def damaged(path: Path, why: str) -> FileError:
    """The error of a file that a new run of the command replaces."""
    return FileError(
        f"{path} is damaged ({why.rstrip('.')}); delete it and run the same `{COMMAND}` again: it "
        "makes what is missing."
    )


def remove_partials(folder: Path, identity: Identity) -> None:
    """Removes what a killed process left of a part's files."""
    part = identity.part
    for path in folder.glob("*.partial"):
        if path.name.startswith((f"{part}.", f"{part}-", f"{identity.dataset}-{part}.")):
            path.unlink(missing_ok=True)


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    value = 0
    for name in _INDEX:
        value = zlib.crc32(np.ascontiguousarray(arrays[name]).view(np.uint8), value)
    return f"{value:08x}"


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def as_json(value: Any) -> Any:
    """What a value is after JSON: tuples are lists."""
    return json.loads(_json(value))
