"""The state of a run, exactly what a checkpoint holds, and the step that moves it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from concat_jax.core.runtime import FUSION_MB, step_compiler_options
from concat_jax.stages.stage import Batch, LossFn, Metrics
from concat_jax.training.sharding import replicated, split_by_rule


class TrainState(flax.struct.PyTreeNode):
    """Batches seen [], the subtrees that the stage trains, float32, and the optimizer's state."""

    step: jax.Array
    params: Any
    opt_state: optax.OptState

    @classmethod
    def create(cls, params: Any, optimizer: optax.GradientTransformation) -> TrainState:
        return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def make_train_step(
    loss: LossFn,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    *,
    skips: bool = False,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """(state, frozen, batch) -> (state, metrics), to be jitted with the state donated.

    The step's PRNG key is folded from the seed and the step number, so a resumed run draws what
    an unbroken one would have drawn and no key needs saving. What is split over "fsdp" is gathered
    for the loss, and its gradients are reduced to the parts that a device updates. With `skips`, a
    loss or gradient that is not finite leaves parameters and optimizer as they are, and the metric
    "skipped" is 1.
    """

    def place(tree: Any, shardings: Any) -> Any:
        # Left to itself the partitioner might split the networks' inner dimensions instead.
        is_split = mesh.shape["fsdp"] > 1
        return jax.lax.with_sharding_constraint(tree, shardings) if is_split else tree

    def train_step(state: TrainState, frozen: Any, batch: Batch):
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        gradient = jax.value_and_grad(loss, has_aux=True)
        params, frozen = place((state.params, frozen), replicated(mesh))
        (value, metrics), gradients = gradient(params, frozen, batch, rng)
        gradients = place(gradients, split_by_rule(gradients, mesh))
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {**metrics, "gradient_norm": optax.tree.norm(gradients)}
        if skips:
            sound = jnp.isfinite(value) & jnp.isfinite(metrics["gradient_norm"])
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(sound, new, old),
                (params, opt_state),
                (state.params, state.opt_state),
            )
            metrics["skipped"] = 1 - sound
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def jit_train_step(
    loss: LossFn,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    state: TrainState,
    *,
    skips: bool = False,
    fusion_mb: int = FUSION_MB,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """The step of `make_train_step`, jitted for states such as `state`, which may be abstract.

    The state is donated and stays where `split_by_rule` puts it; metrics are on every device.
    """
    return jax.jit(
        make_train_step(loss, optimizer, seed, mesh, skips=skips),
        donate_argnums=0,
        out_shardings=(split_by_rule(state, mesh), replicated(mesh)),
        compiler_options=step_compiler_options(mesh.devices.flat[0].device_kind, fusion_mb),
    )
