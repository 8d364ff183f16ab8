"""The regressions from CLIP to vision queries: what they predict, choose, and hand on."""

import dataclasses

import numpy as np
import pytest

from concat_jax.core.batch import QUERY_TARGETS
from concat_jax.models.generators import RegressionGenerator
from concat_jax.stages import finetune, regression
from concat_jax.stages.queries import QueryBank, Targets
from concat_jax.stages.registry import make_stage
from concat_jax.stages.stage import StageConfig
from tests import tiny

WIDTH, JOINT, CLASSES = 12, 8, 10
ALL = range(CLASSES)
RNG = np.random.default_rng(0)
# Queries are a smooth map of instances, which scatter about their class; texts lie a gap off.
CENTRES = tiny.unit(RNG.normal(size=(CLASSES, JOINT)))
TEXT = tiny.unit(CENTRES + 0.3 * tiny.unit(np.ones((1, JOINT)))).astype(np.float64)
MAP = RNG.normal(size=(JOINT, WIDTH))


def bank(classes=ALL, per_class=40):
    """One image a query, with a query that holds nothing beside it."""
    rng = np.random.default_rng(1)
    labels = np.repeat(list(classes), per_class)
    targets = tiny.unit(CENTRES[labels] + 0.15 * rng.normal(size=(len(labels), JOINT)))
    queries = np.tanh(targets @ MAP)
    queries = np.stack([queries, np.zeros_like(queries)], axis=1).astype(np.float32)
    rows = np.stack([np.arange(len(labels)), np.full(len(labels), -1)], axis=1)
    return QueryBank(
        queries,
        np.stack([labels, np.full(len(labels), -1)], axis=1).astype(np.int16),
        batch_size=4,
        seed=0,
        targets=Targets(targets.astype(np.float16), rows.astype(np.int32)),
    )


def class_means():
    found = bank(per_class=4000)
    labels = found.labels[:, 0]
    return np.stack([found.queries[labels == k, 0].mean(axis=0) for k in range(CLASSES)])


@pytest.fixture(scope="module")
def context():
    generator = RegressionGenerator(width=WIDTH, num_centres=64)
    networks = dataclasses.replace(tiny.networks(), generator=generator)
    return dataclasses.replace(tiny.context(), networks=networks)


def fitted(context, on, found):
    stage = regression.make_stage(context, regression.Config(on=on))
    return stage, stage.start(found, {"text": TEXT})["generator"]


def predicted(context, params):
    generator, norm = context.networks.generator, np.ones(WIDTH)
    return np.asarray(generator.apply({"params": params}, TEXT, tiny.KEY, norm, norm))


@pytest.mark.parametrize("on", ["images", "text"])
def test_a_regression_places_classes_that_it_never_saw(context, on):
    """Nearer than the mean of all queries, which knows nothing of the class."""
    seen = range(CLASSES - 2)
    _, params = fitted(context, on, bank(seen))
    means = class_means()
    errors = np.linalg.norm(predicted(context, params) - means, axis=1)
    naive = np.linalg.norm(means - means[: CLASSES - 2].mean(axis=0), axis=1)
    assert errors[-2:].mean() < 0.8 * naive[-2:].mean()
    assert errors[:-2].mean() < 0.5 * naive[:-2].mean()


def test_the_means_are_the_means(context):
    _, params = fitted(context, "means", bank())
    found = bank()
    for k in range(CLASSES):
        mean = found.queries[found.labels[:, 0] == k, 0].mean(axis=0)
        np.testing.assert_allclose(predicted(context, params)[k], mean, atol=1e-3)


def test_the_network_computes_what_was_fitted(context):
    """The module and numpy, on parameters of every part at once."""
    rng = np.random.default_rng(3)
    params = {
        "text_mean": rng.normal(size=JOINT),
        "text_map": rng.normal(size=(JOINT, JOINT)),
        "image_mean": rng.normal(size=JOINT),
        "linear": rng.normal(size=(JOINT, WIDTH)),
        "offset": rng.normal(size=WIDTH),
        "centres": tiny.unit(rng.normal(size=(64, JOINT))),
        "weights": rng.normal(size=(64, WIDTH)),
        "sharpness": np.asarray(3.0),
    }
    filled = context.networks.generator.filled(params, JOINT)
    np.testing.assert_allclose(
        predicted(context, filled), regression.predict(params, TEXT), rtol=1e-4, atol=1e-4
    )


