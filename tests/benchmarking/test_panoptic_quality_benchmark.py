"""The benchmark of panoptic quality: its reference counts as ours, and its report says how fast."""

import dataclasses

import numpy as np

from concat_jax.benchmarking import panoptic_quality
from concat_jax.benchmarking.cases import Case
from concat_jax.benchmarking.harness import in_turns
from concat_jax.benchmarking.panoptic_quality import Pair, official_counts
from concat_jax.core.coco_writers import PanopticWriter
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.panoptic_quality import PanopticQuality

CASE = Case("panoptic_quality", 72, 96, num_images=3, segments=4)


def test_the_reference_counts_as_ours_on_random_maps():
    rng = np.random.default_rng(0)
    total = np.zeros(4)
    for trial in range(100):
        gt = rng.integers(0, 5, (6, 6)).repeat(4, 0).repeat(4, 1)
        pred = np.roll(gt, rng.integers(0, 4, 2), (0, 1))
        if trial % 2:
            pred[rng.random(pred.shape) < 0.1] = 0
        ids, areas = np.unique(gt[gt > 0], return_counts=True)
        labels = {int(i): int(rng.integers(3)) for i in ids}
        crowd = {i: bool(rng.random() < 0.3) for i in labels}
        found = {int(i): labels.get(int(i), 0) if trial % 3 else 1 for i in np.unique(pred) if i}
        segments = {
            int(i): {"label": labels[int(i)], "is_crowd": crowd[int(i)], "area": int(area)}
            for i, area in zip(ids, areas, strict=True)
        }
        counts = official_counts([Pair(gt, pred, segments, found)], 3)
        ours = PanopticQuality(3)
        ours.update(gt, labels, crowd, pred, found)
        np.testing.assert_allclose([ours.iou_sum, ours.tp, ours.fp, ours.fn], counts, atol=1e-12)
        total += counts.sum(axis=1)
    assert (total > 20).all()


def test_drawn_maps_are_measured_and_reported():
    results = in_turns(panoptic_quality.works(CASE), repeats=2)
    assert list(results) == ["official algorithm", "ours", "PNG decoding"]
    counts = results["ours"].outputs["counts"]
    assert counts[1].sum() > 0 and counts[2].sum() > 0
    text = panoptic_quality.table(CASE, results)
    assert CASE.name == "panoptic_quality of 3 pairs (drawn, 72x96)"
    assert "| official algorithm |" in text and "| PNG decoding |" in text
    (line,) = [line for line in text.splitlines() if line.startswith("Largest difference")]
    assert float(line.split(": ")[1].split(" ")[0].rstrip(".")) < 1e-9


def test_maps_of_a_json_are_measured(tmp_path):
    vocabulary = Vocabulary(("cat", "sky"), (True, False), (True, True), (17, 187))
    ids = np.ones((20, 30), int)
    ids[:, 9:] = 2
    with PanopticWriter(tmp_path, vocabulary, name="truth") as writer:
        for number in range(3):
            writer.add(number, f"{number}.jpg", ids, [{"id": 1, "label": 0}, {"id": 2, "label": 1}])
    case = dataclasses.replace(CASE, source=str(tmp_path / "truth.json"))
    works = panoptic_quality.works(case)
    official, ours = (works[name].call()["counts"] for name in ("official algorithm", "ours"))
    np.testing.assert_allclose(ours, official)
    assert official[1].sum() + official[3].sum() == 6
