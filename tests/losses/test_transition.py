"""CAT's losses by hand and by their properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.losses import transition

RNG = np.random.default_rng(0)
BANDWIDTHS = (2.0, 20.0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def test_mmd_by_hand():
    a, b = jnp.array([[0.0]]), jnp.array([[2.0]])
    on = jnp.array([True])
    squared = sum(2 - 2 * np.exp(-4 / (2 * v)) for v in BANDWIDTHS)
    value = transition.mmd(a, b, on, on, bandwidths=BANDWIDTHS)
    np.testing.assert_allclose(value, np.sqrt(squared), rtol=1e-5)


def test_mmd_masked_equals_subset():
    a, b = normal(6, 3), normal(5, 3)
    keep_a, keep_b = np.arange(6) % 2 == 0, np.arange(5) != 3
    masked = transition.mmd(a, b, keep_a, keep_b, bandwidths=BANDWIDTHS)
    subset = transition.mmd(
        a[keep_a], b[keep_b], np.ones(3, bool), np.ones(4, bool), bandwidths=BANDWIDTHS
    )
    np.testing.assert_allclose(masked, subset, rtol=1e-5)


@pytest.mark.parametrize("empty", [False, True])
def test_mmd_gradient_is_finite_for_equal_and_empty_sets(empty):
    a = normal(4, 3)
    valid = jnp.full(4, not empty)
    value, gradient = jax.value_and_grad(
        lambda x: transition.mmd(x, a, valid, valid, bandwidths=BANDWIDTHS)
    )(a)
    assert np.isfinite(gradient).all()
    assert value <= 1.1e-4


def test_mmd_per_class_sees_swapped_classes():
    a = jnp.array([[0.0], [9.0]])
    b = a[::-1]
    on = jnp.array([True, True])
    same = (jnp.eye(2),) * 3
    assert transition.mmd(a, b, on, on, bandwidths=BANDWIDTHS) < 1e-3
    assert transition.mmd(a, b, on, on, same, bandwidths=BANDWIDTHS) > 0.5


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_contrast_by_hand(distance):
    pseudo = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    real = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    real_labels = jnp.array([4, -1, 5])
    losses, valid = transition.query_contrast(
        pseudo, jnp.array([4, 7]), real, real_labels,
        temperature=0.5, distance=distance, class_negatives=False,
    )  # fmt: skip
    np.testing.assert_array_equal(valid, [True, False])
    similarity = {"cosine": (1.0, 0.0), "euclidean": (0.0, -1.0)}[distance]
    positive, negative = np.exp(np.array(similarity) / 0.5)
    np.testing.assert_allclose(losses[0], -np.log(positive / (positive + negative)), rtol=1e-5)

    more, _ = transition.query_contrast(
        pseudo, jnp.array([4, 7]), real, real_labels,
        temperature=0.5, distance=distance, class_negatives=True,
    )  # fmt: skip
    np.testing.assert_allclose(more[0], -np.log(positive / (positive + 2 * negative)), rtol=1e-5)


def test_contrast_without_negatives_is_zero_and_padding_is_invalid():
    losses, valid = transition.query_contrast(
        normal(2, 3), jnp.array([1, -1]), normal(2, 3), jnp.array([1, 1]),
        temperature=0.1, distance="cosine", class_negatives=True,
    )  # fmt: skip
    np.testing.assert_allclose(losses, [0, 0], atol=1e-6)
    np.testing.assert_array_equal(valid, [True, False])


def test_contrast_takes_no_gradient_of_real_queries():
    def loss(real):
        losses, _ = transition.query_contrast(
            jnp.ones((1, 2)), jnp.array([0]), real, jnp.array([0, -1]),
            temperature=0.1, distance="euclidean", class_negatives=False,
        )  # fmt: skip
        return losses.sum()

    assert not np.asarray(jax.grad(loss)(normal(2, 2))).any()


def test_contrast_refuses_unknown_distance():
    with pytest.raises(ValueError, match="cosine or euclidean"):
        transition.query_contrast(
            normal(1, 2), jnp.array([0]), normal(1, 2), jnp.array([0]),
            temperature=1.0, distance="manhattan", class_negatives=False,
        )  # fmt: skip
