"""Average precision of instance masks as COCO counts it, for seen and unseen classes.

The rules are those of pycocotools `COCOeval` with iouType "segm": within an image and a class at
most 100 detections, by descending score; each takes the free ground truth of largest IoU, an
ignored one (crowd, or outside the range of areas) only where no other fits; what is ignored counts
neither way; precision is read at 101 recalls. Masks are compared by their runs, so nothing is
decoded into pixels, and of an image only scores and outcomes of the detections stay.

The zero-shot protocol of ZSI (48/17 and 65/15) is the same with `ZSI_THRESHOLDS`, and quotes AP and
recall at IoU 0.5 and 100 detections: "ap50" and "recall50" here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import numpy as np

from concat_jax.core.run_lengths import MaskRuns, mask_runs
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.counts import ClassCounts, mean_of_known

COCO_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())
ZSI_THRESHOLDS = (0.4, 0.5, 0.6)
# Pixels from and to, both included.
AREA_RANGES = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
# Detections of an image and a class: AR is given at each, the last is the limit of AP.
MAX_DETECTIONS = (1, 10, 100)
RECALLS = np.linspace(0.0, 1.0, 101)
METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar", "recall50")

# What a detection is, at one threshold and range of areas.
_FALSE, _TRUE, _IGNORED = 0, 1, 2


@dataclasses.dataclass(frozen=True, slots=True)
class _Detections:
    """What stays of the D detections of one image.

    Attributes:
      labels: [D] int16 or int32 class indices.
      scores: [D] float64.
      ranks: [D] uint16, place among the detections of its class in this image, from 0.
      outcomes: [D, A, T] int8 at A ranges of areas and T thresholds.
    """

    labels: np.ndarray
    scores: np.ndarray
    ranks: np.ndarray
    outcomes: np.ndarray


_FIELDS = dataclasses.fields(_Detections)


class AveragePrecision(ClassCounts):
    """Accumulates detections image by image; memory is some 60 bytes a detection.

    Attributes:
      num_gt: [K, A] int64, ground truth that counts, by class and range of areas.
    """

    _SUMS = ("num_gt",)

    def __init__(self, num_classes: int, *, thresholds: Sequence[float] = COCO_THRESHOLDS):
        """Starts empty for K = `num_classes` classes.

        Args:
          num_classes: K.
          thresholds: IoUs from which a detection is true; AP is the mean over them.

        Raises:
          ValueError: if num_classes is not positive or a threshold is not in (0, 1].
        """
        super().__init__(num_classes)
        self.thresholds = tuple(float(t) for t in thresholds)
        if not self.thresholds or not all(0.0 < t <= 1.0 for t in self.thresholds):
            raise ValueError(f"IoU thresholds must lie in (0, 1], got {self.thresholds}.")
        self.num_gt = np.zeros((num_classes, len(AREA_RANGES)), np.int64)
        self._images: dict[int, _Detections] = {}

    @property
    def num_images(self) -> int:
        """How many images were added."""
        return len(self._images)

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
        gt_areas: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        """Adds one image; the order of images does not matter, ties are broken by their ids.

        Args:
          image_id: each once.
          gt_masks: G run-length codes {"size": [H, W], "counts"}, as `encode_rle` makes them.
          gt_labels: [G] class indices.
          gt_is_crowd: [G] flags; None means no crowd.
          masks: D run-length codes.
          labels: [D] class indices.
          scores: [D] floats, finite.
          gt_areas: [G] pixels; COCO's annotations bring their own. None measures the masks.

        Raises:
          ValueError: if lengths or sizes of masks differ, a label is outside the K classes, a
            score is not finite, or the image was added before.
        """
        if image_id in self._images:
            raise ValueError(f"The image {image_id} was added before; give every image once.")
        num_gt, num_found = len(gt_masks), len(masks)
        is_crowd = np.zeros(num_gt, bool) if gt_is_crowd is None else np.asarray(gt_is_crowd, bool)
        gt_labels = self._checked_labels(gt_labels, num_gt, image_id, "ground truth")
        labels = self._checked_labels(labels, num_found, image_id, "detections")
        scores = np.asarray(scores, np.float64).reshape(-1)
        if len(scores) != num_found or len(is_crowd) != num_gt:
            raise ValueError(
                f"Image {image_id} has {num_found} detections with {len(scores)} scores and "
                f"{num_gt} annotations with {len(is_crowd)} crowd flags; give one for each."
            )
        if not np.isfinite(scores).all():
            bad = scores[~np.isfinite(scores)][0]
            raise ValueError(f"Image {image_id} has a detection with the score {bad}.")
        sizes = {tuple(mask["size"]) for mask in (*gt_masks, *masks)}
        if len(sizes) > 1:
            raise ValueError(f"Image {image_id} has masks of several sizes: {sorted(sizes)}.")

        order, ranks = _best_of_each_class(labels, scores)
        labels, scores = labels[order], scores[order]
        gt_runs = [mask_runs(mask) for mask in gt_masks]
        runs = [mask_runs(masks[index]) for index in order]
        areas = np.array([run.area for run in runs], np.float64)
        if gt_areas is None:
            gt_areas = [run.area for run in gt_runs]
        low, high = np.array(list(AREA_RANGES.values())).T[..., None]  # [A, 1] each
        outside = (areas < low) | (areas > high)  # [A, D]
        gt_areas = np.asarray(gt_areas, np.float64)
        gt_ignored = is_crowd | (gt_areas < low) | (gt_areas > high)  # [A, G]

        unmatched = np.where(outside, _IGNORED, _FALSE).T[..., None]
        outcomes = np.repeat(unmatched.astype(np.int8), len(self.thresholds), axis=2)
        for label in np.unique(gt_labels):
            rows, columns = np.flatnonzero(labels == label), np.flatnonzero(gt_labels == label)
            self.num_gt[label] += (~gt_ignored[:, columns]).sum(axis=1)
            if len(rows):
                iou = mask_iou(
                    [runs[row] for row in rows],
                    [gt_runs[column] for column in columns],
                    is_crowd[columns],
                )
                found = _match(iou, self.thresholds, gt_ignored[:, columns], is_crowd[columns])
                outcomes[rows] = np.where(found == _FALSE, outcomes[rows], found)
        small = np.int16 if self.num_classes < 2**15 else np.int32
        self._images[image_id] = _Detections(labels.astype(small), scores, ranks, outcomes)

    def _checked_labels(self, labels, length: int, image_id: int, what: str) -> np.ndarray:
        labels = np.asarray(labels, np.int64).reshape(-1)
        if len(labels) != length:
            raise ValueError(
                f"Image {image_id}: {length} masks but {len(labels)} labels in the {what}."
            )
        if length and not 0 <= labels.min() <= labels.max() < self.num_classes:
            wrong = labels[(labels < 0) | (labels >= self.num_classes)][0]
            raise ValueError(
                f"Image {image_id}: the class index {wrong} in the {what} is outside the "
                f"{self.num_classes} classes of this accumulator."
            )
        return labels

    def merge(self, other: AveragePrecision) -> None:
        """Adds the images of another accumulator, for example of another host.

        Raises:
          ValueError: if classes or thresholds differ or both hold one image.
        """
        if other.thresholds != self.thresholds:
            raise ValueError(
                f"Cannot merge AP at {other.thresholds} into AP at {self.thresholds}; both runs "
                "must be of one kind."
            )
        both = self._images.keys() & other._images.keys()
        if both:
            raise ValueError(f"Both accumulators hold the image {min(both)}; give each once.")
        super().merge(other)
        self._images |= other._images

    def to_arrays(self) -> dict[str, np.ndarray]:
        images = self._images
        return {
            **super().to_arrays(),
            "image_ids": np.array(list(images), np.int64),
            "lengths": np.array([len(image.scores) for image in images.values()], np.int64),
            **self._concatenated(images.values()),
        }

    def restored(self, arrays: Mapping[str, np.ndarray]) -> Self:
        other = super().restored(arrays)
        ends = np.cumsum(arrays["lengths"])
        parts = [np.split(arrays[field.name], ends)[:-1] for field in _FIELDS]
        images = (_Detections(*image) for image in zip(*parts, strict=True))
        other._images = dict(zip(arrays["image_ids"].tolist(), images, strict=True))
        return other

    def _concatenated(self, images: Iterable[_Detections]) -> dict[str, np.ndarray]:
        empty = _Detections(
            *(np.zeros(0, dtype) for dtype in (np.int16, np.float64, np.uint16)),
            np.zeros((0, len(AREA_RANGES), len(self.thresholds)), np.int8),
        )
        images = (empty, *images)
        return {
            field.name: np.concatenate([getattr(image, field.name) for image in images])
            for field in _FIELDS
        }

    def _curves(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Precision summed up and recall of every class.

        Returns:
          ap [K, A, T], recall [K, A, M, T] in 0..1, NaN without ground truth; detections [K] and
          true positives [K, T] of all areas, int64.
        """
        sizes = self.num_classes, len(AREA_RANGES), len(self.thresholds)
        ap = np.full(sizes, np.nan)
        recall = np.full((*sizes[:2], len(MAX_DETECTIONS), sizes[2]), np.nan)
        detections = np.zeros(self.num_classes, np.int64)
        true_positives = np.zeros((self.num_classes, sizes[2]), np.int64)
        images = (self._images[image_id] for image_id in sorted(self._images))
        labels, scores, ranks, outcomes = self._concatenated(images).values()
        by_class = np.argsort(labels, kind="stable")
        bounds = np.searchsorted(labels[by_class], np.arange(self.num_classes + 1))
        for label in range(self.num_classes):
            rows = by_class[bounds[label] : bounds[label + 1]]
            rows = rows[np.argsort(-scores[rows], kind="stable")]
            detections[label] = len(rows)
            true_positives[label] = (outcomes[rows, 0] == _TRUE).sum(axis=0)
            for area, number in enumerate(self.num_gt[label]):
                if number:
                    true = outcomes[rows, area] == _TRUE
                    false = outcomes[rows, area] == _FALSE
                    ap[label, area] = _interpolated_precision(true, false, number)
                    for index, limit in enumerate(MAX_DETECTIONS):
                        hits = true[ranks[rows] < limit].sum(axis=0)
                        recall[label, area, index] = hits / number
        return ap, recall, detections, true_positives

    def summarize(self, vocabulary: Vocabulary) -> dict:
        """AP and recall in percent for all, seen and unseen classes and for every class.

        Args:
          vocabulary: the K classes, which says what is seen.

        Returns:
          {"all" | "seen" | "unseen": {"ap" (mean over thresholds), "ap50", "ap75", "ap_small",
          "ap_medium", "ap_large", "ar1", "ar10", "ar" (AR at 100 detections), "recall50": float,
          "n": classes with ground truth}, "harmonic": `METRICS` of seen and unseen, 2su / (s + u),
          "per_class": K dicts with "name", "is_thing", "is_seen", "ap", "ap50", "recall50",
          "instances" (ground truth that counts), "detections" and "true_positives" (at IoU 0.5;
          -1 if that is no threshold), "thresholds": the list}. A mean over no class is NaN, and so
          are quantities at an IoU that is no threshold. A class with ground truth and no detection
          has AP 0.

        Raises:
          ValueError: if the vocabulary has another number of classes.
        """
        ap, recall, detections, true_positives = self._curves()
        areas = list(AREA_RANGES)
        at = {
            iou: np.flatnonzero(np.isclose(self.thresholds, iou, rtol=0, atol=1e-9))
            for iou in (0.5, 0.75)
        }
        values = {
            "ap": ap[:, 0],
            "ap50": ap[:, 0, at[0.5]],
            "ap75": ap[:, 0, at[0.75]],
            **{f"ap_{name}": ap[:, areas.index(name)] for name in ("small", "medium", "large")},
            "ar1": recall[:, 0, 0],
            "ar10": recall[:, 0, 1],
            "ar": recall[:, 0, 2],
            "recall50": recall[:, 0, 2, at[0.5]],
        }

        def of_group(members: np.ndarray) -> dict:
            means = {name: 100.0 * mean_of_known(value[members]) for name, value in values.items()}
            return means | {"n": int((self.num_gt[members, 0] > 0).sum())}

        def of_class(k: int) -> dict:
            return {
                **{
                    name: 100.0 * mean_of_known(values[name][k])
                    for name in ("ap", "ap50", "recall50")
                },
                "instances": int(self.num_gt[k, 0]),
                "detections": int(detections[k]),
                "true_positives": int(true_positives[k, at[0.5][0]]) if len(at[0.5]) else -1,
            }

        summary = self._summary(vocabulary, of_group, of_class, harmonic=METRICS)
        summary["thresholds"] = list(self.thresholds)
        return summary


