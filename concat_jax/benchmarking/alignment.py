"""What alignment to CLIP costs a step of stage 1: without it, with cached and with online targets.

The three steps are those of `concat_jax.stages.con` as the training command compiles them. They
take turns on one state, so that they are timed in the same minutes and memory holds one optimizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from concat_jax.benchmarking import cases
from concat_jax.benchmarking.cases import Case
from concat_jax.benchmarking.measure import Measurement, Turn, measure_in_turns
from concat_jax.benchmarking.ours import (
    compile_program,
    make_turn,
    method_networks,
    random_embeddings,
    random_params,
)
from concat_jax.core.runtime import step_compiler_options
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.models.networks import Networks
from concat_jax.stages import con
from concat_jax.stages.clip_targets import CropConfig
from concat_jax.stages.stage import Context, Stage
from concat_jax.training.optimizer import OptimizerConfig, label_params, make_optimizer
from concat_jax.training.state import TrainState, make_train_step
from concat_jax.weights.model_folder import load_model

# By name; ratios are to the first.
VARIANTS = {
    "without alignment": con.Config(global_weight=0.0, instance_weight=0.0),
    "cached targets": con.Config(targets="cached"),
    "online targets": con.Config(targets="online"),
}


def run(case: Case, model: Path, repeats: int) -> dict[str, Measurement]:
    """Measure a step of each of `VARIANTS`.

    Args:
      case: sizes; an image has `segments` segments and no padding of the table, so online targets
        are as cheap as they can be for so many.
      model: folder of `save_model`, with a class head: its classes are those of the vocabulary.
      repeats: timed steps of each.
    """
    params, card = load_model(model)
    networks = method_networks(case, card)
    state_params = jax.device_put(
        {"segmentor": params["segmentor"], "projector": random_params(networks, "projector")}
    )
    batch = jax.device_put(make_batch(case, card.vocabulary, networks.clip.embed_dim))
    text = random_embeddings(len(card.vocabulary), networks.clip.embed_dim)
    frozen = jax.device_put({"text": text})
    frozen["clip"] = random_params(networks, "clip")

    stages = {
        name: make_stage(networks, card.vocabulary, settings, case.dtype)
        for name, settings in VARIANTS.items()
    }
    rules = next(iter(stages.values())).rules
    optimizer = make_optimizer(OptimizerConfig(), 1000, label_params(state_params, rules))
    state = jax.jit(lambda p: TrainState.create(p, optimizer), donate_argnums=0)(state_params)

    def make(stage: Stage) -> Turn:
        step = jax.jit(
            make_train_step(stage.loss, optimizer, seed=0),
            donate_argnums=0,
            compiler_options=step_compiler_options(),
        )
        read = {name: frozen[name] for name in stage.reads}
        fields = {name: batch[name] for name in stage.batch_fields}
        program, seconds = compile_program(step, state, read, fields)

        def call() -> dict[str, np.ndarray]:
            nonlocal state
            state, metrics = jax.block_until_ready(program(state, read, fields))
            return {"loss": np.asarray(metrics["loss"])}

        return make_turn(program, seconds, call)

    return measure_in_turns({name: make(stage) for name, stage in stages.items()}, repeats)


def make_stage(
    networks: Networks, vocabulary: Vocabulary, settings: con.Config, dtype: str
) -> Stage:
    """Stage 1 with CLIP in a compute type and everything else at its defaults."""
    context = Context(networks, vocabulary, crops=CropConfig(dtype=dtype))
    return con.make_stage(context, settings)


def make_batch(case: Case, vocabulary: Vocabulary, embed_dim: int) -> dict[str, Any]:
    """A batch with every field that a variant of stage 1 reads; CLIP's targets are random."""
    segment_ids, labels = cases.segments(case)
    return {
        "image": cases.images(case),
        "segment_ids": segment_ids,
        "segment_labels": vocabulary.seen[labels % len(vocabulary.seen)],
        "segment_is_crowd": np.zeros(labels.shape, bool),
        "image_size": np.full((case.batch, 2), (case.height, case.width), np.int32),
        "clip_image_target": random_embeddings(case.batch, embed_dim),
        "clip_segment_targets": random_embeddings(case.batch, case.segments, embed_dim),
    }
