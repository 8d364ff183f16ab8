"""Semantic maps from mask logits and class probabilities."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from concat_jax.inference.resize import blend, tile_taps


@functools.partial(jax.jit, static_argnames=("output_size", "strip_rows"))
def semantic_inference(
    mask_logits: jax.Array,
    class_probs: jax.Array,
    *,
    output_size: tuple[int, int],
    source_size: jax.Array | None = None,
    image_size: jax.Array | None = None,
    origin: jax.Array | None = None,
    strip_rows: int = 16,
) -> jax.Array:
    """Mask2Former's semantic post-processing: the class with the most mask probability.

    Every pixel's score of class k is the sum over queries of p(k | query), without no-object, times
    the query's mask probability. The reference is `semantic_inference` in Mask2Former
    mask2former/maskformer_model.py; mask logits are resized to the image's size before, as it does
    for panoptic and instance models (models that are only semantic resize the class scores
    instead). The scores [B, K, H, W] are made in strips of rows and never stored whole.

    Args:
      mask_logits, class_probs, output_size, source_size, image_size: as `panoptic_inference`;
        beyond image_size the map means nothing.
      origin: as `assign_pixels`.
      strip_rows: rows made at once; memory is about B * (N + K) * strip_rows * W floats. Static.

    Returns:
      [B, H, W] class indices, uint8 where they fit, else uint16. The first of equal classes wins.
    """
    probs = class_probs[..., :-1].astype(jnp.float32)

    return class_map(
        mask_logits,
        lambda logits: class_scores(logits, probs),
        probs.shape[-1],
        output_size=output_size,
        source_size=source_size,
        image_size=image_size,
        origin=origin,
        strip_rows=strip_rows,
    )


def class_scores(mask_logits: jax.Array, probs: jax.Array) -> jax.Array:
    """[B, K, h, w] float32 of masks [B, N, h, w] and probabilities of real classes [B, N, K]."""
    masks = jax.nn.sigmoid(mask_logits.astype(jnp.float32))
    return jnp.einsum("bnk,bnhw->bkhw", probs, masks, precision=jax.lax.Precision.HIGHEST)


def class_map(
    maps: jax.Array,
    scores_of: Callable[[jax.Array], jax.Array],
    num_classes: int,
    *,
    output_size: tuple[int, int],
    source_size: jax.Array | None = None,
    image_size: jax.Array | None = None,
    origin: jax.Array | None = None,
    strip_rows: int = 16,
) -> jax.Array:
    """Best classes [B, H, W] by the scores of maps [B, M, h, w] resized strip by strip."""
    batch = maps.shape[0]
    height, width = output_size
    rows = min(strip_rows, height)
    padded_height = -(-height // rows) * rows
    row_taps, column_taps, end = tile_taps(
        maps, output_size, padded_height, source_size, image_size, origin
    )
    dtype = jnp.uint8 if num_classes <= 256 else jnp.uint16

    def strip(index, classes):
        start = index * rows
        taps = jax.tree.map(
            lambda tap: jax.lax.dynamic_slice_in_dim(tap, start, rows, axis=1), row_taps
        )
        # Rows first: a few rows of the narrow source, where [N, h, W] would be large.
        resized = jax.vmap(functools.partial(blend, axis=1))(maps, taps)
        resized = jax.vmap(functools.partial(blend, axis=2))(resized, column_taps)
        best = jnp.argmax(scores_of(resized), axis=1).astype(dtype)
        return jax.lax.dynamic_update_slice_in_dim(classes, best, start, axis=1)

    classes = jnp.zeros((batch, padded_height, width), dtype)
    num_strips = (end[:, 0].max() + rows - 1) // rows
    return jax.lax.fori_loop(0, num_strips, strip, classes)[:, :height]
