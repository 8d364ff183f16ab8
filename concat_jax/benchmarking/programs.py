"""Compiled programs of ours as works: what they share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from concat_jax.benchmarking.harness import Work
from concat_jax.benchmarking.inputs import Case
from concat_jax.core.arrays import unit
from concat_jax.models.networks import Networks, make_networks
from concat_jax.models.segmentor import DEFAULTS
from concat_jax.stages.stage import LossFn
from concat_jax.training.optimizer import OptimizerConfig, label_params, make_optimizer
from concat_jax.training.sharding import make_mesh
from concat_jax.training.state import TrainState, jit_train_step
from concat_jax.weights.model_folder import ModelCard


def compile_program(function: Any, *arguments: Any, calls: int = 1) -> tuple[Any, dict[str, Any]]:
    """A jitted function compiled for the arguments, and fields of the `Work` that it is part of."""
    start = time.perf_counter()
    program = function.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    fields = {
        "compile": seconds,
        "flops": calls * (program.cost_analysis() or {}).get("flops", 0.0),
        "temporary_bytes": memory.temp_size_in_bytes if memory else 0,
    }
    device = jax.local_devices()[0]
    held = (device.memory_stats() or {}).get("bytes_in_use")
    if held is not None:  # an accelerator counts for itself
        fields["peak_bytes"] = lambda: device.memory_stats()["peak_bytes_in_use"] - held
    return program, fields


class Trainer:
    """A state that one or several train steps move, each compiled as the training loop does."""

    def __init__(self, params: Any, rules: Sequence[tuple[str, float, float]]):
        """Copies what is trained; `rules` are of a `Stage`."""
        self._mesh = make_mesh(devices=1)
        self._optimizer = make_optimizer(OptimizerConfig(), 1000, label_params(params, rules))
        copies = jax.tree.map(lambda x: jax.numpy.array(x), params)
        self._state = jax.jit(lambda p: TrainState.create(p, self._optimizer))(copies)

    def work(
        self,
        loss: LossFn,
        frozen: Any,
        batches: Callable[[int], Mapping[str, np.ndarray]],
        **told: np.ndarray,
    ) -> Work:
        """A step of a loss, the making of its batch included."""
        step = jit_train_step(loss, self._optimizer, seed=0, mesh=self._mesh)
        with jax.set_mesh(self._mesh):
            program, fields = compile_program(step, self._state, frozen, batches(0))
        number = 0

        def call() -> dict[str, np.ndarray]:
            nonlocal number
            self._state, metrics = program(self._state, frozen, batches(number))
            jax.block_until_ready(self._state)
            number += 1
            return {"loss": np.asarray(metrics["loss"]), **told}

        return Work(call, **fields)


def method_networks(case: Case, card: ModelCard) -> Networks:
    """The method's networks around a model's segmentor, as wide as in `configs/coco_zps.py`."""
    return make_networks(
        {
            "clip": {**case.clip, "dtype": case.dtype},
            "segmentor": {**DEFAULTS, **card.segmentor, "dtype": case.dtype},
            "projector": {"hidden_width": 512},
            "generator": {"hidden_width": 1024, "num_layers": 2, "noise_width": 256},
        }
    )


def random_params(networks: Networks, name: str) -> Any:
    """Initial values of one of the networks, on the device."""
    return jax.jit(networks.init, static_argnums=0)(name, jax.random.key(0))


def random_embeddings(*shape: int) -> np.ndarray:
    """Normalised vectors [..., C] float32, seeded: in the place of texts' or CLIP's targets."""
    return unit(np.random.default_rng(3).normal(size=shape).astype(np.float32))
