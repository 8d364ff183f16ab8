"""Instance and semantic predictions as files, image by image: a COCO results list, label maps."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Iterable

import numpy as np
from PIL import Image

from concat_jax.core.streamed_json import StreamedJson
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.inference.instance import Instance


class InstanceWriter(StreamedJson):
    """Writes COCO instance results: a list of {image_id, category_id, segmentation, score}.

    Format: https://cocodataset.org/#format-results; pycocotools `loadRes` takes it.
    """

    def __init__(self, json_path: str | os.PathLike, vocabulary: Vocabulary):
        """Opens the partial json; the folder is made.

        Args:
          json_path: of the json.
          vocabulary: maps class indices to the data set's category ids.
        """
        super().__init__(json_path)
        self._vocabulary = vocabulary

    def add(self, image_id: int, instances: Iterable[Instance]) -> None:
        """Writes the instances of one image; scores keep all digits, as ties decide AP.

        Raises:
          ValueError: if a label is outside the vocabulary or a score is not finite.
        """
        for instance in instances:
            if not 0 <= instance.label < len(self._vocabulary):
                raise ValueError(
                    f"Image {image_id}: class index {instance.label} is outside the vocabulary of "
                    f"{len(self._vocabulary)}."
                )
            if not math.isfinite(instance.score):
                raise ValueError(f"Image {image_id} has an instance of score {instance.score}.")
            entry = {
                "image_id": int(image_id),
                "category_id": int(self._vocabulary.category_ids[instance.label]),
                "segmentation": instance.rle,
                "score": float(instance.score),
            }
            self._append(entry)


class SemanticWriter:
    """Writes label maps: one-channel PNGs whose pixels are the data set's own category ids.

    They are uint8 with 255 for void where every id is below 255, else uint16 with 65535.
    """

    def __init__(self, folder: str | os.PathLike, vocabulary: Vocabulary):
        """Makes the folder.

        Args:
          folder: gets `<stem of the image>.png`.
          vocabulary: maps class indices to category ids.

        Raises:
          ValueError: if an id does not fit 16 bits.
        """
        lowest, highest = min(vocabulary.category_ids), max(vocabulary.category_ids)
        if lowest < 0 or highest >= 65535:
            raise ValueError(
                f"Category ids from {lowest} to {highest} do not fit a label map of 16 bits."
            )
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        dtype = np.uint8 if highest < 255 else np.uint16
        # The last entry is void, which index -1 reads.
        self._values = np.array([*vocabulary.category_ids, np.iinfo(dtype).max], dtype)
        self._written: set[str] = set()

    def add(self, file_name: str, labels: np.ndarray) -> None:
        """Writes one image.

        Args:
          file_name: of the image; the PNG takes its stem.
          labels: [H, W] ints, class indices or -1 for void.

        Raises:
          ValueError: if a label is no class, or the PNG name was written before.
        """
        name = pathlib.PurePath(file_name).stem + ".png"
        if name in self._written:
            raise ValueError(f"{name} was already written by this writer; rename {file_name}.")
        labels = np.asarray(labels)
        if labels.size and not -1 <= labels.min() <= labels.max() < len(self._values) - 1:
            raise ValueError(
                f"{file_name} has labels from {labels.min()} to {labels.max()}; they must be class "
                f"indices of the vocabulary of {len(self._values) - 1}, or -1."
            )
        Image.fromarray(self._values[labels]).save(self.folder / name)
        self._written.add(name)
