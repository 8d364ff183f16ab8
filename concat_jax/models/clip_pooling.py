"""Convolutional image towers of CLIP: a backbone, and what makes embeddings of its last map.

OpenAI's ResNets end in attention (`openai/CLIP clip/model.py` AttentionPool2d), open_clip's
ConvNeXts in a mean, a norm and a projection (`open_clip timm_model.py`). Over the pixels of a mask
instead of all of them, both are as in FC-CLIP (Yu et al., arXiv 2308.02487, section 3.3;
`bytedance/fc-clip fcclip/modeling/backbone/clip.py`).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from concat_jax.models.backbones.convnext import NORM_EPSILON, ConvNeXt
from concat_jax.models.backbones.resnet import BOTTLENECK_EXPANSION, ResNet
from concat_jax.models.ops.linear import gelu
from concat_jax.models.ops.transformer_block import layer_norm
from concat_jax.models.ops.valid_area import resize_within, valid_mask

# Pixels from one place of the last map to the next.
STRIDE = 32
PROJECTIONS = ("linear", "mlp")


def _weights(masks: jax.Array | None, features: jax.Array, size: jax.Array | None) -> jax.Array:
    """[B, N, h * w] bool, where to pool; N is 1 for the whole image."""
    batch, height, width, _ = features.shape
    inside = jnp.ones((batch, 1, height, width), bool)
    if size is not None:
        inside = valid_mask(size, height, width)[:, None]
    inside = inside if masks is None else inside & masks
    return inside.reshape(*inside.shape[:2], -1)


def masked_mean(features: jax.Array, where: jax.Array) -> jax.Array:
    """Means [B, N, C] float32 of [B, S, C] over the places of [B, N, S] bool; 0 over none."""
    where = where.astype(jnp.float32)
    weights = where / jnp.maximum(where.sum(axis=-1, keepdims=True), 1)
    return jnp.einsum(
        "bns,bsc->bnc", weights.astype(features.dtype), features, preferred_element_type=jnp.float32
    )


class AttentionPool(nn.Module):
    """A query that is the mean attends to the last map of a ResNet.

    Attributes:
      side: of the square grid of learned positions.
      num_heads: divides the channels of the map.
    """

    embed_dim: int
    side: int
    num_heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, features: jax.Array, masks: jax.Array | None = None, size: jax.Array | None = None
    ) -> jax.Array:
        """Embeddings [B, C] float32 of maps [B, h, w, W]; of `masks` [B, N, h, w] bool [B, N, C].

        Positions are resized to the map, bilinearly. Of masks the mean of the image takes no part
        beyond the query, as in FC-CLIP; the embedding of an empty one means nothing. `size` [B, 2]
        is the valid area of the map, None where nothing is padded.
        """
        batch, height, width, channels = features.shape
        initial = nn.initializers.normal(channels**-0.5)
        table = self.param("positions", initial, (1 + self.side**2, channels)).astype(self.dtype)
        grid = jnp.broadcast_to(
            table[1:].reshape(1, self.side, self.side, channels),
            (batch, self.side, self.side, channels),
        )
        own = None if size is None else jnp.full_like(size, self.side)
        positions = resize_within(grid, own, height, width, size).reshape(batch, -1, channels)
        values = features.astype(self.dtype).reshape(batch, -1, channels)
        whole = _weights(None, features, size)
        mean = masked_mean(values, whole).astype(self.dtype) + table[0]  # [B, 1, W]
        memory, where = values + positions, _weights(masks, features, size)
        if masks is None:
            memory = jnp.concatenate([mean, memory], axis=1)
            where = jnp.pad(where, ((0, 0), (0, 0), (1, 0)), constant_values=True)

        def project(x: jax.Array, name: str) -> jax.Array:  # [B, L, heads, W / heads]
            x = nn.Dense(channels, kernel_init=initial, dtype=self.dtype, name=name)(x)
            return x.reshape(*x.shape[:2], self.num_heads, -1)

        query = project(mean, "q_proj")
        key, value = project(memory, "k_proj"), project(memory, "v_proj")
        # One query an image serves all masks: they differ in where it may look.
        logits = jnp.einsum("bqhd,bshd->bhs", query, key, preferred_element_type=jnp.float32)
        logits = logits[:, None] * (channels // self.num_heads) ** -0.5  # [B, 1, heads, S]
        logits = jnp.where(where[:, :, None], logits, jnp.finfo(jnp.float32).min)
        attention = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        pooled = jnp.einsum("bnhs,bshd->bnhd", attention, value).reshape(batch, -1, channels)
        projection = nn.Dense(self.embed_dim, kernel_init=initial, dtype=self.dtype, name="c_proj")
        pooled = projection(pooled).astype(jnp.float32)
        return pooled[:, 0] if masks is None else pooled


class MeanPool(nn.Module):
    """The mean of the last map of a ConvNeXt, its norm and a projection.

    Attributes:
      projection: "linear", or "mlp" with a hidden layer of 2 C.
    """

    embed_dim: int
    projection: str = "linear"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, features: jax.Array, masks: jax.Array | None = None, size: jax.Array | None = None
    ) -> jax.Array:
        """As `AttentionPool`."""
        values = features.reshape(features.shape[0], -1, features.shape[-1])
        x = masked_mean(values, _weights(masks, features, size))
        x = layer_norm(self.dtype, "norm", NORM_EPSILON)(x)
        if self.projection == "mlp":
            x = nn.Dense(2 * self.embed_dim, dtype=self.dtype, name="fc1")(x)
            x = gelu(x)
            x = nn.Dense(self.embed_dim, use_bias=False, dtype=self.dtype, name="fc2")(x)
        else:
            x = nn.Dense(self.embed_dim, use_bias=False, dtype=self.dtype, name="projection")(x)
        x = x.astype(jnp.float32)
        return x[:, 0] if masks is None else x


def clip_resnet(stage_sizes: tuple[int, ...], width: int, **how: Any) -> ResNet:
    """The backbone of OpenAI's ResNets, which is frozen."""
    return ResNet(stage_sizes, width, block="antialiased", stem="deep", norm="frozen_batch", **how)


def resnet_heads(width: int) -> int:
    """Attention heads of 64 channels over the last map of a ResNet of this width."""
    return width * 8 * BOTTLENECK_EXPANSION // 64


class ConvTower(nn.Module):
    """Images [B, H, W, 3] -> embeddings [B, C] float32."""

    backbone: nn.Module
    pooling: nn.Module

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.pooling(self.backbone(images)[-1])


# Backbone and pooling of an image tower, by the name that `CLIP.image_tower` has.
CONV_TOWERS = {"resnet": (clip_resnet, AttentionPool), "convnext": (ConvNeXt, MeanPool)}


def make_conv_tower(clip: Any) -> tuple[nn.Module, nn.Module]:
    """Backbone and pooling of a `CLIP` with a convolutional image tower, which has its fields."""
    make_backbone, pooling = CONV_TOWERS[clip.image_tower]
    own: dict[str, Any] = {"projection": clip.projection}
    if clip.image_tower == "resnet":
        own = {"side": clip.image_size // STRIDE, "num_heads": clip.image_heads}
    backbone = make_backbone(tuple(clip.image_stages), clip.image_width, dtype=clip.dtype)
    return backbone, pooling(clip.embed_dim, dtype=clip.dtype, **own)
