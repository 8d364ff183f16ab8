"""CLIP embeddings of whole images and of images masked to one segment, made on device."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from concat_jax.losses.masks import over_batch_shards
from concat_jax.models.clip import CLIP
from concat_jax.models.clip_images import (
    l2_normalize,
    normalize_clip_images,
    resize_for_clip,
    resize_windows,
)


@dataclasses.dataclass(frozen=True)
class CropConfig:
    """How a segment becomes a picture for CLIP.

    Attributes:
      margin: of the segment's box, as a share of its longer side, so that the outline is seen.
      min_side: least side of the window in pixels: a small segment is not blown up beyond it.
      max_side: greatest side, or 0 for none: a large patterned region is looked at through a
        window at its centre rather than shrunk until the pattern is gone.
      fill: "mean" paints what is not the segment in CLIP's mean colour, "none" leaves it.
    """

    margin: float = 0.1
    min_side: float = 1.0
    max_side: float = 0.0
    fill: str = "mean"


def segment_windows(
    segment_ids: jax.Array, num_segments: int, config: CropConfig
) -> tuple[jax.Array, jax.Array]:
    """Square window around every segment.

    Args:
      segment_ids: [B, H, W] id map.
      num_segments: G.
      config: margin and limits of the side.

    Returns:
      centres [B, G, 2] float32 (y, x) in pixels and sides [B, G] float32. A segment without a
      pixel gets a window of one pixel, or of the least side, at the origin.
    """
    height, width = segment_ids.shape[1:]
    rows = jnp.arange(height, dtype=jnp.float32)[:, None] + 0.5
    columns = jnp.arange(width, dtype=jnp.float32)[None, :] + 0.5

    def extent(ids, coordinate):  # one image: [H, W] ids -> min, max, mean [G]
        flat = ids.reshape(-1).astype(jnp.int32)
        values = jnp.broadcast_to(coordinate, ids.shape).reshape(-1)
        bins = num_segments + 1
        low = jax.ops.segment_min(values, flat, bins)[1:]
        high = jax.ops.segment_max(values, flat, bins)[1:]
        count = jax.ops.segment_sum(jnp.ones_like(values), flat, bins)[1:]
        mean = jax.ops.segment_sum(values, flat, bins)[1:] / jnp.maximum(count, 1)
        present = count > 0
        return tuple(jnp.where(present, x, 0.0) for x in (low, high, mean))

    top, bottom, mean_y = jax.vmap(lambda ids: extent(ids, rows))(segment_ids)
    left, right, mean_x = jax.vmap(lambda ids: extent(ids, columns))(segment_ids)
    longer = jnp.maximum(bottom - top, right - left) + 1
    sides = jnp.maximum(longer * (1 + 2 * config.margin), config.min_side)
    middle = jnp.stack([(top + bottom) / 2, (left + right) / 2], axis=-1)
    if config.max_side:
        capped = sides > config.max_side
        sides = jnp.minimum(sides, config.max_side)
        middle = jnp.where(capped[..., None], jnp.stack([mean_y, mean_x], axis=-1), middle)
    return middle, sides


def masked_crops(
    images: jax.Array,
    segment_ids: jax.Array,
    num_segments: int,
    size: int,
    config: CropConfig,
    *,
    image_size: jax.Array | None = None,
) -> jax.Array:
    """The picture of each segment alone, cut to its window, resized and normalised for CLIP.

    The resize is antialiased and separable: two small matrices a segment, no [B, G, H, W] mask.
    The mask is applied after it, by nearest id, so a thin seam of the surroundings can remain.

    Args:
      images: [B, H, W, 3] uint8.
      segment_ids: [B, H, W] id map.
      num_segments: G.
      size: side of the crops in pixels.
      config: window and fill.
      image_size: [B, 2] int32 valid (height, width), None where there is no padding.

    Returns:
      [B, G, size, size, 3] float32; 0, CLIP's mean colour, where filled.

    Raises:
      ValueError: if the fill is unknown.
    """
    if config.fill not in ("mean", "none"):
        raise ValueError(f"Crop fill {config.fill!r} is unknown; choose 'mean' or 'none'.")
    batch, height, width = segment_ids.shape
    centres, sides = segment_windows(segment_ids, num_segments, config)
    corners = centres - sides[..., None] / 2
    windows = jnp.concatenate([corners, sides[..., None], sides[..., None]], axis=-1)
    crops = normalize_clip_images(resize_windows(images, windows, size, image_size=image_size))
    if config.fill == "none":
        return crops
    steps = (jnp.arange(size, dtype=jnp.float32) + 0.5) * (sides / size)[..., None]  # [B, G, s]
    ys, xs = corners[..., 0, None] + steps, corners[..., 1, None] + steps
    inside = ((ys >= 0) & (ys < height))[..., :, None] & ((xs >= 0) & (xs < width))[..., None, :]
    row = jnp.clip(jnp.floor(ys), 0, height - 1).astype(jnp.int32)
    column = jnp.clip(jnp.floor(xs), 0, width - 1).astype(jnp.int32)
    flat = (row[..., :, None] * width + column[..., None, :]).reshape(batch, -1)
    ids = jnp.take_along_axis(segment_ids.reshape(batch, -1), flat, axis=1)
    own = jnp.arange(1, num_segments + 1)[:, None, None]
    is_own = ids.reshape(crops.shape[:-1]).astype(jnp.int32) == own
    return jnp.where((is_own & inside)[..., None], crops, 0.0)


def clip_targets(
    clip: CLIP,
    params,
    images: jax.Array,
    segment_ids: jax.Array,
    num_segments: int,
    config,
    *,
    image_size: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Targets of CON: g of the image and c_j of each segment, without gradient.

    Args:
      clip: the CLIP module.
      params: its parameters.
      images: [B, H, W, 3] uint8.
      segment_ids: [B, H, W] id map.
      num_segments: G.
      config: CropConfig.
      image_size: [B, 2] int32 valid (height, width); padding is not shown to CLIP.

    Returns:
      g [B, C] and c [B, G, C], float32, L2-normalised.
    """
    size = clip.image_size
    whole = normalize_clip_images(
        resize_for_clip(images, size, fit="squash", image_size=image_size)
    )
    crops = masked_crops(images, segment_ids, num_segments, size, config, image_size=image_size)
    pictures = jnp.concatenate([whole[:, None], crops], axis=1)  # [B, 1 + G, s, s, 3]

    def encode(params, pictures: jax.Array) -> jax.Array:
        def of_images(images: jax.Array) -> jax.Array:
            return clip.apply({"params": params}, images, method="encode_image")

        return jax.vmap(of_images, in_axes=1, out_axes=1)(pictures)

    embeddings = over_batch_shards(encode, num_replicated=1)(params, pictures)
    embeddings = jax.lax.stop_gradient(l2_normalize(embeddings))
    return embeddings[:, 0], embeddings[:, 1:]
