"""Progress on the terminal: how far, how fast, how long still."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType

Terms = Mapping[str, float | int]
_NONE: Terms = MappingProxyType({})
WIDTH = 110  # columns of a line


class Progress:
    """Prints lines of what is done: count, terms, items a second and the time left."""

    def __init__(
        self,
        name: str,
        start: int,
        total: int,
        batch_size: int = 1,
        *,
        unit: str = "",
        at_peak: float = 0.0,
        every: float = 30.0,
    ):
        """`name` heads each line; `start` steps were done by an earlier run; `every` in seconds.

        `unit` is what `batch_size` counts; a step would take `at_peak` seconds if nothing were
        lost, 0 if nobody knows.
        """
        self._name, self._total, self._batch_size, self._every = name, total, batch_size, every
        self._unit, self._at_peak = unit and f" {unit}", at_peak
        self._last, self._last_time = start, time.monotonic()
        self._rate: float | None = None

    def tick(self, done: int) -> None:
        """`report`, where a line is due or all is done."""
        if done >= self._total or time.monotonic() - self._last_time >= self._every:
            self.report(done)

    def pause(self, seconds: float) -> None:
        """Takes out of the reckoning what was spent on something else."""
        self._last_time += seconds

    def report(
        self, done: int, terms: Terms = _NONE, *, waited: float | None = None
    ) -> dict[str, float]:
        """Prints a line of at most `WIDTH` columns, of as many terms as it holds.

        Args:
          waited: seconds since the last line without anything to work on.

        Returns:
          "steps_per_second" since the last line, "images_per_second" if those are the unit, and of
          "data_wait" and "mfu", shares in 0..1, what is known.
        """
        now = time.monotonic()
        seconds = max(now - self._last_time, 1e-9)
        rate = (done - self._last) / seconds
        # The first interval holds the compilation, so later ones soon outweigh it.
        self._rate = rate if self._rate is None else 0.3 * self._rate + 0.7 * rate
        self._last, self._last_time = done, now
        left = format_seconds((self._total - done) / self._rate) if self._rate else "unknown"
        speed = rate * self._batch_size
        speeds = {"steps_per_second": rate}
        if self._unit:
            speeds[f"{self._unit.strip()}_per_second"] = speed
        end = f"{speed:.{0 if speed >= 10 else 1}f}{self._unit}/s"
        if waited is not None:
            speeds["data_wait"] = min(waited / seconds, 1.0)
            end += f"  data wait {speeds['data_wait']:.0%}"
        if self._at_peak:
            speeds["mfu"] = rate * self._at_peak
            end += f"  MFU {speeds['mfu']:.0%}"
        end += f"  ETA {left}"
        line = f"{self._name:>10} {done:>{len(str(self._total))}}/{self._total}  "
        for name, value in terms.items():
            shown = value if isinstance(value, int) else f"{value:.3f}"
            term = f"{name.removeprefix('loss_')} {shown}  "
            if len(line) + len(term) + len(end) > WIDTH:
                break
            line += term
        print(line + end, flush=True)
        return speeds


def format_seconds(seconds: float) -> str:
    """ "1:02:03", or "2:03" under an hour."""
    minutes, rest = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
