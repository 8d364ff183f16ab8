"""Pixel decoder of Mask2Former: a deformable-attention encoder over three scales and an FPN step.

Source: Mask2Former `mask2former/modeling/pixel_decoder/msdeformattn.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.models.ops.convolution import square_conv
from concat_jax.models.ops.deformable_attention import MultiScaleDeformableAttention
from concat_jax.models.ops.layers_in_turn import run_in_turn
from concat_jax.models.ops.linear import Dense, relu
from concat_jax.models.ops.position_encoding import sine_position_encoding
from concat_jax.models.ops.valid_area import resize_within, statistics_mask, valid_size, zero_beyond

# PyTorch's default for LayerNorm and GroupNorm; published weights assume it.
NORM_EPSILON = 1e-5
# The encoder works on the strides 32, 16 and 8; stride 4 enters at the FPN step only.
NUM_LEVELS = 3

_fpn_init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")


def reference_grid(
    height: int, width: int, size: jax.Array | None = None
) -> np.ndarray | jax.Array:
    """Pixel centres of a map in [0, 1]: [height * width, 2] float32, (x, y), row by row.

    With valid areas `size` [B, 2] in units of those: [B, height * width, 2], over 1 beyond.
    """
    x = (np.arange(width, dtype=np.float32) + 0.5) / width
    y = (np.arange(height, dtype=np.float32) + 0.5) / height
    grid = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    if size is None:
        return grid
    return grid * np.asarray([width, height], np.float32) / size[:, None, ::-1].astype(jnp.float32)


def _split_levels(tokens: jax.Array, sizes: Sequence[tuple[int, int]]) -> list[jax.Array]:
    """Maps [B, H_l, W_l, D] of tokens [B, S, D], the levels of `sizes` one after another."""
    bounds = np.cumsum([height * width for height, width in sizes])[:-1]
    return [
        level.reshape(len(tokens), *size, tokens.shape[-1])
        for level, size in zip(jnp.split(tokens, bounds, axis=1), sizes, strict=True)
    ]


class EncoderLayer(nn.Module):
    """Deformable self-attention over all scales, then a feed-forward layer, post-norm."""

    width: int
    num_heads: int
    num_points: int
    ffn_width: int
    scan_levels: bool = False
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
        levels = _split_levels(tokens, sizes)
        attended = MultiScaleDeformableAttention(
            width=self.width,
            num_heads=self.num_heads,
            num_points=self.num_points,
            scan_levels=self.scan_levels,
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
      scan_layers: compile one encoder layer and run it in a loop, see `run_in_turn`.
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
    scan_layers: bool = False
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
        dense = {"dtype": self.dtype}
        norm = {"num_groups": self.num_groups, "epsilon": NORM_EPSILON, "dtype": self.dtype}
        level_embedding = self.param(
            "level_embedding", nn.initializers.normal(1.0), (NUM_LEVELS, self.width)
        )
        tokens, positions, references, sizes, valid_sizes = [], [], [], [], []
        for level, feature in enumerate(reversed(features[1:])):
            batch, height, width, _ = feature.shape
            valid = valid_size(image_size, self.stride * 2 ** (NUM_LEVELS - level))
            projected = Dense(
                self.width,
                kernel_init=nn.initializers.xavier_uniform(),
                name=f"input_projection_{level}",
                **dense,
            )(feature)
            projected = nn.GroupNorm(name=f"input_norm_{level}", **norm)(
                projected, mask=statistics_mask(projected, valid)
            )
            encoding = sine_position_encoding(height, width, self.width, valid)
            encoding = encoding.reshape(*encoding.shape[:-3], -1, self.width)
            references.append(reference_grid(height, width, valid))
            tokens.append(projected.reshape(batch, height * width, self.width))
            embedding = level_embedding[level]
            if jax.sharding.get_abstract_mesh().size > 1:
                # Else every device would send the others a gradient of [h * w, D] before the sum.
                embedding = jnp.broadcast_to(embedding, (batch, *encoding.shape[-2:]))
            positions.append(encoding + embedding)
            sizes.append((height, width))
            valid_sizes.append(valid)

        layer_class = nn.remat(EncoderLayer, static_argnums=(4,)) if self.remat else EncoderLayer
        encoded = jnp.concatenate(tokens, axis=1)
        positions = jnp.concatenate(positions, axis=-2)
        if image_size is None:
            references, level_sizes = np.concatenate(references, axis=0), None
        else:
            references = jnp.concatenate(references, axis=1)
            level_sizes = jnp.stack(valid_sizes, axis=1)
        layers = [
            layer_class(
                width=self.width,
                num_heads=self.num_heads,
                num_points=self.num_points,
                ffn_width=self.ffn_width,
                scan_levels=self.scan_layers,
                dtype=self.dtype,
                name=f"layer_{index}",
            )
            for index in range(self.num_layers)
        ]

        def encode(layers: Sequence[Callable], tokens: jax.Array) -> tuple[jax.Array, None]:
            (layer,) = layers
            return layer(tokens, positions, references, tuple(sizes), level_sizes), None

        rounds = [[layer] for layer in layers]
        encoded, _ = run_in_turn(self, rounds, encode, encoded, scan=self.scan_layers)
        scales = _split_levels(encoded, sizes)

        finest = features[0]
        valid = valid_size(image_size, self.stride)
        lateral = Dense(
            self.width, use_bias=False, kernel_init=_fpn_init, name="lateral_projection", **dense
        )(finest)
        lateral = nn.GroupNorm(name="lateral_norm", **norm)(
            lateral, mask=statistics_mask(lateral, valid)
        )
        upsampled = resize_within(scales[-1], valid_sizes[-1], *finest.shape[1:3], valid)
        merged = zero_beyond(lateral + upsampled, valid)
        merged = square_conv(self.width, 3, 1, kernel_init=_fpn_init, name="output_conv", **dense)(
            merged
        )
        merged = nn.GroupNorm(name="output_norm", **norm)(
            merged, mask=statistics_mask(merged, valid)
        )
        mask_features = Dense(self.width, kernel_init=_fpn_init, name="mask_projection", **dense)(
            relu(merged)
        )
        return zero_beyond(mask_features, valid), scales
