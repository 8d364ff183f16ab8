"""Matchers of queries and segments: ours, and Scenic's where that is installed.

A cost of 100 x 100 for each image, all segments there, as random as costs of an untrained network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from concat_jax.benchmarking.cases import Case
from concat_jax.benchmarking.harness import Measurement, Work
from concat_jax.evaluation.report import markdown_table
from concat_jax.losses.matching import match
from concat_jax.neighbours.matchers import MATCHERS, OURS, make_matcher

NUM_IMAGES, SIDE = 16, 100


def works(case: Case) -> dict[str, Work]:
    """A work for each matcher that can be had; the others are told on the way."""
    rng = np.random.default_rng(0)
    cost = rng.uniform(0, 10, (NUM_IMAGES, 1, SIDE, SIDE)).astype(np.float32)
    valid = np.ones((NUM_IMAGES, SIDE), bool)
    found = {}
    for name in MATCHERS:
        try:
            found[name] = _work(make_matcher(name), cost, valid)
        except ValueError as error:
            print(f"{name} is not measured: {error}", flush=True)
    return found


def _work(matcher: Any, cost: np.ndarray, valid: np.ndarray) -> Work:
    program = jax.jit(lambda c, v: match(c, v, matcher)).lower(cost, valid).compile()
    on_device = jax.device_put((cost, valid))

    def call() -> dict[str, np.ndarray]:
        queries = np.asarray(program(*on_device))
        taken = np.take_along_axis(cost, queries[:, :, None], axis=2)
        return {"cost": np.asarray(taken.sum() / NUM_IMAGES)}

    return Work(call)


def table(case: Case, results: Mapping[str, Measurement]) -> str:
    """Milliseconds of the batch, and the mean cost of an image."""
    rows = [
        [name, result.show(1000, 1), f"{float(result.outputs['cost']):.4f}"]
        for name, result in results.items()
    ]
    heads = ["matcher", f"ms for {NUM_IMAGES} images (fastest to slowest)", "cost an image"]
    missing = [name for name in MATCHERS if name not in results]
    note = f" Not to be had here: {', '.join(missing)}." if missing else ""
    rows = markdown_table(heads, rows)
    return f"{rows}\n\n{OURS!r} is ours; they took turns in one process.{note}"
