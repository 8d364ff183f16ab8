"""The compiled programs of a prediction: networks, tiles of maps, the verdict on segments."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from concat_jax.inference.assign_pixels import PixelCounts, assign_pixels
from concat_jax.inference.heads import ClassScores, Head, bias_names
from concat_jax.inference.panoptic import SegmentTables, rank_queries, settle_segments
from concat_jax.inference.semantic import semantic_inference
from concat_jax.models.segmentor import Segmentor, mask_logits, normalize_images


@flax.struct.dataclass
class Network:
    """A segmentor with its parameters, as one argument of a compiled program."""

    params: Any
    module: Segmentor = flax.struct.field(pytree_node=False)


class Sizes(NamedTuple):
    """[B, 2] (height, width): of the valid part of the mask logits, and of the native image."""

    source_size: jax.Array
    image_size: jax.Array


@functools.partial(jax.jit, static_argnames=("is_padded", "canvas"))
def run_networks(
    segmentor: Network,
    head: Head,
    images: jax.Array,
    image_size: jax.Array,
    *,
    is_padded: bool,
    canvas: tuple[int, int],
) -> tuple[jax.Array, ClassScores]:
    """Mask logits [B, N, h, w] and scores of images [B, H, W, 3] uint8.

    `is_padded` has the network mask its padding. The logits are those of `canvas` (height, width),
    zero beyond the image: post-processing is compiled once and not once a padded shape.
    """
    module = segmentor.module
    output = module.apply(
        {"params": segmentor.params}, normalize_images(images), image_size if is_padded else None
    )
    logits = mask_logits(output.mask_embeddings[:, -1], output.mask_features)
    missing = (
        (0, side // module.stride - have)
        for side, have in zip(canvas, logits.shape[2:], strict=True)
    )
    return jnp.pad(logits, ((0, 0), (0, 0), *missing)), head(output.queries[:, -1])


@functools.partial(jax.jit, static_argnames=("keep_rule", "side"))
def panoptic_tile(
    logits, scores, counts, sizes, origin, thresholds, mask_threshold, *, keep_rule, side
) -> tuple[jax.Array, PixelCounts]:
    # gamma changes names and not who owns a pixel.
    nobody = jnp.zeros(scores.class_probs.shape[-1] - 1, bool)
    codes, here = assign_pixels(
        logits,
        rank_queries(*scores, nobody, keep_rule=keep_rule, **thresholds),
        output_size=(side, side),
        origin=origin,
        mask_threshold=mask_threshold,
        **sizes._asdict(),
    )
    return codes, counts + here


@functools.partial(jax.jit, static_argnames="keep_rule")
def settle(
    scores, counts, is_thing, is_seen, gammas, thresholds, overlap_threshold, *, keep_rule
) -> SegmentTables:
    """SegmentTables with an axis of gamma [R] after that of the images."""

    def at(gamma: jax.Array) -> SegmentTables:
        queries = rank_queries(*scores, is_seen, keep_rule=keep_rule, gamma=gamma, **thresholds)
        return settle_segments(queries, counts, is_thing, overlap_threshold=overlap_threshold)

    return jax.vmap(at, out_axes=1)(gammas)


@functools.partial(jax.jit, static_argnames="side")
def semantic_tile(logits, scores, is_seen, gamma, sizes, origin, *, side) -> jax.Array:
    probs = bias_names(scores.class_probs, is_seen, gamma)
    return semantic_inference(
        logits, probs, output_size=(side, side), origin=origin, **sizes._asdict()
    )
