"""Scenic's matchers behind ours: least cost where they promise it, on whatever a cost may hold."""

import jax
import numpy as np
import pytest

from concat_jax.losses.matching import match
from concat_jax.neighbours import matchers
from concat_jax.neighbours.matchers import OURS, SCENIC, make_matcher
from tests.neighbours.with_scenic import need_scenic

need_scenic()
SHAPES = [(9, 6), (6, 6), (4, 7)]  # queries, segments


def problems(queries, segments):
    """Costs [5, 2, N, G] and valid [5, G]: random, padded, nothing valid, not finite, all NaN."""
    rng = np.random.default_rng(queries)
    cost = rng.normal(size=(5, 2, queries, segments)).astype(np.float32) * 10
    valid = np.ones((5, segments), bool)
    valid[1, segments // 2 :], valid[2] = False, False
    cost[3, :, 0], cost[3, 0, 1, 2], cost[3, 1, 2, 0] = np.nan, np.inf, -np.inf
    cost[4] = np.nan
    return cost, valid


def found_by(name, cost, valid):
    matcher = make_matcher(name)
    found = np.asarray(jax.jit(lambda c, v: match(c, v, matcher))(cost, valid))
    for b, l in np.ndindex(found.shape[:2]):
        matched = found[b, l][found[b, l] >= 0]
        assert len(matched) == min(cost.shape[2], valid[b].sum()) == len(set(matched))
        assert (found[b, l][~valid[b]] == -1).all()
    return found


def totals(cost, found):
    """[B, L]; what is not finite counts more than all that is, as `match` has it."""
    cost = np.where(np.isfinite(cost), cost, 1e3)
    taken = np.take_along_axis(cost, np.maximum(found, 0)[:, :, None], axis=2)[:, :, 0]
    return np.where(found >= 0, taken, 0).sum(axis=-1)


@pytest.mark.parametrize(("queries", "segments"), SHAPES)
@pytest.mark.parametrize("name", [*SCENIC][:-2])
def test_the_cost_is_that_of_ours(name, queries, segments):
    cost, valid = problems(queries, segments)
    ours = totals(cost, found_by(OURS, cost, valid))
    np.testing.assert_allclose(totals(cost, found_by(name, cost, valid)), ours, atol=1e-3)


@pytest.mark.parametrize(("queries", "segments"), SHAPES)
def test_greedy_takes_the_cheapest_pair_that_is_left(queries, segments):
    cost, valid = problems(queries, segments)
    found = found_by("scenic.greedy", cost, valid)
    for b, l in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        left, expected = cost[b, l].copy(), np.full(segments, -1)
        left[:, ~valid[b]] = np.inf
        while np.isfinite(left).any():
            query, segment = np.unravel_index(left.argmin(), left.shape)
            left[query], left[:, segment], expected[segment] = np.inf, np.inf, query
        np.testing.assert_array_equal(found[b, l], expected)


@pytest.mark.parametrize(("queries", "segments"), SHAPES)
def test_one_for_square_costs_serves_others(queries, segments, monkeypatch):
    """As Sinkhorn's is; here the Hungarian one stands for it."""
    monkeypatch.setitem(SCENIC, "scenic.greedy", SCENIC["scenic.hungarian_tpu"])
    behind, square = matchers._behind_ours, []

    def for_square(pairs, is_square):
        return behind(lambda c: square.append(c.shape) or pairs(c), is_square=True)

    monkeypatch.setattr(matchers, "_behind_ours", for_square)
    cost, valid = problems(queries, segments)
    ours = totals(cost, found_by(OURS, cost, valid))
    np.testing.assert_allclose(
        totals(cost, found_by("scenic.greedy", cost, valid)), ours, atol=1e-3
    )
    assert all(rows == columns for _, rows, columns in square) and square


@pytest.mark.parametrize(("queries", "segments"), SHAPES)
def test_sinkhorn_finds_what_stands_out(queries, segments):
    need_scenic(f"model_lib.matchers.{SCENIC['scenic.sinkhorn'][0]}")
    cost, valid = problems(queries, segments)
    found = found_by("scenic.sinkhorn", cost, valid)
    assert (totals(cost, found) >= totals(cost, found_by(OURS, cost, valid)) - 1e-3).all()
