"""Mask AP against pycocotools on random and degenerate inputs, and by hand."""

import contextlib
import io

import numpy as np
import pytest

from concat_jax.core.mask_codes import encode_rle
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.average_precision import (
    COCO_THRESHOLDS,
    ZSI_THRESHOLDS,
    AveragePrecision,
)

NUM_CLASSES = 3
STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar")


def make_vocabulary(unseen=()):
    return Vocabulary(
        names=tuple(f"class {k}" for k in range(NUM_CLASSES)),
        is_thing=(True,) * NUM_CLASSES,
        is_seen=tuple(k not in unseen for k in range(NUM_CLASSES)),
        category_ids=tuple(range(1, NUM_CLASSES + 1)),
    )


def box_mask(rng, side=120):
    """A box of any size, so that every range of areas has some."""
    mask = np.zeros((side, side + 10), bool)
    size = rng.choice([10, 40, 110])
    top, left = rng.integers(0, side - 8, 2)
    height, width = rng.integers(4, size, 2)
    mask[top : top + height, left : left + width] = True
    return mask


def random_image(rng, case):
    """Annotations (mask, label, crowd) and detections (mask, label, score) of one image."""
    gt = [
        (box_mask(rng), int(rng.integers(NUM_CLASSES)), bool(rng.random() < 0.2)) for _ in range(5)
    ]
    found = []
    for mask, label, _ in gt:
        for _ in range(3):  # copies that are shifted, so that IoUs lie around the thresholds
            shift = tuple(rng.integers(-3, 4, 2))
            other = label if rng.random() < 0.8 else int(rng.integers(NUM_CLASSES))
            found.append((np.roll(mask, shift, (0, 1)), other, float(rng.random())))
    found += [(box_mask(rng), int(rng.integers(NUM_CLASSES)), float(rng.random()))]
    if case == "no prediction":
        found = []
    if case == "all crowd":
        gt = [(mask, label, True) for mask, label, _ in gt]
    if case == "no ground truth of a class":
        gt = [one for one in gt if one[1] != 1]
    if case == "equal scores":
        found = [(mask, label, round(score, 1) // 0.4) for mask, label, score in found]
    if case == "one giant mask":
        gt = [(np.ones_like(gt[0][0]), 0, False)]
        found = [(np.ones_like(gt[0][0]), 0, 0.5), *found]
    if case == "equal masks":
        gt = [*gt, *gt]
        found = [(mask, label, 0.5) for mask, label, _ in gt] + found
    if case == "empty masks":
        gt = [(np.zeros_like(gt[0][0]), 0, False), *gt]
        found = [(np.zeros_like(gt[0][0]), 0, 0.9), *found]
    if case == "more than a hundred":
        found = [(box_mask(rng), 0, float(rng.random())) for _ in range(130)] + found
    return gt, found


def reference(images, thresholds):
    """Stats, and per class AP and recall at IoU 0.5, of pycocotools."""
    coco_module = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    gt_list, results = [], []
    for image_id, (gt, found) in images.items():
        for mask, label, crowd in gt:
            entry = {"id": len(gt_list) + 1, "image_id": image_id, "category_id": label + 1}
            entry |= {"iscrowd": int(crowd), "area": float(mask.sum()), "bbox": [0, 0, 1, 1]}
            gt_list.append(entry | {"segmentation": encode_rle(mask)})
        for mask, label, score in found:
            entry = {"image_id": image_id, "category_id": label + 1, "score": score}
            results.append(entry | {"segmentation": encode_rle(mask)})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = coco_module.COCO()
        coco.dataset = {
            "images": [{"id": i, "height": 120, "width": 130} for i in images],
            "annotations": gt_list,
            "categories": [{"id": k + 1, "name": str(k)} for k in range(NUM_CLASSES)],
        }
        coco.createIndex()
        detected = coco.loadRes(results) if results else coco_module.COCO()
        evaluator = COCOeval(coco, detected, "segm")
        evaluator.params.iouThrs = np.array(thresholds)
        evaluator.evaluate()
        evaluator.accumulate()
        if thresholds == COCO_THRESHOLDS:
            evaluator.summarize()
    return evaluator


def ours(images, thresholds=COCO_THRESHOLDS):
    precision = AveragePrecision(NUM_CLASSES, thresholds=thresholds)
    for image_id, (gt, found) in images.items():
        precision.update(
            image_id,
            [encode_rle(mask) for mask, _, _ in gt],
            [label for _, label, _ in gt],
            [crowd for _, _, crowd in gt],
            [encode_rle(mask) for mask, _, _ in found],
            [label for _, label, _ in found],
            [score for _, _, score in found],
        )
    return precision


CASES = [
    "plain",
    "no prediction",
    "all crowd",
    "no ground truth of a class",
    "equal scores",
    "one giant mask",
    "equal masks",
    "empty masks",
    "more than a hundred",
]


@pytest.mark.parametrize("case", CASES)
def test_equals_pycocotools(case):
    rng = np.random.default_rng(CASES.index(case))
    # Ids out of order: ties between images go by id.
    images = {int(i): random_image(rng, case) for i in rng.permutation(8) + 1}
    summary = ours(images).summarize(make_vocabulary(unseen=(1,)))
    evaluator = reference(images, COCO_THRESHOLDS)
    for name, value in zip(STATS, evaluator.stats, strict=False):
        expected = np.nan if value == -1 else 100 * value
        assert summary["all"][name] == pytest.approx(expected, abs=1e-6, nan_ok=True), name
    per_class = evaluator.eval["precision"][:, :, :, 0, -1]  # [T, R, K]
    for k, row in enumerate(summary["per_class"]):
        values = per_class[:, :, k]
        expected = np.nan if (values == -1).all() else 100 * values.mean()
        assert row["ap"] == pytest.approx(expected, abs=1e-6, nan_ok=True), k


@pytest.mark.parametrize("case", ["plain", "equal scores", "no prediction"])
def test_zero_shot_protocol_equals_pycocotools_at_its_thresholds(case):
    rng = np.random.default_rng(7)
    images = {i: random_image(rng, case) for i in range(1, 7)}
    summary = ours(images, ZSI_THRESHOLDS).summarize(make_vocabulary(unseen=(1,)))
    evaluator = reference(images, ZSI_THRESHOLDS)
    ap50 = evaluator.eval["precision"][1, :, :, 0, -1].mean(axis=0)  # [K] at IoU 0.5
    recall50 = evaluator.eval["recall"][1, :, 0, -1]
    for group, rows in (("seen", [0, 2]), ("unseen", [1])):
        assert summary[group]["ap50"] == pytest.approx(100 * ap50[rows].mean(), abs=1e-6)
        assert summary[group]["recall50"] == pytest.approx(100 * recall50[rows].mean(), abs=1e-6)
    assert np.isnan(summary["all"]["ap75"])
    s, u = summary["seen"]["ap50"], summary["unseen"]["ap50"]
    if s + u:
        assert summary["harmonic"]["ap50"] == pytest.approx(2 * s * u / (s + u))


def test_one_class_by_hand():
    first, second = np.zeros((2, 10, 10), bool)
    first[:5, :5] = True
    second[6:, 6:] = True
    found = [(second, 0, 0.9), (first[::-1], 0, 0.8), (first, 0, 0.7)]  # right, wrong, right
    precision = ours({3: ([(first, 0, False), (second, 0, False)], found)})
    summary = precision.summarize(make_vocabulary())
    # Precision 1 up to recall 1/2 (51 of 101 recalls), then 2/3.
    assert summary["all"]["ap"] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)
    assert summary["all"]["ar1"] == pytest.approx(50)
    row = summary["per_class"][0]
    assert (row["instances"], row["detections"], row["true_positives"]) == (2, 3, 2)
    assert np.isnan(summary["unseen"]["ap"])


def test_merge_equals_one_accumulator_in_any_order():
    rng = np.random.default_rng(3)
    images = {i: random_image(rng, "equal scores") for i in range(6)}
    whole = ours(images)
    odd = ours({i: images[i] for i in (5, 1, 3)})
    odd.merge(ours({i: images[i] for i in (4, 0, 2)}))
    vocabulary = make_vocabulary(unseen=(2,))
    np.testing.assert_equal(odd.summarize(vocabulary), whole.summarize(vocabulary))
    with pytest.raises(ValueError, match="both hold|hold the image 0"):
        odd.merge(ours({0: images[0]}))


MASK = encode_rle(np.ones((2, 2), bool))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([MASK], [0], None, [MASK], [0], [np.nan]), "score nan"),
        (([MASK], [0], None, [encode_rle(np.ones((3, 2), bool))], [0], [1.0]), "several sizes"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AveragePrecision(NUM_CLASSES).update(1, *arguments)


def test_an_image_twice_is_refused():
    precision = AveragePrecision(NUM_CLASSES)
    precision.update(1, [], [], None, [], [], [])
    with pytest.raises(ValueError, match="added before"):
        precision.update(1, [], [], None, [], [], [])
    with pytest.raises(ValueError, match="thresholds"):
        AveragePrecision(NUM_CLASSES, thresholds=())
