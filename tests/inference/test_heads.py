"""What names queries: γ on logits, and objectness that does not depend on the names asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.inference.heads import (
    ClipQueries,
    EnsembleHead,
    TextHead,
    bias_names,
    text_head_for,
)
from concat_jax.inference.panoptic import rank_queries
from concat_jax.models.segmentor_output import ClipEmbeddings
from concat_jax.models.semantic_projector import SemanticProjector
from tests import tiny

IS_SEEN = np.array([True, False, True])


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("gamma", [-3.0, 0.0, 0.7, 4.0])
def test_as_if_taken_from_the_logits(xp, gamma):
    """Of the names' softmax; no-object keeps its probability."""
    logits = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    probs = np.asarray(jax.nn.softmax(logits))
    found = np.asarray(bias_names(xp.asarray(probs), IS_SEEN, np.float32(gamma)))
    names = np.asarray(jax.nn.softmax(logits[:, :3] - gamma * IS_SEEN))
    np.testing.assert_allclose(found[:, :3], names * (1 - probs[:, 3:]), rtol=1e-5)
    np.testing.assert_array_equal(found[:, 3], probs[:, 3])
    if gamma == 0:
        np.testing.assert_array_equal(found, probs)


@pytest.mark.parametrize(("gamma", "left"), [(np.inf, [1]), (-np.inf, [0, 2])])
def test_at_the_ends_one_side_alone_competes(gamma, left):
    probs = np.array([[0.6, 1e-6, 0.3, 0.1]], np.float32)
    found = bias_names(probs, IS_SEEN, np.float32(gamma))
    assert np.flatnonzero(found[0, :3]).tolist() == left
    assert found.sum() == pytest.approx(1.0, abs=1e-5)


def test_more_names_make_no_more_objects():
    """Of the same queries, 28 names of training, 150 or 847 asked for: objectness and what is kept.

    Against all names asked for, more queries would be objects the more names there are.
    """
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(2, 50, 32)).astype(np.float32)
    training = tiny.unit(rng.normal(size=(28, 16)))
    head = TextHead(tiny.params("projector"), training, None, None, tiny.networks().projector)
    found = {28: head(queries)}
    for count in (150, 847):
        names = tiny.unit(rng.normal(size=(count, 16)))
        found[count] = text_head_for(head, names, training, np.zeros(len(names), bool))(queries)
    middle = float(np.median(found[28].objectness))
    thresholds = dict(score_threshold=0.8, objectness_threshold=middle)
    kept = {}
    for count, scores in found.items():
        np.testing.assert_allclose(scores.objectness, found[28].objectness, rtol=1e-5)
        is_seen = np.zeros(scores.class_probs.shape[-1] - 1, bool)
        ranked = rank_queries(*scores, is_seen, keep_rule="objectness", **thresholds)
        kept[count] = np.asarray(ranked.keep)
    assert 40 < kept[28].sum() < 60
    for count in (150, 847):
        assert (kept[count] != kept[28]).sum() <= 1  # the median itself, by a rounding
    against_all = 1 - np.asarray(found[847].class_probs)[..., -1]
    assert (against_all > middle).mean() > 0.9


def test_what_clip_is_sure_of_is_an_object_the_likelier():
    """p(no-object) · (1 - w · max p), by hand; where CLIP saw nothing, it stays."""
    rng = np.random.default_rng(4)
    projector = SemanticProjector(joint_width=8, hidden_width=8, num_layers=1)
    text = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)
    text /= jnp.linalg.norm(text, axis=1, keepdims=True)
    queries = jnp.asarray(rng.normal(size=(1, 2, 8)), jnp.float32)
    params = projector.init(jax.random.key(0), queries, text, method="predict")["params"]
    plain = TextHead(params, text, None, None, projector)
    is_seen, scale = jnp.array([True, False, False]), jnp.float32(5)
    fields = dict(params=params, text=text, is_name=None, training_text=None, projector=projector)
    head = EnsembleHead(**fields, is_seen=is_seen, scale=scale, needs_places=True)
    clip = jnp.asarray(rng.normal(size=(1, 2, 8)), jnp.float32)
    given = ClipQueries(queries, ClipEmbeddings(clip, jnp.array([[True, False]])))
    own, void = plain(queries), np.asarray(plain(queries).class_probs[..., -1])
    without = head.replace(alpha=0.0, beta=0.0)
    np.testing.assert_allclose(without(given).class_probs, own.class_probs, atol=1e-6)
    found = without.replace(void_weight=0.5)(given)
    cosines = clip[0, 0] @ text.T / jnp.linalg.norm(clip[0, 0])
    most = float(jax.nn.softmax(5 * cosines).max())
    expected = void * np.array([[1 - 0.5 * most, 1]])
    np.testing.assert_allclose(found.class_probs[..., -1], expected, atol=1e-6)
    np.testing.assert_allclose(found.objectness, 1 - expected, atol=1e-6)
    np.testing.assert_allclose(found.class_probs.sum(axis=-1), 1, atol=1e-6)


def test_objectness_of_an_fcclip_is_that_of_training_whatever_is_asked():
    rng = np.random.default_rng(5)
    projector = SemanticProjector(joint_width=8, hidden_width=8, num_layers=1)
    training, *asked = (jnp.asarray(rng.normal(size=(k, 8)), jnp.float32) for k in (4, 2, 40))
    queries = jnp.asarray(rng.normal(size=(1, 3, 8)), jnp.float32)
    params = projector.init(jax.random.key(0), queries, training, method="predict")["params"]
    clip = ClipEmbeddings(jnp.ones((1, 3, 8)), jnp.ones((1, 3), bool))
    found = []
    for text in asked:
        head = EnsembleHead(
            params, text, None, training, projector,
            is_seen=jnp.zeros(len(text), bool), scale=jnp.float32(5),
        )  # fmt: skip
        found.append(head(ClipQueries(queries, clip)).objectness)
    np.testing.assert_array_equal(*found)
    np.testing.assert_array_equal(
        found[0], TextHead(params, training, None, None, projector)(queries).objectness
    )
