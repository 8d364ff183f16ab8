"""Multi-scale deformable attention in plain JAX.

Source: Zhu et al., arXiv 2010.04159; Mask2Former
`mask2former/modeling/pixel_decoder/ops/modules/ms_deform_attn.py` (module and initialisation) and
`.../ops/functions/ms_deform_attn_func.py` (the operation).
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.models.ops.linear import Dense

# Queries whose gathered rows are differentiated at once on a CPU: with 16 corners a level, 8 heads
# of 32 channels and float32 that is 1 MB an image, the size of a core's second-level cache.
QUERIES_A_CHUNK = 64


def _take_rows(table: jax.Array, indices: jax.Array) -> jax.Array:
    """[B, S, d] at int [B, ...] -> [B, ..., d]; the batch stays an axis of its own."""
    return jax.vmap(lambda rows, index: rows.at[index].get(mode="promise_in_bounds"))(
        table, indices
    )


def _weighted_row_sum(table: jax.Array, indices: jax.Array, weights: jax.Array) -> jax.Array:
    """[B, Q, heads, d] sums over points and corners of a weight times a row of the table [B, S, d].

    A scan over the points with the corners unrolled lets XLA fuse gather, product and sum: the
    gathered rows, 48 times the size of the output, never reach memory. Indices and weights are
    [points, 4, B, Q, heads].
    """

    def add_point(total: jax.Array, point: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        for corner_indices, corner_weights in zip(*point, strict=True):
            rows = _take_rows(table, corner_indices).astype(jnp.float32)
            total = total + rows * corner_weights[..., None]
        return total, None

    zeros = jnp.zeros((*indices.shape[2:], table.shape[-1]), jnp.float32)
    return jax.lax.scan(add_point, zeros, (indices, weights))[0]


def _level_corners(
    value: jax.Array,
    locations: jax.Array,
    weights: jax.Array,
    valid_size: jax.Array | None,
    level: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Table [B, S * heads, d] of the rows of `value`; indices into it and weights of the corners.

    A row is the d channels of one head at one position. Of the four corners around each sampling
    point, [points, 4, B, Q, heads]: int32 indices, always in range, and weights, bilinear times
    attention weight, 0 outside the map. The map is `value` [B, H, W, heads, d], or its part at
    `level`, [3] int32 (height, width, start), of [B, S, heads, d].
    """
    num_heads, depth = value.shape[-2:]
    height, row_length, start = (*value.shape[1:3], 0) if level is None else level
    table, width = value.reshape(len(value), -1, depth), row_length
    if valid_size is not None:
        height, width = (valid_size[:, axis, None, None] for axis in (0, 1))
    x = jnp.moveaxis(locations[..., 0], -1, 0) * width - 0.5
    y = jnp.moveaxis(locations[..., 1], -1, 0) * height - 0.5
    weights = jnp.moveaxis(weights, -1, 0)
    left, top = jnp.floor(x), jnp.floor(y)
    right_share, bottom_share = x - left, y - top
    positions, corner_weights = [], []
    for row, row_share in ((top, 1 - bottom_share), (top + 1, bottom_share)):
        row_share = jnp.where((row >= 0) & (row <= height - 1), row_share, 0.0) * weights
        row_start = jnp.clip(row, 0, height - 1).astype(jnp.int32) * row_length + start
        for column, column_share in ((left, 1 - right_share), (left + 1, right_share)):
            inside = (column >= 0) & (column <= width - 1)
            corner_weights.append(jnp.where(inside, column_share, 0.0) * row_share)
            positions.append(row_start + jnp.clip(column, 0, width - 1).astype(jnp.int32))
    rows, by_corner = jnp.stack(positions, axis=1), jnp.stack(corner_weights, axis=1)
    return table, rows * num_heads + jnp.arange(num_heads, dtype=jnp.int32), by_corner


@jax.custom_vjp
def _sample_level(
    value: jax.Array,
    locations: jax.Array,
    weights: jax.Array,
    valid_size: jax.Array | None,
    level: jax.Array | None,
) -> jax.Array:
    """One level's part [B, Q, heads, d] of `multi_scale_deformable_attention`, float32.

    The gradient is written out: differentiating through the sum would keep the gathered rows, and
    through the corners four weights and four places a point. Only reverse mode exists.
    """
    return _weighted_row_sum(*_level_corners(value, locations, weights, valid_size, level))


def _sample_level_backward(residuals: tuple, gradient: jax.Array) -> tuple:
    value = residuals[0]
    total, *gradients = jax.lax.platform_dependent(
        *residuals, gradient, cpu=_level_gradients_in_chunks, default=_level_gradients
    )
    return total.reshape(value.shape).astype(value.dtype), *gradients, None, None


