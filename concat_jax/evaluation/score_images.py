"""Scores of predictions as they are made: one class a metric, which also writes them to files."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
from etils.epath import Path

from concat_jax.core.coco_writers import InstanceWriter, PanopticWriter, SemanticWriter
from concat_jax.core.mask_codes import encode_rle
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.average_precision import AveragePrecision
from concat_jax.evaluation.counts import ClassCounts
from concat_jax.evaluation.panoptic_quality import PanopticQuality
from concat_jax.evaluation.semantic_iou import SemanticIoU
from concat_jax.evaluation.worst_best import WorstAndBest
from concat_jax.inference.panoptic import ImageSegments
from concat_jax.inference.predictor import Prediction
from concat_jax.visualize import comparison as pictures


class _Score(contextlib.ExitStack):
    """One metric: its `counts` of the images so far, and its file in `folder`, if there is one."""

    _METRIC: ClassVar[type[ClassCounts]]
    _WRITER: ClassVar[Callable]
    _FILE: ClassVar[str] = ""

    def __init__(self, vocabulary: Vocabulary, folder: Path | None):
        super().__init__()
        self.counts = self._METRIC(len(vocabulary))
        self._is_thing = np.asarray(vocabulary.is_thing)
        self._writer = None
        if folder is not None:
            self._writer = self.enter_context(self._WRITER(folder / self._FILE, vocabulary))

    def add(self, native: Mapping, prediction: Prediction) -> None:
        """Scores and writes one image, whose example at native size is given."""
        written = self._count(native, prediction)
        if self._writer:
            self._writer.add(int(native["image_id"]), native["file_name"], *written)

    @abc.abstractmethod
    def _count(self, native: Mapping, prediction: Prediction) -> tuple:
        """Scores one image; returns what is written of it."""


class PanopticScore(_Score):
    """Panoptic quality; `panoptic_predictions.json` and its PNGs."""

    _METRIC, _WRITER = PanopticQuality, PanopticWriter

    extremes: WorstAndBest | None = None

    def _count(self, native: Mapping, prediction: Prediction) -> tuple:
        result = prediction.panoptic
        own = quality_of(native, result, self.counts.num_classes)
        self.counts.merge(own)
        if self.extremes:
            maps = native["segment_ids"], native["segment_labels"]
            found = result.id_map, result.labels_by_id()
            self.extremes.add(own, native["file_name"], maps, found, native["image"])
        return result.id_map, result.segments


class SemanticScore(_Score):
    """Semantic IoU; maps in `semantic_predictions/`. Crowds have their class, as in COCO's."""

    _METRIC, _WRITER, _FILE = SemanticIoU, SemanticWriter, "semantic_predictions"

    def _count(self, native: Mapping, prediction: Prediction) -> tuple:
        label_of_id = np.append(-1, native["segment_labels"]).astype(np.int32)
        self.counts.update(label_of_id[native["segment_ids"]], prediction.semantic)
        return (prediction.semantic,)


class InstanceScore(_Score):
    """Mask AP of things; `instance_predictions.json`."""

    _METRIC, _WRITER, _FILE = AveragePrecision, InstanceWriter, "instance_predictions.json"

    def _count(self, native: Mapping, prediction: Prediction) -> tuple:
        found = prediction.instances
        labels, scores = [one.label for one in found], [one.score for one in found]
        codes = [one.rle for one in found]
        ids, classes = native["segment_ids"], np.asarray(native["segment_labels"])
        rows = np.flatnonzero((classes >= 0) & self._is_thing[classes])
        # Instances that may hide each other come with their whole masks.
        masks = native.get("segment_masks")
        self.counts.update(
            int(native["image_id"]),
            [masks[row] if masks else encode_rle(ids == row + 1) for row in rows],
            classes[rows],
            np.asarray(native["segment_is_crowd"])[rows],
            codes,
            labels,
            scores,
        )
        return np.shape(ids), labels, scores, codes


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
