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
    """Flat pixel indices and weights [..., 4] of the four pixels around points [..., 2].

    Indices are int32 into the row-major grid (clipped inside it); weights are float32, zero for a
    corner outside.
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
    """Bilinear samples [B, P, D] of a feature map [B, h, w, D] at points [B, P, 2].

    Mask logits are linear in the mask features, so the logits of all queries at shared points
    are one product of these samples with the mask embeddings; no full mask is needed.
    """
    batch, height, width, depth = features.shape
    indices, weights = bilinear_corners(points, height, width)  # [B, P, 4]
    rows = features.reshape(batch, height * width, depth)
    take = jax.vmap(lambda table, index: table.at[index].get(mode="promise_in_bounds"))
    # A sum of four, not a gather of [B, P, 4, D]: the rows of the corners never reach memory.
    return sum(
        take(rows, indices[..., corner]) * weights[..., corner, None].astype(rows.dtype)
        for corner in range(4)
    )


def point_logits(
    mask_embeddings: jax.Array, mask_features: jax.Array, points: jax.Array
) -> jax.Array:
    """Mask logits [B, L, N, P] float32 of L sets of queries [B, L, N, D] at points [B, P, 2].

    Features are [B, h, w, D], or [B, L, h, w, D] where each set has its own.
    """
    if mask_features.ndim == 4:
        features, product = sample_features(mask_features, points), "blnd,bpd->blnp"
    else:
        sample = jax.vmap(sample_features, in_axes=(1, None), out_axes=1)
        features, product = sample(mask_features, points), "blnd,blpd->blnp"
    return jnp.einsum(product, mask_embeddings, features, preferred_element_type=jnp.float32)


def few_point_logits(
    mask_embeddings: jax.Array, mask_features: jax.Array, points: jax.Array
) -> jax.Array:
    """As `point_logits`, for fewer queries than features have channels.

    Where each set has features of its own the products come first, so that what is gathered, and
    scattered backward, is a number for every query and not one for every channel.
    """
    if mask_features.ndim == 4:
        return point_logits(mask_embeddings, mask_features, points)
    logits = jnp.einsum(
        "blnd,blhwd->blhwn",
        mask_embeddings.astype(mask_features.dtype),
        mask_features,
        preferred_element_type=jnp.float32,
    )
    sample = jax.vmap(sample_features, in_axes=(1, None), out_axes=1)
    return jnp.swapaxes(sample(logits, points), 2, 3)


def sample_segments(segment_ids: jax.Array, points: jax.Array, num_segments: int) -> jax.Array:
    """Bilinear samples [B, G, P] of every segment's binary mask at shared points [B, P, 2].

    Row g - 1 is segment g, which owns the pixels g of segment_ids [B, H, W]; 0 is void.
    """
    batch, height, width = segment_ids.shape
    indices, weights = bilinear_corners(points, height, width)
    ids = jnp.take_along_axis(
        segment_ids.reshape(batch, height * width), indices.reshape(batch, -1), axis=1
    )
    ids = ids.reshape(indices.shape).astype(jnp.int32)[:, None]  # [B, 1, P, 4]
    segments = jnp.arange(1, num_segments + 1, dtype=jnp.int32)[:, None]
    return sum(
        jnp.where(ids[..., corner] == segments, weights[:, None, :, corner], 0.0)
        for corner in range(4)
    )


def uncertainty_weights(logits: jax.Array, count: int) -> jax.Array:
    """Which candidate points count where the mask is least certain, as PointRend picks them.

    Source: detectron2 `get_uncertain_point_coords_with_randomness`, whose uncertainty is -|logit|.
    Weights instead of a list of points: the smallest `count` of |logit| are told by their largest
    member, found bit by bit, where sorting C candidates of every mask would cost most of the loss.

    From mask logits [..., C] at the candidates to [..., C] float32 without gradient, 1 for the
    `count` least certain and 0 for the others; those that tie for the last places share them.
    """
    num_candidates = logits.shape[-1]
    if count in (0, num_candidates):
        return jnp.full(logits.shape, float(count > 0), jnp.float32)
    # Of floats without a sign the bits, as integers, are in the order of the values.
    bits = jax.lax.stop_gradient(jnp.abs(logits.astype(jnp.float32)))
    bits = jax.lax.bitcast_convert_type(bits, jnp.int32)

    def number_below(bound: jax.Array) -> jax.Array:
        # A sum of floats: exact up to 2**24 candidates, and it vectorises everywhere.
        return jnp.sum((bits < bound[..., None]).astype(jnp.float32), axis=-1)

    def set_bit(index: jax.Array, bound: jax.Array) -> jax.Array:
        higher = bound | (jnp.int32(1) << (30 - index))
        return jnp.where(number_below(higher) < count, higher, bound)

    # The largest bound with fewer than `count` values below it: the last one picked.
    last = jax.lax.fori_loop(0, 31, set_bit, jnp.zeros(bits.shape[:-1], jnp.int32))
    tied = bits == last[..., None]
    # Nothing is tied, not even the last one itself, where a compiler computes the logits twice and
    # rounds them otherwise; that point then counts nothing, or whole.
    num_tied = jnp.maximum(jnp.sum(tied.astype(jnp.float32), axis=-1), 1.0)
    share = (count - number_below(last)) / num_tied
    return jnp.where(bits < last[..., None], 1.0, jnp.where(tied, share[..., None], 0.0))


def mask_bce(logits: jax.Array, targets: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Binary cross-entropy [...] of logits and targets [..., P], mean over points by `weights`.

    Source: Mask2Former `sigmoid_ce_loss`.
    """
    logits = logits.astype(jnp.float32)
    losses = jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    return jnp.average(losses, axis=-1, weights=weights)


