"""Speed and memory of ours beside transformers/PyTorch, with the same weights, in one run.

    python -m concat_jax.benchmark --output=benchmark

Every case is run by each implementation in a process of its own, one after another, on whatever
device each framework finds. `benchmark.md` and `benchmark.json` are written. Without torch and
transformers only ours is measured.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from concat_jax.benchmarking.cases import NUM_CLASSES, TASKS, Case
from concat_jax.benchmarking.reference import is_installed
from concat_jax.configuration import check_choice
from concat_jax.main import parse_flags
from concat_jax.models.segmentor import LinearClassifier, make_segmentor
from concat_jax.models.swin import SWIN_VARIANTS
from concat_jax.text.vocabulary import Vocabulary
from concat_jax.weights.hugging_face_folder import save_hf_folder
from concat_jax.weights.model_folder import ModelCard, load_model, save_model

# Backbones with random weights, when no converted model is given.
BACKBONES = {
    "resnet50": {"kind": "resnet"},
    "resnet101": {"kind": "resnet", "stage_sizes": (3, 4, 23, 3)},
    **{f"swin_{name}": {"kind": "swin", **fields} for name, fields in SWIN_VARIANTS.items()},
}
# Outputs of ours and the reference that are compared, by task.
_COMPARED = {"forward": ("class_logits", "mask_logits"), "postprocess": (), "train": ()}

_OUTPUT = flags.DEFINE_string("output", "benchmark", "Folder for benchmark.md and benchmark.json.")
_MODEL = flags.DEFINE_string("model", "", "A converted model's folder; else random weights.")
_BACKBONE = flags.DEFINE_string("backbone", "resnet50", "Of the random weights.")
_TASKS = flags.DEFINE_list("tasks", list(TASKS), "Any of forward, postprocess, train.")
_SIZES = flags.DEFINE_list("sizes", ["512", "800"], "512 or 800x1088: forward and postprocess.")
_BATCH = flags.DEFINE_integer("batch", 1, "Images at once: forward and postprocess.", 1)
_TRAIN_SIZES = flags.DEFINE_list("train_sizes", ["512"], "Sizes of the train step.")
_TRAIN_BATCH = flags.DEFINE_integer("train_batch", 2, "Images of the train step.", 1)
_SEGMENTS = flags.DEFINE_integer("segments", 12, "Annotated segments an image.", 1, 100)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute type.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls of a case, after one to warm up.", 1)
_SAME_ALLOCATOR = flags.DEFINE_bool(
    "same_allocator", False, "Give the reference's train step the allocator setting of ours too."
)
_REFERENCE = flags.DEFINE_list(
    "reference", ["torch"], "Any of torch and torch.compile; empty for none."
)


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of "512" or "800x1088".

    Raises:
      ValueError: for anything else.
    """
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) >= 32 for part in parts):
        raise ValueError(f"Size {text!r} is not like 512 or 800x1088 (32 or more).")
    return int(parts[0]), int(parts[-1])


def make_cases() -> list[Case]:
    """The cases that the flags ask for."""
    cases = []
    for task in _TASKS.value:
        check_choice(task, TASKS, "--tasks names no task:")
        training = task == "train"
        for text in _TRAIN_SIZES.value if training else _SIZES.value:
            height, width = parse_size(text)
            batch = _TRAIN_BATCH.value if training else _BATCH.value
            cases.append(Case(task, height, width, batch, _SEGMENTS.value, _DTYPE.value))
    return cases


def random_model(backbone: str) -> tuple[Any, ModelCard]:
    """A segmentor of the published size with a class head, at its initial values.

    Raises:
      ValueError: if the backbone is unknown.
    """
    check_choice(backbone, BACKBONES, "--backbone is unknown:")
    config = {"backbone": BACKBONES[backbone]}
    rng = jax.random.key(0)
    names = tuple(f"class_{index}" for index in range(NUM_CLASSES))
    flags_ = (True,) * NUM_CLASSES
    vocabulary = Vocabulary(names, flags_, flags_, tuple(range(1, NUM_CLASSES + 1)))
    params = {
        "segmentor": jax.jit(make_segmentor(config).init)(rng, np.zeros((1, 64, 64, 3)))["params"],
        "classifier": LinearClassifier(NUM_CLASSES).init(rng, np.zeros((1, 1, 256)))["params"],
    }
    return params, ModelCard(config, vocabulary, "panoptic", "random weights", True)


