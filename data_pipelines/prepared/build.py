"""Writes a part of a data set with TensorFlow Datasets' writer; records are made in threads."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from concat_jax.core.files import FileError, as_path, make_folder, replacing
from concat_jax.core.prefetch import with_progress
from data_pipelines.id_runs import encode_runs
from data_pipelines.leak_test import check_no_leak
from data_pipelines.prepared import files
from data_pipelines.prepared.files import FOOTER, HEADER, Part, Prepared, tensorflow
from data_pipelines.prepared.source import PreparedSource, is_plain_jpeg
from data_pipelines.sources.source import (
    FolderSource,
    ImageRecord,
    Source,
    UnseenImages,
    treat_unseen,
)

# Of a file: 100 MB of COCO, as TFDS advises.
IMAGES_PER_FILE = 500


def build_part(
    folder: str | os.PathLike[str],
    source: FolderSource,
    *,
    dataset: str,
    part: str,
    unseen: UnseenImages,
    id_bits: int = 8,
    skip_bad: bool = False,
) -> tuple[Part, bool]:
    """Writes one part, or finds it there; what it is, and whether it was there.

    Images lie in the files by ascending id, equally many in each. With `unseen` "drop" or "void"
    they are what training may see and nothing else, and the leak test is run on the source before
    and on what was written after. Whatever stops the call before its end leaves no file of the
    part; what is left by a kill is in no description, and goes when the part is written anew.

    Args:
      folder: for all parts of one data set, of this machine or in a bucket; made if absent.
      id_bits: of the id maps, 8 or 16, or more if the part or the folder needs more.
      skip_bad: leave out images that cannot be used, count and name them, instead of raising.

    Raises FileError as well if the folder was made with another data set or setting.
    """
    check_name("data set", dataset)
    check_name("part", part)
    folder = as_path(folder)
    treated, positions = treat_unseen(source, unseen)
    if unseen == "keep":  # for evaluations too, which count what a model finds where nothing is
        positions = np.arange(len(source.records))
    if not len(positions):
        raise FileError(f"Of {part}, no image is left to write with unseen images {unseen!r}.")
    if unseen != "keep":
        check_no_leak(treated, positions)
    before = files.read_prepared(folder)
    least = 8 if max(len(record.labels) for record in source.records) <= 255 else 16
    prepared = Prepared(
        dataset,
        max(least, id_bits, before.id_bits if before else 8),
        files.as_json(dataclasses.asdict(source.vocabulary)),
        dict(before.parts) if before else {},
    )
    made = Part(unseen, files.fingerprint(source), len(positions))
    if before is not None:
        _check_same(folder, before, prepared, _OF_ALL_PARTS)
        if part in before.parts:
            found = before.parts[part]
            _check_same(folder, found, made, ("unseen", "source", "num_images"))
            if found.skipped and not skip_bad:
                name, why = next(iter(found.skipped.items()))
                raise FileError(
                    f"The part {part} in {folder} leaves out {len(found.skipped)} bad images, the "
                    f"first is {name}: {why.rstrip('.')}; take it so with --on_bad_example=skip "
                    "or prepare another folder."
                )
            return found, True
    make_folder(folder)
    files.remove_part(folder, dataset, part)
    try:
        made = _write(folder, prepared, part, made, source, treated, positions, skip_bad)
        if (latest := files.read_prepared(folder)) is not None:  # others wrote parts meanwhile
            _check_same(folder, latest, prepared, _OF_ALL_PARTS)
            prepared.parts.update(latest.parts)
        prepared.parts[part] = made
        if unseen != "keep":
            written = PreparedSource(folder, part, prepared)
            check_no_leak(written, range(len(written.records)))
        _describe(folder, prepared)
    except BaseException:
        files.remove_part(folder, dataset, part)
        raise
    return made, False


def check_name(what: str, name: str) -> None:
    """ValueError for a name of a data set or a part that TFDS does not take in a file's name."""
    if not name.isidentifier():
        raise ValueError(
            f"The {what} {name!r} cannot be part of a file's name; it must be letters, digits and "
            "_, and begin with a letter."
        )


_OF_ALL_PARTS = ("dataset", "vocabulary", "id_bits")
_CALLED = {
    "vocabulary": "another split file",
    "source": "other annotations or images",
    "id_bits": "id maps of {} bits, now {} are needed (write all parts by one command)",
}


def _check_same(folder, begun: Part | Prepared, now: Part | Prepared, names) -> None:
    for name in names:
        then, value = getattr(begun, name), getattr(now, name)
        if then != value:
            said = _CALLED.get(name, name + " {!r}, now it is {!r}")
            difference = said.format(then, value)
            raise FileError(
                f"The prepared data in {folder} was made with {difference}; use another folder for "
                "--out, or the setting it was made with."
            )


