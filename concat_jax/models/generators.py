"""G: text embedding and noise to a pseudo vision query.

A new generator is a module `(text, rng, norm_scale, norm_bias) -> queries` with a field `width`,
and a line in `GENERATORS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.core.config import Share, check_choice, check_fields
from concat_jax.models.semantic_projector import unit


class QueryGenerator(nn.Module):
    """MLP on [text embedding, Gaussian noise] (CONCAT, semantic to vision).

    Real vision queries leave a LayerNorm. The output is normalised likewise and goes through the
    same frozen scale and bias, so pseudo queries live where real ones can. The spread of a class
    comes from the `noise_width` dimensions of z.
    """

    width: int
    hidden_width: int
    num_layers: int = 2
    noise_width: int = 64

    @nn.compact
    def __call__(
        self, text: jax.Array, rng: jax.Array, norm_scale: jax.Array, norm_bias: jax.Array
    ) -> jax.Array:
        """Pseudo queries [..., D] float32 of L2-normalised text embeddings [..., C], one each.

        `norm_scale` and `norm_bias` [D] are of the transformer decoder's last LayerNorm, frozen.
        """
        noise = jax.random.normal(rng, (*text.shape[:-1], self.noise_width))
        # Unit text vectors have entries of order C^-1/2: raised to order 1, like the noise.
        x = jnp.concatenate([text * text.shape[-1] ** 0.5, noise], axis=-1)
        for i in range(self.num_layers):
            x = nn.leaky_relu(nn.Dense(self.hidden_width, name=f"layer_{i}")(x), 0.2)
        x = nn.Dense(self.width, name="output")(x)
        x = nn.LayerNorm(use_scale=False, use_bias=False, name="norm")(x)
        return x * norm_scale + norm_bias


class PrimitiveLayer(nn.Module):
    """One post-norm layer: per-token map, attention to primitives, noise, feed-forward.

    PADing lays class tokens out as sequences of length one, so its self-attention weighs a token
    with 1 whatever its queries and keys are: what remains of it is value and output projection.
    """

    width: int
    num_heads: int
    ffn_width: int
    noise_scale: float
    dropout_rate: float

    @nn.compact
    def __call__(self, tokens: jax.Array, primitives: jax.Array, rng: jax.Array) -> jax.Array:
        """[..., D] class tokens, [P, D] primitives and a PRNG key -> [..., D] float32."""
        depth = self.width // self.num_heads
        noise_rng, *dropout_rngs = jax.random.split(rng, 7)
        keys = iter(dropout_rngs)

        def dropout(x: jax.Array) -> jax.Array:
            return nn.Dropout(self.dropout_rate, deterministic=False)(x, rng=next(keys))

        def heads(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:-1], self.num_heads, depth)

        value = heads(nn.Dense(self.width, name="self_value")(tokens))
        kept = dropout(jnp.ones((*value.shape[:-1], 1)))  # a weight of 1, dropped head by head
        mapped = nn.Dense(self.width, name="self_output")((value * kept).reshape(tokens.shape))
        tokens = nn.LayerNorm(name="self_norm")(tokens + dropout(mapped))

        query = heads(nn.Dense(self.width, name="query")(tokens)) * depth**-0.5
        # A bias of the keys shifts all logits of a query alike, which the softmax cancels.
        key = heads(nn.Dense(self.width, use_bias=False, name="key")(primitives))
        value = heads(nn.Dense(self.width, name="value")(primitives))
        weights = dropout(jax.nn.softmax(jnp.einsum("...hd,phd->...hp", query, key), axis=-1))
        attended = jnp.einsum("...hp,phd->...hd", weights, value).reshape(tokens.shape)
        attended = dropout(nn.Dense(self.width, name="output")(attended))
        noise = self.noise_scale * jax.random.normal(noise_rng, tokens.shape)
        tokens = nn.LayerNorm(name="attention_norm")(tokens + attended + noise)

        hidden = dropout(nn.relu(nn.Dense(self.ffn_width, name="ffn_in")(tokens)))
        hidden = dropout(nn.Dense(self.width, name="ffn_out")(hidden))
        return nn.LayerNorm(name="ffn_norm")(tokens + hidden)


class PrimitiveGenerator(nn.Module):
    """Class tokens that a transformer composes of learned primitives (PADing, CVPR 2023).

    As `PADing/PADing_model.py` (`fc_projection`, `dict_feature`, `generator`) has it, but for the
    last LayerNorm: its scale and bias are those of the real queries, frozen, where PADing learns
    its own. The defaults are PADing's.

    Attributes:
      num_primitives: P, learned vectors that classes are composed of.
      noise_scale: deviation of the Gaussian noise that is added behind every attention; the spread
        of a class comes from it.
      dropout_rate: PADing trains the generator with it and uses it nowhere else, so it is always
        on: a second source of spread.
    """

    width: int
    num_primitives: int = 400
    num_layers: int = 3
    num_heads: int = 8
    ffn_width: int = 1024
    noise_scale: float = 1.0
    dropout_rate: Share = 0.1

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(
                f"Vision queries of width {self.width} cannot be split into {self.num_heads} heads "
                "of the generator; change its num_heads."
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self, text: jax.Array, rng: jax.Array, norm_scale: jax.Array, norm_bias: jax.Array
    ) -> jax.Array:
        """Pseudo queries [..., D], as `QueryGenerator`."""
        primitives = self.param(
            "primitives", nn.initializers.normal(1.0), (self.num_primitives, self.width)
        )
        # Unit text vectors have entries of order C^-1/2: raised to order 1, like the noise.
        x = nn.Dense(self.width, name="projection")(text * text.shape[-1] ** 0.5)
        for i, key in enumerate(jax.random.split(rng, self.num_layers)):
            x = PrimitiveLayer(
                width=self.width,
                num_heads=self.num_heads,
                ffn_width=self.ffn_width,
                noise_scale=self.noise_scale,
                dropout_rate=self.dropout_rate,
                name=f"layer_{i}",
            )(x, primitives, key)
        x = nn.LayerNorm(use_scale=False, use_bias=False, name="norm")(x)
        return x * norm_scale + norm_bias


class RegressionGenerator(nn.Module):
    """The mean query of a class by a regression, see `stages.regression`; it draws no noise.

    Attributes:
      num_centres: R, instances that the kernel compares with.
    """

    width: int
    num_centres: int = 1024

    @nn.compact
    def __call__(
        self, text: jax.Array, rng: jax.Array, norm_scale: jax.Array, norm_bias: jax.Array
    ) -> jax.Array:
        """Queries [..., D], as `QueryGenerator`; alike for equal texts."""
        shapes = self._shapes(text.shape[-1])
        p = {name: self.param(name, nn.initializers.zeros, shape) for name, shape in shapes.items()}
        moved = text - p["text_mean"]
        place = unit(p["image_mean"] + moved @ p["text_map"])
        cosines = jnp.einsum("...c,rc->...r", place, p["centres"])
        values = jnp.exp(p["sharpness"] * (cosines - 1.0))
        return p["offset"] + moved @ p["linear"] + values @ p["weights"]

    def _shapes(self, joint_width: int) -> dict[str, tuple[int, ...]]:
        c, d, r = joint_width, self.width, self.num_centres
        vectors = {"text_mean": (c,), "image_mean": (c,), "offset": (d,), "sharpness": ()}
        return vectors | {
            "text_map": (c, c),
            "linear": (c, d),
            "centres": (r, c),
            "weights": (r, d),
        }

    def filled(self, fitted: Mapping[str, np.ndarray], joint_width: int) -> dict[str, np.ndarray]:
        """Parameters of what a regression fitted; what it lacks, centres included, is zero."""
        params = {}
        for name, shape in self._shapes(joint_width).items():
            params[name] = np.zeros(shape, np.float32)
            value = np.asarray(fitted.get(name, 0.0))
            params[name][tuple(slice(n) for n in value.shape)] = value
        return params


# Generators by the `kind` of the config.
GENERATORS: dict[str, type[nn.Module]] = {
    "mlp": QueryGenerator,
    "primitives": PrimitiveGenerator,
    "regression": RegressionGenerator,
}


def make_generator(
    config: Mapping[str, Any], query_width: int, where: str = "config.model.generator"
) -> nn.Module:
    """A generator from a section of a config, called `where`; `kind` is "mlp" where absent.

    Raises ValueError for a field that the kind does not have or a value it cannot take.
    """
    fields = dict(config)
    kind = fields.pop("kind", "mlp")
    check_choice(kind, GENERATORS, f"{where}.kind is")
    check_fields(fields, GENERATORS[kind], f"{where} has no key", "width")
    return GENERATORS[kind](width=query_width, **fields)
