"""Real vision queries and their classes: what stages 2 and 3 learn from.

A query bank holds one view of each image. With images in the loop every step sees new, augmented
ones, at the price of the frozen segmentor's forward pass; the loss is that of the bank.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from concat_jax.core.batch import MEMORY_FIELDS, QUERY_FIELDS
from concat_jax.losses.matching import labels_of_queries
from concat_jax.losses.segmentation import match_queries
from concat_jax.models.networks import Params
from concat_jax.models.segmentor import normalize_images
from concat_jax.stages.con import training_labels
from concat_jax.stages.stage import MATCHING_PROJECTOR, TEXT, Batch, Context, Stage

IMAGE_FIELDS = ("image", "segment_ids", "segment_labels", "segment_is_crowd")


def extract_queries(
    context: Context, params: Params, text: jax.Array, batch: Batch, rng: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Vision queries of a batch of images and the class each one holds.

    Args:
      context: for the networks, the label space and the weights of the matching cost.
      params: holds "segmentor" and "projector"; frozen.
      text: [K, C] text embeddings.
      batch: with `IMAGE_FIELDS`.
      rng: PRNG key of the matching points.

    Returns:
      queries [B, N, D] float32 and labels [B, N] int32, class index or -1 without a segment.
    """
    networks, vocabulary = context.networks, context.vocabulary
    rows = training_labels(batch["segment_labels"], batch["segment_is_crowd"], vocabulary)
    output = networks.segmentor.apply(
        {"params": params["segmentor"]}, normalize_images(batch["image"])
    )
    queries = output.queries[:, -1]
    logits = networks.projector.apply(
        {"params": params["projector"]}, queries, text[vocabulary.seen], method="predict"
    )
    query_of_segment = match_queries(
        rng,
        logits[:, None],
        output.mask_embeddings[:, -1:],
        output.mask_features,
        batch["segment_ids"],
        rows,
        context.loss,
    )
    labels = jnp.where(rows >= 0, batch["segment_labels"], -1)
    query_labels = labels_of_queries(query_of_segment, labels, queries.shape[1], no_object=-1)
    return jax.lax.stop_gradient(queries), query_labels[:, 0]


def matching_key(rng: jax.Array) -> jax.Array:
    """The key of the matching points, apart from those that a stage's loss splits off `rng`."""
    return jax.random.fold_in(rng, 1 << 16)


def on_images(stage: Stage, context: Context) -> Stage:
    """A stage on batches of queries as one on batches of images, with the same loss.

    Returns:
      A stage that trains and reads what `stage` does, and reads what finds the queries; no gradient
      reaches that.

    Raises:
      ValueError: if the stage draws a memory, which only a bank can give.
    """
    if set(MEMORY_FIELDS) & set(stage.batch_fields):
        raise ValueError(
            "A memory of every class (memory_per_class) is drawn from a query bank, and the stage "
            "is to learn from images; set --config.train.STAGE.queries=bank, or "
            "--config.train.STAGE.method.memory_per_class=0."
        )

    def loss(params, frozen, batch, rng):
        namers = {"segmentor": frozen["segmentor"], "projector": frozen[MATCHING_PROJECTOR]}
        namers, text = jax.lax.stop_gradient((namers, frozen[TEXT]))
        queries = extract_queries(context, namers, text, batch, matching_key(rng))
        return stage.loss(params, frozen, dict(zip(QUERY_FIELDS, queries, strict=True)), rng)

    reads = tuple(dict.fromkeys((*stage.reads, "segmentor", TEXT, MATCHING_PROJECTOR)))
    return dataclasses.replace(stage, reads=reads, loss=loss, batch_fields=IMAGE_FIELDS)
