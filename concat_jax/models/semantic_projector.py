"""P: vision queries to the joint CLIP space, and classification against text embeddings there."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.core.config import Positive

MAX_SCALE = 100.0  # CLIP's clip of exp(s): larger logits stop learning.


def unit(vectors: jax.Array) -> jax.Array:
    """L2-normalise the last axis in float32; a zero vector stays zero, with a finite gradient."""
    vectors = vectors.astype(jnp.float32)
    return vectors * jax.lax.rsqrt(jnp.sum(vectors**2, axis=-1, keepdims=True) + 1e-12)


def class_vectors(text: jax.Array) -> jax.Array:
    """One vector [K, C] a class, for what needs one: a generator's input, a target to be pulled to.

    `text` is [K, C] L2-normalised, or [K, S, C] with one of each synonym, where a class of fewer
    synonyms repeats its first: then the normalised mean, repeats counted once.
    """
    if text.ndim == 2:
        return text
    text = text.astype(jnp.float32)
    repeats = jnp.all(text == text[:, :1], axis=-1).at[:, 0].set(False)
    return unit(jnp.where(repeats[..., None], 0.0, text).sum(axis=1))


def best_synonyms(logits: jax.Array, text: jax.Array) -> jax.Array:
    """Logits [..., K] of those [..., K * S] of every text [K, S, C]; as they are of text [K, C]."""
    if text.ndim == 2:
        return logits
    return logits.reshape(*logits.shape[:-1], *text.shape[:2]).max(axis=-1)


class SemanticProjector(nn.Module):
    """MLP D -> C, with the no-object embedding and the scale of the cosine classifier.

    The classifier is text: other names need other text embeddings and no other weight
    (CONCAT, semantic projector).

    Attributes:
      joint_width: C, width of the CLIP space.
      num_layers: linear layers of the MLP, at least 1.
      initial_scale: exp(s) at the start; CLIP starts at 1 / 0.07.
    """

    joint_width: int
    hidden_width: int
    num_layers: int = 3
    initial_scale: Positive = 1 / 0.07

    def setup(self):
        widths = (*[self.hidden_width] * (self.num_layers - 1), self.joint_width)
        self.layers = [
            nn.Dense(width, dtype=jnp.float32, name=f"layer_{i}") for i, width in enumerate(widths)
        ]
        self.no_object_embedding = self.param(
            "no_object_embedding", nn.initializers.normal(1.0), (self.joint_width,)
        )
        self.log_scale = self.param(
            "log_scale", nn.initializers.constant(np.log(self.initial_scale)), ()
        )

    def __call__(self, queries: jax.Array) -> jax.Array:
        """Semantic queries [..., C] float32 of vision queries [..., D]."""
        x = queries
        for layer in self.layers[:-1]:
            x = nn.relu(layer(x))
        return self.layers[-1](x)

    def classify(self, semantic_queries: jax.Array, text: jax.Array) -> jax.Array:
        """Class logits exp(s) · cos(S, [T; t_∅]), [..., K+1] float32; the last column is no-object.

        `text` is [K, C] L2-normalised, or [K, S, C] with one of each synonym: a class is then as
        near as the nearest of its synonyms.
        """
        no_object = self.no_object_embedding
        no_object = no_object * jax.lax.rsqrt(jnp.sum(no_object**2) + 1e-12)
        words = text.reshape(-1, text.shape[-1])  # one matrix product whatever S is
        words = jnp.concatenate([words.astype(jnp.float32), no_object[None]])
        queries = unit(semantic_queries)
        scale = jnp.minimum(jnp.exp(self.log_scale), MAX_SCALE)
        logits = scale * jnp.einsum("...c,kc->...k", queries, words)
        if text.ndim == 2:
            return logits
        classes = best_synonyms(logits[..., :-1], text)
        return jnp.concatenate([classes, logits[..., -1:]], axis=-1)

    def predict(self, queries: jax.Array, text: jax.Array) -> jax.Array:
        """Class logits [..., K+1] of vision queries [..., D] against text [K, C] or [K, S, C]."""
        return self.classify(self(queries), text)
