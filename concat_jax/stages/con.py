"""Stage 1, CON: the segmentor and the semantic projector on seen classes, aligned to CLIP.

L = 2·(CE + λ_g · L_global + λ_i · L_instance) + 5·BCE + 5·Dice
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.core.batch import PROGRESS, TARGET_FIELDS
from concat_jax.core.config import Positive, check_choice
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.losses import alignment
from concat_jax.losses.segmentation import segmentation_loss
from concat_jax.models.clip import CLIP
from concat_jax.models.segmentor_output import training_arguments
from concat_jax.stages.clip_targets import CropConfig, clip_targets, segment_areas, token_targets
from concat_jax.stages.stage import NO_DECAY, TEXT, Context, Stage

LEARNS_FROM = "images"
# Of the softmax over queries: objectness is in [0, 1], and 0.1 lets the queries that hold a segment
# outweigh the many that hold none by e^10.
POOLING_TEMPERATURE = 0.1


@dataclasses.dataclass(frozen=True)
class Config:
    """Constants of CON. The two alignments are the paper's; each value here is ours.

    Attributes:
      global_weight: λ_g, over the weight of the cross-entropy.
      instance_weight: λ_i, likewise. At a tenth of the cross-entropy the pull is noise beside it.
      alignment: "cosine" (one minus the cosine) or "infonce" (other images and segments of other
        classes in the image as negatives).
      temperature: of InfoNCE; CLIP's own at the start of its training.
      aligned_sets: how many of the decoder's prediction sets are aligned, the last ones, whose
        terms are summed as those of the cross-entropy are; 0 for all.
      global_target: "image", CLIP's embedding of the picture, as in the paper, or "segments", the
        mean of those of its segments, which says what is in the picture and how often.
      min_area: pixels of the smallest segment whose crop is taken to show what it is.
      area_power: a segment's weight in λ_i's mean is its area to this power; 0 is all alike.
      pooling: "objectness", "similarity" or "mean", see `alignment.pool_queries`.
      targets: "online" runs CLIP on every batch; "cached" takes the targets from the batch, where
        they were looked up: of un-augmented images at native size, so the same up to what jitter,
        flip and crop change. The step then holds no CLIP. "": cached where they are at hand.
        "encoder" reads them off the tokens of a segmentor whose frozen encoder is CLIP, see
        `token_targets`.
      max_segments: the most segments of an image that online targets look at, the largest: CLIP
        runs for every row of the tables, padding included, and the crop of a tiny segment says
        little. 0 for all rows. The others are not aligned.
      backbone_multiplier: learning rate of the backbone over that of the rest; 0.1 for pretrained
        weights, 1 from scratch.
    """

    global_weight: float = 0.25
    instance_weight: float = 4.0
    alignment: str = "cosine"
    temperature: Positive = 0.07
    aligned_sets: int = 0
    global_target: str = "image"
    min_area: int = 0
    area_power: float = 0.0
    pooling: str = "objectness"
    targets: str = ""
    max_segments: int = 0
    backbone_multiplier: float = 0.1

    def __post_init__(self):
        check_choice(self.alignment, ("cosine", "infonce"), "CON alignment is")
        check_choice(self.pooling, alignment.POOLINGS, "CON pooling is")
        check_choice(self.global_target, ("image", "segments"), "CON global_target is")
        check_choice(self.targets, ("", "online", "cached", "encoder"), "CON targets are")


# What of CLIP decides its image embeddings besides the parameters.
_IMAGE_FIELDS = (
    *("embed_dim", "image_size", "patch_size", "image_heads"),
    *("activation", "stem", "position_interpolation"),
)


def target_identity(clip: CLIP, crops: CropConfig) -> dict[str, Any]:
    """What targets depend on besides CLIP's parameters and the images: `clip` and `crops`."""
    settings = dataclasses.asdict(crops)
    if not crops.hide_void:  # caches that know nothing of it show everything
        del settings["hide_void"]
    return {"clip": {field: getattr(clip, field) for field in _IMAGE_FIELDS}, "crops": settings}


def training_labels(labels: jax.Array, is_crowd: jax.Array, vocabulary: Vocabulary) -> jax.Array:
    """Labels as rows of the seen text embeddings; -1 for padding, crowd and unseen classes."""
    row_of_class = np.full(len(vocabulary) + 1, -1, np.int32)  # last entry: label -1
    row_of_class[vocabulary.seen] = np.arange(len(vocabulary.seen))
    return jnp.where(is_crowd, -1, jnp.asarray(row_of_class)[labels])


