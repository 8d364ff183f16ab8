"""Image files of a data set: decoded upright, compared with what the annotation says, all there."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import pathlib
from collections.abc import Callable, Sequence

from PIL import Image, ImageOps

from concat_jax.core.coco import spelt
from concat_jax.core.files import FileError, ImageError, open_image
from concat_jax.core.prefetch import with_progress
from data_pipelines.pixels import to_rgb
from data_pipelines.sources.source import ImageRecord, Source

logger = logging.getLogger(__name__)


def open_picture(path: pathlib.Path) -> Image.Image:
    """Decodes an image file as RGB, EXIF rotation applied; FileError if that is not possible."""
    with open_image(path) as picture:
        picture.load()
        # PIL does not look beyond the pixels, so a PNG cut off after them would pass.
        check_end(path)
        return upright(picture, str(path))


def upright(picture: Image.Image, name: str) -> Image.Image:
    """A decoded picture as RGB, EXIF rotation applied; ImageError as `to_rgb`."""
    # Annotators saw the rotated picture; detectron2's `read_image` applies EXIF as well.
    ImageOps.exif_transpose(picture, in_place=True)
    is_plain = picture.mode == "RGB" and not picture.has_transparency_data
    return picture if is_plain else Image.fromarray(to_rgb(picture, name))


def read_picture(folder: pathlib.Path, record: ImageRecord, source: pathlib.Path) -> Image.Image:
    """The RGB image of a record; FileError as `open_picture`, or for another size than it says."""
    path, wanted = folder / record.file_name, (record.width, record.height)
    image = open_picture(path)
    if image.size == wanted:
        return image
    with open_image(path) as picture:
        stored = picture.size
    # Sizes are (width, height), as Pillow has them.
    found, said = (f"{height}x{width}" for width, height in (image.size, wanted))
    if stored == wanted:
        raise FileError(
            f"The image {path} is stored as {said} (height x width), as {source} says, but its "
            f"EXIF orientation turns it to {found}; save it upright without the orientation, or "
            "annotate it as it is shown."
        )
    raise FileError(
        f"The image {path} is {found} (height x width) and {source} says {said}; both must agree."
    )


def check_images(source: Source, part: str, on_fault: Callable[[int, FileError], None]) -> None:
    """Reads every image and its annotation as training and evaluation will, in threads.

    `on_fault` is told the position of one that cannot be used.
    """

    def fault(index: int) -> FileError | None:
        try:
            source.read(source.records[index])
        except FileError as error:
            return error
        return None

    results = with_progress(f"{part}: images", fault, len(source.records))
    with contextlib.closing(results) as faults:
        for index, error in enumerate(faults):
            if error is not None:
                on_fault(index, error)


def leave_out(error: FileError, skips: bool) -> None:
    """Raises what is wrong with an image, or logs it where bad ones are left out."""
    if not skips:
        raise error
    logger.warning("Left out an image: %s", error)


def _spelt(name: str) -> str:
    return spelt(name).as_posix().casefold()


def present(
    folder: pathlib.Path,
    records: Sequence[ImageRecord],
    field: str,
    json_path: pathlib.Path,
    *,
    skips: bool,
) -> list[ImageRecord]:
    """Records whose file is in `folder`; others go to `leave_out`, and FileError if that is all."""
    # A listing of each folder: asking for each of COCO's 240,000 files takes minutes on a network
    # disk.
    listed: dict[str, set[str]] = {}
    found = []
    names = (os.path.normpath(getattr(record, field)) for record in records)
    name, count = collections.Counter(names).most_common(1)[0]
    if count > 1:
        raise FileError(f"{json_path} names the file {name} for {count} images.")
    for record in records:
        name = getattr(record, field)
        parent, base = os.path.split(name)
        if parent not in listed:
            place = folder / parent
            listed[parent] = set(os.listdir(place)) if os.path.isdir(place) else set()
        # Unlike pathlib's, these find nothing under a name that is too long.
        if base in listed[parent] or os.path.isfile(folder / name):
            found.append(record)
            continue
        close = [one for one in listed[parent] if _spelt(one) == _spelt(base)]
        spelling = f"; {close[0]} is, which is spelt otherwise" if close else ""
        error = FileError(
            f"{json_path} names the file {folder / name}, which is not on disk{spelling}."
        )
        leave_out(error, skips)
    if not found:
        raise error
    return found


def check_end(path: pathlib.Path) -> None:
    """Raises an ImageError if a PNG has been cut off behind its pixels; others pass."""
    with path.open("rb") as file:
        if file.read(8) != b"\x89PNG\r\n\x1a\n":
            return
        file.seek(max(0, path.stat().st_size - 4096))
        # Wherever it is: some programs write a few bytes behind it.
        if b"IEND\xaeB`\x82" not in file.read():
            raise ImageError(f"{path} is cut off: it lacks the end of a PNG.")
