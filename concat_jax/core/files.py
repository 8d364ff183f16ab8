"""Files in and out: images and JSON of other people, and files of ours that appear whole."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import secrets
import struct
from collections.abc import Iterator, Mapping
from typing import Any

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


class FileError(ValueError):
    """A file that is missing or cannot be read; the message is one sentence that names it."""


class ImageError(FileError):
    """An image that cannot be used; the message is one sentence that names it."""


@contextlib.contextmanager
def open_image(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Opens an image for a `with` block that decodes it by `load`; it outlives the block.

    EXIF rotation is not applied. Raises ImageError if it cannot be opened or decoded.
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


def read_json(path: str | os.PathLike[str], *, constants: bool = False) -> Any:
    """A JSON file's content, in UTF-8 with or without mark; ValueError if it is missing or no JSON.

    `constants` lets NaN and Infinity pass, for a reader that can say where they are.
    """
    path = pathlib.Path(path)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    try:
        return json.loads(read_text(path), parse_constant=None if constants else refuse)
    except (ValueError, RecursionError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path} is not valid JSON: {error}.") from error


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file in UTF-8, with or without mark; ValueError if it is missing or something else."""
    try:
        return pathlib.Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        if pathlib.Path(path).read_bytes()[:2] == b"\x1f\x8b":
            raise FileError(f"{path} is compressed with gzip; unpack it first.") from error
        raise FileError(f"{path} is no text in UTF-8: {error}; save it in UTF-8.") from error


def make_folder(path: pathlib.Path) -> None:
    """Makes a folder and those above it; FileError if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        is_file = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "a file is in its place or above" if is_file else error.strerror or error
        raise FileError(f"The folder {path} cannot be made: {reason}; name another.") from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, sync: bool = True) -> Iterator[pathlib.Path]:
    """Yields the path to write a file to that appears under its name whole, or not at all.

    Without `sync` only a crash of the machine can leave it cut off. Raises FileError if it cannot
    be written: a full disk, a folder that is read-only or a file.
    """
    path = pathlib.Path(path)
    # Not the process's number: hosts in containers share numbers, and may share the folder.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with writing(path, partial):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            if sync:
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
            os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


@contextlib.contextmanager
def writing(path: pathlib.Path, partial: pathlib.Path | None = None) -> Iterator[None]:
    """Of an OSError in a block that writes a file it makes a FileError that names the file.

    One that names another file passes: it is that file's, for example of one that is copied.
    """
    try:
        yield
    except OSError as error:
        if error.filename in (None, str(partial), str(path.parent), str(path)):
            no_folder = isinstance(error, FileExistsError | NotADirectoryError)
            reason = "its folder is a file" if no_folder else error.strerror or error
            raise FileError(f"{path} cannot be written: {reason}.") from error
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes text in UTF-8, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Writes strict, indented JSON, whole or not at all; numbers not finite become null."""
    write_text(path, json.dumps(_jsonable(content), indent=1, allow_nan=False) + "\n")


def write_png(path: str | os.PathLike[str], image: Image.Image, **options: Any) -> None:
    """Writes a picture, whole or not at all; `options` are of Pillow's PNG writer."""
    with replacing(path, sync=False) as partial:  # thousands of them, that can be made anew
        image.save(partial, "PNG", **options)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return _jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
