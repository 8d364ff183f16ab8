"""Image files of other people: whatever Pillow makes of a bad one, the reader gets one sentence."""

from __future__ import annotations

import contextlib
import os
import pathlib
import struct
from collections.abc import Iterator

from PIL import Image

# What Pillow's decoders raise on files that are cut off, damaged or no pictures; none of them
# documents its own.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    struct.error,
    Image.DecompressionBombError,
)


class ImageError(ValueError):
    """An image that cannot be used; the message is one sentence that names it."""


@contextlib.contextmanager
def open_image(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Opens an image file for a `with` block, in which it is to be decoded by `load`.

    Yields:
      The image as Pillow opens it, without EXIF rotation. Once loaded, it outlives the block.

    Raises:
      ImageError: if the file cannot be opened, or decoded within the block.
    """
    path = pathlib.Path(path)
    try:
        with Image.open(path) as image:
            yield image
    except ImageError:
        raise
    except UNREADABLE as error:
        raise ImageError(f"{path} cannot be read as an image: {_reason(path, error)}.") from error


def _reason(path: pathlib.Path, error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        empty = path.stat().st_size == 0
        return "it is empty" if empty else "it is in no format that Pillow reads"
    if isinstance(error, Image.DecompressionBombError):
        # Pillow refuses twice its limit, and warns of what is between.
        limit = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        return f"it has more than {limit} million pixels; make it smaller"
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    if path.is_dir():
        return "it is a folder"
    return " ".join(str(error).split()).rstrip(".") or "it is damaged"