def _level_gradients(
    value: jax.Array,
    locations: jax.Array,
    weights: jax.Array,
    valid_size: jax.Array | None,
    level: jax.Array | None,
    gradient: jax.Array,
    total: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of `_sample_level` for the rows of `value`, the locations and the weights, float32.

    The rows' gradient is added to `total` [B, S * heads, d]; None: zero.
    """

    def corner_weights(locations: jax.Array, weights: jax.Array) -> tuple[jax.Array, tuple]:
        table, indices, by_corner = _level_corners(value, locations, weights, valid_size, level)
        return by_corner, (table, indices)

    by_corner, pull, (table, indices) = jax.vjp(corner_weights, locations, weights, has_aux=True)
    if total is None:
        total = jnp.zeros(table.shape, jnp.float32)
    # [B, Q, heads, points * 4]: the corners of one query side by side.
    indices, by_query = (
        jnp.moveaxis(array.reshape(-1, *array.shape[2:]), 0, -1) for array in (indices, by_corner)
    )
    rows = _take_rows(table, indices).astype(jnp.float32)
    corner_gradient = jnp.einsum("bqhkd,bqhd->bqhk", rows, gradient)
    updates = gradient[:, :, :, None] * by_query[..., None]
    total = jax.vmap(
        lambda sum_, index, update: sum_.at[index].add(update, mode="promise_in_bounds")
    )(total, indices, updates)
    return total, *pull(jnp.moveaxis(corner_gradient, -1, 0).reshape(by_corner.shape))


def _level_gradients_in_chunks(
    value: jax.Array,
    locations: jax.Array,
    weights: jax.Array,
    valid_size: jax.Array | None,
    level: jax.Array | None,
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`_level_gradients` over a few queries at a time, so that a CPU's cache holds their rows."""
    batch, num_queries = locations.shape[:2]
    if num_queries <= QUERIES_A_CHUNK:
        return _level_gradients(value, locations, weights, valid_size, level, gradient)
    num_chunks = -(-num_queries // QUERIES_A_CHUNK)
    surplus = num_chunks * QUERIES_A_CHUNK - num_queries

    def split(array: jax.Array) -> jax.Array:
        # Zero weights and gradients change no sum.
        array = jnp.pad(array, ((0, 0), (0, surplus)) + ((0, 0),) * (array.ndim - 2))
        array = array.reshape(batch, num_chunks, QUERIES_A_CHUNK, *array.shape[2:])
        return jnp.moveaxis(array, 1, 0)

    def join(array: jax.Array) -> jax.Array:
        array = jnp.moveaxis(array, 0, 1)
        return array.reshape(batch, -1, *array.shape[3:])[:, :num_queries]

    def add_chunk(total: jax.Array, chunk: tuple) -> tuple[jax.Array, tuple]:
        locations, weights, gradient = chunk
        total, *gradients = _level_gradients(
            value, locations, weights, valid_size, level, gradient, total
        )
        return total, tuple(gradients)

    zeros = jnp.zeros((batch, math.prod(value.shape[1:-1]), value.shape[-1]), jnp.float32)
    chunks = tuple(split(array) for array in (locations, weights, gradient))
    total, gradients = jax.lax.scan(add_chunk, zeros, chunks)
    return total, *map(join, gradients)


_sample_level.defvjp(lambda *inputs: (_sample_level(*inputs), inputs), _sample_level_backward)


def multi_scale_deformable_attention(
    values: Sequence[jax.Array],
    sampling_locations: jax.Array,
    weights: jax.Array,
    valid_sizes: jax.Array | None = None,
    *,
    scan_levels: bool = False,
) -> jax.Array:
    """Weighted sum [B, Q, heads * d] of bilinear samples of several feature maps, in float32.

    Points outside a map read zeros; pixel centres sit at (i + 0.5) / size (align_corners=False).
    The bilinear and the attention weights are folded into one weight a corner before the sum, and
    each corner is one gathered row of d contiguous channels. Reverse-mode differentiable only. The
    result has the type of `values`.

    Args:
      values: for each level [B, H_l, W_l, heads, d].
      sampling_locations: [B, Q, heads, levels, points, 2] float32, (x, y) in [0, 1] inside.
      weights: [B, Q, heads, levels, points] float32.
      valid_sizes: [B, levels, 2] int32 (height, width) of the top left part of each map that is
        image and not padding; locations are in [0, 1] of that part, and what lies beyond it
        reads zero. None: the whole maps.
      scan_levels: compile one level and run it in a loop.
    """
    batch, *_, depth = values[0].shape
    output = jnp.zeros((*sampling_locations.shape[:3], depth), jnp.float32)
    if scan_levels:
        table = jnp.concatenate([v.reshape(batch, -1, *v.shape[3:]) for v in values], axis=1)
        sizes = np.array([v.shape[1:3] for v in values], np.int32)
        areas = np.prod(sizes, axis=1)
        by_level = (
            jnp.moveaxis(sampling_locations, 3, 0),
            jnp.moveaxis(weights, 3, 0),
            None if valid_sizes is None else jnp.moveaxis(valid_sizes, 1, 0),
            jnp.column_stack([sizes, np.cumsum(areas) - areas]),
        )

        def add_level(output: jax.Array, of_level: tuple) -> tuple[jax.Array, None]:
            return output + _sample_level(table, *of_level), None

        output, _ = jax.lax.scan(add_level, output, by_level)
    else:
        for level, value in enumerate(values):
            output += _sample_level(
                value,
                sampling_locations[:, :, :, level],
                weights[:, :, :, level],
                None if valid_sizes is None else valid_sizes[:, level],
                None,
            )
    return output.reshape(*output.shape[:2], -1).astype(values[0].dtype)


def compass_offsets(num_heads: int, num_levels: int, num_points: int) -> np.ndarray:
    """Initial sampling offsets: head h looks along direction h of the compass, point p to p + 1.

    [num_heads, num_levels, num_points, 2] float32 (x, y) in pixels of each level.
    """
    angles = np.arange(num_heads) * (2.0 * math.pi / num_heads)
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    directions /= np.abs(directions).max(axis=-1, keepdims=True)
    distances = np.arange(1, num_points + 1)
    offsets = directions[:, None, None, :] * distances[None, None, :, None]
    return np.tile(offsets, (1, num_levels, 1, 1)).astype(np.float32)


class MultiScaleDeformableAttention(nn.Module):
    """Deformable attention layer with its four projections; num_heads divides the width D.

    `scan_levels` compiles the sampling of one level and runs it in a loop.

    Offsets and attention weights are computed in float32 whatever `dtype` is, because a bfloat16
    location is off by whole pixels.
    """

    width: int
    num_heads: int = 8
    num_points: int = 4
    scan_levels: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        queries: jax.Array,
        reference_points: jax.Array,
        features: Sequence[jax.Array],
        valid_sizes: jax.Array | None = None,
    ) -> jax.Array:
        """Attends from every query [B, Q, D] to points around its reference point on every level.

        Args:
          reference_points: [Q, 2] or [B, Q, 2], (x, y) in [0, 1] of the valid area.
          features: for each level [B, H_l, W_l, D].
          valid_sizes: [B, levels, 2] int32 (height, width) of each level's valid area; None: all.
        """
        zeros = nn.initializers.zeros
        dense = {"dtype": self.dtype, "kernel_init": nn.initializers.xavier_uniform()}
        batch, num_queries, _ = queries.shape
        points = (batch, num_queries, self.num_heads, len(features), self.num_points)

        offsets_init = compass_offsets(*points[2:]).reshape(-1)
        # TPUs multiply float32 matrices in bfloat16 unless told otherwise.
        exact = {"dtype": jnp.float32, "precision": jax.lax.Precision.HIGHEST}
        offsets = Dense(
            offsets_init.size,
            kernel_init=zeros,
            bias_init=lambda key, shape, dtype: jnp.asarray(offsets_init, dtype).reshape(shape),
            name="sampling_offsets",
            **exact,
        )(queries).reshape(*points, 2)
        weights = Dense(
            math.prod(points[2:]), kernel_init=zeros, name="attention_weights", **exact
        )(queries)
        weights = jax.nn.softmax(weights.reshape(*points[:3], -1), axis=-1).reshape(points)

        if valid_sizes is None:
            sizes = np.array([[f.shape[2], f.shape[1]] for f in features], np.float32)
        else:  # [B, 1, 1, levels, 2]
            sizes = valid_sizes[:, None, None, :, ::-1].astype(jnp.float32)
        reference_points = jnp.broadcast_to(reference_points, (batch, num_queries, 2))
        locations = reference_points[:, :, None, None, None] + offsets / sizes[..., None, :]

        value_projection = Dense(self.width, name="value_projection", **dense)
        split = (self.num_heads, self.width // self.num_heads)
        if self.scan_levels:
            tokens = [f.reshape(batch, -1, f.shape[-1]) for f in features]
            bounds = np.cumsum([t.shape[1] for t in tokens])[:-1]
            projected = value_projection(jnp.concatenate(tokens, axis=1))
            projected = jnp.split(projected, bounds, axis=1)
        else:
            projected = [value_projection(f) for f in features]
        maps = zip(projected, features, strict=True)
        values = [p.reshape(*f.shape[:3], *split) for p, f in maps]
        output = multi_scale_deformable_attention(
            values, locations, weights, valid_sizes, scan_levels=self.scan_levels
        )
        return Dense(self.width, name="output_projection", **dense)(output)
