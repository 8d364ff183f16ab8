"""Stages 2 and 3 with images in the loop: the frozen segmentor runs in every step.

A query bank holds one view of each image. Here every step sees new, augmented ones, at the price
of the segmentor's forward pass; the loss is that of the bank.
"""

from __future__ import annotations

import dataclasses

import jax

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.losses.segmentation import SegmentationLossConfig
from concat_jax.models.networks import Networks
from concat_jax.stages.query_bank import MEMORY_FIELDS
from concat_jax.stages.real_queries import IMAGE_FIELDS, QUERY_FIELDS, extract_queries
from concat_jax.stages.stage import Stage

# Where a stage on images finds the projector that says which query holds which segment: the one
# that was trained with the segmentor, while a stage may train another under "projector".
MATCHING_PROJECTOR = "matching_projector"


def matching_key(rng: jax.Array) -> jax.Array:
    """The key of the matching points, apart from those that a stage's loss splits off `rng`."""
    return jax.random.fold_in(rng, 1 << 16)


def on_images(
    stage: Stage,
    networks: Networks,
    vocabulary: Vocabulary,
    loss_config: SegmentationLossConfig,
) -> Stage:
    """A stage on batches of queries as one on batches of images.

    Args:
      stage: CAT or the union finetune; its loss is used as it is.
      networks: for the segmentor and the projector.
      vocabulary: the label space.
      loss_config: weights of the matching cost.

    Returns:
      A stage that trains and reads what `stage` does, and the segmentor. `frozen` also has to hold
      `MATCHING_PROJECTOR`. No gradient reaches either.

    Raises:
      ValueError: if the stage draws a memory, which only a bank can give.
    """
    if set(MEMORY_FIELDS) & set(stage.batch_fields):
        raise ValueError(
            "A memory of every class (memory_per_class) is drawn from a query bank, and the stage "
            "is to learn from images; set queries='bank', or memory_per_class=0."
        )

    def loss(params, frozen, batch, rng):
        namers = {"segmentor": frozen["segmentor"], "projector": frozen[MATCHING_PROJECTOR]}
        queries = extract_queries(
            networks,
            vocabulary,
            loss_config,
            jax.lax.stop_gradient(namers),
            jax.lax.stop_gradient(frozen["text"]),
            batch,
            matching_key(rng),
        )
        return stage.loss(params, frozen, dict(zip(QUERY_FIELDS, queries, strict=True)), rng)

    reads = stage.reads if "segmentor" in stage.reads else (*stage.reads, "segmentor")
    return dataclasses.replace(stage, reads=reads, loss=loss, batch_fields=IMAGE_FIELDS)
