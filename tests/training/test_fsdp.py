"""Stages on queries, split over eight devices: an eighth on each, and the same losses."""

import jax
import numpy as np
import pytest

from concat_jax.stages import cat, finetune
from concat_jax.training import sharding
from concat_jax.training.optimizer import OptimizerConfig, label_params, make_optimizer
from concat_jax.training.sharding import make_mesh, shard_batch, split_by_rule
from concat_jax.training.state import TrainState, make_train_step
from tests import tiny

STAGES = {"cat": cat, "finetune": finetune}


def three_steps(name, fsdp):
    """Losses of three steps of eight rows, and bytes of the state: whole, and on each device."""
    stage = STAGES[name].make_stage(tiny.context(), STAGES[name].Config())
    mesh = make_mesh(fsdp=fsdp)
    params, frozen = tiny.trained(stage), tiny.frozen(stage)
    labels = label_params(params, stage.rules)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3, accumulate=2), 10, labels)
    abstract = jax.eval_shape(lambda p: TrainState.create(p, optimizer), params)
    shardings = split_by_rule(abstract, mesh)
    state = jax.device_put(TrainState.create(params, optimizer), shardings)
    frozen = jax.device_put(frozen, split_by_rule(frozen, mesh))
    step = jax.jit(
        make_train_step(stage.loss, optimizer, 0, mesh),
        out_shardings=(shardings, sharding.replicated(mesh)),
    )
    rows = {k: np.resize(v, (8, *v.shape[1:])) for k, v in tiny.query_batch().items()}
    losses = []
    with jax.set_mesh(mesh):
        for _ in range(3):
            state, metrics = step(state, frozen, shard_batch(rows, mesh))
            losses.append(float(metrics["loss"]))
    leaves = jax.tree.leaves(state)
    shards = [[shard.data.nbytes for shard in leaf.addressable_shards] for leaf in leaves]
    moved = [
        np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (state.params, params)), strict=True)
    ]
    assert np.mean(moved) > 0.9  # by the second step, which updates
    return losses, sum(leaf.nbytes for leaf in leaves), np.sum(shards, axis=0)


@pytest.mark.parametrize("name", STAGES)
def test_eight_devices_hold_an_eighth_each(name, monkeypatch):
    whole_losses, whole, here = three_steps(name, 1)
    assert (here == whole).all()
    monkeypatch.setattr(sharding, "MIN_SPLIT", 64)
    losses, _, here = three_steps(name, 8)
    assert len(here) == 8 and (here == here[0]).all()
    assert whole / 8 <= here[0] < 0.2 * whole
    np.testing.assert_allclose(losses, whole_losses, rtol=1e-5)
