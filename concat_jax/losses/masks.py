"""Mask losses on sampled points, with the panoptic id map as ground truth.

Panoptic segments do not overlap, so binary masks are never built: a bilinear sample of segment
g's mask is the sum of those of the four corner weights whose pixel carries the id g.

Points are (x, y) in [0, 1]², align_corners=False, zero outside the picture, as in detectron2's
`point_sample`. Letters: B images, L prediction sets, G segments (padded), P points.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def bilinear_corners(points: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Flat pixel indices and weights of the four pixels around each point.

    Args:
      points: [..., 2] float32, (x, y) in [0, 1].
      height: rows of the sampled grid.
      width: columns of the sampled grid.

    Returns:
      indices [..., 4] int32 into the row-major grid (clipped inside it) and weights [..., 4]
      float32, zero for a corner outside the grid.
    """
    x = points[..., 0] * width - 0.5
    y = points[..., 1] * height - 0.5
    x0, y0 = jnp.floor(x), jnp.floor(y)
    fx, fy = x - x0, y - y0
    columns = jnp.stack([x0, x0 + 1, x0, x0 + 1], axis=-1)
    rows = jnp.stack([y0, y0, y0 + 1, y0 + 1], axis=-1)
    weights = jnp.stack([(1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy], axis=-1)
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    columns = jnp.clip(columns, 0, width - 1).astype(jnp.int32)
    rows = jnp.clip(rows, 0, height - 1).astype(jnp.int32)
    return rows * width + columns, jnp.where(inside, weights, 0.0)


def sample_features(features: jax.Array, points: jax.Array) -> jax.Array:
    """Bilinear samples of a feature map.

    Mask logits are linear in the mask features, so the logits of all queries at shared points
    are one product of these samples with the mask embeddings; no full mask is needed.

    Args:
      features: [B, h, w, D].
      points: [B, P, 2].

    Returns:
      [B, P, D].
    """
    batch, height, width, depth = features.shape
    indices, weights = bilinear_corners(points, height, width)  # [B, P, 4]
    rows = jnp.take_along_axis(
        features.reshape(batch, height * width, depth),
        indices.reshape(batch, -1, 1),
        axis=1,
    ).reshape(*indices.shape, depth)
    return jnp.einsum("bpcd,bpc->bpd", rows, weights.astype(rows.dtype))


def sample_maps(maps: jax.Array, points: jax.Array) -> jax.Array:
    """Bilinear samples of many scalar maps, each at points of its own.

    Args:
      maps: [B, M, h, w], for instance matched mask logits.
      points: [B, M, P, 2].

    Returns:
      [B, M, P].
    """
    batch, count, height, width = maps.shape
    indices, weights = bilinear_corners(points, height, width)  # [B, M, P, 4]
    values = jnp.take_along_axis(
        maps.reshape(batch, count, height * width),
        indices.reshape(batch, count, -1),
        axis=2,
    ).reshape(indices.shape)
    return jnp.sum(values * weights.astype(values.dtype), axis=-1)


def sample_segments(segment_ids: jax.Array, points: jax.Array, num_segments: int) -> jax.Array:
    """Bilinear samples of every segment's binary mask at shared points.

    Args:
      segment_ids: [B, H, W] unsigned integers, 0 void, g in 1..G owned by segment g.
      points: [B, P, 2].
      num_segments: G.

    Returns:
      [B, G, P] float32 in [0, 1]; row g - 1 is segment g.
    """
    ids, weights = _ids_at_corners(segment_ids, points)
    segments = jnp.arange(1, num_segments + 1, dtype=jnp.int32)[:, None, None]
    return jnp.sum(jnp.where(ids[:, None] == segments, weights[:, None], 0.0), axis=-1)


def sample_own_segment(segment_ids: jax.Array, points: jax.Array) -> jax.Array:
    """Bilinear samples of each segment's binary mask at points of its own.

    Args:
      segment_ids: [B, H, W] unsigned integers, 0 void, g in 1..G owned by segment g.
      points: [B, G, P, 2]; row g - 1 holds the points of segment g.

    Returns:
      [B, G, P] float32 in [0, 1].
    """
    ids, weights = _ids_at_corners(segment_ids, points)
    own = jnp.arange(1, points.shape[1] + 1, dtype=jnp.int32)[:, None, None]
    return jnp.sum(jnp.where(ids == own, weights, 0.0), axis=-1)


def _ids_at_corners(segment_ids: jax.Array, points: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ids [B, ..., P, 4] int32 and weights of the corners around points [B, ..., P, 2]."""
    batch, height, width = segment_ids.shape
    indices, weights = bilinear_corners(points, height, width)
    ids = jnp.take_along_axis(
        segment_ids.reshape(batch, height * width), indices.reshape(batch, -1), axis=1
    )
    return ids.reshape(indices.shape).astype(jnp.int32), weights


def sample_uncertain_points(
    rng: jax.Array,
    mask_logits: jax.Array,
    num_points: int,
    *,
    oversample_ratio: float,
    importance_ratio: float,
) -> jax.Array:
    """Points where the mask is least certain, plus a share of uniform ones (PointRend).

    Source: detectron2 `get_uncertain_point_coords_with_randomness`; uncertainty is -|logit|.

    Args:
      rng: PRNG key.
      mask_logits: [B, M, h, w]; gradients are not taken.
      num_points: P.
      oversample_ratio: candidates drawn per kept point, at least 1.
      importance_ratio: share of the P points that are the most uncertain candidates, in [0, 1].

    Returns:
      [B, M, P, 2] float32.

    Raises:
      ValueError: if a ratio is out of range.
    """
    if oversample_ratio < 1 or not 0 <= importance_ratio <= 1:
        raise ValueError(
            f"oversample_ratio must be at least 1 and importance_ratio in [0, 1], got "
            f"{oversample_ratio} and {importance_ratio}."
        )
    batch, count = mask_logits.shape[:2]
    num_uncertain = int(importance_ratio * num_points)
    rng_candidates, rng_uniform = jax.random.split(rng)
    num_candidates = int(num_points * oversample_ratio)
    candidates = jax.random.uniform(rng_candidates, (batch, count, num_candidates, 2))
    uncertainty = -jnp.abs(sample_maps(jax.lax.stop_gradient(mask_logits), candidates))
    top = over_batch_shards(lambda x: jax.lax.top_k(x, num_uncertain)[1])
    best = top(uncertainty)  # [B, M, num_uncertain]
    uncertain = jnp.take_along_axis(candidates, best[..., None], axis=2)
    uniform = jax.random.uniform(rng_uniform, (batch, count, num_points - num_uncertain, 2))
    return jnp.concatenate([uncertain, uniform], axis=2)


def mask_bce(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Binary cross-entropy, mean over points.

    Args:
      logits: [..., P] mask logits at the points.
      targets: [..., P] in [0, 1].

    Returns:
      [...] float32. Source: Mask2Former `sigmoid_ce_loss`.
    """
    logits = logits.astype(jnp.float32)
    losses = jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    return losses.mean(axis=-1)


def mask_dice(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Dice loss with +1 smoothing over points.

    Args:
      logits: [..., P] mask logits at the points.
      targets: [..., P] in [0, 1].

    Returns:
      [...] float32 in [0, 1]. Source: Mask2Former `dice_loss`.
    """
    probs = jax.nn.sigmoid(logits.astype(jnp.float32))
    overlap = 2 * jnp.sum(probs * targets, axis=-1)
    total = jnp.sum(probs, axis=-1) + jnp.sum(targets, axis=-1)
    return 1 - (overlap + 1) / (total + 1)


def pairwise_mask_bce(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Binary cross-entropy of every query with every segment, mean over points.

    Args:
      logits: [..., N, P].
      targets: [..., G, P] in [0, 1].

    Returns:
      [..., N, G] float32. Source: Mask2Former `batch_sigmoid_ce_loss`.
    """
    logits = logits.astype(jnp.float32)
    # -log sigmoid(x) = softplus(-x) and -log(1 - sigmoid(x)) = softplus(-x) + x, so one product
    # over the points serves both signs of the target.
    negative_part = jax.nn.softplus(logits).mean(axis=-1)[..., :, None]
    return negative_part - jnp.einsum("...np,...gp->...ng", logits, targets) / logits.shape[-1]


def pairwise_mask_dice(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Dice loss of every query with every segment.

    Args:
      logits: [..., N, P].
      targets: [..., G, P] in [0, 1].

    Returns:
      [..., N, G] float32 in [0, 1]. Source: Mask2Former `batch_dice_loss`.
    """
    probs = jax.nn.sigmoid(logits.astype(jnp.float32))
    overlap = 2 * jnp.einsum("...np,...gp->...ng", probs, targets)
    total = probs.sum(axis=-1)[..., :, None] + targets.sum(axis=-1)[..., None, :]
    return 1 - (overlap + 1) / (total + 1)


def over_batch_shards(function):
    """Run `function` on each device's own part of the batch.

    For what the partitioner does not split by itself: it gathers the whole batch for a `top_k`, and
    gives the assignment's loop, which runs until its slowest problem is done, a collective an
    iteration. Each shard's rows are its own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    spec = PartitionSpec(mesh.axis_names)
    # check_vma=False: the assignment's carry mixes constants with sharded values.
    return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)
