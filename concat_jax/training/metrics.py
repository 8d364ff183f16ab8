"""Scalars of a stage in `metrics.jsonl` and, where CLU is installed, in TensorBoard."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from etils.epath import Path

from concat_jax.core.files import FileError, as_path, in_bucket, put_folder, system_reason

METRICS = "metrics.jsonl"
# (step, name -> number): who is told of scalars besides.
Mirror = Callable[[int, Mapping[str, float]], None]
_SECONDS_UNSEEN = 60  # of what is new, in a bucket: each time whole files are sent


class MetricWriter:
    """Scalars and pictures of one stage; of several hosts, the first one writes.

    TensorBoard goes through CLU, which imports TensorFlow; without them the JSON lines remain. In a
    bucket, where no file can be appended to, what is new shows after a minute or when it is closed.
    """

    def __init__(self, directory: Path, *, tensorboard: bool, mirror: Mirror | None = None):
        """`directory` is made if absent, and its `metrics.jsonl` appended to."""
        leads = jax.process_index() == 0
        self._directory, self._local, self._mirror = directory, None, mirror
        if leads and in_bucket(directory):
            self._local, self._shown = tempfile.TemporaryDirectory(), time.monotonic()
            directory = as_path(self._local.name)
            if (before := self._directory / METRICS).exists():
                (directory / METRICS).write_bytes(before.read_bytes())
        elif leads:
            directory.mkdir(parents=True, exist_ok=True)
        path = directory / METRICS if leads else as_path(os.devnull)
        self._file = path.open("ab", buffering=0)
        self._tensorboard = None
        if tensorboard and leads:
            try:
                from clu import metric_writers

                with self._sentence():
                    self._tensorboard = metric_writers.SummaryWriter(str(directory))
            except ImportError as error:
                print(f"TensorBoard files are not written: {error}; metrics.jsonl is.")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        finite = {k: v if np.isfinite(v) else None for k, v in values.items()}
        row = json.dumps({"step": step, **finite}).encode() + b"\n"
        end = self._file.tell()
        try:
            if self._file.write(row) < len(row):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(end)  # no half row for a later one to be appended to
            raise OSError(error.errno, error.strerror, self._file.name) from error
        if self._mirror:
            self._mirror(step, values)
        if self._tensorboard:
            with self._sentence():
                self._tensorboard.write_scalars(step, dict(values))
        if self._local and time.monotonic() - self._shown > _SECONDS_UNSEEN:
            with contextlib.suppress(Exception):  # what a bucket does not take now it may later
                self._show()

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Write pictures [H, W, 3] uint8 to TensorBoard."""
        if self._tensorboard:
            batched = {name: image[None] for name, image in images.items()}
            with self._sentence():
                self._tensorboard.write_images(step, batched)

    def _show(self) -> None:
        self._shown = time.monotonic()
        if self._tensorboard:
            self._tensorboard.flush()
        put_folder(pathlib.Path(self._local.name), self._directory, last=())

    def close(self) -> None:
        self._file.close()
        if self._tensorboard:
            with self._sentence():
                self._tensorboard.close()
            self._tensorboard = None
        if self._local:
            with self._local:
                self._show()

    @contextlib.contextmanager
    def _sentence(self) -> Iterator[None]:
        """Of TensorFlow's errors, as of a full disk, one that says which files and why."""
        try:
            yield
        except Exception as error:
            if not type(error).__module__.startswith("tensorflow"):
                raise
            raise FileError(
                f"TensorBoard's files in {self._directory} cannot be written: "
                f"{system_reason(error)}."
            ) from error
