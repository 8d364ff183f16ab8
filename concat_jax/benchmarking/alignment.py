"""What alignment to CLIP costs a step of stage 1: without it, with cached and with online targets.

The three steps take turns on one state, so that memory holds one optimizer.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from concat_jax.benchmarking import cases
from concat_jax.benchmarking.cases import Case
from concat_jax.benchmarking.harness import Work
from concat_jax.benchmarking.programs import (
    Trainer,
    method_networks,
    random_embeddings,
    random_params,
)
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.stages import con
from concat_jax.stages.clip_targets import CropConfig
from concat_jax.stages.stage import TEXT, Context
from concat_jax.weights.model_folder import load_model

# By name; ratios are to the first.
VARIANTS = {
    "without alignment": con.Config(global_weight=0.0, instance_weight=0.0),
    "cached targets": con.Config(targets="cached"),
    "online targets": con.Config(targets="online"),
}


def works(case: Case) -> dict[str, Work]:
    """A step of each of `VARIANTS`, by the model's classes.

    An image has `segments` segments and no padding of the table, so online targets are as cheap as
    they can be for so many.
    """
    params, card = load_model(case.model)
    networks = method_networks(case, card)
    trained = {"segmentor": params["segmentor"], "projector": random_params(networks, "projector")}
    width = networks.clip.embed_dim
    batch = jax.device_put(make_batch(case, card.vocabulary, width))
    frozen = {TEXT: random_embeddings(len(card.vocabulary), width)}
    frozen = jax.device_put(frozen) | {"clip": random_params(networks, "clip")}
    context = Context(networks, card.vocabulary, crops=CropConfig(dtype=case.dtype))
    stages = {name: con.make_stage(context, config) for name, config in VARIANTS.items()}
    trainer = Trainer(trained, next(iter(stages.values())).rules)

    def work(stage) -> Work:
        fields = {name: batch[name] for name in stage.batch_fields}
        return trainer.work(
            stage.loss, {name: frozen[name] for name in stage.reads}, lambda number: fields
        )

    return {name: work(stage) for name, stage in stages.items()}


def make_batch(case: Case, vocabulary: Vocabulary, width: int) -> dict[str, Any]:
    """A batch with every field that a variant of stage 1 reads; CLIP's targets are random."""
    segment_ids, labels = cases.segments(case)
    return {
        "image": cases.images(case),
        "segment_ids": segment_ids,
        "segment_labels": vocabulary.seen[labels % len(vocabulary.seen)],
        "segment_is_crowd": np.zeros(labels.shape, bool),
        "image_size": np.full((case.batch, 2), (case.height, case.width), np.int32),
        "clip_image_target": random_embeddings(case.batch, width),
        "clip_segment_targets": random_embeddings(case.batch, case.segments, width),
    }
