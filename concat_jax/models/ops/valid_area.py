"""The valid area of padded images: sizes, masks, and a resize that never reads the padding.

Images of many sizes share one compiled program by being padded at the bottom and right into a
bucket. The functions here let a network compute on the valid area what it would compute on the
unpadded image: what lies beyond is set to zero before every operation that looks at neighbours
(which is what the zero padding of a convolution would read there), and kept out of statistics.

A `size` is [B, 2] int32, the (height, width) of each image's valid area on one feature map, traced;
None where nothing is padded.
"""

import jax
import jax.numpy as jnp


def valid_size(image_size: jax.Array | None, stride: int) -> jax.Array | None:
    """Valid area [B, 2] of the map of a stride, rounded up as that of the unpadded image is."""
    return None if image_size is None else (image_size + (stride - 1)) // stride


def valid_mask(size: jax.Array, height: int, width: int) -> jax.Array:
    """[B, 2] sizes -> [B, height, width] bool, True inside the valid area at the top left."""
    rows = jnp.arange(height) < size[:, :1]
    columns = jnp.arange(width) < size[:, 1:]
    return rows[:, :, None] & columns[:, None, :]


def zero_beyond(features: jax.Array, size: jax.Array | None) -> jax.Array:
    """[B, H, W, C] with zeros beyond `size` [B, 2]; unchanged where `size` is None."""
    if size is None:
        return features
    return jnp.where(valid_mask(size, *features.shape[1:3])[..., None], features, 0)


def statistics_mask(features: jax.Array, size: jax.Array | None) -> jax.Array | None:
    """The `mask` [B, H, W, C] of flax's GroupNorm that keeps the padding out, or None."""
    if size is None:
        return None
    mask = valid_mask(size, *features.shape[1:3])[..., None]
    return jnp.broadcast_to(mask, features.shape)


def resize_bilinear(features: jax.Array, height: int, width: int) -> jax.Array:
    """[B, H, W, C] resized without antialiasing, torch's `interpolate(align_corners=False)`."""
    in_height, in_width = features.shape[1:3]
    ratio = in_height // height
    if ratio > 0 and ratio % 2 == 0 and (in_height, in_width) == (ratio * height, ratio * width):
        # Every output pixel sits in the middle of four input pixels: their mean, read by slices.
        first, second = (slice(ratio // 2 - 1 + i, None, ratio) for i in (0, 1))
        top = features[:, first, first] + features[:, first, second]
        bottom = features[:, second, first] + features[:, second, second]
        return (top + bottom) * 0.25
    shape = (features.shape[0], height, width, features.shape[3])
    return jax.image.resize(features, shape, "bilinear", antialias=False)


def _interpolation_matrix(
    in_size: jax.Array, out_size: jax.Array, in_length: int, out_length: int
) -> jax.Array:
    """Bilinear weights of one axis: int32 [B], [B] -> [B, out_length, in_length] float32.

    Row i reads (i + 0.5) * in_size / out_size - 0.5, clamped to the valid area. The position is a
    quotient of integers, so that its fraction is exact however long the axis is.
    """
    divisor = 2 * out_size[:, None]
    numerator = (2 * jnp.arange(out_length) + 1) * in_size[:, None] - out_size[:, None]
    numerator = jnp.clip(numerator, 0, divisor * (in_size[:, None] - 1))
    first = numerator // divisor
    share = (numerator - first * divisor) / divisor.astype(jnp.float32)
    places = jnp.arange(in_length)
    is_first = places == first[..., None]
    is_second = places == first[..., None] + 1
    return jnp.where(is_first, 1 - share[..., None], jnp.where(is_second, share[..., None], 0.0))


def resize_within(
    features: jax.Array, size: jax.Array | None, height: int, width: int, new_size: jax.Array | None
) -> jax.Array:
    """`resize_bilinear` of each image's valid area, summed in float32.

    From [B, H, W, C], of which nothing beyond `size` [B, 2] is read, to [B, height, width, C], of
    which what lies beyond `new_size` [B, 2] repeats the edge.
    """
    if size is None:
        return resize_bilinear(features, height, width)
    rows = _interpolation_matrix(size[:, 0], new_size[:, 0], features.shape[1], height)
    columns = _interpolation_matrix(size[:, 1], new_size[:, 1], features.shape[2], width)
    # TPUs multiply float32 matrices in bfloat16 unless told otherwise.
    exact = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    resized = jnp.einsum("bih,bhwc->biwc", rows, features.astype(jnp.float32), **exact)
    resized = jnp.einsum("bjw,biwc->bijc", columns, resized, **exact)
    return resized.astype(features.dtype)
