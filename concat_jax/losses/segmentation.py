"""The segmentor's loss: classification, mask BCE and dice of every matched prediction set."""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from concat_jax.losses import masks, matching


@dataclasses.dataclass(frozen=True)
class SegmentationLossConfig:
    """Constants of Mask2Former's criterion; the defaults are the reference's.

    Attributes:
      class_weight, mask_weight, dice_weight: in the loss and in the matching cost.
      no_object_weight: class weight of no-object, which most queries are.
      num_points: points a mask is compared on, 112 x 112.
      oversample_ratio: candidates drawn per point, at least 1.
      importance_ratio: share of the points taken where the mask is least certain, in [0, 1].
      matcher: gives segments to queries by their cost.
    """

    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object_weight: float = 0.1
    num_points: int = 12544
    oversample_ratio: float = 3.0
    importance_ratio: float = 0.75
    matcher: matching.Matcher = matching.hungarian

    def __post_init__(self):
        if self.oversample_ratio < 1 or not 0 <= self.importance_ratio <= 1:
            raise ValueError(
                f"oversample_ratio must be at least 1 and importance_ratio in [0, 1], got "
                f"{self.oversample_ratio} and {self.importance_ratio}."
            )


class SegmentationLoss(flax.struct.PyTreeNode):
    """Loss terms [], already weighted and summed over prediction sets, and the matching.

    Attributes:
      query_of_segment: [B, L, G] int32, -1 unmatched.
      query_labels: [B, L, N] int32 class of every query, K where it holds no segment.
    """

    loss_class: jax.Array
    loss_mask: jax.Array
    loss_dice: jax.Array
    query_of_segment: jax.Array
    query_labels: jax.Array


def weighted_cross_entropy(
    logits: jax.Array, labels: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy weighted by the target's class, unreduced: (weighted losses, weights), float32.

    Divide the sum of the first by the sum of the second for torch's weighted mean, which
    Mask2Former uses (`loss_labels`). Logits are [..., K], labels [...] in 0..K-1 or -1 to leave
    the row out (both results are zero there), weights [K].
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    index = jnp.clip(labels, 0)
    losses = -jnp.take_along_axis(log_probs, index[..., None], axis=-1)[..., 0]
    row_weights = jnp.where(labels >= 0, weights[index], 0.0)
    return losses * row_weights, row_weights


def match_queries(
    rng: jax.Array,
    class_logits: jax.Array,
    mask_embeddings: jax.Array,
    mask_features: jax.Array,
    segment_ids: jax.Array,
    labels: jax.Array,
    config: SegmentationLossConfig,
) -> jax.Array:
    """Matches all prediction sets on uniform random points; arguments as of `segmentation_loss`.

    The reference draws new points for each set; sharing them lets one gather of mask features
    serve all sets, and the cost keeps its expectation.
    """
    points = jax.random.uniform(rng, (len(segment_ids), config.num_points, 2))
    predicted = jax.lax.stop_gradient((mask_embeddings, mask_features))
    point_logits = masks.point_logits(*predicted, points)
    targets = masks.sample_segments(segment_ids, points, labels.shape[1])
    cost = matching.matching_cost(
        jax.lax.stop_gradient(class_logits),
        point_logits,
        jnp.broadcast_to(
            targets[:, None], (targets.shape[0], class_logits.shape[1], *targets.shape[1:])
        ),
        labels,
        class_weight=config.class_weight,
        mask_weight=config.mask_weight,
        dice_weight=config.dice_weight,
    )
    return matching.match(cost, labels >= 0, config.matcher)


def segmentation_loss(
    rng: jax.Array,
    class_logits: jax.Array,
    mask_embeddings: jax.Array,
    mask_features: jax.Array,
    segment_ids: jax.Array,
    labels: jax.Array,
    config: SegmentationLossConfig,
) -> SegmentationLoss:
    """Loss over L prediction sets. Source: Mask2Former `SetCriterion`.

    Candidate points are shared by the masks of an image, of which each picks its own least certain
    ones; the reference draws candidates for each mask. That keeps every mask's expected loss, and
    the mask features are read once for all of them. Masks are normalised by the number of segments
    in the global batch.

    Args:
      class_logits: [B, L, N, K+1]; the last column is no-object.
      mask_embeddings: [B, L, N, D].
      mask_features: [B, h, w, D], or [B, L, h, w, D] where each set has its own.
      segment_ids: [B, H, W] id map, 0 void.
      labels: [B, G] int32 in 0..K-1, -1 where padded; such a segment's pixels are negatives of
        the other segments, as void pixels are.
    """
    rng_match, rng_points = jax.random.split(rng)
    batch, num_sets, num_queries, num_logits = class_logits.shape
    num_segments = labels.shape[1]
    query_of_segment = match_queries(
        rng_match, class_logits, mask_embeddings, mask_features, segment_ids, labels, config
    )
    matched = query_of_segment >= 0  # [B, L, G]

    query_labels = matching.labels_of_queries(
        query_of_segment, labels, num_queries, no_object=num_logits - 1
    )
    class_weights = jnp.ones(num_logits).at[-1].set(config.no_object_weight)
    losses, weights = weighted_cross_entropy(class_logits, query_labels, class_weights)
    loss_class = jnp.sum(losses.sum(axis=(0, 2)) / weights.sum(axis=(0, 2)))

    # Mask logits at points, of matched queries only; full masks are formed nowhere.
    num_uncertain = int(config.importance_ratio * config.num_points)
    num_candidates = int(config.oversample_ratio * config.num_points)
    num_uniform = config.num_points - num_uncertain
    points = jax.random.uniform(rng_points, (batch, num_candidates + num_uniform, 2))
    embeddings = jnp.take_along_axis(
        mask_embeddings, jnp.clip(query_of_segment, 0)[..., None], axis=2
    )
    point_logits = masks.few_point_logits(embeddings, mask_features, points)
    targets = masks.sample_segments(segment_ids, points, num_segments)[:, None]
    weights = jnp.concatenate(
        [
            masks.uncertainty_weights(point_logits[..., :num_candidates], num_uncertain),
            jnp.ones((*point_logits.shape[:3], num_uniform)),
        ],
        axis=-1,
    )

    count = jnp.maximum(jnp.sum(labels >= 0), 1)
    bce = jnp.where(matched, masks.mask_bce(point_logits, targets, weights), 0.0)
    dice = jnp.where(matched, masks.mask_dice(point_logits, targets, weights), 0.0)
    return SegmentationLoss(
        loss_class=config.class_weight * loss_class,
        loss_mask=config.mask_weight * bce.sum() / count,
        loss_dice=config.dice_weight * dice.sum() / count,
        query_of_segment=query_of_segment,
        query_labels=query_labels,
    )
