"""CAT: losses that make generated queries stand in for real ones, and the way back to text.

Letters: M pseudo queries, R real queries, D query width, C joint width.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

DISTANCES = ("cosine", "euclidean")


def squared_distances(a: jax.Array, b: jax.Array) -> jax.Array:
    """Squared Euclidean distances [M, R] float32 between rows of a [M, D] and b [R, D]."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    cross = jnp.einsum("md,rd->mr", a, b)
    squares = jnp.sum(a**2, axis=-1)[:, None] + jnp.sum(b**2, axis=-1)[None, :]
    # Rounding can leave a tiny negative, which has no meaning here.
    return jnp.maximum(squares - 2 * cross, 0.0)


def mmd(
    pseudo: jax.Array,
    real: jax.Array,
    pseudo_valid: jax.Array,
    real_valid: jax.Array,
    same_class: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    *,
    bandwidths: Sequence[float],
) -> jax.Array:
    """Maximum mean discrepancy between pseudo and real queries, a sum of Gaussian kernels.

    The biased V-statistic under a square root, as PADing trains with (GMMN). In float32, clamped
    before the root: a tiny negative under the root was the reference's NaN.

    Args:
      pseudo: [M, D].
      real: [R, D].
      pseudo_valid: [M] bool.
      real_valid: [R] bool.
      same_class: optional indicators ([M, M], [M, R], [R, R]); the kernel is then multiplied by
        them, which compares the joint distribution of query and class (ours; PADing pools).
      bandwidths: v of exp(-d² / (2 v)); PADing: 2, 5, 10, 20, 40, 80 for 256-d queries.

    Returns:
      [] float32, at least 0; 0 where either side is empty.
    """

    def kernel_sum(a, b, a_valid, b_valid, indicator):
        distances = squared_distances(a, b)
        kernel = sum(jnp.exp(-distances / (2 * v)) for v in bandwidths)
        weights = a_valid[:, None] * b_valid[None, :].astype(jnp.float32)
        if indicator is not None:
            weights = weights * indicator
        return jnp.sum(kernel * weights)

    same = same_class or (None, None, None)
    m = jnp.maximum(pseudo_valid.sum(), 1).astype(jnp.float32)
    r = jnp.maximum(real_valid.sum(), 1).astype(jnp.float32)
    squared = (
        kernel_sum(pseudo, pseudo, pseudo_valid, pseudo_valid, same[0]) / m**2
        - 2 * kernel_sum(pseudo, real, pseudo_valid, real_valid, same[1]) / (m * r)
        + kernel_sum(real, real, real_valid, real_valid, same[2]) / r**2
    )
    present = pseudo_valid.any() & real_valid.any()
    # The gradient of a root at zero is infinite: the floor keeps it finite.
    return jnp.where(present, jnp.sqrt(jnp.maximum(squared, 1e-8)), 0.0)


def query_contrast(
    pseudo: jax.Array,
    pseudo_labels: jax.Array,
    real: jax.Array,
    real_labels: jax.Array,
    *,
    temperature: float,
    distance: str,
    class_negatives: bool,
) -> tuple[jax.Array, jax.Array]:
    """Pull a pseudo query to real queries of its class, push it from queries holding no segment.

    InfoNCE with one term for each positive, averaged over them.

    Args:
      pseudo: [M, D].
      pseudo_labels: [M] int32, -1 where padded.
      real: [R, D]; no gradient is taken.
      real_labels: [R] int32, -1 for a query that holds no segment.
      temperature: of the similarity.
      distance: "cosine", or "euclidean" for minus the squared distance over D, which also
        compares lengths and so cannot be satisfied by direction alone.
      class_negatives: also push from matched queries of other classes (class contrast).

    Returns:
      (losses [M] float32, valid [M] bool): valid where the class has a positive.

    Raises:
      ValueError: if the distance is unknown.
    """
    if distance not in DISTANCES:
        raise ValueError(f"Distance {distance!r} is unknown; choose {' or '.join(DISTANCES)}.")
    real = jax.lax.stop_gradient(real)
    if distance == "cosine":
        norms = jnp.sqrt(jnp.sum(pseudo**2, -1, keepdims=True) + 1e-12)
        real_norms = jnp.sqrt(jnp.sum(real**2, -1, keepdims=True) + 1e-12)
        similarity = jnp.einsum("md,rd->mr", pseudo / norms, real / real_norms)
    else:
        similarity = -squared_distances(pseudo, real) / pseudo.shape[-1]
    logits = similarity / temperature  # [M, R]

    positive = (pseudo_labels[:, None] == real_labels[None, :]) & (pseudo_labels >= 0)[:, None]
    negative = jnp.broadcast_to((real_labels < 0)[None, :], logits.shape)
    if class_negatives:
        negative = negative | ((real_labels >= 0)[None, :] & ~positive)
    negatives = jax.nn.logsumexp(jnp.where(negative, logits, -jnp.inf), axis=-1, keepdims=True)
    losses = jnp.logaddexp(logits, negatives) - logits  # -log(e^s / (e^s + sum of negatives))
    count = positive.sum(axis=-1)
    mean = jnp.sum(jnp.where(positive, losses, 0.0), axis=-1) / jnp.maximum(count, 1)
    return mean, count > 0
