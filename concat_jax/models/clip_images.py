"""Pictures as CLIP wants them, on device: windows resized with antialiasing, normalised.

`openai/CLIP clip/clip.py _transform` resizes the short side bicubically, crops the centre and
normalises, on the host and one picture at a time. Here every picture of a batch keeps its own valid
area and the resampling is two matrix products, so shapes are static and accelerators like it.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# openai/CLIP clip/clip.py `_transform`: RGB statistics of CLIP's own training pictures, in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalize_clip_images(images: jax.Array) -> jax.Array:
    """`images` [..., 3] RGB in 0..255, uint8 or float -> [..., 3] float32 by CLIP's statistics."""
    mean = 255.0 * jnp.asarray(CLIP_MEAN, jnp.float32)
    std = 255.0 * jnp.asarray(CLIP_STD, jnp.float32)
    return (images.astype(jnp.float32) - mean) / std


def _cubic(distance: jax.Array) -> jax.Array:
    """Keys' cubic kernel, a = -1/2: that of Pillow, `jax.image` and torch's antialiased resize."""
    d = jnp.abs(distance)
    near = (1.5 * d - 2.5) * d * d + 1.0
    far = ((-0.5 * d + 2.5) * d - 4.0) * d + 2.0
    return jnp.where(d < 1.0, near, jnp.where(d < 2.0, far, 0.0))


def _resampling_weights(
    start: jax.Array, extent: jax.Array, valid: jax.Array, in_size: int, out_size: int
) -> jax.Array:
    """Weights [B, G, out_size, in_size] that resample [start, start + extent) of one axis.

    `start`, `extent` are [B, G] in pixels with edges at integers; pixels from `valid` [B] on weigh
    nothing.
    """
    step = (extent / out_size)[..., None]
    centre = start[..., None] + (jnp.arange(out_size) + 0.5) * step - 0.5
    pixels = jnp.arange(in_size, dtype=jnp.float32)
    # Widening the kernel by the reduction factor is what antialiases; it never narrows.
    spread = jnp.maximum(step, 1.0)[..., None]
    weights = _cubic((pixels - centre[..., None]) / spread)
    weights = jnp.where(pixels < valid[:, None, None, None], weights, 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(jnp.abs(total) < 1e-6, 1.0, total)


def resize_windows(
    images: jax.Array, windows: jax.Array, size: int, *, image_size: jax.Array | None = None
) -> jax.Array:
    """Bicubic, antialiased resize of G windows of each picture to [B, G, size, size, ch] float32.

    Equals resizing the whole valid picture and cropping: pixels just outside a window, but never
    those outside the picture, take part in its border. Masks can ride along as further channels. It
    may overshoot the input's range.

    Args:
      images: [B, H, W, ch] uint8 or float.
      windows: [B, G, 4] as (top, left, height, width) in pixels, fractions allowed; an empty window
        of padding gives finite nonsense.
      image_size: [B, 2] int (height, width) of the valid area at the top left; None: all.
    """
    batch, height, width, _ = images.shape
    if image_size is None:
        image_size = jnp.broadcast_to(jnp.asarray([height, width]), (batch, 2))
    windows = windows.astype(jnp.float32)
    top, left, rows, columns = (windows[..., i] for i in range(4))
    by_row = _resampling_weights(top, rows, image_size[:, 0], height, size)
    by_column = _resampling_weights(left, columns, image_size[:, 1], width, size)
    # Accelerators would otherwise multiply in bfloat16, whose steps near 255 are one grey level.
    precision = jax.lax.Precision.HIGHEST
    resized = jnp.einsum(
        "bgih,bhwc->bgiwc", by_row, images.astype(jnp.float32), precision=precision
    )
    return jnp.einsum("bgjw,bgiwc->bgijc", by_column, resized, precision=precision)


def resize_for_clip(
    images: jax.Array, size: int, *, image_size: jax.Array | None = None
) -> jax.Array:
    """Whole pictures [B, H, W, 3] in 0..255 at CLIP's input size, for `normalize_clip_images`.

    `image_size` [B, 2] is the valid area at the top left; None: all. All content is kept and the
    aspect changes, where CLIP's own preprocessing keeps the central square.
    """
    batch, height, width, _ = images.shape
    if image_size is None:
        image_size = jnp.broadcast_to(jnp.asarray([height, width]), (batch, 2))
    extent = image_size.astype(jnp.float32)
    window = jnp.concatenate([jnp.zeros_like(extent), extent], axis=-1)
    resized = resize_windows(images, window[:, None], size, image_size=image_size)
    return jnp.clip(resized[:, 0], 0.0, 255.0)


def mask_windows(masks: jax.Array, min_side: float = 0.0, max_side: float = math.inf) -> jax.Array:
    """Boxes [B, M, 4] float32 (top, left, height, width) of masks [B, M, h, w], logits.

    In their pixels. Each side is at least `min_side`, about the same centre, and at most
    `max_side`, about the mask's centroid. That of an empty mask is the whole map, as ZegFormer
    takes it.
    """
    inside = masks > 0

    def along(axis: int) -> tuple[jax.Array, jax.Array]:
        counts = inside.sum(axis=axis, dtype=jnp.float32)  # [B, M, L]
        length = counts.shape[-1]
        occupied = counts > 0
        first = jnp.argmax(occupied, axis=-1)
        extent = length - jnp.argmax(occupied[..., ::-1], axis=-1) - first
        centroid = counts @ (jnp.arange(length) + 0.5) / jnp.maximum(counts.sum(axis=-1), 1)
        middle = jnp.where(extent > max_side, centroid, first + extent / 2)
        side = jnp.clip(extent, min_side, max_side)
        return middle - side / 2, side

    (top, height), (left, width) = along(3), along(2)
    return jnp.stack([top, left, height, width], axis=-1).astype(jnp.float32)


def cut_out(
    images: jax.Array,
    masks: jax.Array,
    windows: jax.Array,
    *,
    stride: int,
    size: int,
    image_size: jax.Array,
) -> jax.Array:
    """What CLIP sees of every mask: its window, resized, the rest painted in the mean colour, 0.

    From images [B, H, W, 3] uint8, logits of masks [B, M, H / stride, W / stride] and windows in
    them to [B, M, size, size, 3] float32. The logits are resized straight to the crop: no mask at
    the image's size is ever made.
    """
    crops = resize_windows(images, windows * stride, size, image_size=image_size)

    def resize_mask(mask: jax.Array, window: jax.Array) -> jax.Array:  # [B, h, w], [B, 4]
        return resize_windows(mask[..., None], window[:, None], size)[:, 0]

    own = jax.vmap(resize_mask, in_axes=1, out_axes=1)(masks, windows) > 0
    return jnp.where(own, normalize_clip_images(crops), 0.0)