def mask_dice(logits: jax.Array, targets: jax.Array, weights: jax.Array | float = 1.0) -> jax.Array:
    """Dice loss [...] in [0, 1] with +1 smoothing over points, which count `weights` times each.

    All arguments are [..., P]. Source: Mask2Former `dice_loss`.
    """
    probs = jax.nn.sigmoid(logits.astype(jnp.float32))
    overlap = 2 * jnp.sum(probs * targets * weights, axis=-1)
    total = jnp.sum((probs + targets) * weights, axis=-1)
    return 1 - (overlap + 1) / (total + 1)


def pairwise_mask_bce(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean binary cross-entropy [..., N, G] of queries [..., N, P] with segments [..., G, P].

    Source: Mask2Former `batch_sigmoid_ce_loss`.
    """
    logits = logits.astype(jnp.float32)
    # -log sigmoid(x) = softplus(-x) and -log(1 - sigmoid(x)) = softplus(-x) + x, so one product
    # over the points serves both signs of the target.
    negative_part = jax.nn.softplus(logits).mean(axis=-1)[..., :, None]
    return negative_part - jnp.einsum("...np,...gp->...ng", logits, targets) / logits.shape[-1]


def pairwise_mask_dice(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Dice loss [..., N, G] in [0, 1] of queries [..., N, P] with segments [..., G, P].

    Source: Mask2Former `batch_dice_loss`.
    """
    probs = jax.nn.sigmoid(logits.astype(jnp.float32))
    overlap = 2 * jnp.einsum("...np,...gp->...ng", probs, targets)
    total = probs.sum(axis=-1)[..., :, None] + targets.sum(axis=-1)[..., None, :]
    return 1 - (overlap + 1) / (total + 1)


def over_batch_shards(function, num_replicated: int = 0):
    """Run `function` on each device's own part of the batch.

    For what the partitioner does not split by itself: it gives the assignment's loop, which runs
    until its slowest problem is done, a collective an iteration, and gathers the pictures of a
    network that is vmapped over segments on TPU. Each shard's rows are its own. `function` takes
    `num_replicated` trees that every device holds whole, then arrays with the batch axis first.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Where every axis is manual, as in `jax.pmap`, this is a device's own part already.
    if mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual:
        return function
    batch = PartitionSpec(mesh.axis_names)

    def run(*arguments):
        specs = (PartitionSpec(),) * num_replicated
        specs += (batch,) * (len(arguments) - num_replicated)
        # check_vma=False: the assignment's carry mixes constants with sharded values.
        mapped = jax.shard_map(function, in_specs=specs, out_specs=batch, check_vma=False)
        return mapped(*arguments)

    return run
