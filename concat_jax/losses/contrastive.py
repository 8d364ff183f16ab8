"""CLIP's image-text objective, for training a small CLIP from scratch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from concat_jax.models.clip_images import l2_normalize


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
        l2_normalize(image_embeddings),
        l2_normalize(text_embeddings),
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
