"""Bipartite matching of queries and segments, on device, for all prediction sets in one call."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from concat_jax.losses import masks

# (finite costs [B, L, N, G], segments [B, G] that are none of padding) -> the query [B, L, G] int32
# of each segment, -1 for those left over; what it says of padding is not looked at.
Matcher = Callable[[jax.Array, jax.Array], jax.Array]


def matching_cost(
    class_logits: jax.Array,
    point_logits: jax.Array,
    point_targets: jax.Array,
    labels: jax.Array,
    *,
    class_weight: float,
    mask_weight: float,
    dice_weight: float,
) -> jax.Array:
    """Cost [B, L, N, G] of giving segment g to query n. Source: Mask2Former `HungarianMatcher`.

    Args:
      class_logits: [B, L, N, K+1]; the last column is no-object.
      point_logits: [B, L, N, P] mask logits at points shared by the queries of an image.
      point_targets: [B, L, G, P] the segments' mask values there.
      labels: [B, G] int32 rows of the class logits; any value where padded.
    """
    probs = jax.nn.softmax(class_logits.astype(jnp.float32), axis=-1)
    index = jnp.clip(labels, 0)[:, None, None, :]
    class_cost = -jnp.take_along_axis(
        probs, jnp.broadcast_to(index, (*probs.shape[:3], labels.shape[-1])), axis=-1
    )
    return (
        class_weight * class_cost
        + mask_weight * masks.pairwise_mask_bce(point_logits, point_targets)
        + dice_weight * masks.pairwise_mask_dice(point_logits, point_targets)
    )


def hungarian(cost: jax.Array, valid: jax.Array) -> jax.Array:
    """The `Matcher` of least cost, by optax; columns of padding must cost alike in all rows."""
    del valid
    return jax.vmap(jax.vmap(_assign))(cost)


def match(cost: jax.Array, valid: jax.Array, matcher: Matcher = hungarian) -> jax.Array:
    """The query [B, L, G] of each segment, -1 where invalid or left over.

    A `cost` [B, L, N, G] that is not finite counts as worse than every finite one, so a NaN can
    neither crash the solver nor win. Where `valid` [B, G] segments outnumber queries, the costliest
    stay unmatched. No gradient.
    """
    cost = jax.lax.stop_gradient(cost)
    usable = valid[:, None, None, :] & jnp.isfinite(cost)
    worst = jnp.max(jnp.where(usable, cost, 0.0), axis=(2, 3), keepdims=True)
    best = jnp.min(jnp.where(usable, cost, 0.0), axis=(2, 3), keepdims=True)
    num_queries, num_segments = cost.shape[-2:]
    rank = min(num_queries, num_segments)
    spread = worst - best + 1.0
    not_finite = worst + rank * spread
    # With a query for every column a padded column shifts all assignments alike. Where queries
    # are scarce it must cost more than it could save, or padding would take them from segments.
    padded = 0.0 if num_queries >= num_segments else worst + (rank + 1) * rank * spread
    cost = jnp.where(usable, cost, not_finite)
    cost = jnp.where(valid[:, None, None, :], cost, padded)

    query_of_segment = masks.over_batch_shards(matcher)(cost, valid)
    return jnp.where(valid[:, None, :], query_of_segment, -1)


def _assign(cost: jax.Array) -> jax.Array:
    """Query of each column of one cost matrix [N, G], -1 for columns left over; [G] int32."""
    queries, segments = optax.assignment.hungarian_algorithm(cost)
    unmatched = jnp.full((cost.shape[1],), -1, jnp.int32)
    return unmatched.at[segments].set(queries.astype(jnp.int32))


def labels_of_queries(
    query_of_segment: jax.Array, labels: jax.Array, num_queries: int, no_object: int
) -> jax.Array:
    """Class target [B, L, N] of every query from `match` [B, L, G] and labels [B, G]."""
    hit = query_of_segment[..., None] == jnp.arange(num_queries)  # [B, L, G, N]
    label = jnp.max(jnp.where(hit, labels[:, None, :, None], -1), axis=2)
    return jnp.where(hit.any(axis=2), label, no_object)
