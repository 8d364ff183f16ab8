"""CLIP embeddings of whole images and of images masked to one segment, made on device."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from concat_jax.core.config import check_choice
from concat_jax.losses.masks import over_batch_shards
from concat_jax.models.clip import CLIP
from concat_jax.models.clip_images import (
    CLIP_MEAN,
    normalize_clip_images,
    resize_for_clip,
    resize_windows,
)
from concat_jax.models.semantic_projector import unit

FILLS = ("mean", "none")


@dataclasses.dataclass(frozen=True)
class CropConfig:
    """How a segment becomes a picture for CLIP.

    Attributes:
      margin: of the segment's box, as a share of its longer side, so that the outline is seen.
      min_side: least side of the window in pixels: a small segment is not blown up beyond it.
      max_side: greatest side, or 0 for none: a large patterned region is looked at through a
        window at its centre rather than shrunk until the pattern is gone.
      fill: "mean" paints what is not the segment in CLIP's mean colour, "none" leaves it.
      size: side of the pictures that CLIP sees, 0 for the one it was trained at; its positions are
        interpolated for others.
      hide_void: paint void pixels in the picture of the whole image. Where unseen classes are void
        in training images, as in COCO-Stuff's protocol, the target must not look at them.
      dtype: compute type of CLIP's image tower, "bfloat16" on accelerators; targets are float32.
    """

    margin: float = 0.1
    min_side: float = 1.0
    max_side: float = 0.0
    fill: str = "mean"
    size: int = 0
    hide_void: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        check_choice(self.fill, FILLS, "Crop fill is")
        check_choice(self.dtype, ("float32", "bfloat16"), "Crop dtype is")


def segment_windows(
    segment_ids: jax.Array, num_segments: int, config: CropConfig
) -> tuple[jax.Array, jax.Array]:
    """Square windows of segments of an id map [B, H, W]: centres [B, G, 2] (y, x) and sides [B, G].

    float32, in pixels. A segment without a pixel gets a window of one, or of the least side, at 0.
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

    From images [B, H, W, 3] uint8 and their id map [B, H, W] to [B, G, size, size, 3] float32, 0,
    CLIP's mean colour, where filled. The resize is antialiased and separable: two small matrices a
    segment, no [B, G, H, W] mask. The mask is applied after it, by nearest id, so a thin seam can
    remain.
    """
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


def segment_areas(segment_ids: jax.Array, num_segments: int) -> jax.Array:
    """Pixels [B, G] int32 of segments 1..G of an id map [B, H, W]."""

    def of_image(ids: jax.Array) -> jax.Array:
        return jnp.zeros(num_segments + 1, jnp.int32).at[ids.ravel()].add(1)[1:]

    return jax.vmap(of_image)(segment_ids.astype(jnp.int32))


def keep_largest(
    segment_ids: jax.Array, num_segments: int, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The id map [B, H, W] with only the `count` M largest of the G segments of each image.

    Returns:
      id map [B, H, W] int32 with ids 1..M, largest first; rows [B, M] int32, which of 0..G-1 each
      of them was; areas [B, M] int32 in pixels. Of equal ones the first comes first.
    """

    def of_image(ids: jax.Array, areas: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        rows = jnp.argsort(-areas, stable=True)[:count].astype(jnp.int32)
        new_ids = jnp.zeros(num_segments + 1, jnp.int32).at[rows + 1].set(jnp.arange(1, count + 1))
        return new_ids[ids], rows, areas[rows]

    segment_ids = segment_ids.astype(jnp.int32)
    return jax.vmap(of_image)(segment_ids, segment_areas(segment_ids, num_segments))


def clip_targets(
    clip: CLIP,
    params,
    images: jax.Array,
    segment_ids: jax.Array,
    num_segments: int,
    config: CropConfig,
    *,
    image_size: jax.Array | None = None,
    max_segments: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Targets of CON, L2-normalised: g [B, C] of the image, c [B, G, C] of segments.

    float32; zeros for a segment that has no pixel or is not among the M largest.

    Args:
      images: [B, H, W, 3] uint8, of which padding beyond `image_size` [B, 2] is not shown to CLIP.
      segment_ids: [B, H, W] id map.
      max_segments: M, the most segments of an image that CLIP looks at, the largest; 0 for all G.
        A row of the tables costs a pass of CLIP whether it holds a segment or padding.
    """
    clip = clip.clone(dtype=jnp.dtype(config.dtype))
    size = config.size or clip.image_size
    count = min(max_segments or num_segments, num_segments)
    if image_size is None:
        height, width = segment_ids.shape[1:]
        image_size = jnp.broadcast_to(jnp.asarray([height, width]), (len(images), 2))

    def targets(params, images, segment_ids, image_size) -> tuple[jax.Array, jax.Array]:
        shown = images
        if config.hide_void:
            mean = 255.0 * jnp.asarray(CLIP_MEAN)
            shown = jnp.where((segment_ids == 0)[..., None], mean, images)
        whole = resize_for_clip(shown, size, image_size=image_size)
        ids, rows, areas = keep_largest(segment_ids, num_segments, count)
        crops = masked_crops(images, ids, count, size, config, image_size=image_size)
        pictures = jnp.concatenate([normalize_clip_images(whole)[:, None], crops], axis=1)

        def encode(pictures: jax.Array) -> jax.Array:  # [b, s, s, 3] -> [b, C]
            return clip.apply({"params": params}, pictures, method="encode_image")

        embeddings = unit(jax.vmap(encode, in_axes=1, out_axes=1)(pictures))
        by_segment = jnp.where((areas > 0)[..., None], embeddings[:, 1:], 0.0)
        place = jax.vmap(lambda table, row, values: table.at[row].set(values))
        table = jnp.zeros((len(images), num_segments, embeddings.shape[-1]), jnp.float32)
        return embeddings[:, 0], place(table, rows, by_segment)

    # The whole of it on each device's own images: TPU's partitioner would gather the pictures.
    targets = over_batch_shards(targets, num_replicated=1)
    return jax.lax.stop_gradient(targets(params, images, segment_ids, image_size))


def patch_regions(segment_ids: jax.Array, num_segments: int, patch_size: int) -> jax.Array:
    """Patches [B, G, P] bool that segments of an id map [B, H, W] are seen in.

    Those of which a segment owns at least half as much as of the one that it owns most of, so that
    a large one is cut at the middle of its border and a small one still has a patch.
    """
    p = patch_size
    batch, height, width = segment_ids.shape
    ids = jnp.pad(segment_ids.astype(jnp.int32), ((0, 0), (0, -height % p), (0, -width % p)))
    rows, columns = (side // p for side in ids.shape[1:])
    ids = ids.reshape(batch, rows, p, columns, p).transpose(0, 1, 3, 2, 4)
    ids = ids.reshape(batch, rows * columns, p * p, 1)
    counts = jnp.sum(ids == jnp.arange(1, num_segments + 1), axis=2)  # [B, P, G]
    counts = counts.transpose(0, 2, 1)
    return (counts > 0) & (2 * counts >= counts.max(axis=-1, keepdims=True))


def token_targets(
    clip: CLIP, params, tokens: jax.Array, segment_ids: jax.Array, num_segments: int
) -> tuple[jax.Array, jax.Array]:
    """`clip_targets` from what a segmentor's encoder, which is CLIP, saw of the images already.

    CLIP's last block runs again, on tokens [B, 1 + P, D] before it (`SegmentorOutput.clip_tokens`)
    and a class token for every segment, which sees the patches of its segment alone. Mask class
    tokens are of Ding et al., arXiv 2208.08984, there in every block; g sees all patches and is
    CLIP's own embedding of the picture at this size. What the patches themselves saw before, their
    surroundings included, stays in them.
    """
    regions = patch_regions(segment_ids, num_segments, clip.patch_size)
    whole = jnp.ones((len(regions), 1, regions.shape[-1]), bool)
    inside = jnp.concatenate([whole, regions], axis=1)
    embeddings = clip.apply({"params": params}, tokens, inside, method="encode_regions")
    embeddings = unit(embeddings)
    of_segments = jnp.where(regions.any(axis=-1)[..., None], embeddings[:, 1:], 0.0)
    return jax.lax.stop_gradient((embeddings[:, 0], of_segments))
