"""The harness: names and callables in; times, memory and their tables in markdown out.

A module of this room that measures something has `works(case) -> {name: Work}`, and where the
general table does not say it, `table(case, results) -> str`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from concat_jax.benchmarking.cases import Case
from concat_jax.core.runtime import keep_freed_memory
from concat_jax.evaluation.report import markdown_table

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Work:
    """Something to be measured.

    Attributes:
      call: does the work, waits for it and returns what is to be compared or told.
      compile: seconds spent before.
      flops: floating-point operations of a call, by the framework's own count; 0 if it has none.
      traffic_bytes: read and written by a call's operations, by the same count.
      temporary_bytes: memory that the compiler planned for what is neither input nor output.
      peak_bytes: a device's counter of what calls needed; None where there is none.
    """

    call: Callable[[], Mapping[str, np.ndarray]]
    compile: float = 0.0
    flops: float = 0.0
    traffic_bytes: float = 0.0
    temporary_bytes: int = 0
    peak_bytes: Callable[[], int] | None = None


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Seconds of every timed call and of the one before; `memory_bytes` 0 if not measured."""

    seconds: tuple[float, ...]
    first: float = 0.0
    compile: float = 0.0
    flops: float = 0.0
    memory_bytes: int = 0
    outputs: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    traffic_bytes: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def show(self, scale: float = 1.0, digits: int = 3) -> str:
        """ "median (fastest to slowest)", in units of which a second has `scale`."""
        numbers = self.median, min(self.seconds), max(self.seconds)
        return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(*(scale * x for x in numbers), d=digits)


def in_turns(
    works: Mapping[str, Work], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Measurement]:
    """Calls each once, then all of them `repeats` times in turn with the clock on.

    What slows the machine down for a while slows all of them down, so their ratios hold. Every
    other round runs backwards: none always follows the one that leaves the caches worst. Memory of
    one that is alone is what was seen; of several the compiler's plan, for they share one peak.
    """
    seen = resident_peak()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    outputs: dict[str, Mapping[str, np.ndarray]] = {}
    for number in range(repeats + 1):
        for name in works if number % 2 else reversed(works):
            start = clock()
            outputs[name] = works[name].call()
            seconds[name].append(clock() - start)
    results = {}
    for name, work in works.items():
        memory = (work.peak_bytes or seen)() if len(works) == 1 else work.temporary_bytes
        first, *timed = seconds[name]
        results[name] = Measurement(
            tuple(timed),
            first,
            work.compile,
            work.flops,
            memory,
            outputs[name],
            work.traffic_bytes,
        )
    return results


def measure(module: str, case: Case, repeats: int, keep_memory: bool) -> dict[str, Measurement]:
    """Measures what a module of this room does with a case; to be called in a process of its own.

    Args:
      case: for its `works`.
      keep_memory: as our training command has it, see `keep_freed_memory`.
    """
    if keep_memory:
        keep_freed_memory()
    task = importlib.import_module(f"concat_jax.benchmarking.{module}")
    return in_turns(task.works(case), repeats, getattr(task, "CLOCK", time.perf_counter))


def in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function in a process of its own, whose threads, caches and memory end with it.

    Raises:
      BrokenProcessPool: if the process was killed; else what the function raised.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def resident_peak() -> Callable[[], int]:
    """A function of the largest resident memory from here on, in bytes beyond what is held now.

    Linux only; elsewhere it gives 0.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _status("VmRSS")
    return lambda: max(_status("VmHWM") - before, 0)


def _status(field: str) -> int:
    """A field of Linux's /proc/self/status in bytes; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    values = [line.split()[1] for line in lines if line.startswith(field + ":")]
    return int(values[0]) * 1024 if values else 0


def machine() -> dict[str, str]:
    """What ran the measurement: processor, devices and versions. It takes hold of the devices."""
    import jax

    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    versions = {}
    for name in ("jax", "torch", "transformers"):
        versions[name] = "not installed"
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": f"{processor}, {cores} cores",
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        **versions,
    }


Results = Mapping[str, Measurement | str]


def table_of_compared(cases: Sequence[tuple[str, Results]]) -> str:
    """Cases by ours and the reference, and how far their outputs agree.

    Args:
      cases: name, and implementation to its measurement, or to the reason why it has none.
    """
    heads = ["case", "by", "s (fastest to slowest)", "ratio", "memory, GB", "GFLOP", "compile, s"]
    rows, notes = [], []
    for name, results in cases:
        ours = results.get("ours")
        for by, result in results.items():
            if isinstance(result, str):
                rows.append([name, by, "failed", *[""] * 4])
                continue
            ratio = f"{result.median / ours.median:.2f}" if isinstance(ours, Measurement) else ""
            end = [_gigabytes(result), gigaflop(result), f"{result.compile:.0f}"]
            rows.append([name, by, result.show(), ratio, *end])
        notes += _agreement(name, {k: r for k, r in results.items() if not isinstance(r, str)})
    return "\n\n".join(
        ["Ratio: the implementation's time over ours, above 1 ours is faster."]
        + [markdown_table(heads, rows), *notes]
    )


def _agreement(name: str, results: Mapping[str, Measurement]) -> Iterator[str]:
    theirs = [by for by in results if by != "ours"]
    if "ours" not in results or not theirs:
        return
    ours, reference = results["ours"].outputs, results[theirs[0]].outputs
    logits = [key for key in ours if key.endswith("logits")]
    if logits:
        sizes = {key: np.abs(reference[key]).max() for key in logits}
        parts = [f"{k} {np.abs(ours[k] - reference[k]).max() / sizes[k]:.1e}" for k in logits]
        yield f"{name}: largest relative difference: {', '.join(parts)}."
    for key in set(ours) - set(logits):
        parts = [f"{by} {result.outputs[key].tolist()}" for by, result in results.items()]
        what = {"segments": "segments found", "loss": "loss at points of their own"}[key]
        yield f"{name}: {what}: {', '.join(parts)}."


def table_in_turns(results: Mapping[str, Measurement]) -> str:
    """Variants of ours; ratios are to the first, so above 1 that one is better."""
    base_name, base = next(iter(results.items()))
    heads = ["variant", "s (fastest to slowest)", "ratio (lowest to highest of a round)", "GFLOP"]
    rows = []
    for name, result in results.items():
        rounds = np.divide(result.seconds, base.seconds)
        ratio = f"{result.median / base.median:.3f}"
        if name != base_name:
            ratio += f" ({rounds.min():.3f} to {rounds.max():.3f})"
        flops = f"{result.flops / base.flops:.2f}" if base.flops else ""
        end = [gigaflop(result), flops, _gigabytes(result), f"{result.compile:.0f}"]
        rows.append([name, result.show(), ratio, *end])
    return (
        f"{markdown_table([*heads, 'GFLOP ratio', 'temporaries, GB', 'compile, s'], rows)}\n\n"
        f"Ratio: the variant's time over that of {base_name!r}; they took turns in one process. "
        "FLOPs and temporaries by XLA's own account of the compiled programs."
    )


def gigaflop(result: Measurement) -> str:
    """Thousands of them in full, and fractions of one at small sizes."""
    number = result.flops / 1e9
    return f"{number:.{0 if number >= 100 else 3}f}" if number else "not counted"


def _gigabytes(result: Measurement) -> str:
    return f"{result.memory_bytes / 1e9:.2f}" if result.memory_bytes else "not measured"
