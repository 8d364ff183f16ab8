"""Progress on the terminal: how far, how fast, how long still."""

from __future__ import annotations

import time
from collections.abc import Mapping


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
