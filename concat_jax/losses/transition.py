"""CAT: losses that make generated queries stand in for real ones, and the way back to text.

Letters: M pseudo queries, R real queries, D query width, K classes. No gradient is taken of real
queries anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from concat_jax.losses.alignment import pairwise_cosine

DISTANCES = ("cosine", "euclidean")


def squared_distances(a: jax.Array, b: jax.Array) -> jax.Array:
    """Squared Euclidean distances [M, R] float32 between rows of a [M, D] and b [R, D]."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    # Whole float32 on every device: squares cancel against the product, and bfloat16 would leave
    # its rounding instead of the distance.
    cross = jnp.einsum("md,rd->mr", a, b, precision="highest")
    squares = jnp.sum(a**2, axis=-1)[:, None] + jnp.sum(b**2, axis=-1)[None, :]
    # Rounding can leave a tiny negative, which has no meaning here.
    return jnp.maximum(squares - 2 * cross, 0.0)


def similarity(a: jax.Array, b: jax.Array, distance: str) -> jax.Array:
    """Similarity [M, R] of a [M, D] and b [R, D]: what the contrasts put over a temperature.

    "cosine", or "euclidean" for minus the squared distance over D, which also compares lengths and
    so cannot be satisfied by direction alone.
    """
    if distance == "cosine":
        return pairwise_cosine(a, b)
    return -squared_distances(a, b) / a.shape[-1]


def class_means(queries: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
    """Mean query [K, D] float32 of each class; zero for a class without a query.

    Queries are [M, D], labels [M] int32, -1 for queries of no class.
    """
    member = jax.nn.one_hot(labels, num_classes)  # a label of -1 is a row of zeros
    sums = jnp.einsum("mk,md->kd", member, queries.astype(jnp.float32), precision="highest")
    return sums / jnp.maximum(member.sum(axis=0), 1)[:, None]


def mmd(
    pseudo: jax.Array,
    real: jax.Array,
    pseudo_valid: jax.Array,
    real_valid: jax.Array,
    *,
    bandwidths: Sequence[float],
) -> jax.Array:
    """Maximum mean discrepancy between pseudo and real queries, a sum of Gaussian kernels.

    The biased V-statistic under a square root, as PADing trains with (GMMN). In float32, clamped
    before the root: a tiny negative under the root was the reference's NaN. Queries are [M, D] and
    [R, D], which of them count [M] and [R]; `bandwidths` are v of exp(-d² / (2 v)); PADing: 2, 5,
    10, 20, 40, 80 for 256-d queries. The result is 0 where either side is empty.
    """

    def kernel_sum(a, b, a_valid, b_valid):
        distances = squared_distances(a, b)
        kernels = {}
        for v in sorted(bandwidths, reverse=True):
            if 2 * v in kernels:
                kernels[v] = kernels[2 * v] ** 2
            else:
                # The barrier keeps XLA from writing the squares as exponentials again.
                kernels[v] = jax.lax.optimization_barrier(jnp.exp(-distances / (2 * v)))
        kernel = sum(kernels.values())
        # As products: the CPU backend spreads every constant of a sum over [M, R] to that shape.
        return jnp.einsum("m,mr,r->", a_valid, kernel, b_valid, precision="highest")

    real = jax.lax.stop_gradient(real)
    of_pseudo, of_real = (x.astype(jnp.float32) for x in (pseudo_valid, real_valid))
    m, r = jnp.maximum(of_pseudo.sum(), 1), jnp.maximum(of_real.sum(), 1)
    own = kernel_sum(pseudo, jax.lax.stop_gradient(pseudo), of_pseudo, of_pseudo)
    # The kernel is symmetric: its two sides have the same gradient, which is taken of one.
    own = 2 * own - jax.lax.stop_gradient(own)
    squared = (
        own / m**2
        - 2 * kernel_sum(pseudo, real, of_pseudo, of_real) / (m * r)
        + kernel_sum(real, real, of_real, of_real) / r**2
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
    real_valid: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Pulls a pseudo query to real queries of its class, pushes it from all others.

    InfoNCE with one term for each positive, averaged over them.

    Args:
      pseudo: [M, D], of pseudo_labels [M] int32, -1 where padded.
      real: [R, D], of real_labels [R] int32, -1 for a query that holds no segment.
      distance: of `similarity`.
      real_valid: [R] bool, False for rows of padding, which are no negatives either.

    Returns (losses [M] float32, valid [M] bool): valid where the class has a positive.
    """
    logits = similarity(pseudo, jax.lax.stop_gradient(real), distance) / temperature  # [M, R]

    positive = (pseudo_labels[:, None] == real_labels[None, :]) & (pseudo_labels >= 0)[:, None]
    negative = ~positive
    if real_valid is not None:
        positive, negative = positive & real_valid[None, :], negative & real_valid[None, :]
    negatives = jax.nn.logsumexp(jnp.where(negative, logits, -jnp.inf), axis=-1, keepdims=True)
    losses = jax.nn.softplus(negatives - logits)  # -log(e^s / (e^s + sum of negatives))
    count = positive.sum(axis=-1)
    mean = jnp.sum(jnp.where(positive, losses, 0.0), axis=-1) / jnp.maximum(count, 1)
    return mean, count > 0
