"""ConvNeXt image backbone (Liu et al., arXiv 2201.03545), as timm `models/convnext.py` has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from concat_jax.models.ops.convolution import depthwise_by_shifts
from concat_jax.models.ops.layers_in_turn import run_in_turn
from concat_jax.models.ops.linear import Dense, gelu
from concat_jax.models.ops.transformer_block import layer_norm
from concat_jax.models.ops.valid_area import valid_size, zero_beyond

NORM_EPSILON = 1e-6  # timm's
_KERNEL = 7
_INITIAL_LAYER_SCALE = 1e-6
_init = nn.initializers.truncated_normal(0.02)


def _merge(
    features: jax.Array, width: int, side: int, size: jax.Array | None, dtype: Any, name: str
) -> jax.Array:
    """Squares to pixels by a convolution: [B, H, W, C] -> [B, ceil(H/side), ceil(W/side), width].

    What lies beyond `size` is read as zero.
    """
    missing = ((0, -length % side) for length in features.shape[1:3])
    features = jnp.pad(zero_beyond(features, size), ((0, 0), *missing, (0, 0)))
    convolution = nn.Conv(
        width,
        (side, side),
        strides=side,
        padding="VALID",
        kernel_init=_init,
        dtype=dtype,
        name=name,
    )
    return convolution(features)


class DepthwiseConv(nn.Module):
    """A 7x7 convolution of every channel by itself, zero-padded: [B, H, W, C] -> the same."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        width = features.shape[-1]
        kernel = self.param("kernel", _init, (_KERNEL, _KERNEL, 1, width)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (width,)).astype(self.dtype)
        features = features.astype(self.dtype)
        # XLA's CPU backend has no fast convolution of many groups.
        return (
            jax.lax.platform_dependent(features, kernel, cpu=depthwise_by_shifts, default=_grouped)
            + bias
        )


def _grouped(features: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        features,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=features.shape[-1],
    )


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, norm, MLP, scaled and added: [B, H, W, C] -> the same."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array, size: jax.Array | None = None) -> jax.Array:
        """`size` [B, 2] is the valid area, beyond which zeros are read."""
        width = features.shape[-1]
        hidden = DepthwiseConv(self.dtype, name="conv")(zero_beyond(features, size))
        hidden = layer_norm(self.dtype, "norm", NORM_EPSILON)(hidden)
        hidden = Dense(4 * width, kernel_init=_init, dtype=self.dtype, name="fc1")(hidden)
        hidden = gelu(hidden)
        hidden = Dense(width, kernel_init=_init, dtype=self.dtype, name="fc2")(hidden)
        initial = nn.initializers.constant(_INITIAL_LAYER_SCALE)
        scale = self.param("layer_scale", initial, (width,))
        return features + hidden * scale.astype(self.dtype)


class ConvNeXt(nn.Module):
    """ConvNeXt returning the feature map of every stage, before any last norm.

    Attributes:
      stage_sizes: number of blocks of each stage; (3, 3, 27, 3) is ConvNeXt-B and -L.
      width: channels of the first stage, which double from stage to stage; 128 is B, 192 L.
      remat: recompute each block in the backward pass instead of storing it.
      scan_layers: compile one of a stage's blocks and run it in a loop, see `run_in_turn`.
    """

    stage_sizes: Sequence[int] = (3, 3, 27, 3)
    width: int = 128
    remat: bool = False
    scan_layers: bool = False
    dtype: Any = jnp.float32
    stride = 4  # pixels between neighbours of the first map

    @nn.compact
    def __call__(self, images: jax.Array, image_size: jax.Array | None = None) -> list[jax.Array]:
        """A map [B, ceil(H/s), ceil(W/s), C_s] a stage, s = 4, 8, 16, 32.

        `image_size` [B, 2] int32 (height, width) is each image's valid area; None where nothing is
        padded.
        """
        features = _merge(
            images.astype(self.dtype), self.width, 4, image_size, self.dtype, "stem_conv"
        )
        features = layer_norm(self.dtype, "stem_norm", NORM_EPSILON)(features)
        block_class = nn.remat(ConvNeXtBlock) if self.remat else ConvNeXtBlock
        outputs = []
        for stage, num_blocks in enumerate(self.stage_sizes):
            if stage:
                size = valid_size(image_size, 2 ** (stage + 1))
                features = layer_norm(self.dtype, f"stage{stage}_merge_norm", NORM_EPSILON)(
                    features
                )
                width, name = self.width * 2**stage, f"stage{stage}_merge_conv"
                features = _merge(features, width, 2, size, self.dtype, name)
            size = valid_size(image_size, 2 ** (stage + 2))

            def run(blocks: Sequence[Callable], features: jax.Array, size=size) -> tuple:
                return blocks[0](features, size), None

            names = (f"stage{stage}_block{index}" for index in range(num_blocks))
            rounds = [[block_class(self.dtype, name=name)] for name in names]
            features, _ = run_in_turn(self, rounds, run, features, scan=self.scan_layers)
            outputs.append(features)
        return outputs
