"""Scores of predictions as they are made: one class a metric, which also writes them to files."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from concat_jax.core.coco import PanopticWriter
from concat_jax.core.run_lengths import encode_segments
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.average_precision import AveragePrecision
from concat_jax.evaluation.coco_results import InstanceWriter, SemanticWriter
from concat_jax.evaluation.panoptic_quality import PanopticQuality
from concat_jax.evaluation.semantic_iou import SemanticIoU
from concat_jax.inference.instance import Instance, instance_inference
from concat_jax.inference.panoptic import PanopticOutput
from concat_jax.inference.segments import ImageSegments, list_segments
from concat_jax.visualize import overlay as pictures

if TYPE_CHECKING:
    from concat_jax.evaluation.evaluate import NetworkOutput


class PanopticScore(contextlib.ExitStack):
    """Panoptic quality; `panoptic_predictions.json` and its PNGs.

    Attributes:
      counts: the PanopticQuality of the images so far.
    """

    def __init__(self, vocabulary: Vocabulary, folder: Path | None):
        """Args:
        vocabulary: the label space.
        folder: where predictions are written, if anywhere.
        """
        super().__init__()
        self.counts = PanopticQuality(len(vocabulary))
        self._writer = (
            self.enter_context(PanopticWriter(folder, vocabulary)) if folder is not None else None
        )

    def add(self, native: Mapping, size: tuple[int, int], output: PanopticOutput) -> ImageSegments:
        """Scores and writes one image.

        Args:
          native: the example at native size.
          size: its (height, width).
          output: of `panoptic_inference`, numpy arrays without the batch axis.

        Returns:
          The image's segments.
        """
        result = list_segments(output.segment_ids[: size[0], : size[1]], output)
        self.counts.update(
            native["segment_ids"],
            native["segment_labels"],
            native["segment_is_crowd"],
            result.id_map,
            result.labels_by_id(),
        )
        if self._writer:
            image_id = int(native["image_id"])
            self._writer.add(image_id, native["file_name"], result.id_map, result.segments)
        return result


class SemanticScore(contextlib.ExitStack):
    """Semantic IoU; label maps in `semantic_predictions/`.

    Attributes:
      counts: the SemanticIoU of the images so far.
    """

    def __init__(self, vocabulary: Vocabulary, folder: Path | None):
        """Args:
        vocabulary: the label space.
        folder: where predictions are written, if anywhere.
        """
        super().__init__()
        self.counts = SemanticIoU(len(vocabulary))
        self._writer = (
            SemanticWriter(folder / "semantic_predictions", vocabulary)
            if folder is not None
            else None
        )

    def add(self, native: Mapping, size: tuple[int, int], labels: np.ndarray) -> np.ndarray:
        """Scores and writes one image; crowds have their class, as in COCO's semantic maps.

        Args:
          native: the example at native size.
          size: its (height, width).
          labels: [H, W] class indices.

        Returns:
          [height, width], the image's part of `labels`.
        """
        labels = labels[: size[0], : size[1]]
        label_of_id = np.append(-1, native["segment_labels"]).astype(np.int32)
        self.counts.update(label_of_id[native["segment_ids"]], labels)
        if self._writer:
            self._writer.add(native["file_name"], labels)
        return labels


class InstanceScore(contextlib.ExitStack):
    """Mask AP of things; `instance_predictions.json`.

    Attributes:
      counts: the AveragePrecision of the images so far.
    """

    def __init__(self, vocabulary: Vocabulary, folder: Path | None):
        """Args:
        vocabulary: the label space.
        folder: where predictions are written, if anywhere.
        """
        super().__init__()
        self.counts = AveragePrecision(len(vocabulary))
        self._is_thing = np.asarray(vocabulary.is_thing)
        self._writer = (
            self.enter_context(InstanceWriter(folder / "instance_predictions.json", vocabulary))
            if folder is not None
            else None
        )

    def add(self, native: Mapping, size: tuple[int, int], output: NetworkOutput) -> list[Instance]:
        """Scores and writes one image.

        Args:
          native: the example at native size.
          size: its (height, width).
          output: numpy arrays without the batch axis.

        Returns:
          The instances, all classes of things.
        """
        instances = instance_inference(
            output.mask_logits,
            output.class_probs,
            image_size=size,
            source_size=tuple(map(float, output.source_size)),
            is_thing=self._is_thing,
        )
        labels = np.asarray(native["segment_labels"])
        rows = np.flatnonzero((labels >= 0) & self._is_thing[labels])
        self.counts.update(
            int(native["image_id"]),
            encode_segments(native["segment_ids"], rows + 1),
            labels[rows],
            np.asarray(native["segment_is_crowd"])[rows],
            [instance.rle for instance in instances],
            [instance.label for instance in instances],
            [instance.score for instance in instances],
        )
        if self._writer:
            self._writer.add(int(native["image_id"]), instances)
        return instances


def comparison_row(
    native: Mapping, result: ImageSegments, vocabulary: Vocabulary
) -> pictures.ComparisonRow:
    """Image, ground truth and prediction side by side."""
    return pictures.comparison_row(
        native["image"],
        (native["segment_ids"], native["segment_labels"]),
        (result.id_map, result.labels_by_id()),
        vocabulary.names,
        vocabulary.is_thing,
        vocabulary.is_seen,
        caption=native["file_name"],
    )
