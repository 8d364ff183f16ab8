"""Colour augmentation for semantic training: pure functions of an image and a generator.

The recipe is SSD's (Liu et al., arXiv 1512.02325, section 2.2), as Mask2Former applies it in
`mask_former_semantic_dataset_mapper.py` through detectron2's `ColorAugSSDTransform`
(`projects/PointRend/point_rend/color_augmentation.py`). Every step is a table of 256 entries.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_LEVELS = np.arange(256, dtype=np.float64)
# detectron2's: the largest shift of all channels, factors of all channels and of HSV's saturation,
# and the largest turn of the hue in degrees, which there are 18 of OpenCV's 180 hues.
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 32.0, (0.5, 1.5), (0.5, 1.5), 36.0


def colour_jitter(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """A new image: brightness, contrast before or after saturation and hue, each half of the time.

    Draws are made in a fixed order and number.
    """
    if image.mode != "RGB":
        raise ValueError(f"The image is {image.mode} and must be RGB; convert it first.")
    brightens, contrasts, saturates, turns = rng.uniform(size=4) < 0.5
    contrast_first = rng.uniform() < 0.5
    shift = rng.uniform(-_BRIGHTNESS, _BRIGHTNESS)
    contrast = rng.uniform(*_CONTRAST)
    saturation = rng.uniform(*_SATURATION)
    turn = rng.uniform(-_HUE, _HUE)
    if brightens:
        image = shift_brightness(image, shift)
    if contrasts and contrast_first:
        image = scale_contrast(image, contrast)
    if saturates or turns:
        image = change_hue_and_saturation(
            image, saturation if saturates else 1.0, turn if turns else 0.0
        )
    if contrasts and not contrast_first:
        image = scale_contrast(image, contrast)
    return image


def shift_brightness(image: Image.Image, shift: float) -> Image.Image:
    """Adds `shift` to every channel of an RGB image, clipped to 0 to 255."""
    return image.point(3 * _table(_LEVELS + shift))


def scale_contrast(image: Image.Image, factor: float) -> Image.Image:
    """Multiplies every channel of an RGB image by `factor` >= 0, clipped to 255."""
    return image.point(3 * _table(_LEVELS * factor))


def change_hue_and_saturation(
    image: Image.Image, saturation: float = 1.0, degrees: float = 0.0
) -> Image.Image:
    """Multiplies HSV's saturation, clipped at full, and turns the hue of an RGB image.

    Both at once, so that it is rounded to HSV only once. PIL's circle has 256 hues, OpenCV's 180.
    """
    turned = (_LEVELS + round(degrees * 256 / 360)) % 256
    tables = _table(turned) + _table(_LEVELS * saturation) + _table(_LEVELS)
    return image.convert("HSV").point(tables).convert("RGB")


def _table(values: np.ndarray) -> list[int]:
    # Truncated, as the reference's cast to uint8 does.
    return np.clip(values, 0, 255).astype(int).tolist()
