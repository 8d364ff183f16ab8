"""Progress on the terminal: how far, how fast, how long still."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType

Terms = Mapping[str, float | int]
_NONE: Terms = MappingProxyType({})


class Progress:
    """Prints lines of what is done: count, terms, items a second and the time left."""

    def __init__(
        self, name: str, start: int, total: int, batch_size: int = 1, *, every: float = 30.0
    ):
        """`name` heads each line; `start` steps were done by an earlier run; `every` in seconds."""
        self._name, self._total, self._batch_size, self._every = name, total, batch_size, every
        self._last, self._last_time = start, time.monotonic()
        self._rate: float | None = None

    def tick(self, done: int, terms: Terms = _NONE) -> None:
        """`report`, where a line is due or all is done."""
        if done >= self._total or time.monotonic() - self._last_time >= self._every:
            self.report(done, terms)

    def report(self, done: int, terms: Terms = _NONE) -> float:
        """Prints a line; returns steps a second since the last one."""
        now = time.monotonic()
        rate = (done - self._last) / max(now - self._last_time, 1e-9)
        # The first interval holds the compilation, so later ones soon outweigh it.
        self._rate = rate if self._rate is None else 0.3 * self._rate + 0.7 * rate
        self._last, self._last_time = done, now
        left = format_seconds((self._total - done) / self._rate) if self._rate else "unknown"
        shown = "".join(
            f"{name.removeprefix('loss_')} {v if isinstance(v, int) else f'{v:.3f}'}  "
            for name, v in terms.items()
        )
        speed = rate * self._batch_size
        print(
            f"{self._name:>10} {done:>{len(str(self._total))}}/{self._total}  {shown}"
            f"{speed:.{0 if speed >= 10 else 1}f}/s  ETA {left}",
            flush=True,
        )
        return rate


def format_seconds(seconds: float) -> str:
    """ "1:02:03", or "2:03" under an hour."""
    minutes, rest = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
