"""One sentence names a file that cannot be read or written; what is written is there whole."""

import errno
import os

import pytest
from PIL import Image

from concat_jax.core.files import (
    UNREADABLE,
    FileError,
    ImageError,
    make_folder,
    open_image,
    read_text,
    replacing,
    write_json,
    write_png,
    write_text,
)


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


def test_a_file_appears_whole_in_a_folder_that_is_made(tmp_path):
    path = tmp_path / "not" / "there" / "a.txt"
    with replacing(path) as partial:
        partial.write_text("half")
        assert not path.exists() and partial.parent == path.parent
    assert path.read_text() == "half" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, ValueError("mine"), KeyError("k")])
def test_what_stops_a_writer_passes_and_leaves_the_old_file(tmp_path, fault):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(fault) if isinstance(fault, Exception) else fault):
        with replacing(path) as partial:
            partial.write_text("new")
            raise fault
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_writers_of_one_file_do_not_write_into_each_others(tmp_path):
    path = tmp_path / "a.txt"
    with replacing(path) as one, replacing(path) as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_and_a_folder_that_is_a_file_are_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.json", tmp_path / "file" / "b" / "a.json"):
        with pytest.raises(FileError, match=r"a\.json cannot be written: its folder is a file\."):
            write_json(path, {})

    for path in (tmp_path / "file", tmp_path / "file" / "b"):
        with pytest.raises(FileError, match="The folder .* cannot be made: a file is in its place"):
            make_folder(path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=r"/c\.json cannot be written: No space left on device\.$"):
        write_json(tmp_path / "c.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_text_in_utf_16_is_told_to_be_saved_anew(tmp_path):
    (tmp_path / "a.txt").write_text("a cat", encoding="utf-16")
    with pytest.raises(FileError, match=r"a\.txt is no text in UTF-8: .*; save it in UTF-8\.$"):
        read_text(tmp_path / "a.txt")


def test_a_picture_on_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda size: "ab")
    (tmp_path / "a.png.ab.partial").symlink_to("/dev/full")
    with pytest.raises(FileError, match=r"/a\.png cannot be written: No space left on device\.$"):
        write_png(tmp_path / "a.png", Image.new("L", (9, 9)))
    assert not list(tmp_path.iterdir())


def test_another_files_fault_is_not_blamed_on_the_one_that_is_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="source"):
        with replacing(tmp_path / "copy") as partial:
            partial.write_bytes((tmp_path / "source").read_bytes())


def test_a_device_is_no_file_to_replace(tmp_path):
    """Root could: os.replace makes a file of /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="pipe cannot be written: it is no regular file"):
        write_text(tmp_path / "pipe", "x")
    assert (tmp_path / "pipe").is_fifo()


def test_what_a_link_leads_to_is_not_written_where_it_may_not_be(tmp_path, monkeypatch):
    """As of git-annex: a link to a read-only file, which root may write."""
    (tmp_path / "own.txt").write_text("precious")
    (tmp_path / "link.txt").symlink_to(tmp_path / "own.txt")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "own.txt").read_text() == "precious"
    assert (tmp_path / "link.txt").read_text() == "new"


def test_a_link_stays_one_to_what_is_written(tmp_path):
    (tmp_path / "own.txt").touch()
    (tmp_path / "link.txt").symlink_to(tmp_path / "own.txt")
    for text in ("one", "two"):
        write_text(tmp_path / "link.txt", text)
        assert (tmp_path / "link.txt").is_symlink()
        assert (tmp_path / "own.txt").read_text() == text
