"""Colour augmentation for semantic training: pure functions of an image and a generator.

The recipe is SSD's (Liu et al., arXiv 1512.02325, section 2.2), as Mask2Former applies it in
`mask_former_semantic_dataset_mapper.py` through detectron2's `ColorAugSSDTransform`
(`projects/PointRend/point_rend/color_augmentation.py`). Every step is a table of 256 entries.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_LEVELS = np.arange(256, dtype=np.float64)


def colour_jitter(
    rng: np.random.Generator,
    image: Image.Image,
    *,
    brightness_delta: float = 32.0,
    contrast_range: tuple[float, float] = (0.5, 1.5),
    saturation_range: tuple[float, float] = (0.5, 1.5),
    hue_delta: float = 36.0,
    probability: float = 0.5,
) -> Image.Image:
    """Brightness, then contrast before or after saturation and hue, each applied or not.

    The defaults are detectron2's, whose `hue_delta` is 18 of OpenCV's 180 hues. Draws are made in
    a fixed order and number.

    Args:
      rng: decides which steps are applied, and how strongly.
      image: RGB.
      brightness_delta: largest shift of all channels, of 0 to 255.
      contrast_range: factor of all channels, uniform.
      saturation_range: factor of HSV's saturation, uniform.
      hue_delta: largest rotation of the hue, in degrees.
      probability: of each of the four steps.

    Returns:
      A new RGB image, or the one given where no step is applied.

    Raises:
      ValueError: if the image is not RGB or a range is not 0 <= low <= high.
    """
    if image.mode != "RGB":
        raise ValueError(f"The image is {image.mode} and must be RGB; convert it first.")
    for name, (low, high) in (("contrast", contrast_range), ("saturation", saturation_range)):
        if not 0 <= low <= high:
            raise ValueError(f"{name}_range is {(low, high)} and must be 0 <= low <= high.")
    brightens, contrasts, saturates, turns = rng.uniform(size=4) < probability
    contrast_first = rng.uniform() < 0.5
    shift = rng.uniform(-brightness_delta, brightness_delta)
    contrast = rng.uniform(*contrast_range)
    saturation = rng.uniform(*saturation_range)
    turn = rng.uniform(-hue_delta, hue_delta)
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
    """Multiplies HSV's saturation of an RGB image and turns its hue.

    Both at once, so that the image is rounded to HSV only once. PIL's HSV has 256 hues to the
    circle, OpenCV's 180.

    Args:
      image: RGB.
      saturation: factor >= 0; saturation is clipped at full.
      degrees: added to the hue, any.
    """
    turned = (_LEVELS + round(degrees * 256 / 360)) % 256
    tables = _table(turned) + _table(_LEVELS * saturation) + _table(_LEVELS)
    return image.convert("HSV").point(tables).convert("RGB")


def _table(values: np.ndarray) -> list[int]:
    # Truncated, as the reference's cast to uint8 does.
    return np.clip(values, 0, 255).astype(int).tolist()
