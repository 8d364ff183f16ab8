"""The pre-norm transformer block of CLIP's towers and of plain vision transformers.

Submodules carry CLIP's names (`transformers models/clip/modeling_clip.py`).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from concat_jax.models.ops.attention import attend
from concat_jax.models.ops.linear import Dense, gelu

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": gelu,
}
NORM_EPSILON = 1e-5  # torch's default, which CLIP was trained with; linen's is 1e-6


def layer_norm(dtype: Any, name: str | None = None, epsilon: float = NORM_EPSILON) -> nn.LayerNorm:
    """LayerNorm with the variance in a second pass, as torch's."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The last P tokens of [B, L, heads, H] turned by their positions.

    `rotation` holds cosines and sines [P, H / 2]; channel i turns with channel i + H / 2.
    """
    cos, sin = (part[:, None].astype(x.dtype) for part in rotation)
    start = x.shape[1] - len(cos)
    first, second = jnp.split(x[:, start:], 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([x[:, :start], turned], axis=1)


class Attention(nn.Module):
    """Multi-head self-attention, [B, L, W] -> [B, L, W]; softmax in float32 whatever `dtype`."""

    num_heads: int
    depth: int
    is_causal: bool = False
    key_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array] | None = None,
        allowed: jax.Array | None = None,
    ) -> jax.Array:
        """`rotation` as of `rotate`; `allowed` [B, N, L] bool: whom the first N tokens see."""
        width = x.shape[-1]
        # Residual branches start small in proportion to their number (openai/CLIP clip/model.py).
        into = nn.initializers.normal(width**-0.5)
        out_of = nn.initializers.normal(width**-0.5 * (2 * self.depth) ** -0.5)

        def heads(name: str, use_bias: bool = True) -> jax.Array:  # [B, L, heads, W / heads]
            dense = Dense(width, use_bias=use_bias, kernel_init=into, dtype=self.dtype, name=name)
            y = dense(x)
            return y.reshape(*y.shape[:-1], self.num_heads, width // self.num_heads)

        queries, keys = heads("q_proj"), heads("k_proj", self.key_bias)
        if rotation is not None:
            queries, keys = rotate(queries, rotation), rotate(keys, rotation)
        values = heads("v_proj")
        if self.is_causal:
            allowed = jnp.tri(x.shape[1], dtype=bool)[None]
        if allowed is None:
            attended = attend(queries, keys, values)
        else:
            number = allowed.shape[1]
            attended = attend(queries[:, :number], keys, values, allowed)
            if number < x.shape[1]:
                others = attend(queries[:, number:], keys, values)
                attended = jnp.concatenate([attended, others], axis=1)
        attended = attended.reshape(x.shape)
        return Dense(width, kernel_init=out_of, dtype=self.dtype, name="out_proj")(attended)


class Block(nn.Module):
    """Pre-norm transformer block, [B, L, W] -> [B, L, W].

    Attributes:
      depth: blocks of the whole stack, which small initial residuals are scaled by.
      ffn_width: hidden width of the MLP.
      activation: a key of `ACTIVATIONS`.
      key_bias: the keys have a bias, which shifts all logits of a query alike.
      layer_scale: each residual branch has a learned scale a channel.
    """

    num_heads: int
    depth: int
    ffn_width: int
    activation: str
    is_causal: bool = False
    key_bias: bool = True
    layer_scale: bool = False
    norm_epsilon: float = NORM_EPSILON
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array] | None = None,
        allowed: jax.Array | None = None,
    ) -> jax.Array:
        """`rotation` and `allowed` as of `Attention`."""
        width = x.shape[-1]

        def norm(name: str) -> nn.LayerNorm:
            return layer_norm(self.dtype, name, self.norm_epsilon)

        def dense(features: int, std: float, name: str) -> nn.Dense:
            init = nn.initializers.normal(std)
            return Dense(features, kernel_init=init, dtype=self.dtype, name=name)

        def scaled(branch: jax.Array, name: str) -> jax.Array:
            if not self.layer_scale:
                return branch
            return branch * self.param(name, nn.initializers.ones, (width,)).astype(self.dtype)

        attended = Attention(
            self.num_heads,
            self.depth,
            self.is_causal,
            self.key_bias,
            self.dtype,
            name="self_attn",
        )(norm("layer_norm1")(x), rotation, allowed)
        x = x + scaled(attended, "layer_scale1")
        y = norm("layer_norm2")(x)
        into = (2 * width) ** -0.5
        hidden = ACTIVATIONS[self.activation](dense(self.ffn_width, into, "fc1")(y))
        out = dense(width, width**-0.5 * (2 * self.depth) ** -0.5, "fc2")(hidden)
        return x + scaled(out, "layer_scale2")
