"""The order in which an epoch shows the images of a training set."""

from __future__ import annotations

import functools

import numpy as np


@functools.lru_cache(maxsize=8)
def epoch_order(count: int, *key: int) -> np.ndarray:
    """A permutation [count] int64 that the key decides, as (seed, epoch); read-only."""
    order = np.random.default_rng(key).permutation(count)
    order.setflags(write=False)
    return order
