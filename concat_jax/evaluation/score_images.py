"""Scores of predictions as they are made: one class a metric, which also writes them to files."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from concat_jax.core.coco_writers import InstanceWriter, PanopticWriter, SemanticWriter
from concat_jax.core.mask_codes import encode_rle
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.average_precision import AveragePrecision
from concat_jax.evaluation.panoptic_quality import PanopticQuality
from concat_jax.evaluation.semantic_iou import SemanticIoU
from concat_jax.inference.predictor import Prediction
from concat_jax.inference.segments import ImageSegments
from concat_jax.visualize import overlay as pictures


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

    def add(self, native: Mapping, prediction: Prediction) -> None:
        """Scores and writes one image, whose example at native size is given."""
        result = prediction.panoptic
        self.counts.merge(quality_of(native, result, self.counts.num_classes))
        if self._writer:
            image_id = int(native["image_id"])
            self._writer.add(image_id, native["file_name"], result.id_map, result.segments)


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
            self.enter_context(SemanticWriter(folder / "semantic_predictions", vocabulary))
            if folder is not None
            else None
        )

    def add(self, native: Mapping, prediction: Prediction) -> None:
        """Scores and writes one image; crowds have their class, as in COCO's semantic maps."""
        label_of_id = np.append(-1, native["segment_labels"]).astype(np.int32)
        self.counts.update(label_of_id[native["segment_ids"]], prediction.semantic)
        if self._writer:
            self._writer.add(int(native["image_id"]), native["file_name"], prediction.semantic)


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

    def add(self, native: Mapping, prediction: Prediction) -> None:
        """Scores and writes one image's instances of things."""
        instances = prediction.instances
        labels = np.asarray(native["segment_labels"])
        rows = np.flatnonzero((labels >= 0) & self._is_thing[labels])
        found = (
            [instance.label for instance in instances],
            [instance.score for instance in instances],
        )
        codes = [instance.rle for instance in instances]
        self.counts.update(
            int(native["image_id"]),
            [encode_rle(native["segment_ids"] == row + 1) for row in rows],
            labels[rows],
            np.asarray(native["segment_is_crowd"])[rows],
            codes,
            *found,
        )
        if self._writer:
            size = np.shape(native["segment_ids"])
            self._writer.add(int(native["image_id"]), native["file_name"], size, *found, codes)


SCORES = {"panoptic": PanopticScore, "semantic": SemanticScore, "instance": InstanceScore}


def quality_of(native: Mapping, result: ImageSegments, num_classes: int) -> PanopticQuality:
    """Counts of one image, whose example at native size is given."""
    counts = PanopticQuality(num_classes)
    counts.update(
        native["segment_ids"],
        native["segment_labels"],
        native["segment_is_crowd"],
        result.id_map,
        result.labels_by_id(),
    )
    return counts


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
