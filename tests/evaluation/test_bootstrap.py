"""The bootstrap of scores and of differences of paired rows."""

import numpy as np
import pytest

from concat_jax.evaluation.bootstrap import Estimate, difference, estimate, resampled


def mean_score(sums):
    """Share of hits, percent, of sums [..., 2] of hits and trials."""
    return 100 * sums[..., 0] / sums[..., 1]


def scenes(rng, rate, seeds=1, number=400):
    trials = rng.integers(2, 8, (seeds, number))
    return np.stack([rng.binomial(trials, rate), trials], axis=-1).astype(np.float32)


def test_deviation_is_that_of_new_scenes():
    """The oracle: how much the score of as many new scenes varies."""
    rng = np.random.default_rng(0)
    found = estimate(*resampled(scenes(rng, 0.4, number=2000), mean_score, draws=2000))
    anew = [mean_score(scenes(rng, 0.4, number=2000)[0].sum(axis=0)) for _ in range(2000)]
    assert found.deviation == pytest.approx(np.std(anew), rel=0.1)
    assert found.low < found.value < found.high


def test_pairs_are_told_apart_where_alone_they_are_not():
    """A row that wins one trial more in every tenth scene, among scenes that differ much."""
    rng = np.random.default_rng(1)
    base = scenes(rng, rng.uniform(0.1, 0.9, (1, 400)))
    better = base.copy()
    gains = (np.arange(400) % 10 == 0) & (base[0, :, 0] < base[0, :, 1])
    better[0, gains, 0] += 1
    rows = [resampled(counts, mean_score, draws=1000) for counts in (better, base)]
    paired = difference(*rows)
    assert paired.low > 0
    alone = [estimate(*row) for row in rows]
    assert alone[0].low < alone[1].high
    assert paired.value == pytest.approx(alone[0].value - alone[1].value)


def test_seeds_that_differ_widen_the_interval():
    rng = np.random.default_rng(2)
    alike = np.concatenate([scenes(rng, 0.5) for _ in range(4)])
    apart = np.concatenate([scenes(rng, rate) for rate in (0.35, 0.45, 0.55, 0.65)])
    narrow, wide = (
        estimate(*resampled(counts, mean_score, draws=1000)) for counts in (alike, apart)
    )
    assert wide.deviation > 2 * narrow.deviation


def test_draws_that_could_not_be_scored_say_nothing():
    """Of three scenes of which one has nothing to score, one draw in 27 has that one alone."""
    counts = np.zeros((1, 3, 2), np.float32)
    counts[0, :2] = [[1, 2], [3, 4]]  # the third scene has no trial
    with np.errstate(invalid="ignore"):
        value, drawn = resampled(counts, mean_score, draws=500)
    assert 5 < np.isnan(drawn).sum() < 50
    found = estimate(value, drawn)
    assert found == estimate(value, drawn[~np.isnan(drawn)])
    assert (found.low, found.high) == (50.0, 75.0) and 5 < found.deviation < 15
    assert np.isnan(estimate(1.0, np.full(9, np.nan))[1:]).all()


def test_what_was_not_measured_is_a_dash():
    assert Estimate(57.71, 1.12, 55.0, 60.0).as_score() == "57.7 ± 1.1"
    assert Estimate(2.04, 0.6, 0.91, 3.2).as_difference() == "+2.0 [+0.9, +3.2]"
    nothing = Estimate(float("nan"), 0.0, 0.0, 0.0)
    assert nothing.as_score() == nothing.as_difference() == "-"
