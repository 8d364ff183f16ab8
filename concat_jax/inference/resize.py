"""Bilinear resize of the valid part of a map, one axis at a time, with traced sizes."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


class Taps(NamedTuple):
    """The source places [..., n] int32 that each target place blends, and the share of `high`."""

    low: Array
    high: Array
    share: Array


def axis_taps(
    source: Array, target: Array, length: int, origin: Array | int = 0, xp: ModuleType = jnp
) -> Taps:
    """Taps [..., n] of one axis: half-pixel centres, clamped edges, no antialias.

    The same numbers as torch `interpolate(mode="bilinear", align_corners=False)`, which the
    reference applies to mask logits when it enlarges and when it shrinks them.

    Args:
      source: [...] valid extent of the source axis, which may be a fraction: 333.25 at stride 4 is
        an image 1333 wide. Places from its ceiling on are never read.
      target: [...] size that the extent is resized to.
      length: n, how many target places are wanted. Static. Those past `target` repeat the edge.
      origin: the first target place wanted, for a map that is made in tiles.
    """
    source = xp.asarray(source, xp.float32)[..., None]
    scale = source / xp.asarray(target, xp.float32)[..., None]
    last = xp.maximum(xp.ceil(source) - 1, 0).astype(xp.int32)
    position = (xp.arange(length) + origin + 0.5).astype(xp.float32) * scale - 0.5
    position = xp.clip(position, 0, last.astype(xp.float32))
    low = xp.floor(position).astype(xp.int32)
    high = xp.minimum(low + 1, last)
    return Taps(low, high, (position - low).astype(xp.float32))


def tile_taps(
    mask_logits: jax.Array,
    output_size: tuple[int, int],
    padded_height: int,
    source_size: jax.Array | None,
    image_size: jax.Array | None,
    origin: jax.Array | None,
) -> tuple[Taps, Taps, jax.Array]:
    """Row taps [B, padded_height], column taps [B, W], and where images end in a map [B, 2].

    Args:
      mask_logits: [B, N, h, w].
      output_size: (H, W) of the map. Static.
      padded_height: H made up to whole strips of rows. Static.
      source_size: [B, 2] valid extent of the logits. None: all of them.
      image_size: [B, 2] size that the extent is resized to. None: output_size.
      origin: [2] int (row, column) of the map's first pixel in the image. None: the image's first.
    """
    batch = mask_logits.shape[0]
    if source_size is None:
        source_size = jnp.broadcast_to(jnp.array(mask_logits.shape[2:]), (batch, 2))
    if image_size is None:
        image_size = jnp.broadcast_to(jnp.asarray(output_size), (batch, 2))
    origin = jnp.zeros(2, jnp.int32) if origin is None else origin
    rows = axis_taps(source_size[:, 0], image_size[:, 0], padded_height, origin[0])
    columns = axis_taps(source_size[:, 1], image_size[:, 1], output_size[1], origin[1])
    return rows, columns, jnp.clip(image_size - origin, 0, jnp.asarray(output_size))


def blend(values: Array, taps: Taps, axis: int) -> Array:
    """Resizes one axis of an array by taps [n] without batch axes (vmap adds them)."""
    shape = [1] * values.ndim
    shape[axis] = -1
    share = taps.share.reshape(shape)
    xp = jnp if isinstance(values, jax.Array) else np
    low, high = (xp.take(values, index, axis=axis, mode="clip") for index in (taps.low, taps.high))
    return low * (1 - share) + high * share


def resize_on_host(
    values: np.ndarray, source_size: tuple[float, float], output_size: tuple[int, int]
) -> np.ndarray:
    """The valid extent of one map [h, w] float32 resized to output_size [H, W], with numpy."""
    # Columns first: the map still has its few rows then.
    columns = axis_taps(source_size[1], output_size[1], output_size[1], xp=np)
    rows = axis_taps(source_size[0], output_size[0], output_size[0], xp=np)
    return blend(blend(values, columns, 1), rows, 0)
