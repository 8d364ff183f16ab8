"""The compiled programs of a prediction: network, names, tiles of maps, verdict on segments.

Those that take long to compile know nothing of the names that are asked for, nor of how many.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.inference.assign_pixels import PixelCounts, RankedQueries, assign_pixels
from concat_jax.inference.heads import ClassScores, ClipQueries, Head, Queries, bias_names
from concat_jax.inference.panoptic import SegmentTables, rank_queries, settle_segments
from concat_jax.inference.semantic import class_map, class_scores, semantic_inference
from concat_jax.models.mask2former import Segmentor
from concat_jax.models.segmentor_output import mask_logits

# Sides of the square tiles that maps at native size are made in: an image takes the first that it
# fits, or as many of the last as cover it. Few programs serve every size, at bounded memory.
TILE_SIDES = (64, 320, 640, 1344)


@flax.struct.dataclass
class Network:
    """A segmentor with its parameters, as one argument of a compiled program."""

    params: Any
    module: Segmentor = flax.struct.field(pytree_node=False)


class Sizes(NamedTuple):
    """[B, 2] (height, width): of the valid part of the mask logits, and of the native image."""

    source_size: jax.Array
    image_size: jax.Array


class NamedQueries(NamedTuple):
    """What a head says of the queries; here alone is an axis of classes.

    Attributes:
      scores: class probabilities and objectness.
      bids: which queries take part in the competition for pixels.
      named: the names at each gamma, [R, B, N] where `RankedQueries` has [B, N].
      is_thing: [R, B, N] bool, of these names.
    """

    scores: ClassScores
    bids: RankedQueries
    named: RankedQueries
    is_thing: jax.Array


@functools.partial(jax.jit, static_argnames=("is_padded", "canvas"))
def run_segmentor(
    segmentor: Network,
    images: jax.Array,
    image_size: jax.Array,
    *,
    is_padded: bool,
    canvas: tuple[int, int],
) -> tuple[jax.Array, Queries]:
    """Mask logits [B, N, h, w] and queries of images [B, H, W, 3] uint8.

    `is_padded` has the network mask its padding. The logits are those of `canvas` (height, width),
    zero beyond the image: post-processing is compiled once and not once a padded shape.
    """
    module = segmentor.module
    logits, queries = look(segmentor, images, image_size if is_padded else None)
    # Patches that do not divide the canvas reach beyond it.
    height, width = (-(-side // module.stride) for side in canvas)
    logits = logits[:, :, :height, :width]
    missing = ((0, height - logits.shape[2]), (0, width - logits.shape[3]))
    return jnp.pad(logits, ((0, 0), (0, 0), *missing)), queries


def look(
    segmentor: Network, images: jax.Array, image_size: jax.Array | None = None
) -> tuple[jax.Array, Queries]:
    """Mask logits [B, N, h, w] of images [B, H, W, 3] uint8, and what a head names queries by."""
    module = segmentor.module
    output = module.apply({"params": segmentor.params}, module.normalize(images), image_size)
    logits = mask_logits(output.mask_embeddings[:, -1], output.mask_features)
    queries = output.queries[:, -1]
    return logits, queries if output.clip is None else ClipQueries(queries, output.clip)


@functools.partial(jax.jit, static_argnames="keep_rule")
def name_queries(
    head: Head, queries: Queries, is_thing, is_seen, gammas, thresholds, *, keep_rule
) -> NamedQueries:
    """Names queries; small, for it is compiled anew for another number of names.

    `is_thing` and `is_seen` are [K] bool, `gammas` [R].
    """
    scores = head(queries)
    # gamma changes names and not who owns a pixel.
    nobody = jnp.zeros_like(is_seen)

    def rank(is_seen: jax.Array, gamma: jax.Array | float) -> RankedQueries:
        return rank_queries(*scores, is_seen, keep_rule=keep_rule, gamma=gamma, **thresholds)

    named = jax.vmap(functools.partial(rank, is_seen))(gammas)
    return NamedQueries(scores, rank(nobody, 0.0), named, is_thing[named.labels])


@functools.partial(jax.jit, static_argnames="side")
def panoptic_tile(
    logits, bids: RankedQueries, counts, sizes, origin, mask_threshold, *, side
) -> tuple[jax.Array, PixelCounts]:
    codes, here = assign_pixels(
        logits,
        bids,
        output_size=(side, side),
        origin=origin,
        mask_threshold=mask_threshold,
        **sizes._asdict(),
    )
    return codes, counts + here


@jax.jit
def settle(named: RankedQueries, is_thing, counts: PixelCounts, overlap_threshold) -> SegmentTables:
    """SegmentTables with an axis of gamma [R] after that of the images."""

    def at_gamma(queries: RankedQueries, is_thing: jax.Array) -> SegmentTables:
        return settle_segments(queries, counts, is_thing, overlap_threshold=overlap_threshold)

    return jax.vmap(at_gamma, out_axes=1)(named, is_thing)


@functools.partial(jax.jit, static_argnames="side")
def semantic_tile(logits, scores, is_seen, gamma, sizes, origin, *, side) -> jax.Array:
    probs = bias_names(scores.class_probs, is_seen, gamma)
    return semantic_inference(
        logits, probs, output_size=(side, side), origin=origin, **sizes._asdict()
    )


@functools.partial(jax.jit, static_argnames="axis", donate_argnums=0)
def add_window(totals, logits, scores, is_seen, gamma, start, weight, *, axis) -> jax.Array:
    """Class scores [B, K, H, W] with those of a square window added at `start` [B] of an axis.

    Logits [B, N, h, w] are resized to the window; `weight` [B, side] is along the axis.
    """
    side = min(totals.shape[2:])
    shape = (*logits.shape[:2], side, side)
    logits = jax.image.resize(logits, shape, "bilinear", antialias=False)
    probs = bias_names(scores.class_probs, is_seen, gamma)[..., :-1]
    weight = jnp.expand_dims(weight, (1, 5 - axis))
    window = class_scores(logits, probs) * weight

    def add(totals: jax.Array, window: jax.Array, start: jax.Array) -> jax.Array:
        corner = [0, 0, 0]
        corner[axis - 1] = start
        here = jax.lax.dynamic_slice(totals, corner, window.shape)
        return jax.lax.dynamic_update_slice(totals, here + window, corner)

    return jax.vmap(add)(totals, window, start)


@functools.partial(jax.jit, static_argnames="side")
def best_class_tile(totals, sizes, origin, *, side) -> jax.Array:
    """As the map of `semantic_tile`, of class scores [B, K, h, w], which are resized instead."""
    how = {"output_size": (side, side), "origin": origin, **sizes._asdict()}
    return class_map(totals, lambda scores: scores, totals.shape[1], **how)


def in_tiles(
    make: Callable[[np.ndarray, int], jax.Array], native_sizes: Sequence[tuple[int, int]]
) -> list[np.ndarray]:
    """Maps of a batch at native sizes from tiles of one static side.

    Args:
      make: (origin [2] int32, side) -> [B, side, side] device array.
    """
    height, width = np.max(native_sizes, axis=0)
    side = next((s for s in TILE_SIDES if max(height, width) <= s), TILE_SIDES[-1])
    maps: list[np.ndarray] = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            tile = np.asarray(make(np.array([top, left], np.int32), side))
            maps = maps or [np.empty(size, tile.dtype) for size in native_sizes]
            for whole, part in zip(maps, tile, strict=False):
                place = whole[top : top + side, left : left + side]
                place[...] = part[: place.shape[0], : place.shape[1]]
    return maps
