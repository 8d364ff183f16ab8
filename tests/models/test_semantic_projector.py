"""The classifier is text: scale, cosine, no-object column, synonyms."""

import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.models.semantic_projector import MAX_SCALE, SemanticProjector, class_vectors

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


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_a_class_is_as_near_as_the_nearest_of_its_synonyms():
    # Synonyms along the axes: class 0 is axis 0, class 1 the better of axes 1 and 2.
    text = jnp.eye(6)[jnp.array([[0, 0], [1, 2]])]
    query = jnp.array([0.0, 3.0, 4.0, 0.0, 0.0, 0.0])  # length 5
    logits = PROJECTOR.apply(PARAMS, query, text, method="classify")
    no_object = _unit(PARAMS["params"]["no_object_embedding"])
    cosines = [0.0, 0.8, 0.6 * no_object[1] + 0.8 * no_object[2]]
    np.testing.assert_allclose(logits, np.array(cosines) / 0.07, rtol=1e-4, atol=1e-5)


def test_synonyms_are_classes_of_one_name_and_repeats_change_nothing():
    words = _unit(np.random.default_rng(0).normal(size=(5, 3, 6))).astype(np.float32)
    words[2:, 2] = words[2:, 0]  # three classes have two synonyms
    logits = PROJECTOR.apply(PARAMS, QUERIES, words, method="predict")
    assert logits.shape == (2, 3, 6) and logits.dtype == jnp.float32
    flat = PROJECTOR.apply(PARAMS, QUERIES, words.reshape(15, 6), method="predict")
    best = np.asarray(flat[..., :15]).reshape(2, 3, 5, 3).max(axis=-1)
    np.testing.assert_allclose(logits[..., :5], best, rtol=1e-6)
    np.testing.assert_allclose(logits[..., 5], flat[..., 15], rtol=1e-6)
    fewer = PROJECTOR.apply(PARAMS, QUERIES, words[2:, :2], method="predict")
    np.testing.assert_allclose(logits[..., 2:5], fewer[..., :3], rtol=1e-5, atol=1e-5)


def test_one_text_a_class_is_the_plain_classifier():
    plain = PROJECTOR.apply(PARAMS, QUERIES, TEXT, method="predict")
    for count in (1, 3):
        text = jnp.repeat(TEXT[:, None], count, axis=1)
        logits = PROJECTOR.apply(PARAMS, QUERIES, text, method="predict")
        np.testing.assert_allclose(logits, plain, rtol=1e-6)


def test_repeated_synonyms_change_no_gradient():
    """A repeat ties with what it repeats; the tie must not double the step."""

    def loss(params, text):
        logits = PROJECTOR.apply(params, QUERIES, text, method="predict")
        return -jax.nn.log_softmax(logits)[..., 0].sum()

    gradient = jax.jit(jax.grad(loss))
    plain = gradient(PARAMS, TEXT)
    repeated = gradient(PARAMS, jnp.repeat(TEXT[:, None], 4, axis=1))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, repeated
    )


def test_class_vectors_by_hand():
    assert class_vectors(TEXT) is TEXT
    third = np.sqrt(1 / 3)
    text = jnp.array(
        [
            [[1.0, 0, 0], [0, 1, 0], [0, 0, 1]],
            [[1.0, 0, 0], [0, 1, 0], [1, 0, 0]],  # two synonyms; the first fills the row
            [[0.6, 0.8, 0], [0.6, 0.8, 0], [0.6, 0.8, 0]],
        ]
    )
    half = np.sqrt(0.5)
    expected = [[third] * 3, [half, half, 0], [0.6, 0.8, 0]]
    np.testing.assert_allclose(class_vectors(text), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(class_vectors)(text), expected, rtol=1e-6)
