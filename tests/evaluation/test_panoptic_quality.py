"""PQ against the official numbers, an independent brute-force count, and hand-made cases."""

import json

import numpy as np
import pytest
from PIL import Image

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.counts import harmonic_mean
from concat_jax.evaluation.panoptic_quality import PanopticQuality
from tests.coco_maps import crowd_of, labels_of, panoptic_maps

UNSEEN = (21, 25, 33, 34, 41, 57, 87, 100, 145, 148, 149, 184, 187, 193)
TEAM = {0: 0, 47: 1, 97: 1, 133: 1, 150: 1, 174: 1, 198: 2, 215: 1, 244: 1, 255: 1}
BIRD = {92: 5, 176: 3, 255: 4}
CAT = {0: 0, 255: 6}
COLOURS = {
    (0, 0, 0): 0,
    (0, 0, 255): 1,
    (255, 0, 0): 2,
    (0, 255, 0): 3,
    (255, 0, 255): 4,
    (0, 255, 255): 5,
    (255, 255, 0): 6,
}


def make_vocabulary(num_classes, unseen=()):
    return Vocabulary(
        names=tuple(f"class {k}" for k in range(num_classes)),
        is_thing=tuple(k % 2 == 0 for k in range(num_classes)),
        is_seen=tuple(k not in unseen for k in range(num_classes)),
        category_ids=tuple(range(1, num_classes + 1)),
    )


def coco_vocabulary(annotation_file):
    categories = json.loads(annotation_file.read_text())["categories"]
    return Vocabulary(
        names=tuple(c["name"] for c in categories),
        is_thing=tuple(bool(c["isthing"]) for c in categories),
        is_seen=tuple(c["id"] not in UNSEEN for c in categories),
        category_ids=tuple(c["id"] for c in categories),
    )


@pytest.mark.parametrize("split", ["val2017", "train2017"])
def test_coco_panoptic_equals_the_official_evaluator(shared_data, split):
    expected = json.loads((shared_data / "panoptic_golden/expected.json").read_text())
    annotations = shared_data / f"coco_panoptic_mini/annotations/panoptic_{split}.json"
    vocabulary = coco_vocabulary(annotations)
    quality = {name: PanopticQuality(133) for name in ("identity", "roll_rows4_cols8")}
    for image, id_map in panoptic_maps(annotations):
        labels, crowd = labels_of(image, vocabulary), crowd_of(image)
        exact = np.where(
            np.isin(id_map, [i for i, is_crowd in crowd.items() if is_crowd]),
            0,
            id_map,
        )
        predictions = {"identity": exact, "roll_rows4_cols8": np.roll(exact, (4, 8), (0, 1))}
        for name, predicted in predictions.items():
            quality[name].update(id_map, labels, crowd, predicted, labels)
    for name, counts in quality.items():
        summary = counts.summarize(vocabulary)
        for group, numbers in expected["coco_panoptic_mini"][split][name].items():
            for key, value in numbers.items():
                assert summary[group.lower()][key] == pytest.approx(value, abs=1e-6), (name, group)


