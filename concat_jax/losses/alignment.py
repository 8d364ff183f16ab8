"""Pulls of embeddings to each other: CON's (CONCAT, section on token alignment) and CLIP's."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from concat_jax.models.semantic_projector import unit

POOLINGS = ("objectness", "similarity", "mean")


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
    predictions: jax.Array,
    targets: jax.Array,
    valid: jax.Array,
    *,
    temperature: float,
    labels: jax.Array | None = None,
) -> jax.Array:
    """InfoNCE of each prediction against all valid targets; its own is the positive.

    From [..., M, C], with valid [..., M], False for rows that are no positives and no negatives, to
    [..., M] float32, zero where invalid. With labels [..., M] targets of the same class are no
    negatives: what they have in common is not to be unlearnt.
    """
    logits = pairwise_cosine(predictions, targets) / temperature
    own = jnp.eye(logits.shape[-1], dtype=bool)
    negative = jnp.broadcast_to(valid[..., None, :], logits.shape)
    if labels is not None:
        negative &= labels[..., :, None] != labels[..., None, :]
    logits = jnp.where(negative | own, logits, -jnp.inf)
    own_log_probs = jnp.diagonal(jax.nn.log_softmax(logits, axis=-1), axis1=-2, axis2=-1)
    return jnp.where(valid, -own_log_probs, 0.0)


def contrastive_loss(
    image_embeddings: jax.Array,
    text_embeddings: jax.Array,
    logit_scale: jax.Array,
    *,
    same_caption: jax.Array | None = None,
) -> jax.Array:
    """Symmetric InfoNCE of pairs (Radford et al. 2021, figure 3): [B] float32, unreduced.

    Captions that occur more than once in the batch are not each other's negatives: the target of a
    row is uniform over the columns with an equal caption, as in UniCL (Yang et al. 2022).
    Closed small worlds repeat captions in every batch; one-hot targets would push equal names
    apart.

    Args:
      image_embeddings, text_embeddings: [B, C], a pair a row; normalised here.
      logit_scale: [] multiplier of the cosine similarities, not its log.
      same_caption: [B, B] bool, symmetric, True where two pairs have the same caption; the diagonal
        counts as True whatever it holds. None where all captions differ.
    """
    # Full precision: the scale multiplies an accelerator's rounding up to 100-fold.
    cosine = jnp.einsum(
        "bc,dc->bd",
        unit(image_embeddings),
        unit(text_embeddings),
        precision=jax.lax.Precision.HIGHEST,
    )
    logits = jnp.asarray(logit_scale, jnp.float32) * cosine
    targets = jnp.eye(logits.shape[0], dtype=jnp.bool_)
    if same_caption is not None:
        targets = targets | same_caption
    targets = targets / jnp.sum(targets, axis=1, keepdims=True)
    image_to_text = -jnp.sum(targets * jax.nn.log_softmax(logits, axis=1), axis=1)
    text_to_image = -jnp.sum(targets * jax.nn.log_softmax(logits.T, axis=1), axis=1)
    return (image_to_text + text_to_image) / 2