def _write(
    folder,
    prepared: Prepared,
    part: str,
    made: Part,
    source: FolderSource,
    treated: Source,
    positions: np.ndarray,
    skip_bad: bool,
) -> Part:
    """Writes the files and their tables; returns `made` with how it ended."""
    core = tensorflow("tensorflow_datasets").core
    features = _features(prepared)
    serializer = core.example_serializer.ExampleSerializer(features.get_serialized_info())
    writer = core.writer.ExampleWriter(core.file_adapters.FileFormat.TFRECORD)

    def payload(number: int) -> tuple[bytes, bool] | FileError:
        try:
            record = treated.records[positions[number]]
            example = _example(source, treated, record, prepared.id_dtype)
            content = serializer.serialize_example(features.encode_example(example))
            return content, is_plain_jpeg(example["image"])
        except FileError as error:
            if not skip_bad:
                raise
            return error

    records: list[ImageRecord] = []
    places: list[tuple[int, int, int, int, bool]] = []
    skipped: dict[str, str] = {}

    def kept(file: int, results: Iterator[tuple[int, Any]]) -> Iterator[tuple]:
        begin = HEADER
        for position, result in results:
            record = treated.records[position]
            if isinstance(result, FileError):
                skipped[record.file_name] = str(result)
                continue
            content, is_plain = result
            records.append(record)
            places.append((file, begin, len(content), zlib.crc32(content), is_plain))
            begin += len(content) + FOOTER + HEADER
            yield record.image_id, content

    count = -(-len(positions) // IMAGES_PER_FILE)
    lengths = []
    with contextlib.closing(with_progress(part, payload, len(positions))) as payloads:
        results = zip(positions, payloads, strict=True)
        for file, share in enumerate(np.array_split(positions, count)):
            path = files.shard_path(folder, prepared.dataset, part, file, count)
            before = len(records)
            with replacing(path) as partial, _writing(path):
                writer.write(partial, kept(file, itertools.islice(results, len(share))))
            lengths.append(len(records) - before)
    if not records:
        raise FileError(f"Not one of the {len(positions)} images of {part} can be used.")
    files.write_tables(files.tables_path(folder, part), records, places)
    return dataclasses.replace(
        made,
        shard_lengths=lengths,
        num_bytes=sum(length for _, _, length, *_ in places),
        skipped=skipped,
    )


@contextlib.contextmanager
def _writing(path) -> Iterator[None]:
    try:
        yield
    except tensorflow("tensorflow").errors.OpError as error:
        raise FileError(f"{path} cannot be written: {error.message}.") from error


def _features(prepared: Prepared) -> Any:
    """The `tfds.features.FeaturesDict` of a record; the names are those of the loader's examples.

    `image` [H, W, 3] uint8 is decoded without EXIF rotation, which TensorFlow does not know;
    `segment_ids` [H, W] is uint8 or uint16, and the tables `segment_*` have one entry a segment.
    `segment_runs` is the same map as `encode_runs` makes it, sooner read: training reads it.
    """
    features = tensorflow("tensorflow_datasets").features
    return features.FeaturesDict(
        {
            "image": features.Image(shape=(None, None, 3), dtype=np.uint8),
            # A third of a PNG's time to read.
            "segment_ids": features.Tensor(
                shape=(None, None), dtype=prepared.id_dtype, encoding=features.Encoding.ZLIB
            ),
            "segment_runs": features.Scalar(np.object_),
            "segment_labels": features.Sequence(
                features.ClassLabel(names=list(prepared.vocabulary["names"]))
            ),
            "segment_is_thing": features.Sequence(np.bool_),
            "segment_is_crowd": features.Sequence(np.bool_),
            "segment_source_ids": features.Sequence(np.int64),
            "image_id": features.Scalar(np.int64),
            "image_size": features.Tensor(shape=(2,), dtype=np.int64),
            "file_name": features.Text(),
        }
    )


def _example(
    source: FolderSource, treated: Source, record: ImageRecord, dtype: type[np.unsignedinteger]
) -> dict[str, Any]:
    _, ids = treated.read(record)
    ids = ids.astype(dtype)  # some sources have 16 bits for any number of segments
    return {
        "image": (source.images_folder / record.file_name).read_bytes(),
        "segment_ids": ids,
        "segment_runs": encode_runs(ids),
        "segment_labels": record.labels,
        "segment_is_thing": np.array(source.vocabulary.is_thing)[record.labels],
        "segment_is_crowd": record.is_crowd,
        "segment_source_ids": record.source_ids,
        "image_id": record.image_id,
        "image_size": np.array([record.height, record.width]),
        "file_name": record.file_name,
    }


def _describe(folder, prepared: Prepared) -> None:
    """Writes TFDS's description of the parts that there are, each file whole, the list last."""
    core = tensorflow("tensorflow_datasets").core
    template = core.ShardedFileTemplate(
        data_dir=folder, dataset_name=prepared.dataset, filetype_suffix="tfrecord"
    )
    unseen = " ".join(
        f"Of {name}, unseen classes: {p.unseen}." for name, p in prepared.parts.items()
    )
    info = core.DatasetInfo(
        builder=core.dataset_info.DatasetIdentity(
            name=prepared.dataset,
            version=core.Version("1.0.0"),
            data_dir=os.fspath(folder),
            module_name="",
        ),
        features=_features(prepared),
        description=f"{prepared.dataset}: images and id maps of segments, 0 void, row + 1 of the "
        f"tables. {unseen}",
        metadata=core.MetadataDict(files.metadata(prepared)),
    )
    info.set_file_format("tfrecord")
    info.set_splits(
        core.splits.SplitDict(
            [
                core.SplitInfo(
                    name=name,
                    shard_lengths=list(part.shard_lengths),
                    num_bytes=part.num_bytes,
                    filename_template=template.replace(split=name),
                )
                for name, part in prepared.parts.items()
            ]
        )
    )
    with tempfile.TemporaryDirectory() as scratch:
        info.write_to_directory(scratch)
        written = sorted(Path(scratch).iterdir(), key=lambda path: path.name == files.INFO)
        for path in written:
            with replacing(folder / path.name) as partial:
                partial.write_bytes(path.read_bytes())
