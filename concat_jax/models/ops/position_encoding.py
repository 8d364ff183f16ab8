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


def sine_position_encoding(
    height: int, width: int, channels: int, size: jax.Array | None = None
) -> np.ndarray | jax.Array:
    """Fixed encoding [height, width, channels] float32 of a grid; y in the first half, then x.

    Of static shapes only, so it is computed in numpy and becomes a constant of the compiled
    program. With the valid areas `size` [B, 2] int32 of padded grids, traced, it has a batch axis
    before, and is on each valid area that of a grid of its size.
    """
    if channels % 4:
        raise ValueError(
            f"The position encoding needs a channel count that is a multiple of 4, not {channels}."
        )
    half = channels // 2
    wavelengths = TEMPERATURE ** (2 * (np.arange(half) // 2) / half)
    xp, batch = (np, ()) if size is None else (jnp, (len(size),))

    def encode_axis(axis: int, length: int) -> np.ndarray | jax.Array:
        if size is None:
            positions = np.arange(1, length + 1) / (length + EXTENT_EPSILON) * (2 * math.pi)
            angles = positions[:, None] / wavelengths
        else:
            places = np.arange(1, length + 1, dtype=np.float32)
            positions = places / (size[:, axis, None] + EXTENT_EPSILON)
            angles = positions[..., None] * (2 * math.pi / wavelengths).astype(np.float32)
        pairs = xp.stack([xp.sin(angles[..., 0::2]), xp.cos(angles[..., 1::2])], axis=-1)
        return pairs.reshape(*batch, length, half).astype(np.float32)

    shape = (*batch, height, width, half)
    y = xp.broadcast_to(encode_axis(0, height)[..., :, None, :], shape)
    x = xp.broadcast_to(encode_axis(1, width)[..., None, :, :], shape)
    return xp.concatenate([y, x], axis=-1)
