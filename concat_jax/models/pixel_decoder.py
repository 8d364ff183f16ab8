"""Pixel decoder of Mask2Former: a deformable-attention encoder over three scales and an FPN step.

Source: Mask2Former `mask2former/modeling/pixel_decoder/msdeformattn.py`.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.models.deformable_attention import MultiScaleDeformableAttention
from concat_jax.models.position_encoding import sine_position_encoding

# PyTorch's default for LayerNorm and GroupNorm; published weights assume it.
NORM_EPSILON = 1e-5
# The encoder works on the strides 32, 16 and 8; stride 4 enters at the FPN step only.
NUM_LEVELS = 3

_fpn_init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")


def resize_bilinear(features: jax.Array, height: int, width: int) -> jax.Array:
    """Bilinear resize without antialiasing, torch's `interpolate(align_corners=False)`.

    Args:
        features: [B, H, W, C].
        height, width: size of the result.

    Returns:
        [B, height, width, C] in the type of `features`.
    """
    in_height, in_width = features.shape[1:3]
    ratio = in_height // height
    if ratio > 0 and ratio % 2 == 0 and (in_height, in_width) == (ratio * height, ratio * width):
        # Every output pixel sits in the middle of four input pixels: their mean, read by slices.
        first, second = (slice(ratio // 2 - 1 + i, None, ratio) for i in (0, 1))
        top = features[:, first, first] + features[:, first, second]
        bottom = features[:, second, first] + features[:, second, second]
        return (top + bottom) * 0.25
    shape = (features.shape[0], height, width, features.shape[3])
    return jax.image.resize(features, shape, "bilinear", antialias=False)


def reference_grid(height: int, width: int) -> np.ndarray:
    """Pixel centres of a map in [0, 1]: [height * width, 2] float32, (x, y), row by row."""
    x = (np.arange(width, dtype=np.float32) + 0.5) / width
    y = (np.arange(height, dtype=np.float32) + 0.5) / height
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


class EncoderLayer(nn.Module):
    """Deformable self-attention over all scales, then a feed-forward layer, post-norm."""

    width: int
    num_heads: int
    num_points: int
    ffn_width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        reference_points: jax.Array,
        sizes: Sequence[tuple[int, int]],
    ) -> jax.Array:
        """One layer.

        Args:
            tokens: [B, S, D], the levels of `sizes` one after another.
            positions: [S, D] position plus level encoding.
            reference_points: [S, 2].
            sizes: (height, width) of each level.

        Returns:
            [B, S, D].
        """
        bounds = np.cumsum([height * width for height, width in sizes])[:-1]
        levels = [
            level.reshape(level.shape[0], height, width, self.width)
            for level, (height, width) in zip(jnp.split(tokens, bounds, axis=1), sizes, strict=True)
        ]
        attended = MultiScaleDeformableAttention(
            width=self.width,
            num_heads=self.num_heads,
            num_levels=len(sizes),
            num_points=self.num_points,
            dtype=self.dtype,
            name="self_attention",
        )(tokens + positions.astype(tokens.dtype), reference_points, levels)
        norm = {"epsilon": NORM_EPSILON, "dtype": self.dtype}
        xavier = nn.initializers.xavier_uniform()
        dense = {"dtype": self.dtype, "kernel_init": xavier}
        tokens = nn.LayerNorm(name="self_attention_norm", **norm)(tokens + attended)
        hidden = nn.relu(nn.Dense(self.ffn_width, name="ffn_in", **dense)(tokens))
        hidden = nn.Dense(self.width, name="ffn_out", **dense)(hidden)
        return nn.LayerNorm(name="ffn_norm", **norm)(tokens + hidden)


class PixelDecoder(nn.Module):
    """MSDeformAttnPixelDecoder.

    Attributes:
        width: D of everything it returns.
        num_layers, num_heads, num_points: of the deformable encoder.
        ffn_width: hidden width of the encoder's feed-forward layers.
        num_groups: groups of GroupNorm; must divide `width`.
        remat: recompute each encoder layer in the backward pass instead of storing it.
        dtype: compute type; parameters are float32.
    """

    width: int = 256
    num_layers: int = 6
    num_heads: int = 8
    num_points: int = 4
    ffn_width: int = 1024
    num_groups: int = 32
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Sequence[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        """Mask features and the three scales that the transformer decoder attends to.

        Args:
            features: four maps [B, H/s, W/s, C_s] for s = 4, 8, 16, 32.

        Returns:
            mask_features [B, H/4, W/4, D] and a list of [B, H/s, W/s, D] for s = 32, 16, 8.

        Raises:
            ValueError: there are not four maps, or num_groups does not divide `width`.
        """
        if len(features) != NUM_LEVELS + 1:
            raise ValueError(
                f"The pixel decoder needs feature maps of strides 4, 8, 16 and 32 but got "
                f"{len(features)} maps; use a backbone that returns four."
            )
        if self.width % self.num_groups:
            raise ValueError(
                f"Pixel decoder width {self.width} is not divisible by num_groups "
                f"{self.num_groups}; change one of them."
            )
        dense = {"dtype": self.dtype}
        norm = {"num_groups": self.num_groups, "epsilon": NORM_EPSILON, "dtype": self.dtype}
        level_embedding = self.param(
            "level_embedding", nn.initializers.normal(1.0), (NUM_LEVELS, self.width)
        )
        tokens, positions, references, sizes = [], [], [], []
        for level, feature in enumerate(reversed(features[1:])):
            batch, height, width, _ = feature.shape
            projected = nn.Dense(
                self.width,
                kernel_init=nn.initializers.xavier_uniform(),
                name=f"input_projection_{level}",
                **dense,
            )(feature)
            projected = nn.GroupNorm(name=f"input_norm_{level}", **norm)(projected)
            encoding = sine_position_encoding(height, width, self.width).reshape(-1, self.width)
            tokens.append(projected.reshape(batch, height * width, self.width))
            positions.append(encoding + level_embedding[level])
            references.append(reference_grid(height, width))
            sizes.append((height, width))

        layer_class = nn.remat(EncoderLayer, static_argnums=(4,)) if self.remat else EncoderLayer
        encoded = jnp.concatenate(tokens, axis=1)
        positions = jnp.concatenate(positions, axis=0)
        references = np.concatenate(references, axis=0)
        for index in range(self.num_layers):
            encoded = layer_class(
                width=self.width,
                num_heads=self.num_heads,
                num_points=self.num_points,
                ffn_width=self.ffn_width,
                dtype=self.dtype,
                name=f"layer_{index}",
            )(encoded, positions, references, tuple(sizes))
        bounds = np.cumsum([height * width for height, width in sizes])[:-1]
        scales = [
            scale.reshape(scale.shape[0], *size, self.width)
            for scale, size in zip(jnp.split(encoded, bounds, axis=1), sizes, strict=True)
        ]

        finest = features[0]
        lateral = nn.Dense(
            self.width, use_bias=False, kernel_init=_fpn_init, name="lateral_projection", **dense
        )(finest)
        lateral = nn.GroupNorm(name="lateral_norm", **norm)(lateral)
        merged = lateral + resize_bilinear(scales[-1], *finest.shape[1:3])
        merged = nn.Conv(
            self.width,
            (3, 3),
            padding=((1, 1), (1, 1)),
            use_bias=False,
            kernel_init=_fpn_init,
            name="output_conv",
            **dense,
        )(merged)
        merged = nn.relu(nn.GroupNorm(name="output_norm", **norm)(merged))
        mask_features = nn.Dense(
            self.width, kernel_init=_fpn_init, name="mask_projection", **dense
        )(merged)
        return mask_features, scales
