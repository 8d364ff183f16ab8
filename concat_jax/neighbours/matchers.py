"""`config.loss.matcher`: ours, or one of Scenic's behind the same function."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from concat_jax.core.config import check_choice
from concat_jax.losses.matching import Matcher, hungarian
from concat_jax.neighbours.scenic import scenic_file, scenic_module

# Pairs [B, 2, min(N, G)] of (query, segment) from costs [B, N, G].
Pairs = Callable[[jax.Array], jax.Array]
OURS = "hungarian"
# Name -> Scenic's module and function. All but the last two find the least cost; "scenic.hungarian"
# is SciPy's, on the host, those with "tpu" are JAX programs.
SCENIC = {
    "scenic.hungarian": ("hungarian", "hungarian_matcher"),
    "scenic.hungarian_tpu": ("hungarian_jax", "hungarian_tpu_matcher"),
    "scenic.hungarian_scan_tpu": ("hungarian_jax", "hungarian_scan_tpu_matcher"),
    "scenic.hungarian_cover_tpu": ("hungarian_cover", "hungarian_cover_tpu_matcher"),
    "scenic.greedy": ("greedy", "greedy_matcher"),
    "scenic.sinkhorn": ("sinkhorn", "sinkhorn_matcher"),
}
MATCHERS = (OURS, *SCENIC)


def make_matcher(name: str) -> Matcher:
    """The matcher of a config; ValueError for an unknown name, or where Scenic's cannot be had."""
    check_choice(name, MATCHERS, "config.loss.matcher is unknown:")
    if name == OURS:
        return hungarian
    module, function = SCENIC[name]
    # Sinkhorn's file is what the others are spared.
    read = scenic_module if module == "sinkhorn" else scenic_file
    pairs = getattr(read(f"model_lib.matchers.{module}"), function)
    return _behind_ours(pairs, is_square=module == "sinkhorn")


def _behind_ours(find_pairs: Pairs, *, is_square: bool) -> Matcher:
    def match_one_set(cost: jax.Array, valid: jax.Array) -> jax.Array:
        batch, num_queries, num_segments = cost.shape
        # A padded column is as dear as can be, so that the greedy one leaves it for the end.
        dearest = jnp.max(cost, axis=(1, 2), keepdims=True) + 1
        cost = jnp.where(valid[:, None, :], cost, dearest)
        if is_square:
            side = max(num_queries, num_segments)
            more = ((0, 0), (0, side - num_queries), (0, side - num_segments))
            cost = jnp.pad(cost, more)
        queries, segments = jnp.moveaxis(find_pairs(cost), 1, 0)
        found = jnp.full((batch, cost.shape[2]), -1, jnp.int32)
        found = found.at[jnp.arange(batch)[:, None], segments].set(queries.astype(jnp.int32))
        found = found[:, :num_segments]
        return jnp.where(found < num_queries, found, -1)

    return jax.vmap(match_one_set, in_axes=(1, None), out_axes=1)
