"""Colour augmentation: single steps by hand, the recipe as detectron2 states it."""

import colorsys

import numpy as np
import pytest
from PIL import Image

from data_pipelines import colour


def _noise(seed=0, shape=(20, 30)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_brightness_and_contrast_by_hand():
    image = Image.fromarray(np.array([[[0, 100, 250], [7, 8, 9]]], np.uint8))
    brighter = np.asarray(colour.shift_brightness(image, 10.6))
    assert brighter.tolist() == [[[10, 110, 255], [17, 18, 19]]]  # clipped, then truncated
    assert np.asarray(colour.shift_brightness(image, -8)).tolist() == [[[0, 92, 242], [0, 0, 1]]]
    assert np.asarray(colour.scale_contrast(image, 1.5)).tolist() == [[[0, 150, 255], [10, 12, 13]]]
    assert np.asarray(colour.scale_contrast(image, 0)).max() == 0


def test_hue_and_saturation_against_colorsys():
    image = _noise()
    factor, degrees = 0.6, 30.0
    found = np.asarray(colour.change_hue_and_saturation(image, factor, degrees)).astype(float)
    expected = np.zeros_like(found)
    for index in np.ndindex(found.shape[:2]):
        h, s, v = colorsys.rgb_to_hsv(*(np.asarray(image)[index] / 255))
        expected[index] = colorsys.hsv_to_rgb((h + degrees / 360) % 1, min(1, factor * s), v)
    difference = np.abs(found - 255 * expected)
    # HSV of 8 bits: the hue is rounded to 1.4 degrees and the turn too, 4.25 levels a degree.
    assert difference.max() <= 9 and difference.mean() < 1


def test_grey_stays_grey_and_a_full_circle_changes_nothing():
    grey = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2))
    turned = np.asarray(colour.change_hue_and_saturation(grey, 1.4, 77))
    np.testing.assert_array_equal(turned, np.asarray(grey))
    once = np.asarray(colour.change_hue_and_saturation(_noise()))
    np.testing.assert_array_equal(
        once, np.asarray(colour.change_hue_and_saturation(_noise(), 1, 360))
    )


def test_jitter_is_a_function_of_the_generator_and_of_fixed_length():
    image = _noise()
    generators = [np.random.default_rng(5) for _ in range(2)]
    first = np.asarray(colour.colour_jitter(generators[0], image))
    np.testing.assert_array_equal(first, np.asarray(colour.colour_jitter(generators[1], image)))
    # Whatever is applied, nine numbers are drawn: what is drawn next does not depend on it.
    for seed in range(20):
        rng, plain = np.random.default_rng(seed), np.random.default_rng(seed)
        colour.colour_jitter(rng, image)
        plain.uniform(size=9)
        assert rng.uniform() == plain.uniform()
    others = [np.asarray(colour.colour_jitter(np.random.default_rng(s), image)) for s in range(9)]
    assert len({other.tobytes() for other in others}) >= 8


def test_steps_are_those_of_the_reference_and_each_happens_half_of_the_time():
    flat = Image.new("RGB", (1, 1), (100, 100, 100))
    rng = np.random.default_rng(0)
    values = [colour.colour_jitter(rng, flat).getpixel((0, 0))[0] for _ in range(1000)]
    values = np.array(values)
    # On grey only brightness and contrast show: 100 is left alone in a quarter of the draws.
    assert np.mean(values == 100) == pytest.approx(0.25, abs=0.06)
    assert values.min() >= 34 - 1 and values.max() <= 198
    assert np.mean((values < 68) | (values > 132)) > 0.1  # contrast goes beyond brightness


def test_other_modes_are_refused():
    with pytest.raises(ValueError, match="is L and must be RGB"):
        colour.colour_jitter(np.random.default_rng(0), _noise().convert("L"))
