"""Pixels of whatever picture somebody has, as 8-bit RGB."""

from __future__ import annotations

import numpy as np
from PIL import Image

from concat_jax.core.files import UNREADABLE, ImageError

# Above this Pillow itself suspects an attack; 0.4 GB as decoded here.
MAX_PIXELS = 89_478_485


def to_rgb(image: np.ndarray | Image.Image, name: str = "The image") -> np.ndarray:
    """A Pillow image, or array [H, W] or [H, W, 1, 3 or 4], uint8 or uint16, as [H, W, 3] uint8.

    Transparent parts show white, as on a page; dropping the transparency instead would show
    whatever colour the file hides there. 16-bit greys are scaled to 8 bit, their range is not
    stretched. EXIF rotation is left. Raises ImageError for pixels whose range is not known (32
    bit), too many or none.
    """
    if not isinstance(image, Image.Image):
        return _array_to_rgb(np.asarray(image), name)
    check_pixels(image, name)
    try:
        image.load()
    except UNREADABLE as error:
        raise ImageError(f"{name} cannot be decoded: {error}.") from error
    if image.mode.startswith("I"):  # of 16 bits, or 32
        grey = np.asarray(image)
        if image.mode == "I" and (grey.min() < 0 or grey.max() > 65535):
            raise ImageError(f"{name} holds 32-bit integers of unknown range; save it in 8 bit.")
        return _array_to_rgb(grey.astype(np.uint16), name)
    if image.mode == "F":
        raise ImageError(f"{name} holds 32-bit floats of unknown range; save it in 8 bit.")
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            page = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(page, image)
        return np.array(image.convert("RGB"))
    except ValueError as error:
        raise ImageError(f"{name} cannot be made RGB: {error}.") from error


def _array_to_rgb(array: np.ndarray, name: str) -> np.ndarray:
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or array.size == 0:
        raise ImageError(
            f"{name} has the shape {array.shape}; give [H, W], or [H, W, C] of 1, 3 or 4 channels."
        )
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # of either byte order
        array = ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ImageError(
            f"{name} is an array of {array.dtype}; give uint8, 0 to 255, or uint16, 0 to 65535."
        )
    if array.shape[-1] == 4:
        return to_rgb(Image.fromarray(array, "RGBA"), name)
    # A copy: who owns the array may write the next frame into it.
    return np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array.copy()


def check_pixels(image: Image.Image, name: str) -> None:
    """ImageError for a picture without pixels or with more than `MAX_PIXELS`."""
    width, height = image.size
    if width * height == 0:
        raise ImageError(f"{name} has no pixel ({height}x{width}).")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name} has {width * height // 10**6} million pixels ({height}x{width}) where "
            f"{MAX_PIXELS // 10**6} million are the limit; make it smaller."
        )
