"""Semantic metrics against scikit-learn, by hand, and at their edges."""

import numpy as np
import pytest

from concat_jax.evaluation.semantic_iou import SemanticIoU
from tests.evaluation.test_panoptic_quality import make_vocabulary


def random_maps(rng, num_classes, case):
    gt = rng.integers(0, num_classes, (13, 17))
    pred = np.where(rng.random(gt.shape) < 0.6, gt, rng.integers(0, num_classes, gt.shape))
    if case == "ignored pixels":
        gt = np.where(rng.random(gt.shape) < 0.3, -1, gt)
    if case == "absent classes":
        gt = np.minimum(gt, num_classes - 3)
        pred = np.minimum(pred, num_classes - 2)  # one is predicted only, one occurs nowhere
    if case == "one giant segment":
        gt[:] = 2
    if case == "nothing right":
        pred = (gt + 1) % num_classes
    return gt, pred


@pytest.mark.parametrize(
    "case", ["plain", "ignored pixels", "absent classes", "one giant segment", "nothing right"]
)
def test_equals_scikit_learn(case):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    num_classes = 7
    counts = SemanticIoU(num_classes)
    everything = []
    for _ in range(5):
        gt, pred = random_maps(rng, num_classes, case)
        counts.update(gt, pred)
        everything.append(np.stack([gt[gt >= 0], pred[gt >= 0]]))
    gt, pred = np.concatenate(everything, axis=1)
    classes = np.arange(num_classes)
    np.testing.assert_array_equal(
        counts.confusion, metrics.confusion_matrix(gt, pred, labels=classes)
    )
    occurs = np.isin(classes, np.concatenate([gt, pred]))
    shown = np.isin(classes, gt)
    iou = metrics.jaccard_score(gt, pred, labels=classes[occurs], average=None)
    summary = counts.summarize(make_vocabulary(num_classes, unseen=(1, 4)))
    got = np.array([row["iou"] for row in summary["per_class"]])
    np.testing.assert_allclose(got[occurs], 100 * iou, atol=1e-9)
    assert np.isnan(got[~occurs]).all()
    expected = {
        "miou": iou.mean(),
        "pixel_accuracy": metrics.accuracy_score(gt, pred),
        "mean_accuracy": metrics.recall_score(gt, pred, labels=classes[shown], average="macro"),
        "frequency_weighted_iou": metrics.jaccard_score(gt, pred, average="weighted"),
    }
    for name, value in expected.items():
        assert summary["all"][name] == pytest.approx(100 * value, abs=1e-6), name
    unseen = [iou[list(classes[occurs]).index(k)] for k in (1, 4) if occurs[k]]
    assert summary["unseen"]["miou"] == pytest.approx(100 * np.mean(unseen), abs=1e-6)


def test_summary_by_hand():
    counts = SemanticIoU(3)
    # Class 0: 4 pixels, 3 right. Class 1: 2 pixels, 1 right, 1 unnamed. Void: 2 pixels.
    gt = np.array([0, 0, 0, 0, 1, 1, -1, -1])
    pred = np.array([0, 0, 0, 1, 1, -1, 0, 1])
    counts.update(gt, pred)
    summary = counts.summarize(make_vocabulary(3, unseen=(1,)))
    assert summary["seen"]["miou"] == pytest.approx(75)
    assert summary["unseen"]["miou"] == pytest.approx(100 / 3)
    assert summary["harmonic"]["miou"] == pytest.approx(2 * 75 * 100 / 3 / (75 + 100 / 3))
    assert summary["all"]["pixel_accuracy"] == pytest.approx(100 * 4 / 6)
    assert summary["unseen"]["pixel_accuracy"] == pytest.approx(50)
    assert summary["all"]["mean_accuracy"] == pytest.approx((75 + 50) / 2)
    assert summary["all"]["frequency_weighted_iou"] == pytest.approx((75 * 4 + 100 / 3 * 2) / 6)
    assert (summary["all"]["n"], summary["ignored_pixels"]) == (2, 2)
    row = summary["per_class"][1]
    assert (row["annotated"], row["predicted"], row["correct"]) == (2, 2, 1)
    assert np.isnan(summary["per_class"][2]["iou"])


def test_void_everywhere_gives_no_number():
    counts = SemanticIoU(2)
    counts.update(np.full((2, 2), -1), np.zeros((2, 2), int))
    summary = counts.summarize(make_vocabulary(2))
    assert np.isnan(summary["all"]["miou"]) and summary["all"]["n"] == 0
    assert np.isnan(summary["unseen"]["pixel_accuracy"])


def test_predicting_nothing_misses_everything():
    counts = SemanticIoU(2)
    counts.update(np.zeros((2, 2), int), np.full((2, 2), -1))
    summary = counts.summarize(make_vocabulary(2))
    assert (summary["all"]["miou"], summary["all"]["pixel_accuracy"]) == (0.0, 0.0)


def test_merge_equals_one_accumulator():
    rng = np.random.default_rng(1)
    whole, parts = SemanticIoU(4), [SemanticIoU(4), SemanticIoU(4)]
    for index in range(4):
        maps = random_maps(rng, 4, "ignored pixels")
        whole.update(*maps)
        parts[index % 2].update(*maps)
    parts[0].merge(parts[1])
    np.testing.assert_array_equal(parts[0].confusion, whole.confusion)
    assert parts[0].ignored == whole.ignored > 0


@pytest.mark.parametrize(
    ("gt", "pred", "message"),
    [
        ([0, 1], [0], "differ in size"),
        ([0, 2], [0, 0], "holds the label 2"),
        ([0, 0], [0, -2], "prediction map holds the label -2"),
    ],
)
def test_bad_input_is_refused(gt, pred, message):
    with pytest.raises(ValueError, match=message):
        SemanticIoU(2).update(np.array(gt), np.array(pred))
