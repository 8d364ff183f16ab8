"""Speed and memory of ours beside transformers/PyTorch, with the same weights, in one run.

    python -m concat_jax.benchmark --output=benchmark

Every case is run by each implementation in a process of its own, one after another, on whatever
device each framework finds. `benchmark.md` and `benchmark.json` are written. Without torch and
transformers only ours is measured.

    python -m concat_jax.benchmark --tasks=alignment
    python -m concat_jax.benchmark --tasks=two_stage --images=FOLDER --batch=4

compare variants of ours, which take turns in one process: what alignment to CLIP costs a step of
stage 1, and inference without CLIP beside inference with CLIP on every mask.

    python -m concat_jax.benchmark --tasks=panoptic_quality

times the metric beside the official algorithm and PNG decoding, on drawn maps or on those of a COCO
panoptic json (--images).

    python -m concat_jax.benchmark --tasks=query_stages

times stages 2 and 3 from a query bank at COCO's size, and says how large that is.

    python -m concat_jax.benchmark --tasks=input_pipeline --images=COCO

times training batches from COCO's folder and from shards of it beside decoding its JPEGs alone.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from concat_jax.benchmarking.cases import (
    COMPARED_TASKS,
    HOST_TASKS,
    INPUT_TASK,
    NUM_CLASSES,
    TASKS,
    TURN_TASKS,
    Case,
    pictures,
)
from concat_jax.benchmarking.reference import is_installed
from concat_jax.benchmarking.report import machine, to_markdown
from concat_jax.core import cli
from concat_jax.core.config import check_choice
from concat_jax.core.runtime import keep_freed_memory
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.inference.images import read_image
from concat_jax.models.backbones.swin import SWIN_VARIANTS
from concat_jax.models.clip import make_clip
from concat_jax.models.segmentor import LinearClassifier, make_segmentor
from concat_jax.predict import find_images
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


def define_flags(flags: cli.Flags) -> None:
    """The flags of this command."""
    flags.string("output", "benchmark", "Folder for benchmark.md and benchmark.json.")
    flags.string("model", "", "A converted model's folder; else random weights.")
    flags.string("backbone", "resnet50", "Of the random weights.")
    flags.strings("tasks", COMPARED_TASKS, f"Any of {', '.join(TASKS)}.")
    flags.strings("sizes", ["512", "800"], "512 or 800x1088: forward and postprocess.")
    flags.integer("batch", 1, "Images at once, but for the training tasks.", 1)
    flags.strings("train_sizes", ["512"], "Sizes of train and alignment.")
    flags.integer("train_batch", 2, "Images of train and alignment.", 1)
    flags.integer("segments", 12, "Annotated segments an image.", 1)
    flags.string(
        "clip",
        "ViT-B/16",
        "Of alignment, two_stage and query_stages: a variant, or make_clip's config in JSON.",
    )
    flags.string(
        "images",
        "",
        "Folder or glob of two_stage, panoptic json of panoptic_quality, else drawn; COCO's folder "
        "of input_pipeline.",
    )
    flags.strings("two_stage_sizes", ["512"], "Sizes of two_stage.")
    flags.integer("two_stage_images", 20, "Images in all, of two_stage and panoptic_quality.", 1)
    # An average image of COCO panoptic has eleven segments, so ten is kind to the other side.
    flags.strings("two_stage_masks", ["10"], "Masks that CLIP sees of an image.")
    flags.integer("input_size", 1024, "Side of input_pipeline's images.", 32)
    flags.choice("dtype", "float32", ("float32", "bfloat16"), "Compute type.")
    flags.integer("repeats", 5, "Timed calls of a case, after one to warm up.", 1)
    flags.switch("same_allocator", "Give the reference's train step ours setting, too.")
    flags.strings("reference", ["torch"], "Any of torch and torch.compile; empty for none.")


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of "512" or "800x1088".

    Raises:
      ValueError: for anything else.
    """
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) >= 32 for part in parts):
        raise ValueError(f"Size {text!r} is not like 512 or 800x1088 (32 or more).")
    return int(parts[0]), int(parts[-1])