def mask_iou(
    masks: Sequence[MaskRuns], gt_masks: Sequence[MaskRuns], gt_is_crowd: np.ndarray
) -> np.ndarray:
    """Intersection over union of D masks with G of one image; over the mask's own area for a crowd.

    Args:
      masks: D detections.
      gt_masks: G annotations.
      gt_is_crowd: [G] bool.

    Returns:
      [D, G] float64, 0 where both are empty.
    """
    starts = np.concatenate([run.starts for run in masks])
    ends = np.concatenate([run.ends for run in masks])
    # Sums over the runs of each mask; reduceat cannot add up none, so empty masks stay out.
    sizes = np.array([len(run.starts) for run in masks])
    filled = np.flatnonzero(sizes)
    offsets = np.concatenate([[0], np.cumsum(sizes[filled])])[:-1]
    areas = np.array([run.area for run in masks], np.int64)
    iou = np.zeros((len(masks), len(gt_masks)))
    for column, gt in enumerate(gt_masks):
        if not len(gt.starts) or not len(filled):
            continue
        inside = gt.pixels_before(ends) - gt.pixels_before(starts)
        inter = np.zeros(len(masks), np.int64)
        inter[filled] = np.add.reduceat(inside, offsets)
        union = areas if gt_is_crowd[column] else areas + gt.area - inter
        np.divide(inter, union, out=iou[:, column], where=inter > 0)
    return iou


