"""How the image tower of CLIP turns pixels into tokens: CLIP's own patches, or convolutions."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax

from concat_jax.models.backbones.resnet import ResNet

# Channels of the hybrid's first stage: enough for pictures of a few dozen pixels.
RESNET_STEM_WIDTH = 16


class _Stem(nn.Module):
    """[B, H, W, 3] -> [B, H/p, W/p, D], p the patch size and D the width."""

    patch_size: int
    width: int
    dtype: Any


class PatchStem(_Stem):
    """CLIP's patch embedding as one matrix product."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        p = self.patch_size
        batch, height, width, channels = images.shape
        patches = images.reshape(batch, height // p, p, width // p, p, channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(batch, height // p, width // p, p * p * channels)
        return nn.Dense(self.width, use_bias=False, dtype=self.dtype, name="projection")(patches)


class ConvStem(_Stem):
    """Stride-2 3x3 convolutions down to the patch stride.

    Xiao et al. 2021, "Early Convolutions Help Transformers See Better", section 4: channels double
    to the tower's width and a last 1x1 convolution follows. GroupNorm stands for their BatchNorm,
    since a contrastive batch must not leak between its members.
    """

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        steps = self.patch_size.bit_length() - 1
        for step in range(steps):
            channels = max(8, self.width >> (steps - 1 - step))
            x = nn.Conv(channels, (3, 3), strides=2, padding=1, use_bias=False, dtype=self.dtype)(x)
            x = nn.GroupNorm(num_groups=math.gcd(channels, 8), dtype=self.dtype)(x)
            x = nn.relu(x)
        return nn.Dense(self.width, dtype=self.dtype, name="projection")(x)


class ResNetStem(_Stem):
    """First stages of a small ResNet down to the patch stride.

    The hybrid of Dosovitskiy et al. 2021, section 3.1. Its `trunk` has the names of
    `concat_jax.models.backbones.resnet`, so that a segmentor's backbone can start from it.
    """

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        stages = self.patch_size.bit_length() - 1  # strides 2, 4, 8, 16
        trunk = ResNet(
            stage_sizes=(1,) * stages,
            width=RESNET_STEM_WIDTH,
            block="basic",
            norm="group",
            stem="small",
            num_groups=8,
            dtype=self.dtype,
            name="trunk",
        )
        return nn.Dense(self.width, dtype=self.dtype, name="projection")(trunk(images)[-1])


STEMS = {"patch": PatchStem, "conv": ConvStem, "resnet": ResNetStem}
