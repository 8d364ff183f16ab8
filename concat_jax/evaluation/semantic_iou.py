"""Mean intersection over union of label maps, seen and unseen classes, from a confusion matrix.

The numbers are those of detectron2 detectron2/evaluation/sem_seg_evaluation.py and of the zero-shot
evaluator that ZegFormer and PADing made of it (`SemSegGzeroEvaluator`): means over classes of
counts that are summed over all images. Their predictions name a class everywhere; ours may also say
nothing, which is a miss of the pixel's class and no false alarm of another.
"""

from __future__ import annotations

import numpy as np

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.counts import ClassCounts, mean_of_known

METRICS = ("miou", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou")


class SemanticIoU(ClassCounts):
    """Accumulates a confusion matrix over images; memory is K x K whatever their number.

    Attributes:
      confusion: [K, K] int64, pixels by class of the ground truth (row) and prediction (column).
      unnamed: [K] int64, pixels of each class of the ground truth for which nothing is predicted.
      ignored: pixels of void ground truth, which count nowhere.
    """

    _SUMS = ("confusion", "unnamed", "ignored")

    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.confusion = np.zeros((num_classes, num_classes), np.int64)
        self.unnamed = np.zeros(num_classes, np.int64)
        self.ignored = 0

    def update(self, gt: np.ndarray, pred: np.ndarray) -> None:
        """Adds one image's maps [H, W] of class indices, or -1 for void.

        Raises ValueError on maps of different shapes, or a value that is neither a class nor void.
        """
        gt, pred = np.asarray(gt), np.asarray(pred)
        if gt.shape != pred.shape:
            raise ValueError(
                f"Ground truth {gt.shape} and prediction {pred.shape} differ in size; resize the "
                "prediction to the ground truth first."
            )
        side = self.num_classes + 1
        gt_rows, pred_rows = self._rows(gt, "ground truth"), self._rows(pred, "prediction")
        counts = np.bincount(gt_rows * side + pred_rows, minlength=side * side).reshape(side, side)
        self.confusion += counts[:-1, :-1]
        self.unnamed += counts[:-1, -1]
        self.ignored += int(counts[-1].sum())

    def _rows(self, labels: np.ndarray, what: str) -> np.ndarray:
        """Class indices, flat, with K for void."""
        labels = labels.ravel()
        wrong = labels[(labels < -1) | (labels >= self.num_classes)]
        if len(wrong):
            raise ValueError(
                f"The {what} map holds the label {wrong[0]}, which is neither void (-1) nor one "
                f"of the {self.num_classes} classes."
            )
        return np.where(labels < 0, self.num_classes, labels).astype(np.int64)

    def summarize(self, vocabulary: Vocabulary) -> dict:
        """The metrics in percent for all, seen and unseen classes and for every class.

        The IoU of a class that is predicted but never annotated is 0 and counts, as in detectron2
        and scikit-learn; a class that occurs in neither is NaN and left out. Accuracies run over
        annotated classes.

        Returns:
          {"all" | "seen" | "unseen": {"miou", "pixel_accuracy", "mean_accuracy" (of classes),
          "frequency_weighted_iou": float, "n": classes in the mean IoU}, "harmonic": the same
          without n, 2su / (s + u), of which "miou" is the field's hIoU, "per_class": K dicts with
          "name", "is_thing", "is_seen", "iou", "accuracy" (percent) and the pixel counts
          "annotated", "predicted" (on annotated pixels) and "correct", "ignored_pixels": int}.
          Pixel accuracy and weights of a group are over the annotated pixels of its classes.
        """
        correct = np.diagonal(self.confusion)
        annotated = self.confusion.sum(axis=1) + self.unnamed
        predicted = self.confusion.sum(axis=0)
        union = annotated + predicted - correct
        nothing = np.full(self.num_classes, np.nan)
        iou = 100.0 * np.divide(correct, union, out=nothing.copy(), where=union > 0)
        accuracy = 100.0 * np.divide(correct, annotated, out=nothing.copy(), where=annotated > 0)

        def of_group(members: np.ndarray) -> dict:
            shown = members & (annotated > 0)
            whole = annotated[shown].sum()
            return {
                "miou": mean_of_known(iou[members]),
                "pixel_accuracy": 100.0 * _share(correct[shown], whole),
                "mean_accuracy": mean_of_known(accuracy[members]),
                "frequency_weighted_iou": _share(iou[shown] * annotated[shown], whole),
                "n": int((members & (union > 0)).sum()),
            }

        pixels = {"annotated": annotated, "predicted": predicted, "correct": correct}

        def of_class(k: int) -> dict:
            counts = {name: int(values[k]) for name, values in pixels.items()}
            return {"iou": float(iou[k]), "accuracy": float(accuracy[k]), **counts}

        summary = self._summary(vocabulary, of_group, of_class, harmonic=METRICS)
        summary["ignored_pixels"] = int(self.ignored)
        return summary


def _share(values: np.ndarray, whole: int) -> float:
    """Sum over `whole`; NaN where that is 0."""
    return float(values.sum() / whole) if whole else float("nan")