def _best_of_each_class(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Detections that take part, by descending score, and their ranks within their class."""
    order = np.argsort(-scores, kind="stable")
    ranks = np.zeros(len(order), np.uint16)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels[order] == label)
        ranks[rows] = np.minimum(np.arange(len(rows)), MAX_DETECTIONS[-1])
    kept = ranks < MAX_DETECTIONS[-1]
    return order[kept], ranks[kept]


def _match(
    iou: np.ndarray, thresholds: Sequence[float], gt_ignored: np.ndarray, is_crowd: np.ndarray
) -> np.ndarray:
    """Outcomes [D, A, T] of detections by descending score; _FALSE where nothing fits.

    Args:
      iou: [D, G].
      thresholds: T.
      gt_ignored: [A, G] bool, also those outside the range of areas.
      is_crowd: [G] bool; a crowd can be taken again and again.
    """
    # COCOeval lets an IoU of 1 pass the threshold 1 in spite of rounding.
    limits = np.minimum(thresholds, 1 - 1e-10)[:, None]
    shape = len(gt_ignored), len(limits), iou.shape[1]
    free = np.ones(shape, bool)
    outcomes = np.full((len(iou), *shape[:2]), _FALSE, np.int8)
    for row in np.flatnonzero((iou >= limits.min()).any(axis=1)):
        fits = free & (iou[row] >= limits)
        wanted = fits & ~gt_ignored[:, None]
        pool = np.where(wanted.any(axis=2, keepdims=True), wanted, fits)
        # Of equal IoUs the last one listed is taken, as there.
        best = shape[2] - 1 - np.where(pool, iou[row], -1.0)[..., ::-1].argmax(axis=2)
        found = pool.any(axis=2)
        areas, levels = np.nonzero(found)
        taken = best[areas, levels]
        outcomes[row, areas, levels] = np.where(gt_ignored[areas, taken], _IGNORED, _TRUE)
        free[areas, levels, taken] = is_crowd[taken]
    return outcomes


def _interpolated_precision(true: np.ndarray, false: np.ndarray, num_gt: int) -> np.ndarray:
    """Mean precision [T] over `RECALLS`, from outcomes [D, T] by descending score.

    At each recall it is the best precision at that recall or a higher one, 0 beyond the last.
    """
    hits = true.cumsum(axis=0)
    precision = hits / (hits + false.cumsum(axis=0) + np.spacing(1))
    precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    means = np.zeros(true.shape[1])
    for level in range(true.shape[1]):
        places = np.searchsorted(hits[:, level] / num_gt, RECALLS, side="left")
        means[level] = precision[places[places < len(hits)], level].sum() / len(RECALLS)
    return means
