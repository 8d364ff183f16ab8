"""The files of a data set that TensorFlow Datasets wrote, and what training needs besides them.

One folder, of this machine or in a bucket, holds the parts of one data set:

    dataset_info.json, features.json, …   TFDS's description; a part is there once it is listed
    coco_panoptic_zps-train2017.tfrecord-00003-of-00090           records, `tf.train.Example`
    metadata.json                         TFDS's place for a builder's own: what parts were made of
    train2017.tables.npz                  tables of all images, and where their records lie

The tables make a data set whose images can be chosen, and read at random, before a record is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import types
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from concat_jax.core.files import FileError, on_disk, read_json, replacing
from data_pipelines.sources.source import ImageRecord, Source

COMMAND = "python -m data_pipelines.prepare"
INFO, _METADATA = "dataset_info.json", "metadata.json"
# Of a TFRecord besides the payload: its length, with CRC, before it, and its CRC after it.
HEADER, FOOTER = 12, 4
# Of n records with m segments in all: array -> type.
_TABLES = {
    "image_ids": np.int64,
    "sizes": np.int64,  # [n, 2]
    # [n, 5], of the record's payload: file, where it begins there, length, CRC-32; and whether its
    # image is a plain JPEG.
    "places": np.int64,
    "num_segments": np.int64,
    "source_ids": np.int64,  # [m], as the next two
    "labels": np.int32,
    "is_crowd": np.bool_,
    # File names of images and maps in turn, UTF-8, each ended by a zero byte.
    "names": np.uint8,
}
# What numpy and zipfile raise of damaged bytes.
_UNREADABLE = (
    *(OSError, ValueError, LookupError, EOFError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)


def tensorflow(what: str) -> types.ModuleType:
    """TensorFlow, quiet and on the processor alone; ValueError where it is not installed.

    `what` is the module to import, "tensorflow" or "tensorflow_datasets".
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")  # whose memory it would take
        if what == "tensorflow":
            return tf
        import tensorflow_datasets as tfds

        return tfds
    except ImportError as error:
        raise ValueError(
            f"Prepared data needs TensorFlow ({error}): pip install -r requirements-data.txt."
        ) from error


@dataclasses.dataclass(frozen=True)
class Part:
    """What one part was made of, and how it ended.

    Attributes:
      source: fingerprint of the annotation of all images that were asked for, `num_images`.
      shard_lengths, num_bytes: records of each file; bytes of all, without TFRecord's frames.
      skipped: file name of each image that was left out -> why.
    """

    unseen: str
    source: str
    num_images: int
    shard_lengths: Sequence[int] = ()
    num_bytes: int = 0
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a folder holds.

    Attributes:
      id_bits: of the id maps, 8 or 16; TFDS decodes all parts alike.
      vocabulary: the split's label space, as JSON gives `dataclasses.asdict`.
    """

    dataset: str
    id_bits: int
    vocabulary: Mapping[str, Any]
    parts: dict[str, Part]

    @property
    def id_dtype(self) -> type[np.unsignedinteger]:
        return np.uint8 if self.id_bits == 8 else np.uint16


def metadata(prepared: Prepared) -> dict[str, Any]:
    """What TFDS writes into `metadata.json`, with its own CRC."""
    content = as_json(dataclasses.asdict(prepared))
    return {**content, "crc32": _crc(content)}


def _crc(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def read_prepared(folder: epath.Path) -> Prepared | None:
    """What a folder holds; None if no data set was finished in it, FileError for another's."""
    if not (folder / INFO).exists():
        return None
    try:
        # TFDS's description is written last.
        lengths = {
            split["name"]: [int(length) for length in split["shardLengths"]]
            for split in read_json(folder / INFO)["splits"]
        }
        content = read_json(folder / _METADATA)
        if content.pop("crc32") != _crc(content):
            raise ValueError(f"{_METADATA} is not as it was written")
        parts = {name: Part(**content["parts"][name]) for name in lengths}
        if any(part.shard_lengths != lengths[name] for name, part in parts.items()):
            raise ValueError(f"{INFO} is not as it was written")
        return Prepared(**{**content, "parts": parts})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(
            f"{folder} holds a data set of TensorFlow Datasets that `{COMMAND}` did not write, or "
            f"whose description is damaged ({type(error).__name__}: {error}); prepare the data in "
            "another folder."
        ) from error


