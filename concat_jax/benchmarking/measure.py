"""Time and memory of a callable, measured alike for every implementation."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
    seconds: of every timed call, in order.
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
    seconds: tuple[float, ...] = ()


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


def _summarize(seconds: Sequence[float]) -> dict[str, Any]:
    return {
        "median": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "seconds": tuple(seconds),
    }


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
        **_summarize(seconds),
        first=first,
        compile=compile_seconds,
        peak_bytes=peak_bytes(),
        flops=flops,
        bytes_accessed=bytes_accessed,
        outputs=outputs,
    )


@dataclasses.dataclass(frozen=True)
class Turn:
    """One of several things that are measured side by side.

    Attributes:
      call: does the work, waits for it and returns outputs.
      compile: seconds spent before.
      temporary_bytes: memory that the compiler planned for what is neither input nor output.
      flops, bytes_accessed: of a call.
    """

    call: Callable[[], dict[str, np.ndarray]]
    compile: float = 0.0
    temporary_bytes: int = 0
    flops: float = 0.0
    bytes_accessed: float = 0.0


def measure_in_turns(turns: Mapping[str, Turn], repeats: int) -> dict[str, Measurement]:
    """Call each once, then all of them `repeats` times in turn with the clock on.

    What slows the machine down for a while slows all of them down, so their ratios hold. Every
    other round runs backwards: none always follows the one that leaves the caches worst. Memory
    is the compiler's plan, since a process that runs all of them has one peak.

    Args:
      turns: what to measure, by name.
      repeats: timed rounds, at least 1.
    """
    first: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    outputs: dict[str, dict[str, np.ndarray]] = {}
    for number in range(repeats + 1):
        for name in turns if number % 2 else reversed(turns):
            start = time.perf_counter()
            outputs[name] = turns[name].call()
            elapsed = time.perf_counter() - start
            if number:
                seconds[name].append(elapsed)
            else:
                first[name] = elapsed
    return {
        name: Measurement(
            **_summarize(seconds[name]),
            first=first[name],
            compile=turn.compile,
            peak_bytes=turn.temporary_bytes,
            flops=turn.flops,
            bytes_accessed=turn.bytes_accessed,
            outputs=outputs[name],
        )
        for name, turn in turns.items()
    }