def parse_clip(text: str) -> dict[str, Any]:
    """Config for `make_clip` from "ViT-B/16" or '{"image_width": 64, ...}'.

    Raises:
      ValueError: for something else, or a config that is no CLIP.
    """
    config: Any = {"variant": text}
    if text.lstrip().startswith("{"):
        try:
            config = json.loads(text)
        except ValueError as error:
            raise ValueError(f"--clip is not valid JSON: {error}.") from error
    make_clip(config)
    return config


def make_cases(given: cli.Flags) -> list[Case]:
    """The cases that the flags ask for.

    Raises:
      ValueError: for a flag without meaning.
    """
    cases = []
    for task in given.tasks:
        check_choice(task, TASKS, "--tasks names no task:")
        if task == INPUT_TASK:
            continue
        if task == "panoptic_quality":
            number = given.two_stage_images
            words = given.images or "drawn, 480x640"
            cases.append(Case(task, 480, 640, num_images=number, pictures=words))
            continue
        if task == "query_stages":
            clip = parse_clip(given.clip)
            cases.append(Case(task, 0, 0, segments=given.segments, clip=clip))
            continue
        training = task in ("train", "alignment")
        sizes = (
            given.train_sizes
            if training
            else given.two_stage_sizes
            if task == "two_stage"
            else given.sizes
        )
        for text in sizes:
            height, width = parse_size(text)
            batch = given.train_batch if training else given.batch
            case = Case(task, height, width, batch, given.segments, given.dtype)
            if task in TURN_TASKS:
                case = dataclasses.replace(case, clip=parse_clip(given.clip))
            if task == "two_stage":
                case = dataclasses.replace(
                    case,
                    num_images=given.two_stage_images,
                    num_masks=parse_counts(given.two_stage_masks),
                    pictures=given.images or case.pictures,
                )
            cases.append(case)
    return cases


def parse_counts(texts: Sequence[str]) -> tuple[int, ...]:
    """Numbers above zero, each once, in order.

    Raises:
      ValueError: for anything else.
    """
    if not texts or not all(text.isdigit() and int(text) > 0 for text in texts):
        raise ValueError(f"--two_stage_masks={','.join(texts)} is not like 10 or 10,100.")
    return tuple(dict.fromkeys(map(int, texts)))


def read_images(given: str, number: int) -> list[np.ndarray]:
    """The first images of a folder or a glob, [h, w, 3] uint8 each.

    Raises:
      ValueError: if there are fewer, or one cannot be read.
    """
    paths, errors = find_images([given])
    if errors:
        raise ValueError(f"--images: {errors[0]}")
    if len(paths) < number:
        raise ValueError(
            f"--images={given} stands for {len(paths)} images where {number} are wanted; name more "
            "or lower --two_stage_images."
        )
    return [read_image(path) for path in paths[:number]]


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
    given: cli.Flags,
    case: Case,
    implementations: Sequence[str],
    models: Mapping[str, Path],
    folder: Path,
    inputs: Path | None = None,
) -> dict:
    """Run a case by every implementation; returns what the report needs.

    Args:
      given: the command's flags.
      case: what to measure.
      implementations: "ours", "torch" or "torch.compile".
      models: folders, "ours" and "reference".
      folder: for files between the processes.
      inputs: file of the images, `cases.Pictures`.
    """
    results: dict[str, dict] = {}
    outputs: dict[str, dict[str, np.ndarray]] = {}
    for name in implementations:
        job, result = folder / "job.json", folder / "result"
        content = {
            "case": dataclasses.asdict(case),
            "implementation": name,
            "model": str(models["ours" if name == "ours" else "reference"]),
            "repeats": given.repeats,
            # Our training command sets it; the reference runs as its users run it, unless asked.
            "keep_memory": case.task in ("train", "alignment")
            and (name == "ours" or given.same_allocator),
            "inputs": str(inputs) if inputs else "",
        }
        job.write_text(json.dumps(content))
        command = [sys.executable, "-m", "concat_jax.benchmarking.worker", str(job), str(result)]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            last = (process.stderr.strip().splitlines() or ["no message"])[-1]
            results[name] = {"error": last}
            print(f"{case.name}, {name}: failed: {last}", flush=True)
            continue
        measured = json.loads(result.with_suffix(".json").read_text())
        with np.load(result.with_suffix(".npz")) as arrays:
            for key, value in arrays.items():
                variant, field = key.rsplit("/", 1)
                outputs.setdefault(variant, {})[field] = value
        for variant, one in measured.items():
            print(f"{case.name}, {variant}: {one['median']:.3f} s", flush=True)
        results |= measured
    report = {"case": dataclasses.asdict(case), "name": case.name, "results": results}
    if case.task in TURN_TASKS:
        report["outputs"] = {
            name: {field: array.tolist() for field, array in arrays.items()}
            for name, arrays in outputs.items()
        }
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


