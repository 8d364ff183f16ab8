"""Sine position encoding of image grids.

Source: Mask2Former `mask2former/modeling/transformer_decoder/position_encoding.py`
(`PositionEmbeddingSine(normalize=True)`), itself from DETR (arXiv 2005.12872).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

# The encoding's longest wavelength, as in "Attention is all you need".
TEMPERATURE = 10000.0
# Keeps the division by the extent defined; part of the published encoding.
EXTENT_EPSILON = 1e-6


def _wavelengths(channels: int, temperature: float) -> np.ndarray:
    """[channels / 2] divisors of the angles of one axis; `channels` must be a multiple of 4."""
    if channels % 4:
        raise ValueError(
            f"The position encoding needs a channel count that is a multiple of 4, not {channels}."
        )
    half = channels // 2
    return temperature ** (2 * (np.arange(half) // 2) / half)


def sine_position_encoding(
    height: int, width: int, channels: int, temperature: float = TEMPERATURE
) -> np.ndarray:
    """Fixed encoding [height, width, channels] float32 of a grid; y in the first half, then x.

    It depends on static shapes only, so it is computed in numpy and becomes a constant of the
    compiled program. `temperature` is the ratio of the longest to the shortest wavelength.
    """
    wavelengths = _wavelengths(channels, temperature)
    half = channels // 2

    def encode_axis(size: int) -> np.ndarray:
        positions = np.arange(1, size + 1) / (size + EXTENT_EPSILON) * (2 * math.pi)
        angles = positions[:, None] / wavelengths
        pairs = np.stack([np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])], axis=-1)
        return pairs.reshape(size, half).astype(np.float32)

    encoding = np.empty((height, width, channels), np.float32)
    encoding[..., :half] = encode_axis(height)[:, None]
    encoding[..., half:] = encode_axis(width)[None, :]
    return encoding


def valid_sine_position_encoding(
    size: jax.Array, height: int, width: int, channels: int, temperature: float = TEMPERATURE
) -> jax.Array:
    """Encoding [B, height, width, channels] of padded grids: on the valid area that of its size.

    `size` [B, 2] int32 (height, width) is each valid area, traced.
    """
    wavelengths = _wavelengths(channels, temperature)
    half = channels // 2

    def encode_axis(extent: jax.Array, length: int) -> jax.Array:
        places = np.arange(1, length + 1, dtype=np.float32)
        positions = places / (extent[:, None] + EXTENT_EPSILON)
        angles = positions[..., None] * (2 * math.pi / wavelengths).astype(np.float32)
        pairs = jnp.stack([jnp.sin(angles[..., 0::2]), jnp.cos(angles[..., 1::2])], axis=-1)
        return pairs.reshape(-1, length, half)

    shape = (size.shape[0], height, width, half)
    y = jnp.broadcast_to(encode_axis(size[:, 0], height)[:, :, None], shape)
    x = jnp.broadcast_to(encode_axis(size[:, 1], width)[:, None, :], shape)
    return jnp.concatenate([y, x], axis=-1)
