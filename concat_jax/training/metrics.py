"""Scalars of a stage in `metrics.jsonl` and, where CLU is installed, in TensorBoard."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import time
from collections.abc import Mapping

import jax
import numpy as np
from etils.epath import Path

from concat_jax.core.files import as_path, in_bucket

METRICS = "metrics.jsonl"
_SECONDS_UNSEEN = 60  # of rows, in a bucket: each time all of them are sent


class MetricWriter:
    """Scalars and pictures of one stage; of several hosts, the first one writes.

    TensorBoard goes through CLU, which imports TensorFlow; without them the JSON lines remain. In a
    bucket, where no file can be appended to, these show after a minute, and all when it is closed.
    """

    def __init__(self, directory: Path, *, tensorboard: bool):
        """`directory` is made if absent, and its `metrics.jsonl` appended to."""
        leads = jax.process_index() == 0
        if leads:
            directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / METRICS if leads else as_path(os.devnull)
        self._shown = time.monotonic()
        if in_bucket(self._path):
            self._file = tempfile.TemporaryFile(buffering=0)
            self._file.write(self._path.read_bytes() if self._path.exists() else b"")
        else:
            self._file = self._path.open("ab", buffering=0)
        self._tensorboard = None
        if tensorboard and leads:
            try:
                from clu import metric_writers

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
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        if time.monotonic() - self._shown > _SECONDS_UNSEEN:
            self._show()
        if self._tensorboard:
            self._tensorboard.write_scalars(step, dict(values))

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Write pictures [H, W, 3] uint8 to TensorBoard."""
        if self._tensorboard:
            batched = {name: image[None] for name, image in images.items()}
            self._tensorboard.write_images(step, batched)

    def _show(self) -> None:
        if in_bucket(self._path):
            self._file.seek(0)
            self._path.write_bytes(self._file.read())
        self._shown = time.monotonic()

    def close(self) -> None:
        self._show()
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
