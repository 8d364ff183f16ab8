"""Files in and out: images and JSON of other people, and files of ours that appear whole.

A path is of this machine, pathlib's, or in a bucket, `gs://NAME/...`: `as_path` tells which. What
both can do is what code that takes either may use; `on_disk` and `replacing` give a local file to
libraries that read or write no other.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import json
import logging
import math
import os
import pathlib
import re
import secrets
import shutil
import struct
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Self

from etils import epath
from PIL import Image

# Of epath, which looks once: TensorFlow, where it happens to be installed, would be another reader,
# with other errors.
os.environ.setdefault("EPATH_USE_TF", "false")

BUCKET = "gs://"
_CHUNK = 1 << 22

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


class BucketPath(type(epath.Path(BUCKET))):
    """A path of epath's in a bucket, which has no folders but names with slashes."""

    def absolute(self) -> Self:
        return self

    def resolve(self, strict: bool = False) -> Self:
        return self

    def _kind(self) -> str:
        """Or "" where nothing is; raises if that cannot be told, of which epath makes nothing."""
        import fsspec

        try:
            return fsspec.filesystem("gcs").info(os.fspath(self))["type"]
        except FileNotFoundError:
            return ""

    def exists(self) -> bool:
        return bool(self._kind())

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def is_file(self) -> bool:
        return self._kind() == "file"

    def open(self, mode: str = "r", **options: Any) -> Any:
        if "a" in mode:  # gcsfs would write over what is there
            raise ValueError(f"{self} is in a bucket, where no file can be appended to.")
        return super().open(mode, **options)

    def rename(self, target: BucketPath) -> BucketPath:
        """Copies what is below and removes it: no step for a bucket, but of its files each."""
        for path in files_below(self):
            _copy(path, target / path.relative_to(self))
        self.rmtree()
        return target


def as_path(path: str | os.PathLike[str]) -> epath.Path:
    """A path of this machine or in a bucket; ValueError for others, or if it cannot be reached.

    The former is pathlib's, which can all that epath's can and more.
    """
    text = os.fspath(path)
    if text.startswith(BUCKET):
        _reach(text.removeprefix(BUCKET).partition("/")[0])
        return BucketPath(text)
    if "://" in text or text.startswith("gs:"):
        raise ValueError(f"{text} is neither a path of this machine nor in a bucket, gs://NAME/...")
    return pathlib.Path(path)


@functools.cache
def _reach(bucket: str) -> None:
    """Raises FileError, at the first path of a bucket, if no path of it can be read or written."""
    if importlib.util.find_spec("gcsfs") is None:
        raise FileError(
            "A path of gs:// needs gcsfs: pip install -r requirements-buckets.txt, or name a "
            "folder of this machine."
        )
    # Kinds of buckets other than the common one, which gcsfs asks for, and may not be told of.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec

    # Other hosts and TensorStore write as well, which a list that is kept does not show.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    for name in ("gcsfs", "google.auth"):  # log in full what they raise
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        fsspec.filesystem("gcs").call("GET", "b/{}/o", bucket, maxResults=1)
    except FileNotFoundError as error:
        raise FileError(
            f"There is no bucket {BUCKET}{bucket}; make it (gcloud storage buckets create "
            f"{BUCKET}{bucket}), or name another."
        ) from error
    except Exception as error:
        if not isinstance(error, OSError) and not is_of_bucket(error):
            raise
        said = " ".join(str(error).split()).rstrip(".")
        remedy = "see that this machine reaches Google Cloud Storage, and try again."
        if said.startswith("Forbidden") or getattr(error, "code", 0) == 401:
            remedy = (
                "sign in (gcloud auth application-default login, or a service account of the "
                "machine) as who has the role Storage Object Admin on it."
            )
        raise FileError(f"The bucket {BUCKET}{bucket} cannot be used: {said}; {remedy}") from error


def is_of_bucket(error: BaseException) -> bool:
    """Whether an error is one of the libraries that read buckets, which is no fault of ours."""
    return type(error).__module__.partition(".")[0] in ("gcsfs", "aiohttp", "google")


def in_bucket(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).startswith(BUCKET)


def files_below(folder: epath.Path) -> dict[epath.Path, int]:
    """All files below a folder, in order, and their bytes; of a bucket in a single question."""
    if not in_bucket(folder):
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {path: path.stat().st_size for path in files}
    import fsspec

    found = fsspec.filesystem("gcs").find(f"{folder}/", detail=True)
    return {as_path(BUCKET + name): found[name]["size"] for name in sorted(found)}


def nearest(path: epath.Path) -> epath.Path:
    """The path if it is there, else the nearest above it that is: of a bucket, all are."""
    return next(p for p in (path, *path.absolute().parents) if p.exists() or in_bucket(p))


def size_of(path: epath.Path) -> int:
    """Bytes of a file."""
    return path.stat().length if in_bucket(path) else path.stat().st_size


