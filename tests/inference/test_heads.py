"""What names queries: γ on logits, and objectness that does not depend on the names asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.inference.heads import TextHead, bias_names, text_head_for
from concat_jax.inference.panoptic import rank_queries
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
