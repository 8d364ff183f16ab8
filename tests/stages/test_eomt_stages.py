"""The stages on the other kind of segmentor, unchanged: what gets gradients, and the progress."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.core.batch import PROGRESS
from concat_jax.models.clip_images import normalize_clip_images
from concat_jax.models.networks import make_networks
from concat_jax.models.segmentor_output import normalize_images
from concat_jax.models.semantic_projector import unit
from concat_jax.stages import cat, con, finetune
from concat_jax.stages.clip_targets import CropConfig, patch_regions, token_targets
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
    assert of.segmentor.width == 32
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


def test_targets_of_an_encoder_that_is_clip():
    """The whole picture's is CLIP's own; a segment's looks at its own patches."""
    clip = {**tiny.MODEL["clip"], "image_depth": 2, "image_size": 32}
    segmentor = {**SEGMENTOR, "backbone": dict(kind="clip", **clip), "frozen": True}
    of = make_networks({**tiny.MODEL, "clip": clip, "segmentor": segmentor})
    stage = con.make_stage(tiny.context(networks=of), con.Config(targets="encoder"))
    trained, frozen = params(stage.trains, of), params(stage.reads, of)
    frozen["clip"] = {**frozen["clip"], "vision_model": trained["segmentor"]["backbone"]}
    batch = tiny.batch()
    (loss, metrics), (gradients, _) = tiny.evaluate(stage)(
        trained, frozen, {**batch, PROGRESS: np.zeros(2, np.float32)}, KEY
    )
    tiny.assert_finite(loss, metrics, gradients)
    assert not tiny.unreached(stage, gradients)

    @jax.jit
    def targets(params, images, ids):
        variables = {"params": params["segmentor"]}
        tokens = of.segmentor.apply(variables, normalize_images(images)).clip_tokens
        pictures = normalize_clip_images(images)
        whole = of.clip.apply({"params": params["clip"]}, pictures, method="encode_image")
        found = token_targets(of.clip, params["clip"], tokens, ids, 3)
        # Other patches in the right half of the picture, which is segment 2.
        other = tokens.at[:, 1:].multiply(1.0 - 2.0 * (jnp.arange(16) % 4 >= 2)[:, None])
        return found, token_targets(of.clip, params["clip"], other, ids, 3), unit(whole)

    images = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)
    ids = np.ones((1, 32, 32), np.uint8)
    ids[:, :, 16:] = 2
    both = {"segmentor": trained["segmentor"], "clip": frozen["clip"]}
    (image, segments), (_, others), whole = targets(both, images, ids)
    np.testing.assert_allclose(image, whole, atol=1e-5)
    assert not segments[0, 2].any()
    assert abs(np.linalg.norm(segments[0, 0]) - 1) < 1e-5
    np.testing.assert_allclose(segments[0, 0], others[0, 0], atol=1e-5)
    assert np.abs(segments[0, 1] - others[0, 1]).max() > 1e-2


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


def test_segments_are_seen_in_the_patches_that_they_own_most_of():
    ids = np.zeros((1, 8, 10), np.uint8)
    ids[0, :, :5] = 1  # a whole patch and a quarter of the next one
    ids[0, 1, 9] = 2  # a pixel
    regions = patch_regions(jnp.asarray(ids), 3, 4)[0].reshape(3, 2, 3)
    np.testing.assert_array_equal(regions[0], [[1, 0, 0], [1, 0, 0]])
    np.testing.assert_array_equal(regions[1], [[0, 0, 1], [0, 0, 0]])
    assert not regions[2].any()


def test_targets_of_an_encoder_that_is_no_frozen_clip_are_refused():
    with pytest.raises(ValueError, match="segmentor's encoder, which is no frozen CLIP; set"):
        con.make_stage(tiny.context(), con.Config(targets="encoder"))
    backbone = dict(kind="clip", **tiny.MODEL["clip"])
    segmentor = {**SEGMENTOR, "backbone": backbone, "frozen": True}
    of, crops = make_networks({**tiny.MODEL, "segmentor": segmentor}), CropConfig(hide_void=True)
    with pytest.raises(ValueError, match="encoder, which sees void pixels"):
        con.make_stage(tiny.context(networks=of, crops=crops), con.Config(targets="encoder"))
