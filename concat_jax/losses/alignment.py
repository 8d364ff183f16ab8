"""CON: pull semantic queries to CLIP image embeddings (CONCAT, section on token alignment)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

POOLINGS = ("objectness", "similarity", "mean")


def unit(vectors: jax.Array) -> jax.Array:
    """L2-normalise the last axis in float32; a zero vector stays zero, with a finite gradient."""
    vectors = vectors.astype(jnp.float32)
    return vectors * jax.lax.rsqrt(jnp.sum(vectors**2, axis=-1, keepdims=True) + 1e-12)


def pool_queries(
    semantic_queries: jax.Array,
    objectness: jax.Array,
    image_embedding: jax.Array,
    *,
    pooling: str,
    temperature: float,
) -> jax.Array:
    """One vector [B, C] float32 an image from its semantic queries [B, N, C].

    Args:
      objectness: [B, N] in [0, 1], one minus the probability of no-object.
      image_embedding: [B, C] CLIP embedding of the whole image.
      pooling: "objectness" (softmax over queries of the objectness), "similarity" (softmax of
        the cosine with the image embedding) or "mean".
      temperature: of the softmax; small values pick few queries.

    No gradient flows through the pooling weights: the loss is to move the queries, not to choose
    which of them count.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"Pooling {pooling!r} is unknown; choose one of {', '.join(POOLINGS)}.")
    if pooling == "objectness":
        scores = objectness / temperature
    elif pooling == "similarity":
        scores = pairwise_cosine(semantic_queries, image_embedding[:, None])[..., 0] / temperature
    else:
        scores = jnp.zeros(semantic_queries.shape[:2])
    weights = jax.lax.stop_gradient(jax.nn.softmax(scores.astype(jnp.float32), axis=-1))
    return jnp.einsum("bn,bnc->bc", weights, semantic_queries.astype(jnp.float32))


def pairwise_cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Cosines [..., M, N] float32 of vectors a [..., M, C] and b [..., N, C]."""
    return jnp.einsum("...mc,...nc->...mn", unit(a), unit(b))


def cosine_alignment(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    """One minus the cosine of predictions and targets [..., C]: [...] float32 in [0, 2]."""
    return 1 - jnp.sum(unit(predictions) * unit(targets), axis=-1)


def info_nce(
    predictions: jax.Array, targets: jax.Array, valid: jax.Array, *, temperature: float
) -> jax.Array:
    """InfoNCE of each prediction against all valid targets; its own is the positive.

    From [..., M, C], with valid [..., M], False for rows that are no positives and no negatives, to
    [..., M] float32, zero where invalid.
    """
    logits = pairwise_cosine(predictions, targets) / temperature
    own = jnp.eye(logits.shape[-1], dtype=bool)
    logits = jnp.where(valid[..., None, :] | own, logits, -jnp.inf)
    own_log_probs = jnp.diagonal(jax.nn.log_softmax(logits, axis=-1), axis1=-2, axis2=-1)
    return jnp.where(valid, -own_log_probs, 0.0)
