"""CON's losses by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.losses import alignment


def test_cosine_alignment_by_hand():
    a = jnp.array([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    b = jnp.array([[5.0, 0.0], [0.0, -1.0], [1.0, 0.0]])
    expected = [0.0, 2.0, 1 - 1 / np.sqrt(2)]
    np.testing.assert_allclose(alignment.cosine_alignment(a, b), expected, atol=1e-6)


def test_zero_vector_has_a_finite_gradient():
    gradient = jax.grad(lambda a: alignment.cosine_alignment(a, jnp.ones(3)))(jnp.zeros(3))
    assert np.isfinite(gradient).all()


def test_poolings():
    queries = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])
    objectness = jnp.array([[1.0, 0.0]])
    image = jnp.array([[0.0, 1.0]])

    def pool(name):
        return alignment.pool_queries(queries, objectness, image, pooling=name, temperature=0.5)

    high = np.exp(2) / (np.exp(2) + 1)
    np.testing.assert_allclose(pool("objectness"), [[high, 1 - high]], rtol=1e-5)
    np.testing.assert_allclose(pool("similarity"), [[1 - high, high]], rtol=1e-5)
    np.testing.assert_allclose(pool("mean"), [[0.5, 0.5]], rtol=1e-5)


def test_info_nce_by_hand():
    eye = jnp.eye(3)
    valid = jnp.array([True, True, False])
    # Cosines are 1 with the own target and 0 with the one other valid target.
    expected = -np.log(np.exp(2) / (np.exp(2) + 1))
    losses = alignment.info_nce(eye, eye, valid, temperature=0.5)
    np.testing.assert_allclose(losses, [expected, expected, 0], rtol=1e-5)


def test_info_nce_keeps_leading_axes():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 4, 5, 3)).astype(np.float32)
    valid = rng.uniform(size=(4, 5)) < 0.6
    batched = alignment.info_nce(a, b, valid, temperature=0.1)
    single = [
        alignment.info_nce(x, y, v, temperature=0.1) for x, y, v in zip(a, b, valid, strict=True)
    ]
    np.testing.assert_allclose(batched, np.stack(single), rtol=1e-5)
