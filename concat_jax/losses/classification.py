"""Cross-entropy over text classes and no-object, with class weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def weighted_cross_entropy(
    logits: jax.Array, labels: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy weighted by the target's class, unreduced: (weighted losses, weights), float32.

    Divide the sum of the first by the sum of the second for torch's weighted mean, which
    Mask2Former uses (`loss_labels`). Logits are [..., K], labels [...] in 0..K-1 or -1 to leave
    the row out (both results are zero there), weights [K].
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    index = jnp.clip(labels, 0)
    losses = -jnp.take_along_axis(log_probs, index[..., None], axis=-1)[..., 0]
    row_weights = jnp.where(labels >= 0, weights[index], 0.0)
    return losses * row_weights, row_weights