def matched_accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Share [] of matched queries whose best real class is right; 0 where nothing is matched.

    Logits are [B, N, K+1], labels [B, N] int32, K without a segment.
    """
    matched = labels < logits.shape[-1] - 1
    hit = matched & (jnp.argmax(logits[..., :-1], axis=-1) == labels)
    return hit.sum() / jnp.maximum(matched.sum(), 1)


def make_stage(context: Context, config: Config) -> Stage:
    """CON as a `Stage`: trains segmentor and projector; reads CLIP unless targets are cached."""
    aligns = config.global_weight > 0 or config.instance_weight > 0
    at_hand = "cached" if context.has_clip_targets else "online"
    cached = aligns and (config.targets or at_hand) == "cached"
    networks, vocabulary = context.networks, context.vocabulary
    of_encoder = config.targets == "encoder"
    if of_encoder and not networks.segmentor.gives_clip_tokens:
        raise ValueError(
            "CON's targets are of the segmentor's encoder, which is no frozen CLIP; set its "
            'backbone\'s kind to "clip" and frozen to True, or CON\'s targets to "online".'
        )
    if of_encoder and context.crops.hide_void:
        raise ValueError(
            "CON's targets are of the segmentor's encoder, which sees void pixels where "
            'config.crops.hide_void says to hide them; set CON\'s targets to "online".'
        )

    def pull(predictions, targets, valid, labels=None):
        if config.alignment == "cosine":
            return jnp.where(valid, alignment.cosine_alignment(predictions, targets), 0.0)
        return alignment.info_nce(
            predictions, targets, valid, temperature=config.temperature, labels=labels
        )

    def targets_of(frozen, batch, clip_tokens):
        # g [B, C] of the images, c [B, G, C] of their segments, and what each of these weighs.
        ids, num_segments = batch["segment_ids"], batch["segment_labels"].shape[1]
        if cached:
            of_image, of_segments = (batch[field] for field in TARGET_FIELDS)
        elif of_encoder:
            of_image, of_segments = token_targets(
                networks.clip, frozen["clip"], clip_tokens, ids, num_segments
            )
        else:
            of_image, of_segments = clip_targets(
                networks.clip,
                frozen["clip"],
                batch["image"],
                ids,
                num_segments,
                context.crops,
                image_size=batch["image_size"],
                max_segments=config.max_segments,
            )
        weights = jnp.any(of_segments != 0, axis=-1).astype(jnp.float32)
        if config.min_area or config.area_power:
            areas = segment_areas(ids, num_segments)
            weights *= (areas >= config.min_area) * (areas / ids[0].size) ** config.area_power
        if config.global_target == "segments":
            of_image = alignment.unit(jnp.where(weights[..., None] > 0, of_segments, 0).sum(axis=1))
        return of_image, of_segments, weights

    def align(semantic, objectness, query_of_segment, targets, labels):
        # Both terms of one prediction set: [B, N, C], [B, N] and [B, G] of it.
        of_image, of_segments, weights = targets
        pooled = alignment.pool_queries(
            semantic,
            objectness,
            of_image,
            pooling=config.pooling,
            temperature=POOLING_TEMPERATURE,
        )
        loss_global = jnp.mean(pull(pooled, of_image, jnp.ones(len(pooled), bool)))
        weights = jnp.where(query_of_segment >= 0, weights, 0.0)
        rows = jnp.clip(query_of_segment, 0)[..., None]
        holders = jnp.take_along_axis(semantic, rows, axis=1)
        losses = pull(holders, of_segments, weights > 0, labels)
        return loss_global, (weights * losses).sum() / jnp.maximum(weights.sum(), 1e-6)

    def loss(params, frozen, batch, rng):
        labels = training_labels(batch["segment_labels"], batch["segment_is_crowd"], vocabulary)
        segmentor = networks.segmentor
        output = segmentor.apply(
            {"params": params["segmentor"]},
            segmentor.normalize(batch["image"]),
            **training_arguments(segmentor, rng, batch),
        )
        projector = {"params": params["projector"]}
        semantic = networks.projector.apply(projector, output.queries)  # [B, L, N, C]
        text = frozen[TEXT][vocabulary.seen]
        logits = networks.projector.apply(projector, semantic, text, method="classify")
        terms = segmentation_loss(
            rng,
            logits,
            output.mask_embeddings,
            output.mask_features,
            batch["segment_ids"],
            labels,
            context.loss,
        )
        metrics = {"accuracy": matched_accuracy(logits[:, -1], terms.query_labels[:, -1])}
        metrics |= {f"loss_{x}": getattr(terms, f"loss_{x}") for x in ("class", "mask", "dice")}
        total = terms.loss_class + terms.loss_mask + terms.loss_dice
        if aligns:
            targets = targets_of(frozen, batch, output.clip_tokens)
            objectness = 1 - jax.nn.softmax(logits, axis=-1)[..., -1]
            sets = (semantic, objectness, terms.query_of_segment)
            pulls = [
                align(*(of_sets[:, i] for of_sets in sets), targets, labels)
                for i in range(logits.shape[1])[-config.aligned_sets :]
            ]
            weights = (config.global_weight, config.instance_weight)
            aligned = [
                context.loss.class_weight * weight * sum(of_sets)
                for weight, of_sets in zip(weights, zip(*pulls, strict=True), strict=True)
            ]
            metrics |= dict(zip(("loss_global", "loss_instance"), aligned, strict=True))
            total = total + aligned[0] + aligned[1]
        return total, {"loss": total, **metrics}

    rate = 0.0 if networks.segmentor.frozen else config.backbone_multiplier
    rules = (
        (r".*/frozen_\w+", 0.0, 0.0),
        (r"segmentor/backbone/" + NO_DECAY, rate, 0.0),
        (r"segmentor/backbone/.*", rate, 1.0),
        (NO_DECAY, 1.0, 0.0),
        (r".*", 1.0, 1.0),
    )
    fields = ("image", "segment_ids", "segment_labels", "segment_is_crowd")
    fields += TARGET_FIELDS if cached else ("image_size",)
    fields += (PROGRESS,) if networks.segmentor.anneals else ()
    reads = (TEXT, "clip") if aligns and not cached else (TEXT,)
    return Stage(("segmentor", "projector"), reads, loss, rules, fields)
