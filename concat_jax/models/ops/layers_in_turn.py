"""Layers of equal shape, one after another: written out, or as a loop that compiles them once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Run = Callable[[Sequence[Callable], Any], tuple[Any, Any]]


def run_in_turn(
    parent: nn.Module, rounds: Sequence[Sequence[nn.Module]], run: Run, carry: Any, *, scan: bool
) -> tuple[Any, list[Any]]:
    """The carry after every round, and what each round gave.

    Args:
      parent: the module whose compact method made the layers.
      rounds: named layers; with `scan` each has as many as the first, of the same shapes in order.
      run: (layers, carry) -> (carry, what the round gives); may be traced once for all rounds.
      scan: as a `lax.scan` over the stacked parameters, which keep their names and places. What is
        computed is the same up to rounding.
    """
    given = []
    if not scan or len(rounds) < 2 or parent.is_initializing():
        for layers in rounds:
            carry, gives = run(layers, carry)
            given.append(gives)
        return carry, given
    params = parent.variables["params"]
    of_rounds = [[params[layer.name] for layer in layers] for layers in rounds]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *of_rounds)
    alone = [layer.clone(parent=None, name=None) for layer in rounds[0]]

    def step(carry: Any, params: list[Any]) -> tuple[Any, Any]:
        pairs = zip(alone, params, strict=True)
        return run([functools.partial(layer.apply, {"params": p}) for layer, p in pairs], carry)

    carry, outputs = jax.lax.scan(step, carry, stacked)
    return carry, [jax.tree.map(lambda x, i=i: x[i], outputs) for i in range(len(rounds))]
