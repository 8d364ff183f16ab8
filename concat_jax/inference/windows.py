"""Square windows along a picture's longer side, as EoMT's semantic models look through them.

The reference is `EomtImageProcessor` of `transformers` with do_split_image: the shorter side fills
the window, as few windows as cover the longer one overlap evenly, and class scores are averaged
where they do before they are resized to the picture.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from PIL import Image

from concat_jax.inference.images import SIDE_MULTIPLE


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of a side in pixels; takes the place of `Buckets`."""

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
        """[H, W, 3] uint8 resized and padded to whole windows, and its (height, width) in them."""
        height, width = self.resized(*image.shape[:2])
        resized = Image.fromarray(image)
        if resized.size != (width, height):
            resized = resized.resize((width, height), Image.Resampling.BILINEAR)
        shape = (math.ceil(side / self.side) * self.side for side in (height, width))
        padded = np.zeros((*shape, 3), np.uint8)
        padded[:height, :width] = resized
        return padded, (height, width)

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
