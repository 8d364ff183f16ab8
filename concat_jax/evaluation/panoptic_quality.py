"""Panoptic quality as the official panopticapi counts it, in numpy, for seen and unseen classes.

Two readings of the segmentation quality (SQ) are reported. panopticapi, and PADing after it, give
a class without a true positive an SQ of 0 and average it in, so that one unseen class never found
lowers the unseen SQ by its whole share: `sq`. The mean over classes with at least one true
positive, which measures mask quality alone, is `sq_matched`. Published numbers are `sq`.

Means run over classes that occur in the ground truth or the prediction. PADing's seen and unseen
rows also count absent classes, as 0; the two agree on all of val2017, where every class occurs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from concat_jax.core.arrays import Table, table_rows
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.counts import ClassCounts, mean_of_known

MAX_ID = 2**31 - 1
GROUPS = ("all", "things", "stuff", "seen", "unseen")
METRICS = ("pq", "sq", "rq", "sq_matched")


def _crowd_flags(is_crowd: Table | None, ids: np.ndarray) -> np.ndarray:
    if is_crowd is None:
        return np.zeros(len(ids), bool)
    if isinstance(is_crowd, Mapping):
        return np.array([bool(is_crowd.get(int(i), False)) for i in ids], bool)
    flags = np.asarray(is_crowd, bool)
    if len(ids) and ids.max() > len(flags):
        raise ValueError(
            f"gt_is_crowd has {len(flags)} rows but gt_labels holds the segment id {ids.max()}; "
            "give both the same form and length."
        )
    return flags[ids - 1]


def _rows_of(map_ids: np.ndarray, ids: np.ndarray, what: str) -> np.ndarray:
    """Position of each map id in (0, *ids); 0 stands for void."""
    if not np.issubdtype(map_ids.dtype, np.integer):
        raise ValueError(f"The {what} map has type {map_ids.dtype}; ids must be integers.")
    if map_ids.size and (map_ids.min() < 0 or map_ids.max() > MAX_ID):
        raise ValueError(
            f"The {what} map holds ids from {map_ids.min()} to {map_ids.max()}; they must lie in "
            f"0..{MAX_ID}."
        )
    known = np.concatenate([[0], ids])
    order = np.argsort(known, kind="stable")
    place = np.minimum(np.searchsorted(known, map_ids, sorter=order), len(known) - 1)
    rows = order[place]
    missing = map_ids[known[rows] != map_ids]
    if len(missing):
        raise ValueError(
            f"The {what} map holds the segment id {missing[0]}, which its label table does not "
            "list; every non-zero id needs a label."
        )
    return rows


def _runs(gt_ids: np.ndarray, pred_ids: np.ndarray) -> tuple[np.ndarray, ...]:
    """Runs of pixels, in reading order, of which both maps have one id: (gt id, pred id, length).

    A map of 300,000 pixels has a few thousand runs: what follows need not see every pixel. To sort
    the pixels' pairs of ids, as panopticapi does, is what its time goes to.
    """
    gt, pred = gt_ids.ravel(), pred_ids.ravel()
    changes = gt[1:] != gt[:-1]
    changes |= pred[1:] != pred[:-1]
    starts = np.flatnonzero(np.concatenate([np.ones(min(1, gt.size), bool), changes]))
    return gt[starts], pred[starts], np.diff(starts, append=gt.size)


def class_quality(counts: np.ndarray) -> dict[str, np.ndarray]:
    """PQ, SQ and RQ [..., K] in percent of counts [..., 4, K], in the order of `PanopticQuality`.

    NaN for a class that occurs nowhere.
    """
    iou_sum, tp, fp, fn = np.moveaxis(np.asarray(counts, np.float64), -2, 0)
    weight = tp + 0.5 * fp + 0.5 * fn
    occurs, found = weight > 0, tp > 0

    def ratio(numerator, denominator, where):
        absent = np.where(occurs, 0.0, np.nan)
        return 100.0 * np.divide(numerator, denominator, out=absent, where=where)

    return {
        "pq": ratio(iou_sum, weight, occurs),
        "sq": ratio(iou_sum, tp, found),
        "rq": ratio(tp, weight, occurs),
    }


def confusion(named: np.ndarray, is_seen: np.ndarray) -> dict[str, dict[str, int]]:
    """What segments of seen and of unseen classes are named, of `PanopticQuality.named`.

    {"seen" | "unseen": {"right", "other_seen", "other_unseen", "unmatched": ints}}.
    """
    rows = {}
    for group, members in (("seen", is_seen), ("unseen", ~is_seen)):
        right = int(np.diagonal(named)[members].sum())
        *by_class, unmatched = named[members].sum(axis=0).tolist()
        seen, unseen = (int(np.dot(by_class, side)) for side in (is_seen, ~is_seen))
        other = {"other_seen": seen, "other_unseen": unseen}
        other[f"other_{group}"] -= right
        rows[group] = {"right": right, **other, "unmatched": unmatched}
    return rows


class PanopticQuality(ClassCounts):
    """Accumulates matches over images; sums of several accumulators merge exactly.

    Attributes:
      iou_sum, tp, fp, fn: [K] float64, summed IoU of true positives and the three counts.
      named: [K, K + 1] int64, segments of each class by the class of the prediction that matches
        them when classes are left aside; K is none.
    """

    _SUMS = ("iou_sum", "tp", "fp", "fn", "named")

    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.iou_sum, self.tp, self.fp, self.fn = np.zeros((4, num_classes))
        self.named = np.zeros((num_classes, num_classes + 1), np.int64)

    @property
    def counts(self) -> np.ndarray:
        """[4, K]: iou_sum, tp, fp and fn."""
        return np.stack([self.iou_sum, self.tp, self.fp, self.fn])

    def update(
        self,
        gt_ids: np.ndarray,
        gt_labels: Table,
        gt_is_crowd: Table | None,
        pred_ids: np.ndarray,
        pred_labels: Table,
    ) -> None:
        """Adds one image's maps [H, W], 0 void; labels and crowd flags as of `table_rows`.

        As panopticapi (`pq_compute_single_core`): a pair matches when classes agree, the ground
        truth is no crowd and IoU > 0.5, where pixels of void ground truth are taken out of the
        union. An unmatched crowd is no false negative. An unmatched prediction of which more than
        half lies on void plus the crowd of its class is no false positive; of several crowds of one
        class only the last one listed counts, as there. Listed ground truth without a pixel is a
        false negative, as there. A listed prediction without a pixel is ignored (panopticapi
        refuses the file). Raises ValueError for maps that differ in shape, or ids without a valid
        label.
        """
        gt_ids, pred_ids = np.asarray(gt_ids), np.asarray(pred_ids)
        if gt_ids.shape != pred_ids.shape:
            raise ValueError(
                f"Ground truth {gt_ids.shape} and prediction {pred_ids.shape} differ in size; "
                "resize the prediction to the ground truth first."
            )
        gt_table_ids, gt_classes = table_rows(gt_labels)
        pred_table_ids, pred_classes = table_rows(pred_labels)
        for what, classes in (("ground truth", gt_classes), ("prediction", pred_classes)):
            if len(classes) and classes.max() >= self.num_classes:
                raise ValueError(
                    f"The {what} holds the class index {classes.max()}, outside the "
                    f"{self.num_classes} classes of this accumulator."
                )
        is_crowd = np.concatenate([[False], _crowd_flags(gt_is_crowd, gt_table_ids)])

        gt_runs, pred_runs, lengths = _runs(gt_ids, pred_ids)
        gt_rows = _rows_of(gt_runs, gt_table_ids, "ground truth")
        pred_rows = _rows_of(pred_runs, pred_table_ids, "prediction")
        shape = len(gt_table_ids) + 1, len(pred_table_ids) + 1
        # Sums of integers below 2^53 are exact in float64.
        inter = np.bincount(
            gt_rows * shape[1] + pred_rows, weights=lengths, minlength=shape[0] * shape[1]
        )
        inter = inter.astype(np.int64).reshape(shape)
        on_void, gt_area, pred_area = inter[0], inter.sum(axis=1), inter.sum(axis=0)
        gt_classes = np.concatenate([[-1], gt_classes])
        pred_classes = np.concatenate([[-2], pred_classes])  # void matches void nowhere

        union = gt_area[:, None] + pred_area - inter - on_void
        comparable = ~is_crowd[:, None] & (inter > 0)
        comparable[0] = comparable[:, 0] = False
        iou = np.divide(inter, union, out=np.zeros(inter.shape), where=comparable)
        held, holding = np.nonzero(iou > 0.5)
        names = np.full(len(gt_classes), self.num_classes)
        names[held] = pred_classes[holding]
        wanted = ~is_crowd
        wanted[0] = False
        np.add.at(self.named, (gt_classes[wanted], names[wanted]), 1)
        agree = gt_classes[held] == pred_classes[holding]
        matched_gt, matched_pred = held[agree], holding[agree]
        np.add.at(self.iou_sum, gt_classes[matched_gt], iou[matched_gt, matched_pred])
        np.add.at(self.tp, gt_classes[matched_gt], 1)

        wanted[matched_gt] = False
        np.add.at(self.fn, gt_classes[wanted], 1)

        crowd_of_class = np.full(self.num_classes, -1)
        for row in np.flatnonzero(is_crowd):  # the last one listed wins
            crowd_of_class[gt_classes[row]] = row
        false = pred_area > 0
        false[0] = False
        false[matched_pred] = False
        rows = np.flatnonzero(false)
        crowd = crowd_of_class[pred_classes[rows]]
        ignored = on_void[rows] + np.where(crowd >= 0, inter[crowd, rows], 0)
        rows = rows[ignored / pred_area[rows] <= 0.5]
        np.add.at(self.fp, pred_classes[rows], 1)

    def summarize(self, vocabulary: Vocabulary) -> dict:
        """PQ, SQ and RQ in percent for groups of classes and for every class.

        Returns:
          {"all" | "things" | "stuff" | "seen" | "unseen": {"pq", "sq", "rq", "sq_matched": float,
          "n": classes in the mean}, "harmonic": {"pq", "sq", "rq", "sq_matched"}: 2su / (s + u) of
          the seen and unseen aggregates, 0 when both are 0, "per_class": K dicts with "name",
          "is_thing", "is_seen", "pq", "sq", "rq" (percent), "tp", "fp", "fn" (ints)}; with
          "confusion", see there, if a class is unseen.
          A mean over no class, and the qualities of a class that occurs nowhere, are NaN.
        """
        quality = class_quality(self.counts)
        found, occurs = self.tp > 0, ~np.isnan(quality["pq"])

        def of_group(members: np.ndarray) -> dict:
            means = {name: mean_of_known(values[members]) for name, values in quality.items()}
            means["sq_matched"] = mean_of_known(quality["sq"][members & found])
            return means | {"n": int((members & occurs).sum())}

        def of_class(k: int) -> dict:
            counts = {name: int(getattr(self, name)[k]) for name in ("tp", "fp", "fn")}
            return {name: float(values[k]) for name, values in quality.items()} | counts

        groups = dict(groups=GROUPS, harmonic=METRICS)
        summary = self._summary(vocabulary, of_group, of_class, **groups)
        if not all(vocabulary.is_seen) and self.named.any():
            summary["confusion"] = confusion(self.named, np.asarray(vocabulary.is_seen))
        return summary