def test_ridge_is_the_minimum_of_its_loss():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(30, 5)), rng.normal(size=(30, 3))
    best = regression.ridge(x, y, 0.1)

    def loss(w):
        return ((x @ w - y) ** 2).sum() / len(x) + 0.1 * (w**2).sum()

    nearby = [best + 1e-3 * rng.normal(size=best.shape) for _ in range(50)]
    assert all(loss(best) < loss(w) for w in nearby)


def test_settings_are_chosen_on_classes_that_were_left_out():
    """A fit that repeats what it saw is perfect on its own classes and is not chosen."""
    found = bank()
    pairs = regression._pairs(found, np.random.default_rng(0), False)
    means = pairs.means(np.arange(CLASSES), pairs.queries)

    def fit(pairs, text, kind):
        if kind == "memory":  # knows the classes it was fitted to, and nothing of others
            known = np.unique(pairs.labels)
            return {"memory": {tuple(text[k]): means[k] for k in known}}
        return regression._fit_text(pairs, text, 1e-3)

    def predict(params, text):
        if "memory" in params:
            return np.stack([params["memory"].get(tuple(t), np.full(WIDTH, 9.0)) for t in text])
        return original(params, text)

    original, regression.predict = regression.predict, predict
    try:
        best, error = regression.choose(fit, [("memory",), ("ridge",)], pairs, TEXT, folds=4)
    finally:
        regression.predict = original
    assert best == ("ridge",) and 0 < error < 5


@pytest.mark.parametrize("on", ["images", "text"])
def test_a_bank_of_one_class_is_refused(context, on):
    with pytest.raises(ValueError, match="queries of 1 to learn from; extract more images"):
        fitted(context, on, bank(range(1)))


def test_images_need_targets_and_a_generator_of_the_kind(context):
    assert QUERY_TARGETS in fitted(context, "images", bank())[0].batch_fields
    assert QUERY_TARGETS not in fitted(context, "text", bank())[0].batch_fields
    with pytest.raises(ValueError, match="generator.kind=regression"):
        regression.make_stage(tiny.context(), regression.Config())
    with pytest.raises(ValueError, match="'image'; did you mean 'images'"):
        regression.Config(on="image")


def test_the_finetune_takes_its_pseudo_queries(context):
    """As it takes those of any generator; equal texts give equal ones, and deviations are added."""
    _, params = fitted(context, "images", bank())
    frozen = {"segmentor": {"transformer_decoder": {"decoder_norm": {"scale": 1.0, "bias": 0.0}}}}
    pseudo = finetune.generate(
        context.networks, {**frozen, "generator": params}, TEXT[[0, 0, 1]], tiny.KEY
    )
    np.testing.assert_array_equal(pseudo[0], pseudo[1])
    assert np.abs(pseudo[0] - pseudo[2]).max() > 0.05


def test_a_closed_form_has_no_steps_and_a_loss_has_some(context):
    takes = {"clip": "clip", "segmentor": "con", "projector": "con"}
    settings = dict(batch_size=2, bank_images=2, optimizer={}, takes=takes)
    fitted_stage = StageConfig("regression", steps=0, **settings)
    assert make_stage("fit", fitted_stage, context).loss is None
    for changes in (dict(steps=3), dict(queries="images")):
        wrong = dataclasses.replace(fitted_stage, **changes)
        with pytest.raises(ValueError, match="'fit' is in closed form, from a bank"):
            make_stage("fit", wrong, context)
    with pytest.raises(ValueError, match="config.train.cat.steps is 0; set --config.train.cat"):
        make_stage("cat", StageConfig("cat", steps=0, **settings), tiny.context())
