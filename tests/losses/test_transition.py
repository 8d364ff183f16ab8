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


def test_mmd_and_its_gradient_are_those_of_the_plain_sum():
    rng = np.random.default_rng(1)
    pseudo, real = rng.normal(size=(5, 3)), rng.normal(size=(4, 3))
    on, real_on = np.array([1.0, 1, 0, 1, 1]), np.array([1.0, 1, 0, 1])
    bandwidths = (2.0, 5.0, 10.0, 20.0, 40.0, 80.0)  # some are twice another, 2 and 5 are not

    def plain(pseudo):
        def mean(a, b, a_weights, b_weights):
            squares = ((a[:, None] - b[None]) ** 2).sum(-1)
            kernel = sum(np.exp(-squares / (2 * v)) for v in bandwidths)
            return a_weights @ kernel @ b_weights / (a_weights.sum() * b_weights.sum())

        own, theirs = mean(pseudo, pseudo, on, on), mean(real, real, real_on, real_on)
        return np.sqrt(own - 2 * mean(pseudo, real, on, real_on) + theirs)

    value, gradient = jax.value_and_grad(
        lambda x: transition.mmd(
            x,
            jnp.asarray(real, jnp.float32),
            jnp.asarray(on > 0),
            jnp.asarray(real_on > 0),
            bandwidths=bandwidths,
        )
    )(jnp.asarray(pseudo, jnp.float32))
    np.testing.assert_allclose(value, plain(pseudo), rtol=1e-5)
    nudges = 1e-5 * np.eye(15).reshape(15, 5, 3)
    numeric = [(plain(pseudo + x) - plain(pseudo - x)) / 2e-5 for x in nudges]
    np.testing.assert_allclose(gradient.ravel(), numeric, rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_contrast_by_hand(distance):
    pseudo = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    real = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    real_labels = jnp.array([4, -1, 5])
    losses, valid = transition.query_contrast(
        pseudo, jnp.array([4, 7]), real, real_labels,
        temperature=0.5, distance=distance,
    )  # fmt: skip
    np.testing.assert_array_equal(valid, [True, False])
    similarity = {"cosine": (1.0, 0.0), "euclidean": (0.0, -1.0)}[distance]
    positive, negative = np.exp(np.array(similarity) / 0.5)
    # What holds no segment and what is of another class push alike.
    np.testing.assert_allclose(losses[0], -np.log(positive / (positive + 2 * negative)), rtol=1e-5)


def test_contrast_without_negatives_is_zero_and_padding_is_invalid():
    losses, valid = transition.query_contrast(
        normal(2, 3), jnp.array([1, -1]), normal(2, 3), jnp.array([1, 1]),
        temperature=0.1, distance="cosine",
    )  # fmt: skip
    np.testing.assert_allclose(losses, [0, 0], atol=1e-6)
    np.testing.assert_array_equal(valid, [True, False])


def test_contrast_rows_of_padding_are_neither_positive_nor_negative():
    pseudo, real = normal(2, 3), normal(5, 3)
    labels = jnp.array([0, 0, -1, 1, -1])
    valid = jnp.array([True, False, True, False, True])
    options = dict(temperature=0.3, distance="euclidean")
    padded = transition.query_contrast(
        pseudo, jnp.array([0, 1]), real, labels, real_valid=valid, **options
    )
    keep = np.array([0, 2, 4])
    subset = transition.query_contrast(
        pseudo, jnp.array([0, 1]), real[keep], labels[keep], **options
    )
    np.testing.assert_allclose(padded[0], subset[0], rtol=1e-5)
    np.testing.assert_array_equal(padded[1], [True, False])
    np.testing.assert_array_equal(subset[1], [True, False])


# Each as (pseudo, real) -> loss, for queries of classes 0 and 1.
LABELS, REAL_LABELS = jnp.array([0, 0, 1, 1]), jnp.array([0, 0, 1, 1, -1])
TERMS = {
    "query": lambda pseudo, real, distance: transition.query_contrast(
        pseudo, LABELS, real, REAL_LABELS, temperature=0.1, distance=distance
    )[0],
    "mmd": lambda pseudo, real, distance: transition.mmd(
        pseudo, real, LABELS >= 0, REAL_LABELS >= 0, bandwidths=BANDWIDTHS
    ),
}


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("term", TERMS)
def test_gradients_go_to_pseudo_queries_and_not_to_real_ones(term, distance):
    def loss(pseudo, real):
        return TERMS[term](pseudo, real, distance).sum()

    # The same numbers whichever tests run before: terms that are content have next to no gradient.
    rng = np.random.default_rng(0)
    pseudo, real = (jnp.asarray(rng.normal(size=(n, 3)), jnp.float32) for n in (4, 5))
    of_pseudo, of_real = jax.grad(loss, argnums=(0, 1))(pseudo, real)
    assert not np.asarray(of_real).any()
    assert np.asarray(of_pseudo).any(axis=1).all()
    # A generator that collapsed must get a gradient that it can use, or none.
    collapsed = jax.grad(loss)(jnp.ones((4, 3)), real)
    assert np.isfinite(collapsed).all()


def test_a_contrast_of_nothing_is_zero_with_finite_gradients(monkeypatch):
    monkeypatch.setitem(globals(), "LABELS", jnp.full(4, -1))
    monkeypatch.setitem(globals(), "REAL_LABELS", jnp.full(5, -1))
    value, gradient = jax.value_and_grad(
        lambda pseudo: TERMS["query"](pseudo, normal(5, 3), "cosine").sum()
    )(normal(4, 3))
    assert value == 0 and not np.asarray(gradient).any()