def measure_case(
    case: Case, implementations: Sequence[str], models: Mapping[str, Path], folder: Path
) -> dict:
    """Run a case by every implementation; returns what the report needs."""
    results: dict[str, dict] = {}
    outputs: dict[str, Mapping[str, np.ndarray]] = {}
    for name in implementations:
        job, result = folder / "job.json", folder / "result"
        content = {
            "case": dataclasses.asdict(case),
            "implementation": name,
            "model": str(models["ours" if name == "ours" else "reference"]),
            "repeats": _REPEATS.value,
            # Our training command sets it; the reference runs as its users run it, unless asked.
            "keep_memory": case.task == "train" and (name == "ours" or _SAME_ALLOCATOR.value),
        }
        job.write_text(json.dumps(content))
        command = [sys.executable, "-m", "concat_jax.benchmarking.worker", str(job), str(result)]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            last = (process.stderr.strip().splitlines() or ["no message"])[-1]
            results[name] = {"error": last}
            print(f"{case.name}, {name}: failed: {last}", flush=True)
            continue
        results[name] = json.loads(result.with_suffix(".json").read_text())
        with np.load(result.with_suffix(".npz")) as arrays:
            outputs[name] = dict(arrays)
        print(f"{case.name}, {name}: {results[name]['median']:.3f} s", flush=True)
    report = {"case": dataclasses.asdict(case), "name": case.name, "results": results}
    if {"ours", "torch"} <= outputs.keys():
        report["relative_difference"] = {
            key: _relative_difference(outputs["ours"][key], outputs["torch"][key])
            for key in _COMPARED[case.task]
        }
        report["segments"] = {
            name: arrays["segments"].tolist()
            for name, arrays in outputs.items()
            if "segments" in arrays
        }
        report["loss"] = {
            name: float(arrays["loss"]) for name, arrays in outputs.items() if "loss" in arrays
        }
    return report


def _relative_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


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
    """The report as a table; ratios are the reference's over ours, so above 1 ours is better."""
    about = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    lines = [
        f"Model: {report['model']}. {about}. Median of {report['repeats']} calls after a warm-up.",
        "Ratio: the implementation's time over ours, above 1 ours is faster.",
        "",
        "| case | by | s (fastest to slowest) | ratio | memory, GB | GFLOP | compile, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in report["cases"]:
        ours = case["results"].get("ours", {}).get("median")
        for name, result in case["results"].items():
            if "error" in result:
                lines.append(f"| {case['name']} | {name} | failed | | | | |")
                continue
            ratio = f"{result['median'] / ours:.2f}" if ours else ""
            cells = [
                case["name"],
                name,
                f"{result['median']:.3f} ({result['fastest']:.3f} to {result['slowest']:.3f})",
                ratio,
                f"{result['peak_bytes'] / 1e9:.2f}" if result["peak_bytes"] else "not measured",
                f"{result['flops'] / 1e9:.0f}" if result["flops"] else "not counted",
                f"{result['compile']:.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    for case in report["cases"]:
        if case.get("relative_difference"):
            parts = [f"{k} {v:.1e}" for k, v in case["relative_difference"].items()]
            lines.append(f"\n{case['name']}: largest relative difference: {', '.join(parts)}.")
        if case.get("segments"):
            parts = [f"{k} {v}" for k, v in case["segments"].items()]
            lines.append(f"\n{case['name']}: segments found: {', '.join(parts)}.")
    return "\n".join(lines) + "\n"


def run() -> dict:
    """Run what the flags ask for; returns the report.

    Raises:
      ValueError: for a flag without meaning.
    """
    implementations = ["ours"]
    for name in _REFERENCE.value:
        check_choice(name, ("torch", "torch.compile"), "--reference is unknown:")
        implementations.append(name)
    if len(implementations) > 1 and not is_installed():
        print("torch and transformers are not installed: only ours is measured.")
        implementations = ["ours"]
    cases = make_cases()
    params, card = load_model(_MODEL.value) if _MODEL.value else random_model(_BACKBONE.value)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = {"ours": folder / "ours", "reference": folder / "reference"}
        save_model(models["ours"], params, card)
        save_hf_folder(models["reference"], params, card)
        del params
        reports = [measure_case(case, implementations, models, folder) for case in cases]
    return {
        "model": f"{_BACKBONE.value}, {card.source}" if not _MODEL.value else card.source,
        "machine": machine(),
        "repeats": _REPEATS.value,
        "cases": reports,
    }


def main(argv: list[str]) -> None:
    """Entry point; a user's mistake ends in one sentence and exit code 1."""
    if len(argv) > 1:
        sys.exit(f"Error: unknown argument {argv[1]!r}; flags look like --sizes=512,800.")
    logging.set_verbosity(logging.WARNING)
    try:
        report = run()
        output = Path(_OUTPUT.value)
        output.mkdir(parents=True, exist_ok=True)
        (output / "benchmark.json").write_text(json.dumps(report, indent=1) + "\n")
        markdown = to_markdown(report)
        (output / "benchmark.md").write_text(markdown)
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {' '.join(str(error).split())}")
    print(f"\n{markdown}\nWritten to {output}.")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
