"""Folders that appear whole or not at all; what a disk refuses on the way, as one sentence."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from concat_jax.core.files import as_path, in_bucket, nearest, put_folder, remove_folder

CARD_NAME = "model.json"
EXPORT_NAME = "export.json"
# What a folder that this package writes has at its top, the mark first: what `overwrite` may
# replace.
CONTENTS = (
    (CARD_NAME, "params", "tokenizer"),
    ("config.json", "model.safetensors", "preprocessor_config.json"),
    (EXPORT_NAME, "model.jax", "model.onnx", "saved_model", "text.npy"),
)
MARKERS = tuple(mark for mark, *_ in CONTENTS)
# What a disk says that takes no more.
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EBUSY)


@contextlib.contextmanager
def new_folder(
    folder: str | os.PathLike[str], params: Mapping[str, Any], *, overwrite: bool = False
) -> Iterator[Path]:
    """A temporary folder for a model, which takes its final name only if the block does not raise.

    `overwrite` replaces what is there, if it is a model's folder or an empty one. In a bucket what
    shows that it is whole, one of `MARKERS`, comes last. Raises ValueError as `check_destination`;
    OSError if there is no room for `params` or a file cannot be written.
    """
    if in_bucket(folder):
        final = as_path(folder)
        check_destination(final, overwrite=overwrite)
        with tempfile.TemporaryDirectory() as local, _one_reason(final, Path(local), params):
            yield Path(local)
            check_destination(final, overwrite=overwrite)
            remove_folder(final)
            put_folder(Path(local), final, last=MARKERS)
        return
    # realpath: a link to a folder stays a link to what replaces that folder.
    final = _real(folder)
    check_destination(final, overwrite=overwrite)
    # An empty folder is filled: it may be a mount, or all that somebody may write to.
    is_empty = final.is_dir() and not _content(final)
    place = final if is_empty else final.parent
    temporary = place / f".{final.name}.{secrets.token_hex(4)}.part"
    with _one_reason(folder, nearest(final), params):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            check_destination(final, overwrite=overwrite)
            (_fill if is_empty else _replace)(final, temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _content(folder: Path) -> list[Path]:
    """What lies in a folder, marks last, without what systems and killed runs leave there."""
    is_left = re.compile(r"\..*\.(part|old)|\.DS_Store|lost\+found")
    paths = [path for path in folder.iterdir() if not is_left.fullmatch(path.name)]
    return sorted(paths, key=lambda path: (path.name in MARKERS, path.name))


def _fill(folder: Path, new: Path) -> None:
    """Moves what is in `new` to an empty folder, all of it or nothing."""
    moved: list[Path] = []
    try:
        for path in _content(new):
            moved.append(path.rename(folder / path.name))
    except BaseException:
        for path in moved:
            path.rename(new / path.name)
        raise
    new.rmdir()


def _replace(folder: Path, new: Path) -> None:
    """Gives `new` the name of a folder, of which what it was goes if there is one."""
    old = new.with_suffix(".old")
    if is_there := folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        if is_there:
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_destination(folder: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Raise a ValueError if the name is taken, with `overwrite` by more than a model."""
    folder = as_path(folder)
    if not folder.exists():
        above = nearest(folder)
        if above.is_file():
            raise ValueError(f"{above} is a file and {folder} below it; name another folder.")
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder to write to.")
    names = {path.name for path in _content(folder)}
    if not names:
        return
    if not overwrite:
        raise ValueError(f"{folder} is there already; name another folder or pass --overwrite.")
    if any(folder.glob("*/checkpoints")):
        raise ValueError(
            f"{folder} holds a training run, which --overwrite leaves alone; name another folder."
        )
    marks = {mark for mark in MARKERS if (folder / mark).is_file()}
    if not marks:
        raise ValueError(
            f"{folder} holds no model ({' or '.join(MARKERS)}), so --overwrite leaves it alone; "
            "name another folder."
        )
    if not any(mark in marks and {mark} < names <= {mark, *rest} for mark, *rest in CONTENTS):
        foreign = names.difference(*CONTENTS) or marks
        raise ValueError(
            f"{folder} holds {sorted(foreign)[0]}, which is no part of a model that this package "
            "writes, so --overwrite leaves it alone; name another folder."
        )


def check_apart(destination: str, *sources: str) -> None:
    """Raise a ValueError if a destination that is made or replaced takes a source with it.

    What is no path of anything is no source: classes may be named and not lie in a file.
    """
    for source in sources:
        if not (in_bucket(source) or os.path.exists(source)):
            continue
        old, new = map(_real, (source, destination))
        if new in (old, *old.parents):
            raise ValueError(
                f"{destination} is or holds {source}, which would be lost; name another folder."
            )


def _real(path: str | os.PathLike[str]) -> Path:
    """Without links; one that is a loop stays."""
    path = as_path(path)
    return path if in_bucket(path) else Path(os.path.realpath(path))


@contextlib.contextmanager
def _one_reason(
    destination: str | os.PathLike[str], folder: Path, params: Mapping[str, Any]
) -> Iterator[None]:
    """Turns whatever Orbax, safetensors and their threads tell about a full disk into a sentence.

    The size of `params` is compared with the room in `folder` before anything is written.
    """
    size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(params))
    disk = shutil.disk_usage(folder)
    if disk.total and disk.free < size:
        raise OSError(
            f"{destination} cannot be written: it takes {size / 1e6:,.1f} MB and the disk has "
            f"{disk.free / 1e6:,.1f} MB left; make room or name another folder."
        )
    shown, level = sys.excepthook, logging.get_verbosity()

    def passed_over(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        # TensorStore's threads report the writes that were given up to a loop that is gone.
        if str(error) != "Event loop is closed":
            shown(kind, error, trace)

    sys.excepthook = passed_over
    logging.set_verbosity(logging.FATAL)  # Orbax logs what it raises
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        reasons = map(os.strerror, _REFUSALS)
        reason = next((reason for reason in reasons if reason in text), "")
        if not reason and isinstance(error, ValueError | OSError):
            raise
        time.sleep(0.5)  # for those threads to end
        raise OSError(
            f"{destination} cannot be written: {reason or text[:200]}; nothing of it was kept."
        ) from error
    finally:
        sys.excepthook = shown
        logging.set_verbosity(level)
