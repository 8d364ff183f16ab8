"""The curve of seen against unseen accuracy, against a sweep by brute force."""

import numpy as np
import pytest

from concat_jax.evaluation.bias_curve import (
    accuracy_curve,
    curve_area,
    name_queries,
    naming_curve,
)
from concat_jax.evaluation.counts import harmonic_mean

IS_SEEN = np.array([True, False, True, True, False])


@pytest.fixture(scope="module")
def queries():
    """Log probabilities [60, 5] that know a little of their labels, and seen names too much."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 60)
    logits = rng.normal(size=(60, 5)) + 1.2 * np.eye(5)[labels] + 1.5 * IS_SEEN
    return logits, labels


def named(logits, labels):
    return name_queries(logits, labels, IS_SEEN, np.arange(len(labels)))


def accuracies(logits, labels, bias):
    """Seen and unseen accuracy, percent, means over classes, at one bias."""
    right = np.argmax(logits - bias * IS_SEEN, axis=1) == labels
    of_class = np.array([right[labels == k].mean() for k in range(5)])
    return 100 * of_class[IS_SEEN].mean(), 100 * of_class[~IS_SEEN].mean()


def test_curve_is_a_sweep(queries):
    found = naming_curve(named(*queries), IS_SEEN)
    logits = queries[0]
    gaps = np.sort(logits[:, IS_SEEN].max(axis=1) - logits[:, ~IS_SEEN].max(axis=1))
    biases = np.concatenate([[-50], (gaps[1:] + gaps[:-1]) / 2, [50]])  # between all steps
    points = np.array([accuracies(*queries, bias) for bias in biases])
    assert found.area == pytest.approx(curve_area(*points.T), abs=1e-9)
    seen, unseen = points.T
    assert found.among_seen == pytest.approx(seen[0]) == accuracies(*queries, -50.0)[0]
    assert found.among_unseen == pytest.approx(unseen[-1])
    assert (found.seen, found.unseen) == pytest.approx(accuracies(*queries, 0.0))


def test_a_bias_changes_no_area(queries):
    """What the harmonic mean at one bias measures and the area does not."""
    logits, labels = queries
    plain, biased = (naming_curve(named(logits + b * IS_SEEN, labels), IS_SEEN) for b in (0.0, 2.0))
    assert biased[:3] == pytest.approx(plain[:3])
    harmonic = [harmonic_mean(*accuracies(logits + b * IS_SEEN, labels, 0.0)) for b in (0.0, 2.0)]
    assert harmonic[1] < harmonic[0] - 5


def test_queries_of_one_gap_change_sides_together():
    """Equal queries make one step: an order among them would invent points of the curve."""
    logits = np.zeros((4, 5))
    labels = np.array([0, 0, 1, 1])
    logits[np.arange(4), labels] = 1.0
    logits[:2, 1] = logits[2:, 0] = 1.0  # every query is as near to the seen as to the unseen name
    seen, unseen = accuracy_curve(named(logits, labels), IS_SEEN, np.ones(4))
    assert seen.tolist() == [100.0, 0.0]
    assert unseen.tolist() == [0.0, 100.0]


def test_weights_are_repeats(queries):
    """A bootstrap weighs queries instead of repeating them."""
    logits, labels = queries
    repeats = np.random.default_rng(3).integers(0, 3, (4, len(labels)))
    seen, unseen = accuracy_curve(named(logits, labels), IS_SEEN, repeats.astype(float))
    for row, times in enumerate(repeats):
        repeated = np.repeat(np.arange(len(labels)), times)
        expected = naming_curve(named(logits[repeated], labels[repeated]), IS_SEEN)
        assert curve_area(seen[row], unseen[row]) == pytest.approx(expected.area)


@pytest.mark.parametrize("side", [0, 1])
def test_a_draw_without_a_query_of_one_side_has_no_score(queries, side):
    logits, labels = queries
    weights = np.stack([np.ones(len(labels)), IS_SEEN[labels] == bool(side)]).astype(float)
    curves = accuracy_curve(named(logits, labels), IS_SEEN, weights)
    assert np.isfinite(np.array(curves)[:, 0]).all() and np.isnan(curve_area(*curves)[1])
    assert np.isnan(curves[side][1]).all() and np.isfinite(curves[1 - side][1]).all()


@pytest.mark.parametrize("labels", [[0, 2], [1, 4], []])
def test_one_side_alone_has_no_score(labels):
    names = named(np.zeros((len(labels), 5)), np.array(labels, int))
    assert np.isnan(naming_curve(names, IS_SEEN).area)
