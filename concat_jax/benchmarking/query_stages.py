"""Stages 2 and 3 at COCO's size: a step of each from a query bank, drawing its batch included.

Sizes are those of `configs/coco_zps.py`. The bank's numbers are random, which changes no time; so
are the networks' weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from concat_jax.benchmarking.cases import Case
from concat_jax.benchmarking.measure import Measurement, Turn, measure_in_turns
from concat_jax.benchmarking.ours import (
    compile_program,
    make_turn,
    method_networks,
    random_embeddings,
    random_params,
)
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.models.generators import make_generator
from concat_jax.models.segmentor import DEFAULTS
from concat_jax.stages import cat, finetune
from concat_jax.stages.query_bank import QueryBank
from concat_jax.stages.stage import TEXT, Context, Stage
from concat_jax.training.optimizer import OptimizerConfig, label_params, make_optimizer
from concat_jax.training.state import TrainState, make_train_step
from concat_jax.weights.model_folder import load_model

# Images of COCO's train2017 that show no unseen class, each once in the bank.
COCO_IMAGES = 44_912
# Images of the bank here, so many that a batch is drawn from all over the memory.
BANK_IMAGES = 2048
# Of `configs/coco_zps.py`.
BATCHES = {"CAT": 16, "union finetune": 64}
GENERATOR = {"hidden_width": 1024, "num_layers": 2, "noise_width": 256}
# Of COCO's 133 classes; which ones changes no time.
NUM_UNSEEN = 14


def run(case: Case, model: Path, repeats: int) -> dict[str, Measurement]:
    """Measure a step of both stages.

    Args:
      case: `segments` of an image's queries hold a segment; `clip` gives the text's width.
      model: folder of `save_model`, with a class head: its classes are those of the vocabulary,
        the last `NUM_UNSEEN` of them unseen unless it says which are.
      repeats: timed steps of each.
    """
    _, card = load_model(model)
    vocabulary = card.vocabulary
    if all(vocabulary.is_seen):
        number = len(vocabulary)
        is_seen = tuple(k < number - NUM_UNSEEN for k in range(number))
        vocabulary = dataclasses.replace(vocabulary, is_seen=is_seen)
    networks = method_networks(case, card)
    generator = make_generator(GENERATOR, networks.query_width)
    networks = dataclasses.replace(networks, generator=generator)
    params = {n: random_params(networks, n) for n in ("segmentor", "projector", "generator")}
    text = random_embeddings(len(vocabulary), networks.clip.embed_dim)
    queries, labels = random_bank(case, card.segmentor, vocabulary)
    context = Context(networks, vocabulary)
    stages = {
        "CAT": cat.make_stage(context, cat.Config()),
        "union finetune": finetune.make_stage(context, finetune.Config()),
    }

    def make(name: str, stage: Stage) -> Turn:
        bank = QueryBank(queries, labels, batch_size=BATCHES[name], seed=0)
        trained = {n: params[n] for n in stage.trains}
        frozen = jax.device_put({n: text if n == TEXT else params[n] for n in stage.reads})
        optimizer = make_optimizer(OptimizerConfig(), 1000, label_params(trained, stage.rules))
        state = jax.jit(lambda p: TrainState.create(p, optimizer))(trained)
        step = jax.jit(make_train_step(stage.loss, optimizer, seed=0))
        program, seconds = compile_program(step, state, frozen, bank.batch(0))
        number = 0

        def call() -> dict[str, np.ndarray]:
            nonlocal number, state
            state, metrics = jax.block_until_ready(program(state, frozen, bank.batch(number)))
            number += 1
            return {"loss": np.asarray(metrics["loss"]), "bank_shape": np.array(queries.shape)}

        return make_turn(program, seconds, call)

    return measure_in_turns({name: make(name, stage) for name, stage in stages.items()}, repeats)


def random_bank(
    case: Case, segmentor: Mapping[str, Any], vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """Queries [M, N, D] float16 and labels [M, N] int16 of seen classes, -1 where nothing is."""
    rng = np.random.default_rng(0)
    number, width = ({**DEFAULTS, **segmentor}[key] for key in ("num_queries", "width"))
    queries = rng.standard_normal((BANK_IMAGES, number, width), np.float32).astype(np.float16)
    labels = np.full((BANK_IMAGES, number), -1, np.int16)
    held = min(case.segments, number)
    labels[:, :held] = rng.choice(vocabulary.seen, (BANK_IMAGES, held))
    return queries, labels
