"""Stage 3: it trains the projector only, the control generates nothing, no unseen name leaks."""

import dataclasses

import jax
import numpy as np
import pytest

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.stages import finetune
from tests import tiny
from tests.tiny import KEY, UNSEEN

CONTEXT = tiny.context()
VARIANTS = {
    "union": finetune.Config(pseudo_per_class=2),
    "inductive": finetune.Config(
        pseudo_per_class=2, pseudo_seen=True, deviation=0.7, unseen_names=False
    ),
    "control": finetune.Config(pseudo_per_class=0),
}


@pytest.fixture(scope="module", params=VARIANTS)
def run(request):
    config = VARIANTS[request.param]
    stage = finetune.make_stage(CONTEXT, config)
    assert set(tiny.query_batch()) == set(stage.batch_fields)
    gradient = tiny.evaluate(stage)

    def function(rng=KEY, **frozen):
        given = {**tiny.frozen(stage), **frozen}
        return gradient(tiny.trained(stage), given, tiny.query_batch(), rng)

    return config, stage, function


def test_finetune_trains_the_projector_only(run):
    config, stage, function = run
    (value, metrics), (gradients, others) = function()
    assert stage.trains == ("projector",)
    tiny.assert_finite(value, metrics, gradients)
    assert tiny.unreached(stage, gradients) == set()
    if config.pseudo_per_class:
        assert stage.reads == ("text", "segmentor", "generator")
        assert tiny.reached(others["segmentor"]) == set()
        assert "accuracy_pseudo" in metrics
        changed = function(generator=tiny.params("generator", 77))
        assert abs(changed[0][0] - value) > 1e-5


def test_finetune_control_ignores_generator_and_noise(run):
    config, stage, function = run
    first, second = function(), function(jax.random.key(4))
    if config.pseudo_per_class:
        assert abs(first[0][0] - second[0][0]) > 1e-6
        return
    assert stage.reads == ("text",)  # it is not even handed a generator
    tiny.assert_same(first, second)


def test_finetune_knows_unseen_names_only_if_told(run):
    """A number that is multiplied by zero would show as NaN, too."""
    config, _, function = run
    known, text, other = function(), tiny.text(), tiny.text()
    text[UNSEEN], other[1] = np.nan, -other[1]
    changed = function(text=text)
    if config.unseen_names:
        assert np.isnan(changed[0][0])
        # Names of all classes compete, with pseudo queries or without.
        assert np.abs(known[1][1]["text"]).max(axis=1).all()
    else:
        tiny.assert_same(known, changed)
    assert abs(function(text=other)[0][0] - known[0][0]) > 1e-5


def test_unseen_names_are_refused_where_there_are_none():
    seen = Vocabulary(("cat", "sky"), (True, False), (True, True), (1, 2))
    context = dataclasses.replace(CONTEXT, vocabulary=seen)
    with pytest.raises(ValueError, match="all 2 classes of the vocabulary are seen; mark"):
        finetune.make_stage(context, finetune.Config(pseudo_seen=True))
    finetune.make_stage(context, finetune.Config(pseudo_seen=True, unseen_names=False))
    finetune.make_stage(context, finetune.Config(pseudo_per_class=0))  # generates nothing
    with pytest.raises(ValueError, match="neither unseen nor seen classes; set"):
        finetune.Config(unseen_names=False)


def test_finetune_cross_entropy_by_hand():
    """Two real queries, one of them without a segment, against a softmax written out."""
    config = finetune.Config(pseudo_per_class=0, no_object_weight=0.25)
    stage = finetune.make_stage(CONTEXT, config)
    batch = {
        "queries": np.random.default_rng(5).normal(size=(1, 2, 32)).astype(np.float32),
        "query_labels": np.array([[4, -1]], np.int32),
    }
    value, metrics = stage.loss(tiny.trained(stage), tiny.frozen(stage), batch, KEY)
    logits = CONTEXT.networks.projector.apply(
        {"params": tiny.params("projector")}, batch["queries"], tiny.text(), method="predict"
    )
    exponents = np.exp(np.asarray(logits, np.float64)[0])
    probabilities = exponents / exponents.sum(axis=-1, keepdims=True)
    expected = -(np.log(probabilities[0, 4]) + 0.25 * np.log(probabilities[1, 6])) / 1.25
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert metrics["accuracy_real"] in (0.0, 1.0)


def test_sampled_deviations_by_hand():
    """Class 0 has two queries, class 1 one; what holds no segment has no class to deviate from."""
    queries = np.array([[[1.0, 2.0], [5.0, 5.0]], [[3.0, 6.0], [100.0, 100.0]]], np.float32)
    labels = np.array([[0, 1], [0, -1]])
    drawn = finetune.sample_deviations(KEY, queries, labels, num_classes=3, count=300)
    assert drawn.shape == (300, 2)
    rows, counts = np.unique(np.asarray(drawn), axis=0, return_counts=True)
    # Over n - 1, as the variance of a class is: two queries deviate by more than from their mean.
    np.testing.assert_allclose(rows, np.multiply([[-1, -2], [1, 2]], 2**0.5), rtol=1e-6)
    assert counts.min() > 120  # a half each, and none of the class of one
    nothing = finetune.sample_deviations(KEY, queries, np.full((2, 2), -1), 3, 10)
    np.testing.assert_array_equal(nothing, np.zeros((10, 2)))
