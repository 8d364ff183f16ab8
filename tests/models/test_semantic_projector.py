"""The classifier is text: scale, cosine, no-object column."""

import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.models.semantic_projector import MAX_SCALE, SemanticProjector

PROJECTOR = SemanticProjector(joint_width=6, hidden_width=10, num_layers=2)
QUERIES = jax.random.normal(jax.random.key(0), (2, 3, 8))
TEXT = jnp.eye(6)[:4]
PARAMS = PROJECTOR.init(jax.random.key(1), QUERIES, TEXT, method="predict")


def test_logits_are_scaled_cosines():
    semantic = PROJECTOR.apply(PARAMS, QUERIES)
    logits = PROJECTOR.apply(PARAMS, QUERIES, TEXT, method="predict")
    assert logits.shape == (2, 3, 5)
    unit = semantic / np.linalg.norm(semantic, axis=-1, keepdims=True)
    np.testing.assert_allclose(logits[..., :4], unit[..., :4] / 0.07, rtol=1e-4)
    no_object = PARAMS["params"]["no_object_embedding"]
    expected = unit @ (no_object / np.linalg.norm(no_object)) / 0.07
    np.testing.assert_allclose(logits[..., 4], expected, rtol=1e-4, atol=1e-4)


def test_other_names_need_no_other_weight():
    more = PROJECTOR.apply(PARAMS, QUERIES, jnp.eye(6), method="predict")
    fewer = PROJECTOR.apply(PARAMS, QUERIES, TEXT, method="predict")
    np.testing.assert_allclose(more[..., :4], fewer[..., :4], rtol=1e-6)


def test_scale_is_clipped():
    params = jax.tree.map(lambda x: x, PARAMS)
    params["params"]["log_scale"] = jnp.asarray(20.0)
    logits = PROJECTOR.apply(params, QUERIES, TEXT, method="predict")
    assert np.abs(logits).max() <= MAX_SCALE * (1 + 1e-5)
