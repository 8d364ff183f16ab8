"""Transformer decoder of Mask2Former: learned queries with masked cross-attention. Class-free.

Source: Mask2Former
`mask2former/modeling/transformer_decoder/mask2former_transformer_decoder.py`.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from concat_jax.models.ops.layers_in_turn import run_in_turn
from concat_jax.models.ops.linear import Dense, relu
from concat_jax.models.ops.position_encoding import sine_position_encoding
from concat_jax.models.ops.valid_area import resize_within, valid_mask, valid_size
from concat_jax.models.pixel_decoder import NORM_EPSILON
from concat_jax.models.segmentor_output import mask_logits

# The reference's stacked [3 D, D] projection draws Xavier over all three matrices at once, which
# gives each of them this variance times D.
_attention_init = nn.initializers.variance_scaling(0.5, "fan_in", "uniform")


def attention_block_mask(
    mask_embeddings: jax.Array, mask_features: jax.Array, size: jax.Array | None = None
) -> jax.Array:
    """Where a query may not look, outside its own predicted mask: [B, N, h * w] bool, no gradient.

    From embeddings [B, N, D] and features [B, h, w, D] at the attended scale: mask probability
    under one half. Beyond `size` [B, 2] every query is blocked; one that would be blocked
    everywhere is blocked nowhere in the valid area.
    """
    logits = mask_logits(*jax.lax.stop_gradient((mask_embeddings, mask_features)))
    blocked = (logits < 0).reshape(*logits.shape[:2], -1)
    if size is None:
        return blocked & ~blocked.all(axis=-1, keepdims=True)
    beyond = ~valid_mask(size, *mask_features.shape[1:3]).reshape(blocked.shape[0], 1, -1)
    blocked = blocked | beyond
    return (blocked & ~blocked.all(axis=-1, keepdims=True)) | beyond


class MultiHeadAttention(nn.Module):
    """Multi-head attention with an optional block mask; the softmax runs in float32."""

    width: int
    num_heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        queries: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        blocked: jax.Array | None = None,
    ) -> jax.Array:
        """[B, N, D], [B, S, D], [B, S, D], bool [B, N, S] -> [B, N, D] in `dtype`."""
        depth = self.width // self.num_heads

        def project(inputs: jax.Array, name: str) -> jax.Array:
            dense = Dense(self.width, dtype=self.dtype, kernel_init=_attention_init, name=name)
            return dense(inputs).reshape(*inputs.shape[:2], self.num_heads, depth)

        query = project(queries, "query") * depth**-0.5
        key, value = project(keys, "key"), project(values, "value")
        logits = jnp.einsum("bnhd,bshd->bhns", query, key, preferred_element_type=jnp.float32)
        if blocked is not None:
            logits = jnp.where(blocked[:, None], -jnp.inf, logits)
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        attended = jnp.einsum("bhns,bshd->bnhd", weights, value)
        return Dense(
            self.width,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            name="output",
        )(attended.reshape(*queries.shape[:2], self.width))


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward; post-norm.

    The queries stay float32 between the sublayers whatever `dtype` is: they are few, and what they
    hold becomes the classes.
    """

    width: int
    num_heads: int
    ffn_width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        queries: jax.Array,
        query_positions: jax.Array,
        memory: jax.Array,
        memory_positions: jax.Array,
        blocked: jax.Array,
    ) -> jax.Array:
        """One layer on queries [B, N, D], with positions [N, D] learned.

        `memory` [B, S, D] is one scale of the pixel decoder, its positions are [S, D] or [B, S, D];
        `blocked` is [B, N, S] bool.
        """
        attention = {"width": self.width, "num_heads": self.num_heads, "dtype": self.dtype}
        norm = {"epsilon": NORM_EPSILON, "dtype": jnp.float32}
        dense = {"dtype": self.dtype, "kernel_init": nn.initializers.xavier_uniform()}

        attended = MultiHeadAttention(name="cross_attention", **attention)(
            queries + query_positions, memory + memory_positions, memory, blocked
        )
        queries = nn.LayerNorm(name="cross_attention_norm", **norm)(queries + attended)
        placed = queries + query_positions
        attended = MultiHeadAttention(name="self_attention", **attention)(placed, placed, queries)
        queries = nn.LayerNorm(name="self_attention_norm", **norm)(queries + attended)
        hidden = relu(Dense(self.ffn_width, name="ffn_in", **dense)(queries))
        hidden = Dense(self.width, name="ffn_out", **dense)(hidden)
        return nn.LayerNorm(name="ffn_norm", **norm)(queries + hidden)


