"""Pixel decoder of Mask2Former: a deformable-attention encoder over three scales and an FPN step.

Source: Mask2Former `mask2former/modeling/pixel_decoder/msdeformattn.py`.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.models.ops.convolution import square_conv
from concat_jax.models.ops.deformable_attention import MultiScaleDeformableAttention
from concat_jax.models.ops.linear import Dense, relu
from concat_jax.models.ops.position_encoding import (
    sine_position_encoding,
    valid_sine_position_encoding,
)
from concat_jax.models.ops.valid_area import resize_within, statistics_mask, valid_size, zero_beyond

# PyTorch's default for LayerNorm and GroupNorm; published weights assume it.
NORM_EPSILON = 1e-5
# The encoder works on the strides 32, 16 and 8; stride 4 enters at the FPN step only.
NUM_LEVELS = 3

_fpn_init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")


def resize_bilinear(features: jax.Array, height: int, width: int) -> jax.Array:
    """[B, H, W, C] resized without antialiasing, torch's `interpolate(align_corners=False)`."""
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


def valid_reference_grid(size: jax.Array, height: int, width: int) -> jax.Array:
    """`reference_grid` in units of each image's valid area: [B, 2] -> [B, height * width, 2].

    (x, y) float32, over 1 beyond the valid area.
    """
    centres = reference_grid(height, width) * np.asarray([width, height], np.float32)
    return centres / size[:, None, ::-1].astype(jnp.float32)


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
        valid_sizes: jax.Array | None = None,
    ) -> jax.Array:
        """One layer on tokens [B, S, D], the levels of `sizes` one after another.

        Args:
          positions: [S, D] or [B, S, D] position plus level encoding.
          reference_points: [S, 2] or [B, S, 2].
          valid_sizes: [B, levels, 2] int32 (height, width) of each level's valid area, beyond which
            no value is read and in units of which the points are; or None.
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
        )(tokens + positions.astype(tokens.dtype), reference_points, levels, valid_sizes)
        norm = {"epsilon": NORM_EPSILON, "dtype": self.dtype}
        xavier = nn.initializers.xavier_uniform()
        dense = {"dtype": self.dtype, "kernel_init": xavier}
        tokens = nn.LayerNorm(name="self_attention_norm", **norm)(tokens + attended)
        hidden = relu(Dense(self.ffn_width, name="ffn_in", **dense)(tokens))
        hidden = Dense(self.width, name="ffn_out", **dense)(hidden)
        return nn.LayerNorm(name="ffn_norm", **norm)(tokens + hidden)


class PixelDecoder(nn.Module):
    """MSDeformAttnPixelDecoder of `width` D.

    Attributes:
      num_groups: groups of GroupNorm; must divide `width`.
      remat: recompute each encoder layer in the backward pass instead of storing it.
      stride: pixels between neighbours of the finest map, which tells the valid area of padded
        images; 4 for the backbones of the publication.
    """

    width: int = 256
    num_layers: int = 6
    num_heads: int = 8
    num_points: int = 4
    ffn_width: int = 1024
    num_groups: int = 32
    remat: bool = False
    stride: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, features: Sequence[jax.Array], image_size: jax.Array | None = None
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Mask features [B, H/4, W/4, D] and scales [B, H/s, W/s, D], s = 32, 16, 8.

        `features` are four maps, s = 4, 8, 16, 32 (times `stride` / 4). For `image_size` [B, 2] the
        result is that of the unpadded image; beyond it mask features are zero, the scales without
        meaning.
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
        tokens, positions, references, sizes, valid_sizes = [], [], [], [], []
        for level, feature in enumerate(reversed(features[1:])):
            batch, height, width, _ = feature.shape
            valid = None
            if image_size is not None:
                valid = valid_size(image_size, self.stride * 2 ** (NUM_LEVELS - level))
                valid_sizes.append(valid)
            projected = Dense(
                self.width,
                kernel_init=nn.initializers.xavier_uniform(),
                name=f"input_projection_{level}",
                **dense,
            )(feature)
            projected = nn.GroupNorm(name=f"input_norm_{level}", **norm)(
                projected, mask=statistics_mask(projected, valid)
            )
            if valid is None:
                encoding = sine_position_encoding(height, width, self.width)
                encoding = encoding.reshape(-1, self.width)
                references.append(reference_grid(height, width))
            else:
                encoding = valid_sine_position_encoding(valid, height, width, self.width)
                encoding = encoding.reshape(batch, -1, self.width)
                references.append(valid_reference_grid(valid, height, width))
            tokens.append(projected.reshape(batch, height * width, self.width))
            positions.append(encoding + level_embedding[level])
            sizes.append((height, width))

        layer_class = nn.remat(EncoderLayer, static_argnums=(4,)) if self.remat else EncoderLayer
        encoded = jnp.concatenate(tokens, axis=1)
        positions = jnp.concatenate(positions, axis=-2)
        if image_size is None:
            references, level_sizes = np.concatenate(references, axis=0), None
        else:
            references = jnp.concatenate(references, axis=1)
            level_sizes = jnp.stack(valid_sizes, axis=1)
        for index in range(self.num_layers):
            encoded = layer_class(
                width=self.width,
                num_heads=self.num_heads,
                num_points=self.num_points,
                ffn_width=self.ffn_width,
                dtype=self.dtype,
                name=f"layer_{index}",
            )(encoded, positions, references, tuple(sizes), level_sizes)
        bounds = np.cumsum([height * width for height, width in sizes])[:-1]
        scales = [
            scale.reshape(scale.shape[0], *size, self.width)
            for scale, size in zip(jnp.split(encoded, bounds, axis=1), sizes, strict=True)
        ]

        finest = features[0]
        valid = None if image_size is None else valid_size(image_size, self.stride)
        lateral = Dense(
            self.width, use_bias=False, kernel_init=_fpn_init, name="lateral_projection", **dense
        )(finest)
        lateral = nn.GroupNorm(name="lateral_norm", **norm)(
            lateral, mask=statistics_mask(lateral, valid)
        )
        if valid is None:
            upsampled = resize_bilinear(scales[-1], *finest.shape[1:3])
        else:
            upsampled = resize_within(scales[-1], valid_sizes[-1], *finest.shape[1:3], valid)
        merged = zero_beyond(lateral + upsampled, valid)
        output_conv = square_conv(
            self.width, 3, 1, kernel_init=_fpn_init, name="output_conv", **dense
        )
        merged = output_conv(merged)
        merged = nn.GroupNorm(name="output_norm", **norm)(
            merged, mask=statistics_mask(merged, valid)
        )
        merged = relu(merged)
        mask_features = Dense(self.width, kernel_init=_fpn_init, name="mask_projection", **dense)(
            merged
        )
        return zero_beyond(mask_features, valid), scales
