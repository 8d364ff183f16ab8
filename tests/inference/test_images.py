"""Reading the images people have, and the few shapes they are resized into."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from concat_jax.core.files import ImageError
from concat_jax.inference.images import Buckets, open_picture, read_image
from data_pipelines.pixels import MAX_PIXELS, to_rgb

RED, GREEN = (255, 0, 0), (0, 255, 0)


def saved(tmp_path, image, name="a.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def two_halves(mode="RGB", size=(8, 4)):
    """Left half red, right half green."""
    image = Image.new("RGB", size, RED)
    image.paste(GREEN, (size[0] // 2, 0, *size))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    if mode == "YCbCr":  # Pillow before 13 cannot read the TIFF of it that it writes
        rgb = open_picture(two_halves(mode), "a")
    else:
        rgb = read_image(
            saved(tmp_path, two_halves(mode), f"a.{'tif' if mode == 'CMYK' else 'png'}")
        )
    assert rgb.shape == (4, 8, 3) and rgb.dtype == np.uint8
    if mode in ("1", "L", "LA"):
        assert (rgb == rgb[..., :1]).all()
    else:
        np.testing.assert_allclose(rgb[0, 0], RED, atol=3)
        np.testing.assert_allclose(rgb[0, 7], GREEN, atol=3)


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    grey = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    rgb = read_image(saved(tmp_path, Image.fromarray(grey)))
    assert rgb[0, :, 0].tolist() == [0, 1, 128, 255]
    assert (rgb == rgb[..., :1]).all()


def test_transparent_parts_are_white(tmp_path):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128)]
    rgb = read_image(saved(tmp_path, Image.fromarray(rgba)))
    assert rgb[0, :2].tolist() == [[255, 0, 0], [255, 255, 255]]
    np.testing.assert_allclose(rgb[0, 2], 127, atol=1)
    palette = two_halves("P")
    hidden = palette.getpixel((0, 0))
    path = saved(tmp_path, palette, "p.png", transparency=hidden)
    assert read_image(path)[0, 0].tolist() == [255, 255, 255]


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown a quarter turn clockwise
    rgb = read_image(saved(tmp_path, two_halves(), exif=exif))
    assert rgb.shape == (8, 4, 3)
    assert rgb[0, 0].tolist() == list(RED) and rgb[7, 0].tolist() == list(GREEN)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN)]
    path = saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(path)[0, 0].tolist() == list(RED)


def test_one_pixel(tmp_path):
    assert read_image(saved(tmp_path, Image.new("RGB", (1, 1), RED))).tolist() == [[list(RED)]]


def png_header(width, height):
    """A PNG that only claims to be large."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"x")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jpg", b"", "is empty"),
        ("text.jpg", b"not an image, whatever it is called", "in no format that"),
        ("large.png", png_header(12000, 8000), "96 million pixels"),
        ("absurd.png", png_header(10**6, 10**6), "million pixels"),
        ("missing.png", None, "does not exist"),
    ],
)
def test_what_cannot_be_read_is_named_in_a_sentence(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError, match=message) as caught:
        read_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "?"))


@pytest.mark.parametrize("suffix", ["jpeg", "png", "gif", "webp", "bmp", "tiff"])
def test_truncated_files_are_named(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, suffix)
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(ImageError, match="cut"):
        read_image(path)


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(ImageError, match="is a folder"):
        read_image(tmp_path)


def test_arrays():
    grey = np.array([[0, 7]], np.uint8)
    assert to_rgb(grey).tolist() == [[[0] * 3, [7] * 3]]
    assert to_rgb(np.zeros((2, 3, 4), np.uint8)).tolist() == [[[255] * 3] * 3] * 2
    for kind in ("<u2", ">u2"):
        assert to_rgb(np.full((1, 1, 3), 65535, kind)).tolist() == [[[255] * 3]]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2, 3)), "float64; give uint8, 0 to 255, or uint16, 0 to 65535"),
        (Image.new("La", (2, 2)), "The image cannot be made RGB: conversion from La"),
        (np.zeros((2, 2, 2), np.uint8), "channels"),
        (np.zeros((0, 2, 3), np.uint8), "shape"),
        (Image.new("F", (2, 2)), "floats of unknown range"),
        (Image.fromarray(np.full((2, 2), 70000, np.int32)), "unknown range"),
    ],
)
def test_arrays_of_unknown_meaning_are_refused(array, message):
    with pytest.raises(ImageError, match=message):
        to_rgb(array)


def test_the_limit_admits_large_photographs():
    assert 6000 * 4000 < MAX_PIXELS


@pytest.mark.parametrize(
    ("native", "expected"),
    [
        # detectron2 ResizeShortestEdge(800, 1333), by hand
        ((480, 640), (800, 1067)),
        ((640, 480), (1067, 800)),
        ((426, 640), (800, 1202)),
        ((1080, 1920), (750, 1333)),
        ((1, 1), (800, 800)),
        ((1, 6000), (1, 1333)),
        ((4000, 6000), (800, 1200)),
    ],
)
def test_resized_as_the_reference(native, expected):
    assert Buckets().resized(*native) == expected


def test_every_size_fits_one_of_five_buckets():
    buckets = Buckets()
    assert buckets.shapes == ((800, 800), (800, 1088), (1088, 800), (800, 1344), (1344, 800))
    rng = np.random.default_rng(0)
    for size in rng.integers(1, 3000, (500, 2)):
        assert buckets.shape_for(buckets.resized(*size)) in buckets.shapes
    assert Buckets(64, 64).shapes == ((64, 64),)
    assert Buckets(50, 70).shapes == ((64, 64), (64, 96), (96, 64))


def test_prepared_image_lies_at_the_top_left():
    image = np.full((30, 60, 3), 200, np.uint8)
    padded, size = Buckets(40, 100).prepare(image)
    assert size == (40, 80)
    assert padded.shape == (64, 128, 3)
    assert (padded[:40, :80] == 200).all()
    assert not padded[40:].any() and not padded[:, 80:].any()


@pytest.mark.parametrize("sides", [(0, 5), (10, 5)])
def test_impossible_sides_are_refused(sides):
    with pytest.raises(ValueError, match="short_side"):
        Buckets(*sides)
