"""Images of people's disks: reading them as 8-bit RGB, and resizing and padding into few shapes."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageOps

from concat_jax.core.files import UNREADABLE, ImageError, open_image
from data_pipelines.pixels import check_pixels, to_rgb

# What a folder is searched for.
SUFFIXES = frozenset(
    (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
)
# Of pictures this package writes beside its results; a folder's listing passes them over.
OVERLAY_SUFFIX = ".overlay.png"
# Sides are multiples of it: the coarsest features have stride 32.
SIDE_MULTIPLE = 32
# Class scores of so many windows of 640 pixels and 150 names fill 16 GB.
MAX_WINDOWS = 64

Picture = str | os.PathLike[str] | np.ndarray | Image.Image


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """An image file as it is meant to be seen, RGB [H, W, 3] uint8: EXIF rotation, first frame.

    Raises ImageError if it is missing, empty, no image, damaged, too large or of an unknown range.
    """
    with warnings.catch_warnings():
        # Its threshold is the one checked below, and stray tags are no business of ours.
        warnings.simplefilter("ignore")
        with open_image(path) as picture:
            check_pixels(picture, str(path))
            picture.load()
            return to_rgb(_upright(picture), str(path))


def open_picture(picture: Picture, name: str) -> np.ndarray:
    """An image [H, W, 3] uint8 from whatever somebody has: a path, an array or a Pillow image.

    Raises ImageError as `read_image` and `to_rgb`, which calls what is no file by its `name`.
    """
    if isinstance(picture, str | os.PathLike):
        return read_image(picture)
    if not isinstance(picture, Image.Image) and not hasattr(picture, "__array__"):
        raise ImageError(
            f"{name} is of type {type(picture).__name__}; give a path, an array or a Pillow "
            "image, or a list of them."
        )
    return to_rgb(picture, name)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except UNREADABLE:
        # Broken EXIF says nothing about the pixels; viewers show such a picture as stored.
        return image


def resized_within(image: np.ndarray, size: Iterable[int], shape: Iterable[int]) -> np.ndarray:
    """[*shape, 3] uint8: an image [h, w, 3] at another size at the top left, zero beyond.

    Bilinear with antialias, as Pillow does for the reference.
    """
    height, width = size
    padded = np.zeros((*shape, 3), np.uint8)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    padded[:height, :width] = resized
    return padded


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The few padded shapes that images of all sizes are resized into.

    The shorter side becomes `short_side` (Mask2Former `INPUT.MIN_SIZE_TEST`) unless the longer
    would exceed `long_side` (`INPUT.MAX_SIZE_TEST`).
    """

    short_side: int = 800
    long_side: int = 1333

    def __post_init__(self):
        if not 1 <= self.short_side <= self.long_side:
            raise ValueError(
                f"short_side is {self.short_side} and long_side {self.long_side}; both must be "
                "positive and the short side no longer than the long one."
            )

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The buckets (height, width), smallest first: square, up to 4:3 and beyond, lying and
        standing. What is nearer the square wastes less than half of its bucket."""
        middle = min(self.short_side * 4 / 3, self.long_side)
        short, *longer = (
            SIDE_MULTIPLE * math.ceil(round(side) / SIDE_MULTIPLE)
            for side in (self.short_side, middle, self.long_side)
        )
        shapes = {(short, short)}
        for long in longer:
            shapes |= {(short, long), (long, short)}
        return tuple(sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape)))

    @property
    def canvas(self) -> tuple[int, int]:
        """(height, width) that no padded image exceeds."""
        side = max(max(shape) for shape in self.shapes)
        return side, side

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Size of the network's input for an image of a size, detectron2 `ResizeShortestEdge`."""
        scale = self.short_side / min(height, width)
        scale = min(scale, self.long_side / max(height, width))
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))

    def shape_for(self, size: Sequence[int]) -> tuple[int, int]:
        """The smallest bucket that a resized image fits."""
        return next(s for s in self.shapes if size[0] <= s[0] and size[1] <= s[1])

    def prepare(self, image: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """[H, W, 3] uint8 resized and padded to one of `shapes`, and its (height, width) in it."""
        size = self.resized(*image.shape[:2])
        return resized_within(image, size, self.shape_for(size)), size


@dataclasses.dataclass(frozen=True)
class Windows:
    """Square windows along a picture's longer side, as EoMT's semantic models look through them.

    They take the place of `Buckets`. The reference is `EomtImageProcessor` of `transformers` with
    do_split_image: the shorter side fills the window, as few windows as cover the longer one
    overlap evenly, and class scores are averaged where they do before they are resized to the
    picture. `side` is in pixels.
    """

    side: int

    def __post_init__(self):
        if self.side < 1 or self.side % SIDE_MULTIPLE:
            raise ValueError(
                f"short_side is {self.side}, but windows have sides divisible by {SIDE_MULTIPLE}; "
                "change it."
            )

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of what the network sees."""
        return ((self.side, self.side),)

    @property
    def canvas(self) -> tuple[int, int]:
        return self.side, self.side

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """The size whose shorter side is the window's; the longer one is cut to a whole number."""
        short = min(height, width)
        return int(self.side * height / short), int(self.side * width / short)

    def prepare(self, image: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """[H, W, 3] uint8 resized and padded to whole windows, and its (height, width) in them.

        Raises ImageError if it is longer than `MAX_WINDOWS`.
        """
        height, width = image.shape[:2]
        size = self.resized(height, width)
        if max(size) > MAX_WINDOWS * self.side:
            raise ImageError(
                f"A picture of {height}x{width} pixels is more than {MAX_WINDOWS} times as long as "
                "wide, too long for windows; cut it into pieces."
            )
        shape = (math.ceil(side / self.side) * self.side for side in size)
        return resized_within(image, size, shape), size

    def starts(self, lengths: np.ndarray, number: int) -> np.ndarray:
        """First pixels [number, B] of the windows along sides of these lengths [B]."""
        overlap = (number * self.side - lengths) / max(number - 1, 1)
        return np.int32(np.arange(number)[:, None] * (self.side - overlap))

    def weights(self, starts: np.ndarray) -> np.ndarray:
        """What each window [number, B] adds to the average at its pixels, [number, B, side]."""
        pixels = starts[..., None] + np.arange(self.side)
        covers = (pixels[:, None] >= starts[None, ..., None]) & (
            pixels[:, None] < starts[None, ..., None] + self.side
        )
        return (1 / covers.sum(axis=1)).astype(np.float32)
