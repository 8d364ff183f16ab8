"""Rules, labels, freezing and clipping on small trees."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from concat_jax.training.optimizer import (
    FROZEN,
    OptimizerConfig,
    label_params,
    make_optimizer,
    make_schedule,
)

PARAMS = {
    "backbone": {"kernel": jnp.ones(3), "mean": jnp.ones(3)},
    "head": {"kernel": jnp.ones(3), "bias": jnp.ones(3)},
}
RULES = (
    (r".*mean", 0.0, 0.0),
    (r"backbone/.*", 0.1, 1.0),
    (r".*bias", 1.0, 0.0),
    (r".*kernel", 1.0, 1.0),
)
GRADIENTS = {
    "backbone": {"kernel": jnp.full(3, 0.5), "mean": jnp.full(3, 1e6)},
    "head": {"kernel": jnp.full(3, 0.5), "bias": jnp.full(3, 0.5)},
}


def test_first_matching_rule_decides():
    assert label_params(PARAMS, RULES) == {
        "backbone": {"kernel": "lr x0.1, decay x1", "mean": FROZEN},
        "head": {"kernel": "lr x1, decay x1", "bias": "lr x1, decay x0"},
    }


def test_multipliers_keep_their_digits():
    rules = [(".*", 0.12345678, 1.0)]
    assert set(jax.tree.leaves(label_params(PARAMS, rules))) == {"lr x0.12345678, decay x1"}


def test_a_parameter_without_a_rule_is_named():
    with pytest.raises(ValueError, match="'head/bias'"):
        label_params(PARAMS, [r for r in RULES if "bias" not in r[0]])


def updates(**fields):
    config = OptimizerConfig(
        learning_rate=1e-2, schedule="constant", weight_decay=0.5, clip_norm=0.0
    )
    config = OptimizerConfig(**{**vars(config), **fields})
    optimizer = make_optimizer(config, 10, label_params(PARAMS, RULES))
    return optimizer.update(GRADIENTS, optimizer.init(PARAMS), PARAMS)[0]


def test_multipliers_decay_and_freezing():
    result = updates()
    # Adam's first step is the sign of the gradient; decay adds 0.5 x the parameter.
    np.testing.assert_allclose(result["head"]["kernel"], -1e-2 * (1 + 0.5), rtol=1e-4)
    np.testing.assert_allclose(result["head"]["bias"], -1e-2, rtol=1e-4)
    np.testing.assert_allclose(result["backbone"]["kernel"], -1e-3 * (1 + 0.5), rtol=1e-4)
    assert not np.asarray(result["backbone"]["mean"]).any()


def test_frozen_gradients_do_not_shrink_live_ones():
    """With the frozen 1e6 in the norm the clipped gradient would vanish beside Adam's epsilon."""
    result = updates(clip_norm=1e-3)
    np.testing.assert_allclose(result["head"]["bias"], -1e-2, rtol=1e-3)


def test_clip_uses_one_norm_over_all_groups():
    labels = label_params(PARAMS, RULES)
    config = OptimizerConfig(schedule="constant", clip_norm=0.3)
    state = make_optimizer(config, 10, labels).init(PARAMS)
    _, state = make_optimizer(config, 10, labels).update(GRADIENTS, state, PARAMS)
    moments = optax.tree_utils.tree_get_all_with_path(state, "mu")
    first = [
        np.asarray(m["head"]["kernel"]) for _, m in moments if hasattr(m["head"]["kernel"], "shape")
    ]
    norm = np.sqrt(9 * 0.25)
    np.testing.assert_allclose(first[0], 0.1 * 0.5 * 0.3 / norm, rtol=1e-4)


def test_schedules():
    steps = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10), 1000)
    np.testing.assert_allclose(
        [steps(0), steps(5), steps(10), steps(888), steps(900), steps(970)],
        [0, 0.5, 1, 1, 0.1, 0.01],
        rtol=1e-5,
    )
    few = make_schedule(OptimizerConfig(learning_rate=1.0), 8)  # both decays fall on step 7
    np.testing.assert_allclose([few(6), few(7)], [1, 0.01], rtol=1e-5)
    cosine = make_schedule(
        OptimizerConfig(learning_rate=1.0, warmup_steps=10, schedule="cosine"), 110
    )
    np.testing.assert_allclose([cosine(10), cosine(60), cosine(110)], [1, 0.5, 0], atol=1e-5)
