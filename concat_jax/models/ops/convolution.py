"""Square convolutions as torch pads them, with a weight gradient that CPUs compute quickly."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# Input elements of a band of rows that a CPU computes at once. XLA's CPU convolution takes three
# times as long for the weight gradient of a map eight times this size.
BAND_ELEMENTS = 2**19
_LAYOUT = ("NHWC", "HWIO", "NHWC")


def depthwise_by_shifts(
    inputs: jax.Array, kernel: jax.Array, row_padding: int | None = None
) -> jax.Array:
    """[B, H, W, C] with one filter a channel, kernel [k, k, 1, C] with odd k; padded with zeros.

    As k * k shifted copies, scaled and added. `row_padding` is k // 2 unless given.
    """
    side = len(kernel)
    edge = side // 2
    rows = edge if row_padding is None else row_padding
    padded = jnp.pad(inputs, ((0, 0), (rows, rows), (edge, edge), (0, 0)))
    height, width = (length - 2 * edge for length in padded.shape[1:3])
    return sum(
        padded[:, row : row + height, column : column + width] * kernel[row, column, 0]
        for row in range(side)
        for column in range(side)
    )


def by_bands(function: Callable[[jax.Array], jax.Array], inputs: jax.Array, edge: int) -> jax.Array:
    """What `function` makes of [B, H, W, C] with `edge` rows of zeros above and below it.

    It maps [B, r + 2 edge, W, C] to [B, r, W, ...], each row of which is made of the 2 edge + 1
    about it. A CPU runs it on bands of rows that fit into its cache, and again in the backward
    pass.
    """

    def whole(inputs: jax.Array) -> jax.Array:
        return function(jnp.pad(inputs, ((0, 0), (edge, edge), (0, 0), (0, 0))))

    def in_bands(inputs: jax.Array) -> jax.Array:
        batch, height, *rest = inputs.shape
        rows = max(edge, 1, BAND_ELEMENTS * height // inputs.size)
        rows = next(rows for rows in range(min(rows, height), height + 1) if height % rows == 0)
        bands = jnp.moveaxis(inputs.reshape(batch, height // rows, rows, *rest), 1, 0)
        beyond = jnp.zeros_like(bands[:1, :, :edge])
        above = jnp.concatenate([beyond, bands[:-1, :, rows - edge :]])
        below = jnp.concatenate([bands[1:, :, :edge], beyond])

        @jax.checkpoint
        def one(band: tuple[jax.Array, ...]) -> jax.Array:
            return function(jnp.concatenate(band, axis=1))

        outputs = jnp.moveaxis(jax.lax.map(one, (above, bands, below)), 0, 1)
        return outputs.reshape(batch, height, *outputs.shape[3:])

    return jax.lax.platform_dependent(inputs, cpu=in_bands, default=whole)


def _plain(inputs: jax.Array, kernel: jax.Array, settings: tuple) -> jax.Array:
    """[B, H, W, C] with a kernel [h, w, C, D]; settings are (strides, padding, precision)."""
    strides, padding, precision = settings
    return jax.lax.conv_general_dilated(
        inputs, kernel, strides, padding, dimension_numbers=_LAYOUT, precision=precision
    )


_convolve = jax.custom_vjp(_plain, nondiff_argnums=(2,))


def _convolve_backward(
    settings: tuple, residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    inputs, kernel = residuals
    (input_gradient,) = jax.vjp(lambda x: _plain(x, kernel, settings), inputs)[1](gradient)

    def whole(inputs: jax.Array, gradient: jax.Array) -> jax.Array:
        return jax.vjp(lambda k: _plain(inputs, k, settings), kernel)[1](gradient)[0]

    def in_bands(inputs: jax.Array, gradient: jax.Array) -> jax.Array:
        (row_stride, _), (row_padding, column_padding), precision = settings
        band_settings = (settings[0], ((0, 0), column_padding), precision)
        height, out_height = inputs.shape[1], gradient.shape[1]
        num_bands = -(-height * inputs.shape[2] * inputs.shape[3] // BAND_ELEMENTS)
        size = -(-out_height // num_bands)
        padded = jnp.pad(inputs, ((0, 0), row_padding, (0, 0), (0, 0)))
        total = jnp.zeros(kernel.shape, gradient.dtype)
        for first in range(0, out_height, size):
            last = min(first + size, out_height)
            rows = slice(first * row_stride, (last - 1) * row_stride + kernel.shape[0])
            band = functools.partial(_plain, padded[:, rows], settings=band_settings)
            total += jax.vjp(band, kernel)[1](gradient[:, first:last])[0]
        return total

    kernel_gradient = jax.lax.platform_dependent(inputs, gradient, cpu=in_bands, default=whole)
    return input_gradient, kernel_gradient


_convolve.defvjp(lambda x, k, how: (_convolve(x, k, how), (x, k)), _convolve_backward)


def _conv_general_dilated(
    inputs: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any
) -> jax.Array:
    """`lax.conv_general_dilated` as flax's Conv calls it; reverse mode only."""
    padding = tuple(tuple(sides) for sides in padding)
    return _convolve(inputs, kernel, (tuple(strides), padding, options["precision"]))


def square_conv(
    width: int, size: int, stride: int, *, dtype: Any, kernel_init: Any, name: str
) -> nn.Conv:
    """A size x size convolution without bias, padded by size // 2 on every side as in torch."""
    return nn.Conv(
        width,
        (size, size),
        strides=(stride, stride),
        padding=((size // 2, size // 2),) * 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=kernel_init,
        conv_general_dilated=_conv_general_dilated,
        name=name,
    )