def shard_path(folder: epath.Path, dataset: str, part: str, index: int, count: int) -> epath.Path:
    """Where records lie; the name is TFDS's."""
    return folder / f"{dataset}-{part}.tfrecord-{index:05}-of-{count:05}"


def tables_path(folder: epath.Path, part: str) -> epath.Path:
    return folder / f"{part}.tables.npz"


def remove_part(folder: epath.Path, dataset: str, part: str) -> None:
    """Removes what a preparation that was killed left of a part."""
    for pattern in (f"{dataset}-{part}.tfrecord-*", f"{part}.tables.npz*"):
        for path in list(folder.glob(pattern)):
            path.unlink(missing_ok=True)


def fingerprint(source: Source) -> str:
    """SHA-256 of what the annotation says of every image of a source; pixels are not read."""
    digest = hashlib.sha256()
    categories = np.array(source.vocabulary.category_ids, np.int64)
    for record in source.records:
        head = [record.image_id, record.file_name, record.png_name, record.height, record.width]
        tables = (record.source_ids, categories[record.labels], record.is_crowd)
        content = [*head, *(table.tolist() for table in tables)]
        digest.update(json.dumps(content).encode() + b"\n")
    return digest.hexdigest()


def write_tables(
    path: epath.Path, records: Sequence[ImageRecord], places: Sequence[Sequence[int]]
) -> None:
    """Writes what `read_tables` returns."""
    names = [name for r in records for name in (r.file_name, r.png_name)]
    values = dict(
        image_ids=[r.image_id for r in records],
        sizes=[(r.height, r.width) for r in records],
        places=places,
        num_segments=[len(r.labels) for r in records],
        names=np.frombuffer("".join(f"{name}\0" for name in names).encode(), np.uint8),
        **{
            name: np.concatenate([getattr(r, name) for r in records])
            for name in ("source_ids", "labels", "is_crowd")
        },
    )
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, **{name: np.asarray(values[name], t) for name, t in _TABLES.items()})


def read_tables(path: epath.Path) -> tuple[list[ImageRecord], np.ndarray]:
    """Records by ascending image id, and the [n, 5] places of their payloads; FileError."""
    try:
        # Each array has a CRC, which is compared.
        with on_disk(path) as file, np.load(file) as arrays:
            tables = {name: arrays[name] for name in _TABLES}
        names = tables["names"].tobytes().decode().split("\0")
    except _UNREADABLE as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error
    ends = np.cumsum(tables["num_segments"]).tolist()
    records = []
    for row, (image_id, (height, width), begin, end) in enumerate(
        zip(
            tables["image_ids"].tolist(),
            tables["sizes"].tolist(),
            [0, *ends],
            ends,
            strict=False,  # `begin` has one more
        )
    ):
        columns = {name: tables[name][begin:end] for name in ("source_ids", "labels", "is_crowd")}
        file_name, png_name = names[2 * row : 2 * row + 2]
        records.append(ImageRecord(image_id, file_name, png_name, height, width, **columns))
    return records, tables["places"]


def damaged(path: epath.Path, why: str) -> FileError:
    """The error of a file that only a new preparation can replace."""
    return FileError(
        f"{path} is damaged ({why.rstrip('.')}); delete its folder and prepare the data again with "
        f"`{COMMAND}`."
    )


def as_json(value: Any) -> Any:
    """What a value is after JSON: tuples are lists."""
    return json.loads(json.dumps(value))
