"""Real vision queries and their classes: what stages 2 and 3 learn from."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.losses.matching import labels_of_queries
from concat_jax.losses.segmentation import SegmentationLossConfig, match_queries
from concat_jax.models.networks import Networks
from concat_jax.models.segmentor import normalize_images
from concat_jax.stages.con import training_labels

IMAGE_FIELDS = ("image", "segment_ids", "segment_labels", "segment_is_crowd")
QUERY_FIELDS = ("queries", "query_labels")


def extract_queries(
    networks: Networks,
    vocabulary: Vocabulary,
    loss_config: SegmentationLossConfig,
    params,
    text: jax.Array,
    batch,
    rng: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Vision queries of a batch of images and the class each one holds.

    Args:
      networks: for the segmentor and the projector.
      vocabulary: the label space.
      loss_config: weights of the matching cost.
      params: holds "segmentor" and "projector"; frozen.
      text: [K, C] text embeddings.
      batch: with `IMAGE_FIELDS`.
      rng: PRNG key of the matching points.

    Returns:
      queries [B, N, D] float32 and labels [B, N] int32, class index or -1 without a segment.
    """
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
        loss_config,
    )
    labels = jnp.where(rows >= 0, batch["segment_labels"], -1)
    query_labels = labels_of_queries(query_of_segment, labels, queries.shape[1], no_object=-1)
    return jax.lax.stop_gradient(queries), query_labels[:, 0]
