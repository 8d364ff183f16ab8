"""G: text embedding and noise to a pseudo vision query."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


class QueryGenerator(nn.Module):
    """MLP on [text embedding, Gaussian noise] (CONCAT, semantic to vision).

    Real vision queries leave a LayerNorm. The output is normalised likewise and goes through the
    same frozen scale and bias, so pseudo queries live where real ones can.

    Attributes:
      width: D of the vision queries.
      hidden_width: of the MLP.
      num_layers: hidden layers, at least 1.
      noise_width: dimensions of z; the spread of a class comes from it.
    """

    width: int
    hidden_width: int
    num_layers: int = 2
    noise_width: int = 64

    @nn.compact
    def __call__(
        self, text: jax.Array, rng: jax.Array, norm_scale: jax.Array, norm_bias: jax.Array
    ) -> jax.Array:
        """Pseudo queries [..., D] float32.

        Args:
          text: [..., C] L2-normalised text embeddings, one pseudo query each.
          rng: PRNG key of the noise.
          norm_scale: [D] scale of the transformer decoder's last LayerNorm, frozen.
          norm_bias: [D] its bias, frozen.
        """
        noise = jax.random.normal(rng, (*text.shape[:-1], self.noise_width))
        # Unit text vectors have entries of order C^-1/2: raised to order 1, like the noise.
        x = jnp.concatenate([text * text.shape[-1] ** 0.5, noise], axis=-1)
        for i in range(self.num_layers):
            x = nn.leaky_relu(nn.Dense(self.hidden_width, name=f"layer_{i}")(x), 0.2)
        x = nn.Dense(self.width, name="output")(x)
        x = nn.LayerNorm(use_scale=False, use_bias=False, name="norm")(x)
        return x * norm_scale + norm_bias