class TransformerDecoder(nn.Module):
    """MultiScaleMaskedTransformerDecoder without its class head; num_heads and 4 divide D.

    Attributes:
      num_layers: decoder layers; prediction sets are one more (the learned queries come first).
      remat: recompute each layer in the backward pass instead of storing it.
      scan_layers: compile one round over the scales and run it in a loop, see `run_in_turn`; where
        the layers are whole rounds.
      stride: pixels between neighbours of the mask features, which tells the valid area of
        padded images.
    """

    width: int = 256
    num_queries: int = 100
    num_layers: int = 9
    num_heads: int = 8
    ffn_width: int = 2048
    remat: bool = False
    scan_layers: bool = False
    stride: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        scales: Sequence[jax.Array],
        mask_features: jax.Array,
        image_size: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Queries and mask embeddings [B, L, N, D] float32 of all L = num_layers + 1 sets.

        The queries are those after the decoder norm; the sets are in order.

        Args:
          scales: maps [B, h_s, w_s, D] from coarse to fine, each of half the stride of the one
            before, down to twice that of the mask features; layer i attends to map i mod len.
          mask_features: [B, h, w, D].
          image_size: [B, 2] int32 (height, width) of each image's valid area, beyond which no
            query looks; None where nothing is padded.
        """
        normal = nn.initializers.normal(1.0)
        table = (self.num_queries, self.width)
        query_features = self.param("query_feature_embedding", normal, table)
        query_positions = self.param("query_position_embedding", normal, table)
        level_embedding = self.param("level_embedding", normal, (len(scales), self.width))

        batch = mask_features.shape[0]
        memories, memory_positions, small_mask_features, valid_sizes = [], [], [], []
        for level, scale in enumerate(scales):
            height, width = scale.shape[1:3]
            memory = scale.reshape(batch, height * width, self.width)
            memories.append((memory + level_embedding[level]).astype(self.dtype))
            # Mask logits are linear in the mask features, and so is the resize: resizing the
            # features once for each scale equals resizing the logits of every layer.
            frozen = jax.lax.stop_gradient(mask_features)
            valid = valid_size(image_size, self.stride * 2 ** (len(scales) - level))
            encoding = sine_position_encoding(height, width, self.width, valid)
            encoding = encoding.reshape(*encoding.shape[:-3], -1, self.width)
            memory_positions.append(jnp.asarray(encoding, self.dtype))
            finest = valid_size(image_size, self.stride)
            small_mask_features.append(resize_within(frozen, finest, height, width, valid))
            valid_sizes.append(valid)

        # Float32 whatever the compute type: these are what losses and class logits are made of.
        decoder_norm = nn.LayerNorm(epsilon=NORM_EPSILON, dtype=jnp.float32, name="decoder_norm")

        def torch_bias_init(key, shape, dtype):  # PyTorch's default: uniform in +-1 / sqrt(fan in)
            return jax.random.uniform(key, shape, dtype, -(self.width**-0.5), self.width**-0.5)

        mask_mlp = [
            Dense(
                self.width,
                dtype=jnp.float32,
                kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
                bias_init=torch_bias_init,
                name=f"mask_mlp_{i}",
            )
            for i in range(3)
        ]

        def predict(queries: jax.Array) -> tuple[jax.Array, jax.Array]:
            normalised = decoder_norm(queries)
            hidden = relu(mask_mlp[0](normalised))
            return normalised, mask_mlp[2](relu(mask_mlp[1](hidden)))

        layer_class = nn.remat(DecoderLayer) if self.remat else DecoderLayer
        queries = jnp.broadcast_to(query_features, (batch, *table))
        layers = [
            layer_class(
                width=self.width,
                num_heads=self.num_heads,
                ffn_width=self.ffn_width,
                dtype=self.dtype,
                name=f"layer_{index}",
            )
            for index in range(self.num_layers)
        ]

        def decode(layers: Sequence[Callable], carry: tuple) -> tuple[tuple, list]:
            queries, mask_embeddings = carry
            given = []
            for level, layer in enumerate(layers):
                blocked = attention_block_mask(
                    mask_embeddings, small_mask_features[level], valid_sizes[level]
                )
                queries = layer(
                    queries, query_positions, memories[level], memory_positions[level], blocked
                )
                given.append(predict(queries))
                mask_embeddings = given[-1][1]
            return (queries, mask_embeddings), given

        first = predict(queries)
        starts = range(0, self.num_layers, len(scales))
        rounds = [layers[start : start + len(scales)] for start in starts]
        scan = self.scan_layers and self.num_layers % len(scales) == 0
        _, given = run_in_turn(self, rounds, decode, (queries, first[1]), scan=scan)
        predictions = [first, *itertools.chain(*given)]
        all_queries, all_mask_embeddings = zip(*predictions, strict=True)
        return jnp.stack(all_queries, axis=1), jnp.stack(all_mask_embeddings, axis=1)
