"""A data set in TFRecord shards, read at random: few large files, with id maps that decode fast.

`python -m data_pipelines.prepare` writes the shards. No TensorFlow is needed to read them here;
`tfds.builder_from_directory(FOLDER).as_dataset()` reads them too.
"""

from __future__ import annotations

import dataclasses
import io
import os
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from concat_jax.core.files import FileError
from concat_jax.core.vocabulary import Vocabulary
from data_pipelines.id_runs import decode_runs
from data_pipelines.shards.files import COMMAND, damaged, read_index, read_manifest, shard_path
from data_pipelines.sources.source import ImageRecord, UnseenImages


class ShardSource:
    """One part of a data set from its shards; a `Source`.

    It gives the pictures and id maps of the folder that the shards were made from, bit for bit.
    Reads keep no file open and share nothing, so any number of threads may read. Only shards made
    with `unseen` "keep" hold all that an evaluation needs.
    """

    def __init__(self, folder: str | os.PathLike[str], part: str):
        """Reads the indices; of COCO's 118,287 images they would hold 31 MB.

        Raises:
          FileError: if the part is not there or not finished, or a file is damaged.
        """
        self._folder = Path(folder)
        self._identity, result = read_manifest(self._folder, part)
        if result is None:
            raise FileError(
                f"The shards of {part} in {folder} are not finished; run the same `{COMMAND}` "
                "again: it goes on where it stopped."
            )
        vocabulary = {name: tuple(v) for name, v in self._identity.vocabulary.items()}
        self.vocabulary = Vocabulary(**vocabulary)
        self.unseen = self._identity.unseen
        indices = [
            read_index(self._folder, self._identity, i) for i in range(self._identity.num_shards)
        ]
        where = [
            (record, i, row) for i, x in enumerate(indices) for row, record in enumerate(x.records)
        ]
        where.sort(key=lambda entry: entry[0].image_id)
        self.records = [record for record, _, _ in where]
        self._where = {record.image_id: (i, row) for record, i, row in where}
        self.skipped = {name: why for index in indices for name, why in index.skipped.items()}
        # Without the records, which would be held a second time.
        self._indices = [dataclasses.replace(index, records=()) for index in indices]

    def check_treatment(self, wanted: UnseenImages, by: str) -> None:
        """Refuses shards that lack what the treatment `wanted` would have kept, by a FileError.

        Whole shards serve every treatment, and where no class is unseen all treatments are alike.
        """
        if self.unseen in ("keep", wanted) or not len(self.vocabulary.unseen):
            return
        part = self._identity.part
        raise FileError(
            f"The shards of {part} in {self._folder} were made with --unseen={self.unseen}, and "
            f"{by} asks for {wanted!r}; make them in another folder with `{COMMAND} "
            f"{self._identity.dataset} --root=... --part={part} --unseen={wanted} --out=...`."
        )

    def read(self, record: ImageRecord) -> tuple[Image.Image, np.ndarray]:
        """As `Source.read`; the id map is uint8, or uint16 where an image has over 255 segments."""
        shard, row = self._where[record.image_id]
        path = shard_path(self._folder, self._identity, shard)
        index = self._indices[shard]
        offset, length, crc = index.payloads[row].tolist()
        try:
            with path.open("rb") as file:
                file.seek(offset)
                payload = file.read(length)
        except OSError as error:
            raise damaged(path, str(error)) from error
        if len(payload) != length or zlib.crc32(payload) != crc:
            raise FileError(
                f"Record {row} (image {record.image_id}) of {path} is damaged; delete this file "
                f"and run `{COMMAND}` again: it makes it anew."
            )
        (first, last), (first_id, last_id) = index.images[row], index.id_maps[row]
        image = Image.open(io.BytesIO(payload[first:last]))
        image.load()
        # As `pictures.open_picture` treats the file itself.
        ImageOps.exif_transpose(image, in_place=True)
        dtype = np.uint8 if self._identity.id_bits == 8 else np.uint16
        try:
            ids = decode_runs(payload[first_id:last_id], record.height, record.width, dtype)
        except ValueError as error:
            raise damaged(path, str(error)) from error
        return image if image.mode == "RGB" else image.convert("RGB"), ids
