"""Stages 2 and 3 at COCO's size: a step of each from a query bank, drawing its batch included.

Sizes are those of `configs/coco_zps.py`. The bank's numbers are random, which changes no time; so
are the networks' weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from concat_jax.benchmarking.cases import Case
from concat_jax.benchmarking.harness import Measurement, Work, gigaflop
from concat_jax.benchmarking.programs import (
    Trainer,
    method_networks,
    random_embeddings,
    random_params,
)
from concat_jax.evaluation.report import markdown_table
from concat_jax.stages import cat, finetune
from concat_jax.stages.queries import QueryBank
from concat_jax.stages.stage import TEXT, Context
from concat_jax.weights.model_folder import load_model

# Images of COCO's train2017 that show no unseen class, each once in the bank.
COCO_IMAGES = 44_912
# Images of the bank here, so many that a batch is drawn from all over the memory.
BANK_IMAGES = 2048
# Of `configs/coco_zps.py`.
BATCHES = {"CAT": 16, "union finetune": 64}
# Of COCO's 133 classes, the last so many unless the model says which; which ones changes no time.
NUM_UNSEEN = 14


def works(case: Case) -> dict[str, Work]:
    """A step of both; `segments` of an image's queries hold a segment, `clip` is the text's."""
    _, card = load_model(case.model)
    vocabulary = card.vocabulary
    if all(vocabulary.is_seen):
        is_seen = np.arange(len(vocabulary)) < len(vocabulary) - NUM_UNSEEN
        vocabulary = dataclasses.replace(vocabulary, is_seen=tuple(is_seen.tolist()))
    networks = method_networks(case, card)
    params = {n: random_params(networks, n) for n in ("segmentor", "projector", "generator")}
    params[TEXT] = random_embeddings(len(vocabulary), networks.clip.embed_dim)
    # Queries [M, N, D] float16 and labels [M, N] int16 of seen classes, -1 where nothing is.
    rng = np.random.default_rng(0)
    number, width = networks.segmentor.num_queries, networks.segmentor.width
    queries = rng.standard_normal((BANK_IMAGES, number, width), np.float32).astype(np.float16)
    labels = np.full((BANK_IMAGES, number), -1, np.int16)
    held = min(case.segments, number)
    labels[:, :held] = rng.choice(vocabulary.seen, (BANK_IMAGES, held))
    context = Context(networks, vocabulary)
    stages = {
        "CAT": cat.make_stage(context, cat.Config()),
        "union finetune": finetune.make_stage(context, finetune.Config()),
    }

    def work(name: str, stage) -> Work:
        bank = QueryBank(queries, labels, batch_size=BATCHES[name], seed=0)
        trainer = Trainer({n: params[n] for n in stage.trains}, stage.rules)
        frozen = jax.device_put({n: params[n] for n in stage.reads})
        return trainer.work(stage.loss, frozen, bank.batch, bank_shape=np.array(queries.shape))

    return {name: work(name, stage) for name, stage in stages.items()}


def table(case: Case, results: Mapping[str, Measurement]) -> str:
    """A step of each stage, and what an epoch of COCO would take of them."""
    heads = ["stage", "images a step", "ms a step (fastest to slowest)", "GFLOP"]
    rows = [
        [
            name,
            f"{BATCHES[name]}",
            result.show(1000, 1),
            gigaflop(result),
            f"{COCO_IMAGES / BATCHES[name] * result.median / 60:.1f}",
        ]
        for name, result in results.items()
    ]
    _, number, width = results["CAT"].outputs["bank_shape"]
    values = COCO_IMAGES * int(number) * int(width)
    return (
        f"{markdown_table([*heads, f'{COCO_IMAGES:,} images, min'], rows)}\n\n"
        f"A bank of {COCO_IMAGES:,} images x {number} queries x {width} numbers is "
        f"{2 * values / 1e9:.1f} GB in float16 and {4 * values / 1e9:.1f} GB in float32. Drawing "
        "the batch from memory is part of a step; they took turns in one process."
    )
