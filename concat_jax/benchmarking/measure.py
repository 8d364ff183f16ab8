"""Time and memory of a callable, measured alike for every implementation."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Attributes:
    median: seconds of a call, after the first.
    fastest, slowest: seconds, likewise.
    first: seconds of the first call after compilation, which warms caches up.
    compile: seconds of compilation, 0 where there is none.
    peak_bytes: memory that the calls needed beyond what was held before them, on the device
      where it has a counter, else of the process.
    flops: floating-point operations of a call, by the framework's own count; 0 if it has none.
    bytes_accessed: bytes read and written by a call, likewise.
    outputs: what the last call returned, to be compared.
    """

    median: float
    fastest: float
    slowest: float
    first: float
    compile: float
    peak_bytes: int
    flops: float
    bytes_accessed: float
    outputs: dict[str, np.ndarray]


def _status(field: str) -> int:
    """A field of Linux's /proc/self/status in bytes; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    values = [line.split()[1] for line in lines if line.startswith(field + ":")]
    return int(values[0]) * 1024 if values else 0


class ResidentPeak:
    """Largest resident memory of this process since the object was made, beyond what it held.

    Linux only; elsewhere it reads 0, which the report writes as not measured.
    """

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        self._before = _status("VmRSS")

    def __call__(self) -> int:
        """Bytes."""
        return max(_status("VmHWM") - self._before, 0)


def measure(
    call: Callable[[], dict[str, np.ndarray]],
    repeats: int,
    *,
    peak_bytes: Callable[[], int] | None = None,
    compile_seconds: float = 0.0,
    flops: float = 0.0,
    bytes_accessed: float = 0.0,
) -> Measurement:
    """Call once, then `repeats` times with the clock on.

    Args:
      call: does the work, waits for it and returns outputs.
      repeats: timed calls, at least 1.
      peak_bytes: the device's own counter; None measures the process.
      compile_seconds: spent before.
      flops: of a call.
      bytes_accessed: of a call.
    """
    peak_bytes = peak_bytes or ResidentPeak()
    start = time.perf_counter()
    outputs = call()
    first = time.perf_counter() - start
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        outputs = call()
        seconds.append(time.perf_counter() - start)
    return Measurement(
        median=statistics.median(seconds),
        fastest=min(seconds),
        slowest=max(seconds),
        first=first,
        compile=compile_seconds,
        peak_bytes=peak_bytes(),
        flops=flops,
        bytes_accessed=bytes_accessed,
        outputs=outputs,
    )