def pair_map(classes, instances):
    """Unique ids of (class, value) pairs, and their classes; class 0 is void."""
    ids = np.where(classes == 0, 0, classes * 256 + instances)
    return ids, {int(i): int(i) // 256 - 1 for i in np.unique(ids) if i}


def golden_case(folder, name, gt_file, class_of):
    values = np.asarray(Image.open(folder / gt_file).convert("L")).astype(int)
    gt = pair_map(np.vectorize(class_of.get)(values), values)
    rgb = np.asarray(Image.open(folder / f"{name}_pred_class.png").convert("RGB"))
    classes = np.zeros(rgb.shape[:2], int)
    for colour, index in COLOURS.items():
        classes[(rgb == colour).all(-1)] = index
    instances = np.asarray(Image.open(folder / f"{name}_pred_instance.png").convert("L"))
    return gt, pair_map(classes, instances.astype(int))


@pytest.mark.parametrize(
    ("case", "images", "num_classes"),
    [
        ("deeplab2_team", [("team", "team_gt_instance.png", TEAM)], 2),
        (
            "deeplab2_bird_cat_team",
            [
                ("bird", "bird_gt.png", BIRD),
                ("cat", "cat_gt.png", CAT),
                ("team", "team_gt_instance.png", TEAM),
            ],
            6,
        ),
    ],
)
def test_deeplab2_cases(shared_data, case, images, num_classes):
    folder = shared_data / "panoptic_golden"
    expected = json.loads((folder / "expected.json").read_text())[case]
    quality = PanopticQuality(num_classes)
    for name, gt_file, class_of in images:
        (gt_ids, gt_labels), (pred_ids, pred_labels) = golden_case(folder, name, gt_file, class_of)
        quality.update(gt_ids, gt_labels, None, pred_ids, pred_labels)
    summary = quality.summarize(make_vocabulary(num_classes))
    for key in ("pq", "sq", "rq"):
        assert summary["all"][key] / 100 == pytest.approx(expected[key], abs=1e-6)
    for key in ("tp", "fn", "fp"):
        assert getattr(quality, key).mean() == pytest.approx(expected[f"mean_{key}"], abs=1e-6)


def brute_force(num_classes, gt, gt_labels, crowd, pred, pred_labels):
    """The official rules, one pixel set at a time."""
    iou_sum, tp, fp, fn = (np.zeros(num_classes) for _ in range(4))
    void = {(y, x) for y, x in np.argwhere(gt == 0)}
    gt_sets = {i: {(y, x) for y, x in np.argwhere(gt == i)} for i in gt_labels}
    pred_sets = {i: {(y, x) for y, x in np.argwhere(pred == i)} for i in pred_labels}
    matched_gt, matched_pred = set(), set()
    for g, g_pixels in gt_sets.items():
        for p, p_pixels in pred_sets.items():
            if crowd[g] or gt_labels[g] != pred_labels[p] or not g_pixels & p_pixels:
                continue
            iou = len(g_pixels & p_pixels) / len((g_pixels | p_pixels) - (p_pixels & void))
            if iou > 0.5:
                tp[gt_labels[g]] += 1
                iou_sum[gt_labels[g]] += iou
                matched_gt.add(g)
                matched_pred.add(p)
    last_crowd = {}
    for g in gt_sets:
        if crowd[g]:
            last_crowd[gt_labels[g]] = g
        elif g not in matched_gt:
            fn[gt_labels[g]] += 1
    for p, p_pixels in pred_sets.items():
        if p in matched_pred or not p_pixels:
            continue
        free = set(void)
        if pred_labels[p] in last_crowd:
            free |= gt_sets[last_crowd[pred_labels[p]]]
        if len(p_pixels & free) <= 0.5 * len(p_pixels):
            fp[pred_labels[p]] += 1
    return iou_sum, tp, fp, fn


def random_map(rng, num_ids, void):
    """Rectangles of random ids over void or over the first id."""
    ids = np.zeros((20, 20), int) if void else np.ones((20, 20), int)
    for i in rng.permutation(num_ids) + 1:
        top, left = rng.integers(0, 14, 2)
        ids[top : top + rng.integers(3, 14), left : left + rng.integers(3, 14)] = i
    return ids


def test_random_maps_equal_the_brute_force_count():
    rng = np.random.default_rng(0)
    totals = np.zeros(4)
    for trial in range(300):
        gt = random_map(rng, 5, void=trial % 2)
        gt_labels = rng.integers(0, 3, 5)
        crowd = rng.random(5) < 0.3
        if trial % 3:  # a noisy copy, so that many pairs lie around IoU 0.5
            pred, pred_labels = np.roll(gt, rng.integers(0, 4, 2), (0, 1)), gt_labels.copy()
            pred[rng.random(pred.shape) < 0.1] = 0
            pred_labels[rng.integers(5)] = rng.integers(0, 3)
        else:
            pred, pred_labels = random_map(rng, 5, void=True), rng.integers(0, 3, 5)
        ids = range(1, 6)
        expected = brute_force(
            3,
            gt,
            dict(zip(ids, gt_labels, strict=True)),
            dict(zip(ids, crowd, strict=True)),
            pred,
            dict(zip(ids, pred_labels, strict=True)),
        )
        quality = PanopticQuality(3)
        quality.update(gt, gt_labels, crowd, pred, pred_labels)
        got = (quality.iou_sum, quality.tp, quality.fp, quality.fn)
        np.testing.assert_allclose(got, expected, atol=1e-12, err_msg=f"trial {trial}")
        np.testing.assert_array_equal(np.diagonal(quality.named), quality.tp)
        np.testing.assert_array_equal(quality.named.sum(axis=1), quality.tp + quality.fn)
        totals += np.sum(got, axis=1)
    assert (totals[1:] > 100).all(), f"the random maps exercise too little: {totals}"


def update_one(gt, gt_labels, crowd, pred, pred_labels, num_classes=2):
    quality = PanopticQuality(num_classes)
    quality.update(np.array([gt]), gt_labels, crowd, np.array([pred]), pred_labels)
    return quality


def test_iou_of_exactly_one_half_is_no_match():
    quality = update_one([1, 1, 2, 2], [0, 1], None, [1, 0, 2, 2], [0, 1])
    assert quality.tp.tolist() == [0, 1]
    assert quality.fp.tolist() == [1, 0]
    assert quality.fn.tolist() == [1, 0]


def test_void_is_taken_out_of_the_union():
    # 3 of 3 pixels hit, the two on void do not count.
    quality = update_one([1, 1, 1, 0, 0], [0], None, [1, 1, 1, 1, 1], [0])
    assert quality.iou_sum[0] == 1.0


def test_prediction_half_on_void_counts_and_more_than_half_does_not():
    half = update_one([0, 0, 2, 2], [-1, 1], None, [1, 1, 1, 1], [0])
    more = update_one([0, 0, 0, 2], [-1, 1], None, [1, 1, 1, 1], [0])
    assert half.fp[0] == 1
    assert more.fp[0] == 0


def test_crowd_is_never_missed_and_excuses_its_own_class_only():
    same = update_one([1, 1, 1, 2], [0, 1], [True, False], [1, 1, 1, 0], [0])
    other = update_one([1, 1, 1, 2], [0, 1], [True, False], [1, 1, 1, 0], [1])
    assert (same.fp[0], same.fn[0], same.tp[0]) == (0, 0, 0)
    assert other.fp[1] == 1


def test_of_two_crowds_of_a_class_the_last_listed_counts():
    crowd = {7: True, 9: True}
    first_hit = update_one([7, 7, 7, 9], {7: 0, 9: 0}, crowd, [1, 1, 1, 0], [0])
    last_hit = update_one([7, 7, 7, 9], {9: 0, 7: 0}, crowd, [1, 1, 1, 0], [0])
    assert first_hit.fp[0] == 1
    assert last_hit.fp[0] == 0


def test_listed_ground_truth_without_pixels_is_missed_and_empty_prediction_is_nothing():
    quality = update_one([1, 1], [0, 1], None, [1, 1], [0, 1])
    assert quality.fn.tolist() == [0, 1]
    assert quality.fp.tolist() == [0, 0]


def test_what_seen_and_unseen_segments_are_named():
    """Four pixels a segment; of a cat, a sky (both seen), a cow and a fog (both unseen)."""
    cat, sky, cow, fog = range(4)
    pairs = [(cat, cat), (cat, cat), (cat, sky), (sky, cow), (sky, None)]
    pairs += [(cow, cow), (cow, fog), (fog, cat), (cow, sky), (cow, cat), (fog, None)]
    crowd = [False] * len(pairs) + [True, False]
    pairs += [(fog, sky), (sky, sky)]  # a crowd, and half a sky, an IoU of one half
    labels, names = zip(*pairs, strict=True)
    gt = np.repeat(np.arange(1, 14), 4)
    pred = np.where(np.isin(gt, [5, 11]), 0, gt)
    pred[-2:] = 0
    quality = update_one(gt, labels, crowd, pred, [-1 if k is None else k for k in names], 4)
    expected = {
        "seen": {"right": 2, "other_seen": 1, "other_unseen": 1, "unmatched": 2},
        "unseen": {"right": 1, "other_seen": 3, "other_unseen": 1, "unmatched": 1},
    }
    assert quality.summarize(make_vocabulary(4, unseen=(cow, fog)))["confusion"] == expected
    assert "confusion" not in quality.summarize(make_vocabulary(4))
    quality.merge(quality)
    twice = quality.summarize(make_vocabulary(4, unseen=(cow, fog)))["confusion"]
    assert twice["unseen"]["other_seen"] == 6


@pytest.mark.parametrize(
    ("gt", "labels", "crowd", "pred"),
    [
        ([0, 0, 0], [], None, [0, 0, 0]),
        ([0, 0, 0], [], None, [1, 1, 1]),
        ([1, 1, 1], [0], [True], [1, 1, 1]),
        ([1, 1, 1], [0], [True], [0, 0, 0]),
    ],
)
def test_all_void_and_all_crowd_give_no_counts(gt, labels, crowd, pred):
    quality = update_one(gt, labels, crowd, pred, [0], num_classes=1)
    assert quality.tp[0] == quality.fp[0] == quality.fn[0] == 0
    summary = quality.summarize(make_vocabulary(1))
    assert summary["all"]["n"] == 0
    assert np.isnan(summary["all"]["pq"])


def test_summary_by_hand():
    quality = PanopticQuality(4)
    quality.iou_sum[:] = [1.6, 0.0, 0.9, 0.0]
    quality.tp[:] = [2, 0, 1, 0]
    quality.fp[:] = [1, 0, 0, 0]
    quality.fn[:] = [1, 2, 0, 0]
    summary = quality.summarize(make_vocabulary(4, unseen=(1, 2)))
    seen, unseen = summary["seen"], summary["unseen"]
    assert seen["pq"] == pytest.approx(100 * 1.6 / 3)
    assert (seen["n"], unseen["n"], summary["all"]["n"]) == (1, 2, 3)
    assert unseen["pq"] == pytest.approx(45)
    assert unseen["sq"] == pytest.approx(45)  # the class without a match pulls it down
    assert unseen["sq_matched"] == pytest.approx(90)
    assert unseen["rq"] == pytest.approx(50)
    assert summary["harmonic"]["pq"] == pytest.approx(2 * 45 * 160 / 3 / (45 + 160 / 3))
    assert summary["stuff"]["n"] == 1
    rows = summary["per_class"]
    assert [row["tp"] for row in rows] == [2, 0, 1, 0]
    assert rows[1]["pq"] == 0.0
    assert np.isnan(rows[3]["pq"])


def test_harmonic_mean():
    assert harmonic_mean(37.7, 14.4) == pytest.approx(20.84, abs=0.01)
    assert harmonic_mean(0.0, 0.0) == 0.0
    assert np.isnan(harmonic_mean(50.0, float("nan")))


def test_merge_equals_one_accumulator():
    rng = np.random.default_rng(1)
    whole, parts = PanopticQuality(3), [PanopticQuality(3), PanopticQuality(3)]
    for index in range(6):
        arguments = (
            random_map(rng, 4, True),
            rng.integers(0, 3, 4),
            None,
            random_map(rng, 4, True),
            rng.integers(0, 3, 4),
        )
        whole.update(*arguments)
        parts[index % 2].update(*arguments)
    parts[0].merge(parts[1])
    for name in ("iou_sum", "tp", "fp", "fn"):
        np.testing.assert_allclose(getattr(parts[0], name), getattr(whole, name))


@pytest.mark.parametrize(
    ("gt", "labels", "pred", "pred_labels", "message"),
    [
        ([[1, 2]], [0], [[0, 0]], [], "does not list"),
        ([[1, 1]], [0], [[5, 5]], [0], "prediction map holds the segment id 5"),
        ([[1, 1]], [2], [[0, 0]], [], "class index 2"),
        ([[1, 1]], [0], [[0, 0, 0]], [], "differ in size"),
        ([[1.0, 1.0]], [0], [[0, 0]], [], "must be integers"),
        ([[-1, 1]], [0], [[0, 0]], [], "must lie in"),
        ([[1, 1]], {0: 1}, [[0, 0]], [], "0 is void"),
        ([[1, 1]], [[0]], [[0, 0]], [], "one-dimensional"),
    ],
)
def test_bad_input_is_refused(gt, labels, pred, pred_labels, message):
    with pytest.raises(ValueError, match=message):
        PanopticQuality(2).update(np.array(gt), labels, None, np.array(pred), pred_labels)


def test_vocabulary_of_another_size_is_refused():
    with pytest.raises(ValueError, match="3 classes but 2"):
        PanopticQuality(2).summarize(make_vocabulary(3))