def measure_input(given: cli.Flags) -> str:
    """The tables of "input_pipeline".

    Raises:
      ValueError: if there is no data set in --images.
    """
    from concat_jax.benchmarking.input_speed import measure_input_speed, to_markdown

    if not given.images:
        raise ValueError(
            "--tasks=input_pipeline needs --images=COCO, a folder with train2017 and annotations."
        )
    keep_freed_memory()  # as the training command does, which makes many such batches
    return to_markdown(
        measure_input_speed(given.images, size=given.input_size, rounds=given.repeats),
        given.input_size,
    )


def run(given: cli.Flags) -> dict:
    """Run what the flags ask for; returns the report.

    Raises:
      ValueError: for a flag without meaning.
    """
    cases = make_cases(given)
    input_tables = measure_input(given) if INPUT_TASK in given.tasks else ""
    implementations = ["ours"]
    for name in given.reference:
        check_choice(name, ("torch", "torch.compile"), "--reference is unknown:")
        implementations.append(name)
    if all(case.task in TURN_TASKS for case in cases):
        implementations = ["ours"]
    if len(implementations) > 1 and not is_installed():
        print("torch and transformers are not installed: only ours is measured.")
        implementations = ["ours"]
    files = ()
    if given.images and any(case.task == "two_stage" for case in cases):
        files = read_images(given.images, given.two_stage_images)
    reports, source = [], "none"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = {"ours": folder / "ours", "reference": folder / "reference"}
        if not all(case.task in HOST_TASKS for case in cases):
            model = load_model(given.model) if given.model else random_model(given.backbone)
            params, card = model
            source = card.source if given.model else f"{given.backbone}, {card.source}"
            save_model(models["ours"], params, card)
            if len(implementations) > 1:
                save_hf_folder(models["reference"], params, card)
            del params, model
        for case in cases:
            inputs = None
            if case.task == "panoptic_quality" and given.images:
                inputs = Path(given.images).resolve()
            if case.task == "two_stage":
                inputs = folder / "inputs.npz"
                pictures(case, files).save(inputs)
            names = ["ours"] if case.task in TURN_TASKS else implementations
            reports.append(measure_case(given, case, names, models, folder, inputs))
    return {
        "model": source,
        "machine": machine(),
        "repeats": given.repeats,
        "cases": reports,
        "input_pipeline": input_tables,
    }


def command(given: cli.Flags, arguments: Sequence[str]) -> None:
    """What the flags ask for."""
    report = run(given)
    output = Path(given.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "benchmark.json").write_text(json.dumps(report, indent=1) + "\n")
    markdown = "\n".join(filter(None, (to_markdown(report), report["input_pipeline"])))
    (output / "benchmark.md").write_text(markdown)
    print(f"\n{markdown}\nWritten to {output}.")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    cli.main(__doc__, define_flags, command, argv, computes=False)


if __name__ == "__main__":
    main()
