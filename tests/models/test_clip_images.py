"""Resizing on device beside torch's and jax's own antialiased resize."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.models import clip_images

# Compiled once a shape: operation by operation is slower than the work itself.
resize_for_clip = jax.jit(clip_images.resize_for_clip, static_argnames="size")
resize_windows = jax.jit(clip_images.resize_windows, static_argnames="size")


def _pictures(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("size", [5, 24, 40])
def test_whole_pictures_equal_torch_bicubic(size):
    torch = pytest.importorskip("torch")
    images = _pictures(2, 24, 24, 3)
    planes = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32))
    theirs = torch.nn.functional.interpolate(
        planes, size=(size, size), mode="bicubic", antialias=True
    )
    theirs = theirs.numpy().transpose(0, 2, 3, 1).clip(0, 255)
    ours = resize_for_clip(images, size)
    np.testing.assert_allclose(ours, theirs, atol=1e-2)  # of 255


def test_native_size_is_the_identity():
    images = _pictures(1, 16, 16, 3)
    np.testing.assert_allclose(resize_for_clip(images, 16), images, atol=1e-4)


def test_each_picture_is_resized_over_its_own_valid_area():
    images = _pictures(2, 20, 30, 3)
    image_size = np.array([[20, 30], [12, 18]])
    ours = resize_for_clip(images, 8, image_size=image_size)
    for b, (height, width) in enumerate(image_size):
        alone = jax.image.resize(
            images[b, :height, :width].astype(np.float32), (8, 8, 3), "bicubic", antialias=True
        )
        np.testing.assert_allclose(ours[b], alone.clip(0, 255), atol=1e-2)
    images[1, 12:] = 255 - images[1, 12:]  # padding has no say
    again = resize_for_clip(images, 8, image_size=image_size)
    np.testing.assert_array_equal(again, ours)


def test_a_window_is_the_crop_of_the_resized_picture():
    images = _pictures(1, 16, 32, 3).astype(np.float32)
    double = jax.image.resize(images, (1, 32, 64, 3), "bicubic")
    windows = jnp.asarray([[[4, 8, 8, 8], [0, 0, 8, 8], [8, 24, 8, 8]]])
    ours = resize_windows(images, windows, 16)
    for g, (top, left, _, _) in enumerate(windows[0]):
        expected = double[0, 2 * top : 2 * top + 16, 2 * left : 2 * left + 16]
        np.testing.assert_allclose(ours[0, g], expected, atol=1e-2)


def test_empty_windows_and_pictures_are_finite():
    images = _pictures(2, 8, 8, 3)
    windows = jnp.zeros((2, 1, 4))
    assert np.isfinite(resize_windows(images, windows, 4)).all()
    image_size = np.array([[0, 0], [8, 8]])
    assert np.isfinite(resize_for_clip(images, 4, image_size=image_size)).all()
