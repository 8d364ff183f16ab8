"""Scalars of a stage in `metrics.jsonl` and, where CLU is installed, in TensorBoard."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

METRICS = "metrics.jsonl"


class MetricWriter:
    """Scalars and pictures of one stage; of several hosts, the first one writes.

    TensorBoard goes through CLU, which imports TensorFlow; without them the JSON lines remain.
    """

    def __init__(self, directory: Path, *, tensorboard: bool):
        """`directory` is made if absent, and its `metrics.jsonl` appended to."""
        leads = jax.process_index() == 0
        if leads:
            directory.mkdir(parents=True, exist_ok=True)
        path = directory / METRICS if leads else Path(os.devnull)
        self._file = path.open("ab", buffering=0)
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
            raise OSError(error.errno, error.strerror, self._file.name) from error
        if self._tensorboard:
            self._tensorboard.write_scalars(step, dict(values))

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Write pictures [H, W, 3] uint8 to TensorBoard."""
        if self._tensorboard:
            batched = {name: image[None] for name, image in images.items()}
            self._tensorboard.write_images(step, batched)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
