"""Progress on the terminal, scalars in `metrics.jsonl` and, where installed, in TensorBoard."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np


class MetricWriter:
    """Scalars and pictures of one stage; of several hosts, the first one writes.

    TensorBoard goes through CLU, which imports TensorFlow; without them the JSON lines remain.
    """

    def __init__(self, directory: Path, *, tensorboard: bool):
        """Args:
        directory: made if absent; `metrics.jsonl` is appended to.
        tensorboard: also write TensorBoard event files.
        """
        leads = jax.process_index() == 0
        if leads:
            directory.mkdir(parents=True, exist_ok=True)
        self._file = (directory / "metrics.jsonl").open("a") if leads else open(os.devnull, "w")
        self._tensorboard = _tensorboard_writer(directory) if tensorboard and leads else None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row."""
        finite = {k: v if np.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        if self._tensorboard:
            self._tensorboard.write_scalars(step, dict(values))

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Write pictures [H, W, 3] uint8 to TensorBoard."""
        if self._tensorboard:
            batched = {name: image[None] for name, image in images.items()}
            self._tensorboard.write_images(step, batched)

    def close(self) -> None:
        """Flush everything."""
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()


def _tensorboard_writer(directory: Path):
    try:
        from clu import metric_writers
    except ImportError as error:
        print(f"TensorBoard files are not written: {error}; metrics.jsonl is.")
        return None
    return metric_writers.SummaryWriter(str(directory))


class Progress:
    """One line each time it is told: step, loss terms, images/s and the time left."""

    def __init__(self, stage: str, start: int, total: int, batch_size: int):
        """Args:
        stage: name at the head of each line.
        start: step the run starts or resumes at.
        total: steps of the stage.
        batch_size: images a step.
        """
        self._stage, self._total, self._batch_size = stage, total, batch_size
        self._last_step, self._last_time = start, time.monotonic()
        self._rate: float | None = None

    def report(self, step: int, metrics: Mapping[str, float]) -> float:
        """Print a line; returns steps per second since the last one."""
        now = time.monotonic()
        rate = (step - self._last_step) / max(now - self._last_time, 1e-9)
        # The first interval holds the compilation, so later ones soon outweigh it.
        self._rate = rate if self._rate is None else 0.3 * self._rate + 0.7 * rate
        self._last_step, self._last_time = step, now
        left = (self._total - step) / self._rate
        terms = "  ".join(f"{name.removeprefix('loss_')} {v:.3f}" for name, v in metrics.items())
        print(
            f"{self._stage:>10} {step:>{len(str(self._total))}}/{self._total}  {terms}  "
            f"{rate * self._batch_size:.0f}/s  ETA {format_seconds(left)}",
            flush=True,
        )
        return rate


def format_seconds(seconds: float) -> str:
    """ "1:02:03", or "2:03" under an hour."""
    minutes, rest = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
