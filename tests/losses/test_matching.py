"""The matcher against scipy on random, padded and NaN-laden costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from concat_jax.losses import masks, matching


def total(cost, query_of_segment):
    columns = np.flatnonzero(query_of_segment >= 0)
    return cost[query_of_segment[columns], columns].sum(), len(columns)


@pytest.mark.parametrize(("queries", "segments"), [(8, 5), (6, 6), (4, 7), (1, 3), (30, 20)])
def test_cost_equals_scipy(queries, segments):
    rng = np.random.default_rng(queries)
    cost = rng.normal(size=(3, 2, queries, segments)).astype(np.float32) * 10
    valid = rng.uniform(size=(3, segments)) < 0.7
    valid[0] = True
    valid[1] = False
    matched = np.asarray(jax.jit(matching.match)(cost, valid))
    for b in range(3):
        columns = np.flatnonzero(valid[b])
        for l in range(2):
            rows, cols = linear_sum_assignment(cost[b, l][:, columns])
            expected = cost[b, l][rows, columns[cols]].sum()
            found, count = total(cost[b, l], matched[b, l])
            assert count == min(queries, len(columns))
            assert (matched[b, l][~valid[b]] == -1).all()
            taken = matched[b, l][matched[b, l] >= 0]
            assert len(set(taken)) == len(taken)
            np.testing.assert_allclose(found, expected, atol=1e-3)


def test_not_finite_costs_lose():
    rng = np.random.default_rng(1)
    cost = rng.normal(size=(1, 1, 6, 4)).astype(np.float32)
    broken = cost.copy()
    broken[0, 0, [0, 2]] = np.nan
    broken[0, 0, 4, 1] = np.inf
    broken[0, 0, 5, 0] = -np.inf
    matched = np.asarray(matching.match(broken, np.array([[True, True, True, True]])))[0, 0]
    worst = np.where(np.isfinite(broken), broken, 1e3)[0, 0]
    rows, cols = linear_sum_assignment(worst)
    np.testing.assert_allclose(total(worst, matched)[0], worst[rows, cols].sum(), rtol=1e-6)


def test_all_nan_gives_a_valid_assignment():
    matched = np.asarray(
        matching.match(np.full((1, 1, 5, 3), np.nan, np.float32), np.ones((1, 3), bool))
    )
    assert len(set(matched[0, 0])) == 3 and (matched >= 0).all()


def test_no_gradient_flows():
    def loss(cost):
        return matching.match(cost, jnp.ones((1, 2), bool)).astype(jnp.float32).sum()

    assert not np.asarray(jax.grad(loss)(jnp.ones((1, 1, 3, 2)))).any()


def test_matching_cost_by_hand():
    logits = jnp.log(jnp.array([[[[0.2, 0.7, 0.1]]]]))  # one query, two classes and no-object
    point_logits = jnp.zeros((1, 1, 1, 4))
    targets = jnp.array([[[[1.0, 1.0, 0.0, 0.0]]]])
    cost = matching.matching_cost(
        logits, point_logits, targets, jnp.array([[1]]),
        class_weight=2.0, mask_weight=5.0, dice_weight=5.0,
    )  # fmt: skip
    expected = 2 * -0.7 + 5 * np.log(2) + 5 * (1 - (2 * 1 + 1) / (2 + 2 + 1))
    np.testing.assert_allclose(cost, [[[[expected]]]], rtol=1e-6)
    assert masks.mask_dice(point_logits[0, 0], targets[0, 0])[0] == pytest.approx(0.4)


def test_labels_of_queries():
    query_of_segment = jnp.array([[[2, -1, 0]]])
    labels = jnp.array([[7, 5, 3]])
    result = matching.labels_of_queries(query_of_segment, labels, 4, no_object=9)
    np.testing.assert_array_equal(result, [[[3, 9, 7, 9]]])
