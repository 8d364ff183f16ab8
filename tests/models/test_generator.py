"""Pseudo queries live where real ones can."""

import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.models.generators import QueryGenerator

GENERATOR = QueryGenerator(width=8, hidden_width=16, noise_width=4)
TEXT = jax.random.normal(jax.random.key(0), (5, 6))
SCALE, BIAS = jnp.arange(1.0, 9.0), jnp.linspace(-1, 1, 8)
PARAMS = GENERATOR.init(jax.random.key(1), TEXT, jax.random.key(2), SCALE, BIAS)


def test_output_is_normalised_then_scaled():
    queries = GENERATOR.apply(PARAMS, TEXT, jax.random.key(3), SCALE, BIAS)
    inner = (queries - BIAS) / SCALE
    np.testing.assert_allclose(inner.mean(axis=-1), 0, atol=1e-5)
    np.testing.assert_allclose(inner.std(axis=-1), 1, atol=1e-3)


def test_noise_spreads_a_class_and_the_key_decides():
    one_class = jnp.broadcast_to(TEXT[:1], TEXT.shape)
    a = GENERATOR.apply(PARAMS, one_class, jax.random.key(3), SCALE, BIAS)
    b = GENERATOR.apply(PARAMS, one_class, jax.random.key(3), SCALE, BIAS)
    np.testing.assert_array_equal(a, b)
    assert np.std(a, axis=0).min() > 1e-3
