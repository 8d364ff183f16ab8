"""Stage 2: its terms, what the generator learns from, and no unseen name where there is none."""

import dataclasses

import jax
import numpy as np
import pytest

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.stages import cat
from tests import tiny
from tests.tiny import KEY, UNSEEN

CONTEXT = tiny.context()


def memory_batch():
    """Queries with a memory: class 4 has none in it, and rows from 6 on are padding."""
    rng = np.random.default_rng(15)
    valid = np.zeros((9, 3), bool)
    valid[[1, 2, 5]] = True
    memory = np.where(valid[..., None], rng.normal(size=(9, 3, 32)), 0).astype(np.float32)
    return {**tiny.query_batch(), "memory_queries": memory, "memory_valid": valid}


# Weight of every term, the config and the batch: the defaults, and all that can be asked for.
VARIANTS = {
    "default": ({"mmd": 1.0, "contrast": 0.3, "cycle": 0.03}, cat.Config(), tiny.query_batch()),
    "inductive": (
        {"mmd": 1.0, "contrast": 0.3, "cycle": 0.03},
        cat.Config(unseen_names=False, contrast_distance="cosine", memory_per_class=3),
        memory_batch(),
    ),
}


@pytest.fixture(scope="module", params=VARIANTS)
def run(request):
    parts, config, batch = VARIANTS[request.param]
    stage = cat.make_stage(CONTEXT, config)
    assert set(batch) == set(stage.batch_fields)
    gradient = tiny.evaluate(stage)

    def function(batch=batch, text=None):
        return gradient(tiny.trained(stage), tiny.frozen(stage, text), batch, KEY)

    return parts, config, stage, batch, function


def test_cat_trains_the_generator(run):
    parts, _, stage, _, function = run
    (value, metrics), (gradients, others) = function()
    assert stage.trains == ("generator",) and stage.reads == ("text", "segmentor", "projector")
    tiny.assert_finite(value, metrics, gradients)
    assert {f"loss_{part}" for part in parts} == {m for m in metrics if m.startswith("loss_")}
    total = sum(weight * metrics[f"loss_{part}"] for part, weight in parts.items())
    np.testing.assert_allclose(value, total, rtol=1e-5)
    assert all(metrics[f"loss_{part}"] > 0 for part in parts)
    assert tiny.unreached(stage, gradients) == set()
    # Only the scale that pseudo queries go through is read of the segmentor.
    assert tiny.reached(others["segmentor"]) == set()
    other = tiny.text()
    other[1] = -other[1]
    assert abs(function(text=other)[0][0] - value) > 1e-4


def test_cat_knows_unseen_names_only_if_told(run):
    """A number that is multiplied by zero would show as NaN, too."""
    _, config, _, _, function = run
    known, text = function(), tiny.text()
    text[UNSEEN] = -text[UNSEEN] if config.unseen_names else np.nan
    changed = function(text=text)
    if not config.unseen_names:
        tiny.assert_same(known, changed)
        assert not np.asarray(known[1][1]["text"])[UNSEEN].any()
        return
    assert abs(changed[0][1]["loss_cycle"] - known[0][1]["loss_cycle"]) > 1e-4
    # What is learnt from real queries cannot depend on classes that have none.
    for name in ("loss_mmd", "loss_contrast", "spread_ratio", "offset_ratio"):
        np.testing.assert_array_equal(changed[0][1][name], known[0][1][name])


def test_cat_survives_a_batch_without_a_matched_query(run):
    *_, batch, function = run
    empty = {**batch, "query_labels": np.full_like(batch["query_labels"], -1)}
    if "memory_valid" in batch:
        empty["memory_valid"] = np.zeros_like(batch["memory_valid"])
    (value, metrics), (gradients, _) = function(empty)
    tiny.assert_finite(value, metrics, gradients)
    assert metrics["loss_mmd"] == 0 and metrics["loss_contrast"] == 0


def test_the_contrast_learns_from_the_memory_and_the_mmd_from_the_batch():
    config = cat.Config()
    batch = {
        "queries": np.random.default_rng(16).normal(size=(2, 4, 32)).astype(np.float32),
        "query_labels": np.array([[1, 1, -1, -1], [4, 4, -1, -1]], np.int32),
        "memory_queries": np.full((6, 2, 32), np.nan, np.float32),  # never valid, never read
        "memory_valid": np.zeros((6, 2), bool),
    }

    def loss_of(config):
        stage = cat.make_stage(CONTEXT, config)
        loss = jax.jit(stage.loss)

        def metrics():
            inputs = {name: batch[name] for name in stage.batch_fields}
            return loss(tiny.trained(stage), tiny.frozen(stage), inputs, KEY)[1]

        return metrics

    plain = loss_of(config)()
    of_memory = loss_of(dataclasses.replace(config, memory_per_class=2))
    empty = of_memory()
    for name, value in plain.items():
        np.testing.assert_allclose(empty[name], value, rtol=1e-4, err_msg=name)
    batch["memory_queries"][[1, 4]] = batch["queries"][:, :2]
    batch["memory_valid"][[1, 4]] = True
    own = of_memory()  # the batch's queries once more: the means of classes stay
    np.testing.assert_allclose(own["offset_ratio"], plain["offset_ratio"], rtol=1e-4)
    batch["memory_queries"][1] += 1.0
    other = of_memory()
    for name in ("loss_contrast", "offset_ratio"):
        assert abs(other[name] - own[name]) > 1e-3, name
    np.testing.assert_allclose(other["loss_mmd"], plain["loss_mmd"], rtol=1e-4)


def test_unseen_names_are_refused_where_there_are_none():
    seen = Vocabulary(("cat", "sky"), (True, False), (True, True), (1, 2))
    context = dataclasses.replace(CONTEXT, vocabulary=seen)
    with pytest.raises(ValueError, match="all 2 classes of the vocabulary are seen; mark"):
        cat.make_stage(context, cat.Config())
    cat.make_stage(context, cat.Config(unseen_names=False))


def test_generated_queries_have_the_scale_of_the_last_layer_norm():
    text = np.repeat(tiny.text()[:2], 500, axis=0)
    params = {name: tiny.params(name) for name in ("generator", "segmentor")}
    queries = np.asarray(cat.generate(CONTEXT.networks, params, text, KEY))
    norm = params["segmentor"]["transformer_decoder"]["decoder_norm"]
    normalised = (queries - norm["bias"]) / norm["scale"]
    np.testing.assert_allclose(normalised.mean(axis=-1), 0, atol=1e-4)
    np.testing.assert_allclose((normalised**2).mean(axis=-1), 1, atol=1e-3)
    # Queries of one class differ by their noise, and classes differ by more than that.
    within = queries[:500].std(axis=0).mean()
    assert within > 0.01
    assert not np.array_equal(queries[0], queries[1])
