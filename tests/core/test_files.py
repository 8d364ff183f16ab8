"""Every fault of an image file is one exception whose sentence names the file."""

import pytest
from PIL import Image

from concat_jax.core.files import UNREADABLE, ImageError, open_image


def load(path):
    with open_image(path) as image:
        image.load()
    return image


def cut(path):
    Image.effect_noise((64, 64), 50).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: None, "it does not exist."),
        (lambda path: path.mkdir(), "it is a folder."),
        (lambda path: path.write_bytes(b""), "it is empty."),
        (lambda path: path.write_bytes(b"a text"), "it is in no format that Pillow reads."),
        (cut, "image file is truncated"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, spoil, reason):
    path = tmp_path / "a.png"
    spoil(path)
    with pytest.raises(ImageError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be read as an image: {reason}")
    assert message.endswith(".") and not message.endswith("..") and "\n" not in message


def test_a_picture_that_pillow_finds_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    Image.new("1", (2000, 2000)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"a.png .*: it has more than 2 million pixels; make it"):
        load(tmp_path / "a.png")


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_a_decoder_raises_in_the_block_is_a_fault_of_the_file(tmp_path, kind):
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"a.png cannot be read as an image: .+\.$"):
        with open_image(tmp_path / "a.png"):
            raise kind()


def test_other_exceptions_and_ones_own_sentence_pass(tmp_path):
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="^It is too small.$"):
        with open_image(tmp_path / "a.png"):
            raise ImageError("It is too small.")
    with pytest.raises(KeyError):
        with open_image(tmp_path / "a.png"):
            raise KeyError
    # An image outlives the block once it is loaded.
    assert load(tmp_path / "a.png").getpixel((1, 1)) == 0
