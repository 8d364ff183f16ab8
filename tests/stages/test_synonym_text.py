"""Stages on text with several vectors a class: one vector where one is needed, the best elsewhere.

Each test compares with text of one vector a class, [K, C], which the other stage tests are about.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.models.semantic_projector import class_vectors
from concat_jax.stages import cat, finetune
from tests import tiny

CONTEXT = tiny.context()
STAGES = {
    "cat": lambda: cat.make_stage(CONTEXT, cat.Config()),
    "finetune": lambda: finetune.make_stage(CONTEXT, finetune.Config(pseudo_seen=True)),
    "inductive finetune": lambda: finetune.make_stage(
        CONTEXT, finetune.Config(pseudo_seen=True, unseen_names=False)
    ),
}


def text(count):
    """[K, count, C] different unit vectors."""
    return jnp.stack([tiny.text(seed) for seed in range(count)], axis=1)


def run(stage, *texts):
    """The stage's metrics on each text."""
    loss = jax.jit(stage.loss)
    arguments = tiny.query_batch(), tiny.KEY
    return [loss(tiny.trained(stage), tiny.frozen(stage, t), *arguments)[1] for t in texts]


@pytest.mark.parametrize("name", STAGES)
def test_one_synonym_repeated_is_the_stage_without_synonyms(name):
    one = text(1)
    plain, repeated = run(STAGES[name](), one[:, 0], jnp.repeat(one, 3, axis=1))
    assert plain.keys() == repeated.keys()
    for metric in plain:
        np.testing.assert_allclose(repeated[metric], plain[metric], rtol=1e-4, err_msg=metric)


def test_cat_generates_from_the_mean_and_classifies_by_the_best():
    several = text(3)
    best, mean = run(STAGES["cat"](), several, class_vectors(several))
    # What depends on pseudo queries alone cannot tell the two apart.
    for metric in ("loss_mmd", "loss_contrast", "spread_ratio"):
        np.testing.assert_allclose(best[metric], mean[metric], rtol=1e-4)
    assert abs(best["loss_cycle"] - mean["loss_cycle"]) > 1e-2
