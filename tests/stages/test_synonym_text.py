"""Stages on text with several vectors a class: one vector where one is needed, the best elsewhere.

Each test compares with text of one vector a class, [K, C], which the other stage tests are about.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.models.networks import make_networks
from concat_jax.models.semantic_projector import class_vectors
from concat_jax.stages import cat, finetune
from concat_jax.stages.stage import Context

# The programs run once, so compiling them is what these tests cost.
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
KEY = jax.random.key(5)
WIDTH, JOINT = 32, 8
NETWORKS = make_networks(
    {
        "clip": dict(embed_dim=JOINT),
        "segmentor": dict(
            backbone=dict(stage_sizes=(1, 1, 1, 1), width=8, block="basic", stem="small"),
            width=WIDTH,
            num_queries=4,
            num_encoder_layers=1,
            num_decoder_layers=1,
            num_heads=4,
            num_points=2,
            ffn_width=32,
            decoder_ffn_width=32,
            num_groups=8,
        ),
        "projector": dict(hidden_width=16, num_layers=2),
        "generator": dict(hidden_width=16, num_layers=2, noise_width=4),
    }
)
VOCABULARY = Vocabulary(
    names=("cow", "sky", "cat", "road"),
    is_thing=(True, False, True, False),
    is_seen=(True, True, False, False),
    category_ids=(1, 2, 3, 4),
)
NORM = {"scale": jnp.linspace(0.5, 1.5, WIDTH), "bias": jnp.linspace(-1, 1, WIDTH)}


@functools.cache
def params():
    rng = np.random.default_rng(0)
    trees = jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32),
        jax.eval_shape(lambda: {n: NETWORKS.init(n, KEY) for n in ("projector", "generator")}),
    )
    return {**trees, "segmentor": {"transformer_decoder": {"decoder_norm": NORM}}}


def text(count):
    """[4, count, JOINT] different unit vectors."""
    x = np.random.default_rng(count).normal(size=(4, count, JOINT)).astype(np.float32)
    return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))


def batch():
    rng = np.random.default_rng(1)
    return {
        "queries": rng.normal(size=(2, 6, WIDTH)).astype(np.float32),
        "query_labels": np.array([[0, 1, -1, 0, -1, 1], [1, -1, 1, 0, 0, -1]], np.int32),
    }


def run(stage, text):
    frozen = {name: text if name == "text" else params()[name] for name in stage.reads}
    trained = {name: params()[name] for name in stage.trains}
    _, metrics = jax.jit(stage.loss, compiler_options=FAST_COMPILE)(trained, frozen, batch(), KEY)
    return metrics


CONTEXT = Context(NETWORKS, VOCABULARY)
STAGES = {
    "cat": lambda: cat.make_stage(CONTEXT, cat.Config()),
    "finetune": lambda: finetune.make_stage(CONTEXT, finetune.Config(pseudo_seen=True)),
    "inductive finetune": lambda: finetune.make_stage(
        CONTEXT, finetune.Config(pseudo_seen=True, unseen_names=False)
    ),
}


@pytest.mark.parametrize("name", STAGES)
def test_one_synonym_repeated_is_the_stage_without_synonyms(name):
    stage, one = STAGES[name](), text(1)
    plain = run(stage, one[:, 0])
    repeated = run(stage, jnp.repeat(one, 3, axis=1))
    assert plain.keys() == repeated.keys()
    for metric in plain:
        np.testing.assert_allclose(repeated[metric], plain[metric], rtol=1e-4, err_msg=metric)


def test_cat_generates_from_the_mean_and_classifies_by_the_best():
    stage, several = STAGES["cat"](), text(3)
    best, mean = run(stage, several), run(stage, class_vectors(several))
    # What depends on pseudo queries alone cannot tell the two apart.
    for metric in ("loss_mmd", "loss_contrast", "spread_ratio"):
        np.testing.assert_allclose(best[metric], mean[metric], rtol=1e-4)
    assert abs(best["loss_cycle"] - mean["loss_cycle"]) > 1e-2
