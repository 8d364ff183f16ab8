"""Panoptic quality by the official algorithm, from its description: ours is timed beside it.

panopticapi `evaluation.py` (`pq_compute_single_core`) reads, for every image: unique ids and areas
of the prediction; unique values of ground truth x 256^3 + prediction, which are the intersections;
then Python loops over intersections and segments. Nothing here is for use: `PanopticQuality` is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

_OFFSET = 256**3


class OfficialPanopticQuality:
    """Counts as panopticapi does, class by class."""

    def __init__(self) -> None:
        """Starts at zero."""
        # Class to summed IoU, true positives, false positives, false negatives.
        self._counts: dict[int, list[float]] = defaultdict(lambda: [0.0, 0, 0, 0])

    def update(
        self,
        gt_ids: np.ndarray,
        gt_segments: Mapping[int, Mapping],
        pred_ids: np.ndarray,
        pred_labels: Mapping[int, int],
    ) -> None:
        """Adds one image.

        Args:
          gt_ids, pred_ids: [H, W] ints below 256^3, 0 void.
          gt_segments: id -> {"label", "is_crowd", "area"}, areas as the official json brings them.
        """
        ids, sizes = np.unique(pred_ids, return_counts=True)
        areas = {int(i): int(size) for i, size in zip(ids, sizes, strict=True) if i}
        if areas.keys() != pred_labels.keys():
            raise ValueError("The prediction's map and table hold different ids.")
        codes = gt_ids.astype(np.uint64) * _OFFSET + pred_ids.astype(np.uint64)
        shared = defaultdict(int)
        for code, count in zip(*np.unique(codes, return_counts=True), strict=True):
            shared[int(code) // _OFFSET, int(code) % _OFFSET] = int(count)

        matched_gt, matched_pred = set(), set()
        for (gt, pred), intersection in list(shared.items()):
            if gt not in gt_segments or pred not in pred_labels:
                continue
            truth = gt_segments[gt]
            if truth["is_crowd"] or truth["label"] != pred_labels[pred]:
                continue
            iou = intersection / (areas[pred] + truth["area"] - intersection - shared[0, pred])
            if iou > 0.5:
                self._counts[truth["label"]][0] += iou
                self._counts[truth["label"]][1] += 1
                matched_gt.add(gt)
                matched_pred.add(pred)

        crowd_of_label = {}
        for gt, truth in gt_segments.items():
            if gt not in matched_gt and truth["is_crowd"]:
                crowd_of_label[truth["label"]] = gt
            elif gt not in matched_gt:
                self._counts[truth["label"]][3] += 1
        for pred, label in pred_labels.items():
            if pred in matched_pred:
                continue
            ignored = shared[0, pred]
            if label in crowd_of_label:
                ignored += shared[crowd_of_label[label], pred]
            if ignored / areas[pred] <= 0.5:
                self._counts[label][2] += 1

    def counts(self, num_classes: int) -> np.ndarray:
        """[4, K] float64: summed IoU, TP, FP and FN of every class."""
        return np.array([self._counts[k] for k in range(num_classes)], float).T
