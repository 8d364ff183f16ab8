"""Average precision of instance masks as COCO counts it, for seen and unseen classes.

hotcoco matches and counts, with the numbers of pycocotools' `COCOeval` for iouType "segm": within
an image and a class at most 100 detections; what is ignored (crowds, other areas) counts neither
way; precision is read at 101 recalls. Ours are the groups of classes and what bad input gets.

The zero-shot protocol of ZSI (48/17 and 65/15) is the same with `ZSI_THRESHOLDS`, and quotes AP and
recall at IoU 0.5 and 100 detections: "ap50" and "recall50" here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from hotcoco import Params, StreamingEval
from hotcoco.mask import area

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.counts import ClassCounts, mean_of_known

COCO_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())
ZSI_THRESHOLDS = (0.4, 0.5, 0.6)
# COCO's ranges of areas and limits of detections, in the order of hotcoco's arrays.
AREAS = ("all", "small", "medium", "large")
MAX_DETECTIONS = (1, 10, 100)
METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar", "recall50")


class AveragePrecision(ClassCounts):
    """Accumulates detections image by image; no masks are kept.

    Attributes:
      num_gt: [K] int64, ground truth that counts.
      detections: [K] int64, the best 100 of each image and class.
    """

    _SUMS = ("num_gt", "detections")

    def __init__(self, num_classes: int, *, thresholds: Sequence[float] = COCO_THRESHOLDS):
        """`thresholds` are IoUs in (0, 1] from which a detection is true; AP is their mean."""
        super().__init__(num_classes)
        self.thresholds = tuple(float(t) for t in thresholds)
        if not self.thresholds or not all(0.0 < t <= 1.0 for t in self.thresholds):
            raise ValueError(f"IoU thresholds must lie in (0, 1], got {self.thresholds}.")
        self.num_gt = np.zeros(num_classes, np.int64)
        self.detections = np.zeros(num_classes, np.int64)
        self._image_ids: set[int] = set()
        params = Params("segm")
        params.iou_thrs = list(self.thresholds)
        categories = [{"id": k, "name": str(k)} for k in range(num_classes)]
        self._counts = StreamingEval(categories, "segm", params=params)

    def update(
        self,
        image_id: int,
        gt_masks: Sequence[Mapping],
        gt_labels: Sequence[int] | np.ndarray,
        gt_is_crowd: Sequence[bool] | np.ndarray | None,
        masks: Sequence[Mapping],
        labels: Sequence[int] | np.ndarray,
        scores: Sequence[float] | np.ndarray,
        *,
        gt_areas: Sequence[float | None] | None = None,
    ) -> None:
        """Adds one image; the order of images does not matter, ties are broken by their ids.

        Args:
          gt_masks: G run-length codes {"size": [H, W], "counts"}, as `encode_rle` makes them.
          gt_labels, labels: [G] and [D] class indices.
          scores: [D] floats, finite.
          gt_areas: [G] pixels; COCO's annotations bring their own. None measures the mask.

        Raises ValueError if sizes differ, or a score or the image is not valid.
        """
        image_id = int(image_id)
        if image_id in self._image_ids:
            raise ValueError(f"The image {image_id} was added before; give every image once.")
        gt_labels, labels = (np.asarray(k, np.int64).reshape(-1) for k in (gt_labels, labels))
        is_crowd = np.zeros(len(gt_masks), bool) if gt_is_crowd is None else np.array(gt_is_crowd)
        is_crowd = is_crowd.astype(bool)
        scores = np.asarray(scores, np.float64).reshape(-1)
        if not np.isfinite(scores).all():
            bad = scores[~np.isfinite(scores)][0]
            raise ValueError(f"Image {image_id} has a detection with the score {bad}.")
        sizes = {tuple(mask["size"]) for mask in (*gt_masks, *masks)}
        if len(sizes) > 1:
            raise ValueError(f"Image {image_id} has masks of several sizes: {sorted(sizes)}.")
        height, width = sizes.pop() if sizes else (1, 1)
        areas = area(list(gt_masks)) if len(gt_masks) else ()
        if gt_areas is not None:
            areas = [mask if a is None else a for a, mask in zip(gt_areas, areas, strict=True)]

        def entry(label: int, mask: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
            common = {"image_id": image_id, "category_id": int(label), "segmentation": dict(mask)}
            return common | fields

        annotated = enumerate(zip(gt_labels, gt_masks, is_crowd, areas, strict=True), start=1)
        truth = [
            entry(label, mask, id=number, iscrowd=int(crowd), area=float(size))
            for number, (label, mask, crowd, size) in annotated
        ]
        found = [
            entry(label, mask, score=float(score))
            for label, mask, score in zip(labels, masks, scores, strict=True)
        ]
        self._counts.update([{"id": image_id, "height": height, "width": width}], truth, found)
        self._image_ids.add(image_id)
        self.num_gt += np.bincount(gt_labels[~is_crowd], minlength=self.num_classes)
        found_of = np.bincount(labels, minlength=self.num_classes)
        self.detections += np.minimum(found_of, MAX_DETECTIONS[-1])

    def merge(self, other: Self) -> None:
        """Adds the images of another accumulator; ValueError if both hold one image."""
        both = self._image_ids & other._image_ids
        if both:
            raise ValueError(f"Both accumulators hold the image {min(both)}; give each once.")
        super().merge(other)
        self._image_ids = self._image_ids | other._image_ids
        self._counts = StreamingEval.merge([self._counts, other._counts])

    def to_arrays(self) -> dict[str, np.ndarray]:
        return {
            **super().to_arrays(),
            "image_ids": np.array(sorted(self._image_ids), np.int64),
            "counts": np.frombuffer(self._counts.to_bytes(), np.uint8),
        }

    def restored(self, arrays: Mapping[str, np.ndarray]) -> Self:
        other = super().restored(arrays)
        other._image_ids = set(arrays["image_ids"].tolist())
        other._counts = StreamingEval.from_bytes(arrays["counts"].tobytes())
        return other

    def _curves(self) -> tuple[np.ndarray, np.ndarray]:
        """Precision [K, A, T], the mean over recalls, and recall [K, A, M, T] in 0..1.

        NaN without ground truth.
        """
        # To finalize would end the counting, so a copy is.
        result = StreamingEval.from_bytes(self._counts.to_bytes()).finalize()
        result.accumulate()
        precision = np.asarray(result.eval["precision"])[..., -1].mean(axis=1)  # [T, K, A]
        recall = np.asarray(result.eval["recall"])  # [T, K, A, M]
        curves = precision.transpose(1, 2, 0), recall.transpose(1, 2, 3, 0)
        return tuple(np.where(curve < 0, np.nan, curve) for curve in curves)

    def summarize(self, vocabulary: Vocabulary) -> dict:
        """AP and recall in percent for all, seen and unseen classes and for every class.

        Returns:
          {"all" | "seen" | "unseen": {"ap" (mean over thresholds), "ap50", "ap75", "ap_small",
          "ap_medium", "ap_large", "ar1", "ar10", "ar" (AR at 100 detections), "recall50": float,
          "n": classes with ground truth}, "harmonic": `METRICS` of seen and unseen, 2su / (s + u),
          "per_class": K dicts with "name", "is_thing", "is_seen", "ap", "ap50", "recall50",
          "instances" (ground truth that counts), "detections" and "true_positives" (at IoU 0.5;
          -1 if that is no threshold), "thresholds": the list}. A mean over no class is NaN, and so
          are quantities at an IoU that is no threshold. A class with ground truth and no detection
          has AP 0.
        """
        ap, recall = self._curves()
        at = {
            iou: np.flatnonzero(np.isclose(self.thresholds, iou, rtol=0, atol=1e-9))
            for iou in (0.5, 0.75)
        }
        values = {
            "ap": ap[:, 0],
            "ap50": ap[:, 0, at[0.5]],
            "ap75": ap[:, 0, at[0.75]],
            **{f"ap_{name}": ap[:, AREAS.index(name)] for name in AREAS[1:]},
            "ar1": recall[:, 0, 0],
            "ar10": recall[:, 0, 1],
            "ar": recall[:, 0, 2],
            "recall50": recall[:, 0, 2, at[0.5]],
        }

        def of_group(members: np.ndarray) -> dict:
            means = {name: 100.0 * mean_of_known(value[members]) for name, value in values.items()}
            return means | {"n": int((self.num_gt[members] > 0).sum())}

        def of_class(k: int) -> dict:
            names = ("ap", "ap50", "recall50")
            row = {name: 100.0 * mean_of_known(values[name][k]) for name in names}
            number, found = int(self.num_gt[k]), values["recall50"][k]
            hits = round(float(found[0]) * number) if len(found) and number else 0
            row |= {"instances": number, "detections": int(self.detections[k])}
            return row | {"true_positives": hits if len(found) else -1}

        summary = self._summary(vocabulary, of_group, of_class, harmonic=METRICS)
        summary["thresholds"] = list(self.thresholds)
        return summary