def remove_folder(path: epath.Path) -> None:
    """Removes what there is of a folder."""
    path.rmtree(missing_ok=True) if in_bucket(path) else shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def on_disk(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """The path of a file or folder for readers of local ones alone: its own, or of a copy.

    The copy is there for the `with` block; what of it is mapped into memory outlives it.
    """
    path = as_path(path)
    if not in_bucket(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, path.name)
        for file in files_below(path) or (path,):
            own = copy / file.relative_to(path)
            own.parent.mkdir(parents=True, exist_ok=True)
            _copy(file, own)
        yield copy


def _copy(source: epath.Path, target: epath.Path) -> None:
    with source.open("rb") as read, target.open("wb") as written:
        shutil.copyfileobj(read, written, _CHUNK)


def put_folder(source: pathlib.Path, target: epath.Path, *, last: Collection[str]) -> None:
    """Copies a folder into a bucket; files called as in `last` come last, as all is there then."""
    for file in sorted(files_below(source), key=lambda file: file.name in last):
        _copy(file, target / file.relative_to(source))


@contextlib.contextmanager
def open_image(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Opens an image for a `with` block that decodes it by `load`; it outlives the block.

    EXIF rotation is not applied. Raises ImageError if it cannot be opened or decoded; a FileError
    of the block passes.
    """
    path = as_path(path)
    try:
        with on_disk(path) as file, Image.open(file) as image:
            yield image
    except FileError:
        raise
    except UNREADABLE as error:
        raise ImageError(f"{path} cannot be read as an image: {_reason(path, error)}.") from error


def _reason(path: epath.Path, error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        empty = size_of(path) == 0
        return "it is empty" if empty else "it is in no format that Pillow reads"
    if isinstance(error, Image.DecompressionBombError):
        # Pillow refuses twice its limit, and warns of what is between.
        limit = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        return f"it has more than {limit} million pixels; make it smaller"
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    with contextlib.suppress(OSError):  # a name that is too long
        if path.is_dir():
            return "it is a folder"
    return " ".join(str(error).split()).rstrip(".") or "it is damaged"


def read_json(path: str | os.PathLike[str], *, constants: bool = False) -> Any:
    """A JSON file's content, in UTF-8 with or without mark; ValueError if it is missing or no JSON.

    `constants` lets NaN and Infinity pass, for a reader that can say where they are.
    """
    path = as_path(path)

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
        content = as_path(path).read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise FileError(f"{path} cannot be read: {_said(error)}.") from error
    except UnicodeDecodeError as error:
        if content[:2] == b"\x1f\x8b":
            raise FileError(f"{path} is compressed with gzip; unpack it first.") from error
        raise FileError(f"{path} is no text in UTF-8: {error}; save it in UTF-8.") from error


def _said(error: Exception) -> str:
    """What an error says; gcsfs has no words for a file that is not there."""
    is_missing = isinstance(error, FileNotFoundError)
    said = "No such file" if is_missing else " ".join(str(error).split()).rstrip(".")
    return getattr(error, "strerror", "") or said


def make_folder(path: epath.Path) -> None:
    """Makes a folder and those above it; FileError if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        is_file = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "a file is in its place or above" if is_file else _said(error)
        raise FileError(f"The folder {path} cannot be made: {reason}; name another.") from error


def cut_name(name: str) -> str:
    """A file's name, of 255 bytes at most, with room for what is added to it."""
    return name.encode()[:200].decode(errors="ignore")


def refuse_inputs(written: Iterable[epath.Path], read: Iterable[epath.Path]) -> None:
    """FileError if a file that is to be written is one that is read."""
    inputs = {path.resolve() for path in read}
    for path in written:
        if path.resolve() in inputs:
            raise FileError(f"{path} is an input and would be written over; name another output.")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, sync: bool = True) -> Iterator[pathlib.Path]:
    """Yields the local path to write a file to that appears under its name whole, or not at all.

    Without `sync` only a crash of the machine can leave it cut off. What goes into a bucket is
    written here first, and shows there once all of it has arrived. A link to a file that may be
    written stays one. Raises FileError if it cannot be: a full disk, a read-only folder, a device.
    """
    path = as_path(path)
    if in_bucket(path):
        with tempfile.TemporaryDirectory() as folder:
            partial = pathlib.Path(folder, path.name)
            with writing(path, partial):
                yield partial
                _copy(partial, path)
        return
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise FileError(f"{path} cannot be written: it is no regular file.")
    if os.access(path, os.W_OK):  # of a link, what it leads to
        path = pathlib.Path(os.path.realpath(path))
    # Not the process's number: hosts in containers share numbers, and may share the folder.
    partial = path.with_name(f"{cut_name(path.name)}.{secrets.token_hex(4)}.partial")
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
def writing(path: epath.Path, partial: pathlib.Path | None = None) -> Iterator[None]:
    """Makes of an OSError a FileError that names the file; one of another file passes."""
    try:
        yield
    except OSError as error:
        if error.filename in (None, str(partial), str(path.parent), str(path)):
            no_folder = isinstance(error, FileExistsError | NotADirectoryError)
            reason = "its folder is a file" if no_folder else _said(error)
            raise FileError(f"{path} cannot be written: {reason}.") from error
        raise


def append_text(path: epath.Path, text: str) -> None:
    """Adds to a text file; one in a bucket is written anew."""
    if in_bucket(path):
        write_text(path, (read_text(path) if path.exists() else "") + text)
        return
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


def system_reason(error: Exception) -> str:
    """What the system said of a file, of the long story that TensorStore or TensorFlow tells."""
    text = " ".join(str(error).split())
    known = (os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES))
    cause = re.split(r" \[(?:tensorstore_spec|source locations)=", text)[0]  # at its end
    return next((reason for reason in known if reason in text), cause[-200:])


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
