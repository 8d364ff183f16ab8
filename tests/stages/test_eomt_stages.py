"""The stages on the other kind of segmentor, unchanged: what gets gradients, and the progress."""

import functools

import jax
import numpy as np

from concat_jax.core.batch import PROGRESS
from concat_jax.models.networks import make_networks
from concat_jax.stages import cat, con, finetune
from concat_jax.stages.stage import TEXT, Stage
from concat_jax.training import loop
from concat_jax.training.optimizer import FROZEN, OptimizerConfig, label_params, path_name
from concat_jax.training.sharding import make_mesh
from tests import tiny
from tests.tiny import KEY

BACKBONE = dict(width=32, depth=2, num_heads=2, ffn_width=32, patch_size=8, grid=4, num_registers=1)
SEGMENTOR = dict(kind="eomt", backbone=BACKBONE, num_queries=6, num_blocks=1, num_upscales=1)


@functools.cache
def networks(**changes):
    """Those of `tiny` around an EoMT."""
    return make_networks({**tiny.MODEL, "segmentor": {**SEGMENTOR, **changes}})


def params(names, of):
    return {name: tiny.text() if name == TEXT else tiny.params(name, of=of) for name in names}


def test_con_trains_it_and_reads_how_far_training_is():
    of = networks()
    assert of.query_width == 32
    stage = con.make_stage(tiny.context(networks=of), con.Config())
    assert PROGRESS in stage.batch_fields
    function = tiny.evaluate(stage)
    trained, frozen = params(stage.trains, of), params(stage.reads, of)
    batch = tiny.batch()
    results = [
        function(trained, frozen, {**batch, PROGRESS: np.full(2, p, np.float32)}, KEY)
        for p in (0.0, 1.0)
    ]
    for (loss, metrics), (gradients, _) in results:
        tiny.assert_finite(loss, metrics, gradients)
        assert not tiny.unreached(stage, gradients)
    assert results[0][0][0] != results[1][0][0]  # masked at the start, not at the end


def test_a_frozen_encoder_is_not_trained_by_con():
    of = networks(frozen=True)
    stage = con.make_stage(tiny.context(networks=of), con.Config())
    shapes = jax.eval_shape(lambda: {"segmentor": of.init("segmentor", jax.random.key(0))})
    labels = jax.tree_util.tree_leaves_with_path(label_params(shapes, stage.rules))
    frozen = {path_name(path) for path, label in labels if label == FROZEN}
    backbone = {path_name(path) for path, _ in labels if "segmentor/backbone/" in path_name(path)}
    assert frozen == backbone and backbone


def test_cat_and_finetune_learn_from_its_queries():
    of = networks()
    context = tiny.context(networks=of)
    for module in (cat, finetune):
        stage = module.make_stage(context, module.Config())
        (loss, metrics), (gradients, _) = tiny.evaluate(stage)(
            params(stage.trains, of), params(stage.reads, of), tiny.query_batch(), KEY
        )
        tiny.assert_finite(loss, metrics, gradients)
        assert not tiny.unreached(stage, gradients)


def test_the_loop_says_how_far_it_is(tmp_path, monkeypatch):
    seen = []

    def loss(params, frozen, batch, rng):
        value = batch[PROGRESS].mean() + 0 * params["head"].sum()
        return value, {"loss": value}

    monkeypatch.setattr(
        loop.MetricWriter, "scalars", lambda self, step, values: seen.append(values["loss"])
    )
    loop.train_stage(
        "toy",
        Stage(("head",), (), loss, ((r".*", 1.0, 1.0),), (PROGRESS,)),
        params={"head": np.zeros(2, np.float32)},
        frozen={},
        batches=lambda first, count: ({"x": np.zeros(4)} for _ in range(count)),
        workdir=tmp_path,
        mesh=make_mesh(devices=1),
        loop=loop.LoopConfig(steps=4, log_every=1, tensorboard=False),
        optimizer=OptimizerConfig(learning_rate=0.1),
    )
    np.testing.assert_allclose(seen, [0, 0.25, 0.5, 0.75])
