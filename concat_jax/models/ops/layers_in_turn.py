"""Layers of equal shape, one after another: written out, or as a loop that compiles them once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.lax import platform_dependent

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
        computed is the same up to rounding. On a CPU, where XLA gives the gradients of a loop's
        convolutions eight times as long, they are written out all the same.
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

    def written_out(carry: Any, stacked: list[Any]) -> tuple[Any, Any]:
        outputs = []
        for index in range(len(rounds)):
            carry, gives = step(carry, jax.tree.map(lambda x, i=index: x[i], stacked))
            outputs.append(gives)
        return carry, jax.tree.map(lambda *x: jnp.stack(x), *outputs)

    def looped(carry: Any, stacked: list[Any]) -> tuple[Any, Any]:
        return jax.lax.scan(step, carry, stacked)

    carry, outputs = platform_dependent(carry, stacked, cpu=written_out, default=looped)
    return carry, [jax.tree.map(lambda x, i=i: x[i], outputs) for i in range(len(rounds))]
