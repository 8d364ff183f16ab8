"""A workdir that is written is one process's own; a second one is told whose."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from etils.epath import Path

from concat_jax.core import stopping
from concat_jax.core.files import in_bucket, make_folder, read_json, write_json, writing

LOCK_NAME = "lock.json"
# Seconds between the signs of life in a bucket, and of silence after which a process is taken for
# dead. Of two that write at once the one that reads itself `_SETTLED` seconds later goes on.
_BEAT, _SILENCE, _SETTLED = 10.0, 30.0, 1.0


@functools.cache  # held until the process ends, however it does
def lock_workdir(workdir: Path) -> Any:
    """Makes a workdir this process's own; ValueError naming the process whose own it is."""
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    return _beating(workdir, mine) if in_bucket(workdir) else _flocked(workdir, mine)


def _flocked(workdir: Path, mine: Mapping[str, Any]) -> Any:
    """The open file; the system lets go of it when the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    make_folder(workdir)
    try:
        file = (workdir / LOCK_NAME).open("ab", buffering=0)
    except OSError as error:
        report = workdir / "report.json"
        told = f" The report of the run that is finished there is {report}." * report.exists()
        raise ValueError(
            f"The workdir {workdir} cannot be written: {error.strerror}; name another.{told}"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _refusal(workdir, _read(workdir)) from error
    except OSError:
        print(f"Warning: {workdir} cannot be locked on its file system; let no one else write it.")
    file.truncate(0)
    with writing(workdir / LOCK_NAME):
        file.write(json.dumps(mine).encode())
    return file


def _beating(workdir: Path, mine: Mapping[str, Any]) -> threading.Thread:
    """The thread that writes the lock of a bucket, where nothing else tells who is alive."""
    if found := _read(workdir):
        print(
            f"{workdir} was last written by {_name(found)}; waiting {_SILENCE:g} s for signs of "
            "life.",
            flush=True,
        )
        time.sleep(_SILENCE)
        if _read(workdir) not in ({}, found):
            raise _refusal(workdir, found)
    path, ended = workdir / LOCK_NAME, threading.Event()
    write_json(path, mine)
    time.sleep(_SETTLED)
    if (found := _read(workdir)) != mine:
        raise _refusal(workdir, found)

    def beat() -> None:
        while not ended.wait(_BEAT):
            with contextlib.suppress(Exception):  # the run itself will say what is wrong
                write_json(path, {**mine, "beat": time.time()})

    def let_go() -> None:
        ended.set()
        thread.join()
        with contextlib.suppress(Exception):
            path.unlink()

    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    stopping.at_exit(let_go)
    return thread


def _read(workdir: Path) -> dict[str, Any]:
    with contextlib.suppress(ValueError):  # there is none, or it has not been written yet
        return read_json(workdir / LOCK_NAME)
    return {}


def _name(owner: Mapping[str, Any]) -> str:
    with contextlib.suppress(KeyError):
        return "process {pid} of host {host} since {since}".format(**owner)
    return "another process"


def _refusal(workdir: Path, owner: Mapping[str, Any]) -> ValueError:
    return ValueError(
        f"The workdir {workdir} is being written by {_name(owner)}; wait until it ends, or give "
        "another --workdir."
    )
