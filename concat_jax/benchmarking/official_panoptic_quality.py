"""Panoptic quality by the official algorithm, from its description: ours is timed beside it.

panopticapi `evaluation.py` (`pq_compute_single_core`) reads, for every image: unique ids and areas
of the prediction; unique values of ground truth x 256^3 + prediction, which are the intersections;
then Python loops over intersections and segments. Nothing here is for use: `PanopticQuality` is.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

VOID = 0
_OFFSET = 256**3


class OfficialPanopticQuality:
    """Counts as panopticapi does.

    Attributes:
      iou_sum, tp, fp, fn: class -> summed IoU and counts; absent classes have no entry.
    """

    def __init__(self) -> None:
        """Starts at zero."""
        self.iou_sum: dict[int, float] = {}
        self.tp: dict[int, int] = {}
        self.fp: dict[int, int] = {}
        self.fn: dict[int, int] = {}

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
          pred_labels: id -> class.

        Raises:
          ValueError: if the prediction's map and table hold different ids.
        """
        areas = {}
        for segment, area in zip(*np.unique(pred_ids, return_counts=True), strict=True):
            if segment == VOID:
                continue
            if int(segment) not in pred_labels:
                raise ValueError(f"The prediction map holds the id {segment}, which has no label.")
            areas[int(segment)] = int(area)
        if areas.keys() != pred_labels.keys():
            raise ValueError("The prediction lists an id that has no pixel.")

        codes = gt_ids.astype(np.uint64) * _OFFSET + pred_ids.astype(np.uint64)
        intersections = {}
        for code, count in zip(*np.unique(codes, return_counts=True), strict=True):
            intersections[int(code) // _OFFSET, int(code) % _OFFSET] = int(count)

        matched_gt, matched_pred = set(), set()
        for (gt, pred), intersection in intersections.items():
            if gt not in gt_segments or pred not in pred_labels:
                continue
            truth = gt_segments[gt]
            if truth["is_crowd"] or truth["label"] != pred_labels[pred]:
                continue
            on_void = intersections.get((VOID, pred), 0)
            union = areas[pred] + truth["area"] - intersection - on_void
            iou = intersection / union
            if iou > 0.5:
                label = truth["label"]
                self.tp[label] = self.tp.get(label, 0) + 1
                self.iou_sum[label] = self.iou_sum.get(label, 0.0) + iou
                matched_gt.add(gt)
                matched_pred.add(pred)

        crowd_of_label = {}
        for gt, truth in gt_segments.items():
            if gt in matched_gt:
                continue
            label = truth["label"]
            if truth["is_crowd"]:
                crowd_of_label[label] = gt
            else:
                self.fn[label] = self.fn.get(label, 0) + 1

        for pred, label in pred_labels.items():
            if pred in matched_pred:
                continue
            ignored = intersections.get((VOID, pred), 0)
            if label in crowd_of_label:
                ignored += intersections.get((crowd_of_label[label], pred), 0)
            if ignored / areas[pred] <= 0.5:
                self.fp[label] = self.fp.get(label, 0) + 1

    def counts(self, num_classes: int) -> np.ndarray:
        """[4, K] float64: iou_sum, tp, fp, fn of every class."""
        tables = self.iou_sum, self.tp, self.fp, self.fn
        return np.array([[float(table.get(k, 0)) for k in range(num_classes)] for table in tables])
