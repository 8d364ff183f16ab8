"""What the benchmark writes: the machine, and tables of its measurements in markdown."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from concat_jax.benchmarking.cases import TURN_TASKS
from concat_jax.benchmarking.query_stages import BATCHES, COCO_IMAGES

# Every query of a published Mask2Former: what pipelines that name all proposals would encode.
ALL_QUERIES = 100


def machine() -> dict[str, str]:
    """What ran the measurement: processor, devices and versions."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    versions = {}
    for name in ("jax", "torch", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": f"{processor}, {cores} cores",
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        **versions,
    }


def to_markdown(report: Mapping[str, Any]) -> str:
    """The report as tables: ours beside the reference, and variants of ours that took turns."""
    about = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    lines = [
        f"Model: {report['model']}. {about}. Median of {report['repeats']} calls after a warm-up.",
    ]
    compared = [case for case in report["cases"] if case["case"]["task"] not in TURN_TASKS]
    if compared:
        lines += _compared(compared)
    for case in report["cases"]:
        if case["case"]["task"] in TURN_TASKS:
            lines += ["", f"{case['name']}:", "", *_in_turns(case)]
    return "\n".join(lines) + "\n"


def _compared(cases: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Ratios are the reference's over ours, so above 1 ours is better."""
    yield "Ratio: the implementation's time over ours, above 1 ours is faster."
    yield ""
    yield "| case | by | s (fastest to slowest) | ratio | memory, GB | GFLOP | compile, s |"
    yield "|---|---|---|---|---|---|---|"
    for case in cases:
        ours = case["results"].get("ours", {}).get("median")
        for name, result in case["results"].items():
            if "error" in result:
                yield f"| {case['name']} | {name} | failed | | | | |"
                continue
            cells = [
                case["name"],
                name,
                _seconds(result),
                f"{result['median'] / ours:.2f}" if ours else "",
                _gigabytes(result),
                _gigaflop(result),
                f"{result['compile']:.0f}",
            ]
            yield f"| {' | '.join(cells)} |"
    for case in cases:
        if case.get("relative_difference"):
            parts = [f"{k} {v:.1e}" for k, v in case["relative_difference"].items()]
            yield f"\n{case['name']}: largest relative difference: {', '.join(parts)}."
        if case.get("segments"):
            parts = [f"{k} {v}" for k, v in case["segments"].items()]
            yield f"\n{case['name']}: segments found: {', '.join(parts)}."


def _in_turns(case: Mapping[str, Any]) -> Iterator[str]:
    """Ratios are to the first variant, so above 1 that one is better."""
    results = case["results"]
    error = next((result["error"] for result in results.values() if "error" in result), None)
    if error:
        yield f"Failed: {error}"
        return
    if case["case"]["task"] == "panoptic_quality":
        yield from _panoptic_quality(case)
        return
    if case["case"]["task"] == "query_stages":
        yield from _query_stages(case)
        return
    base_name, base = next(iter(results.items()))
    yield (
        "| variant | s (fastest to slowest) | ratio (lowest to highest of a round) | GFLOP "
        "| GFLOP ratio | temporaries, GB | compile, s |"
    )
    yield "|---|---|---|---|---|---|---|"
    for name, result in results.items():
        rounds = np.divide(result["seconds"], base["seconds"])
        flops = f"{result['flops'] / base['flops']:.2f}" if base["flops"] else ""
        ratio = f"{result['median'] / base['median']:.3f}"
        cells = [
            name,
            _seconds(result),
            ratio if name == base_name else f"{ratio} ({rounds.min():.3f} to {rounds.max():.3f})",
            _gigaflop(result),
            flops,
            _gigabytes(result),
            f"{result['compile']:.0f}",
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield (
        f"Ratio: the variant's time over that of {base_name!r}; they took turns in one process. "
        "FLOPs and temporaries by XLA's own account of the compiled programs."
    )
    if case["case"]["task"] == "two_stage":
        yield from _two_stage_notes(case)


def _panoptic_quality(case: Mapping[str, Any]) -> Iterator[str]:
    """Milliseconds a pair, and how many times as fast as the official algorithm each is."""
    results, number = case["results"], case["case"]["num_images"]
    official = results["official algorithm"]
    yield "| variant | ms a pair (fastest to slowest) | times as fast (lowest to highest round) |"
    yield "|---|---|---|"
    for name, result in results.items():
        rounds = np.divide(official["seconds"], result["seconds"])
        ms = (1000 * result[key] / number for key in ("median", "fastest", "slowest"))
        shown = "{:.2f} ({:.2f} to {:.2f})".format(*ms)
        ratio = f"{official['median'] / result['median']:.1f}"
        span = f" ({rounds.min():.1f} to {rounds.max():.1f})" if result is not official else ""
        yield f"| {name} | {shown} | {ratio}{span} |"
    counts = (
        np.asarray(case["outputs"][name]["counts"]) for name in ("official algorithm", "ours")
    )
    yield ""
    yield (
        f"Largest difference of counts and summed IoUs: {np.abs(np.subtract(*counts)).max():.1e}. "
        "They took turns in one process, on one core."
    )


def _query_stages(case: Mapping[str, Any]) -> Iterator[str]:
    """A step of each stage, and what an epoch of COCO would take of them."""
    yield (
        "| stage | images a step | ms a step (fastest to slowest) | GFLOP "
        f"| {COCO_IMAGES:,} images, min |"
    )
    yield "|---|---|---|---|---|"
    for name, result in case["results"].items():
        ms = (1000 * result[key] for key in ("median", "fastest", "slowest"))
        epoch = COCO_IMAGES / BATCHES[name] * result["median"] / 60
        shown = "{:.1f} ({:.1f} to {:.1f})".format(*ms)
        yield f"| {name} | {BATCHES[name]} | {shown} | {_gigaflop(result)} | {epoch:.1f} |"
    _, number, width = case["outputs"]["CAT"]["bank_shape"]
    values = COCO_IMAGES * number * width
    yield ""
    yield (
        f"A bank of {COCO_IMAGES:,} images x {number} queries x {width} numbers is "
        f"{2 * values / 1e9:.1f} GB in float16 and {4 * values / 1e9:.1f} GB in float32. Drawing "
        "the batch from memory is part of a step; they took turns in one process."
    )


def _two_stage_notes(case: Mapping[str, Any]) -> Iterator[str]:
    """What a mask costs, so that a reader can scale it to as many as their pipeline has."""
    (_, ours), *others = case["results"].items()
    num_images = case["case"]["num_images"]
    proposals, kept = (np.asarray(case["outputs"]["ours"][key]) for key in ("proposals", "kept"))
    yield (
        f"Of an image's queries {proposals.mean():.1f} have a mask with a pixel; our "
        f"post-processing keeps {kept.mean():.1f} ({kept.min()} to {kept.max()})."
    )
    for (name, result), number in zip(others, case["case"]["num_masks"], strict=True):
        cost = (result["median"] - ours["median"]) / (num_images * number)
        scaled = (ours["median"] + cost * num_images * ALL_QUERIES) / ours["median"]
        yield (
            f"{name}: {1000 * cost:.0f} ms a mask beyond ours, so all {ALL_QUERIES} queries would "
            f"be {scaled:.1f} times ours (scaled, not measured)."
        )


def _seconds(result: Mapping[str, Any]) -> str:
    return f"{result['median']:.3f} ({result['fastest']:.3f} to {result['slowest']:.3f})"


def _gigabytes(result: Mapping[str, Any]) -> str:
    return f"{result['peak_bytes'] / 1e9:.2f}" if result["peak_bytes"] else "not measured"


def _gigaflop(result: Mapping[str, Any]) -> str:
    # Thousands of them in full, and fractions of one at small sizes.
    number = result["flops"] / 1e9
    return f"{number:.{0 if number >= 100 else 3}f}" if number else "not counted"
