"""How sure a score and a difference of scores are: a bootstrap over scenes and over seeds.

Rows of a table are paired: a draw takes the same scenes, and the same seeds, for all of them
(Efron and Tibshirani, An Introduction to the Bootstrap, 1993).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]


class Estimate(NamedTuple):
    """A value, its standard deviation over the draws, and the middle 95 % of them."""

    value: float
    deviation: float
    low: float
    high: float

    def as_score(self) -> str:
        """ "57.7 ± 1.1", or a dash for what was not measured."""
        return "-" if np.isnan(self.value) else f"{self.value:.1f} ± {self.deviation:.1f}"

    def as_difference(self) -> str:
        """ "+2.0 [+0.9, +3.2]", likewise."""
        interval = f"{self.value:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"
        return "-" if np.isnan(self.value) else interval


def draw_samples(num_seeds: int, num_scenes: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights of seeds [draws, S], which sum to 1, and of scenes [draws, M]; always the same.

    So rows that are scored on the same scenes are paired.
    """
    rng = np.random.default_rng(0)
    scenes, seeds = (
        rng.multinomial(number, np.full(number, 1.0 / number), size=draws).astype(np.float32)
        for number in (num_scenes, num_seeds)
    )
    return seeds / num_seeds, scenes


def resampled(
    counts: np.ndarray, statistic: Statistic, *, draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """A statistic of all scenes, [] and of resampled ones, [draws].

    Args:
      counts: [S, M, ...] of S seeds and M scenes, which add up over the scenes.
      statistic: sums [..., counts' other axes] over scenes to values [...]. What several seeds give
        is averaged; one seed says nothing of how seeds differ.
    """
    num_seeds, num_scenes = counts.shape[:2]
    seeds, scenes = draw_samples(num_seeds, num_scenes, draws)
    flat = counts.reshape(num_seeds, num_scenes, -1)
    whole, drawn = [], []
    for of_seed in flat:
        whole.append(statistic(of_seed.sum(axis=0).reshape(counts.shape[2:])))
        drawn.append(statistic((scenes @ of_seed).reshape(draws, *counts.shape[2:])))
    return np.mean(whole), np.einsum("sd,ds->d", np.stack(drawn), seeds)


def estimate(value: float, drawn: np.ndarray) -> Estimate:
    """Of a value and its draws [draws]; those that are NaN show too little to be scored.

    Of few scenes some draws show no class of one side. NaN but for the value where all do.
    """
    drawn = drawn[~np.isnan(drawn)]
    if len(drawn) < 2:
        return Estimate(float(value), *[float("nan")] * 3)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(float(value), float(np.std(drawn, ddof=1)), float(low), float(high))


def difference(row: tuple[np.ndarray, np.ndarray], base: tuple[np.ndarray, np.ndarray]) -> Estimate:
    """How far a row is above another, both `resampled` with one number of draws."""
    return estimate(float(row[0] - base[0]), row[1] - base[1])
