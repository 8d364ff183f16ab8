"""A prepared data set, read at random: few large files, with id maps that decode fast.

`python -m data_pipelines.prepare` writes it; `tfds.builder_from_directory(FOLDER).as_dataset()`
reads it too, in any program.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Mapping
from concurrent import futures

import cv2
import numpy as np
from PIL import Image

from concat_jax.core.files import FileError, as_path, in_bucket, size_of
from concat_jax.core.vocabulary import Vocabulary
from data_pipelines.id_runs import decode_runs
from data_pipelines.prepared.files import (
    COMMAND,
    FOOTER,
    Prepared,
    damaged,
    read_prepared,
    read_tables,
    shard_path,
    tables_path,
    tensorflow,
)
from data_pipelines.sources.pictures import upright
from data_pipelines.sources.source import ImageRecord, UnseenImages


class PreparedSource:
    """One part of a prepared data set; a `Source`.

    It gives the pictures and id maps of the folder that the part was made from, bit for bit. Reads
    share nothing, so any number of threads may read. Only parts made with `unseen` "keep" hold all
    that an evaluation needs.
    """

    def __init__(self, folder: str | os.PathLike[str], part: str, prepared: Prepared | None = None):
        """Reads the tables; of COCO's 118,287 images they hold 40 MB.

        Args:
          prepared: what the folder will say that it holds; None takes what it says.

        Raises FileError if the part is not there or not finished, or a file is damaged.
        """
        self._folder, self._part = as_path(folder), part
        prepared = prepared or read_prepared(self._folder)
        if prepared is None or part not in prepared.parts:
            raise FileError(
                f"{folder} holds no finished part {part!r} of a prepared data set; make it with "
                f"`{COMMAND} DATASET --root=... --part={part} --out={folder}`."
            )
        self._dataset, made = prepared.dataset, prepared.parts[part]
        self.vocabulary = Vocabulary(**{k: tuple(v) for k, v in prepared.vocabulary.items()})
        self.unseen, self.skipped = made.unseen, made.skipped
        self._id_dtype = prepared.id_dtype
        self.records, self._places = read_tables(tables_path(self._folder, part))
        if len(self.records) != sum(made.shard_lengths):
            raise damaged(tables_path(self._folder, part), "it is of another data set")
        count = len(made.shard_lengths)
        self._paths = [
            shard_path(self._folder, prepared.dataset, part, index, count) for index in range(count)
        ]
        self._check_sizes()
        self._indices = {record.image_id: i for i, record in enumerate(self.records)}
        self._parse = tensorflow("tensorflow").train.Example.FromString

    def _check_sizes(self) -> None:
        ends = np.zeros(len(self._paths), np.int64)
        np.maximum.at(ends, self._places[:, 0], self._places[:, 1:3].sum(axis=1) + FOOTER)

        def size(path) -> int | None:
            return size_of(path) if path.exists() else None

        with futures.ThreadPoolExecutor(16) as pool:
            for path, end, found in zip(
                self._paths, ends.tolist(), pool.map(size, self._paths), strict=True
            ):
                if found != end:
                    why = "it is missing" if found is None else f"it has {found} bytes, not {end}"
                    raise damaged(path, why)

    def check_treatment(self, wanted: UnseenImages, by: str) -> None:
        """Refuses a part that lacks what the treatment `wanted` would have kept, by a FileError.

        A whole part serves every treatment, and where no class is unseen all are alike.
        """
        if self.unseen in ("keep", wanted) or not len(self.vocabulary.unseen):
            return
        raise FileError(
            f"The part {self._part} in {self._folder} was made with --unseen={self.unseen}, and "
            f"{by} asks for {wanted!r}; make it in another folder with `{COMMAND} "
            f"{self._dataset} --root=... --part={self._part} --unseen={wanted} --out=...`."
        )

    def read(self, record: ImageRecord) -> tuple[Image.Image, np.ndarray]:
        """As `Source.read`; the id map is uint8, or uint16 where an image has over 255 segments."""
        index = self._indices[record.image_id]
        image, ids = self.decode(index, self.payload(index))
        return Image.fromarray(image), ids

    def payload(self, index: int) -> bytes:
        """A record as it lies in its file; FileError if it is damaged."""
        file, begin, length, crc, _ = self._places[index].tolist()
        path = self._paths[file]
        try:
            if in_bucket(path):
                content = _read_range(os.fspath(path), begin, length)
            else:
                with open(path, "rb", buffering=0) as handle:
                    content = os.pread(handle.fileno(), length, begin)
        except OSError as error:
            raise damaged(path, str(error)) from error
        if len(content) != length or zlib.crc32(content) != crc:
            raise damaged(path, f"the record of {length} bytes at {begin} differs")
        return content

    def decode(self, index: int, payload: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Image [H, W, 3] uint8, upright, and id map [H, W] of a record's payload."""
        record = self.records[index]
        fields: Mapping = self._parse(payload).features.feature
        if fields["image_id"].int64_list.value[0] != record.image_id:
            raise damaged(tables_path(self._folder, self._part), "records are not where it says")
        try:
            (runs,) = fields["segment_runs"].bytes_list.value  # none in data of an older format
            ids = decode_runs(runs, record.height, record.width, self._id_dtype)
        except ValueError as error:
            path = self._paths[self._places[index, 0]]
            raise damaged(path, f"the runs of an id map are missing or wrong ({error})") from error
        image = fields["image"].bytes_list.value[0]
        if self._places[index, -1]:
            return cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR_RGB), ids
        with Image.open(io.BytesIO(image)) as picture:
            picture.load()
            return np.asarray(upright(picture, record.file_name)), ids


def is_plain_jpeg(content: bytes) -> bool:
    """Whether an image file is one of which OpenCV makes Pillow's pixels, sooner: by one library,
    EXIF rotation applied."""
    with Image.open(io.BytesIO(content)) as picture:
        return picture.format == "JPEG" and picture.mode in ("RGB", "L")


def _read_range(path: str, begin: int, length: int) -> bytes:
    import fsspec

    return fsspec.filesystem("gcs").cat_file(path, begin, begin + length)
