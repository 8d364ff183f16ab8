"""From the flags of the benchmark to its cases."""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import Any

from concat_jax.benchmarking.inputs import Case
from concat_jax.core import cli
from concat_jax.core.config import check_choice
from concat_jax.inference.images import SUFFIXES
from concat_jax.models.clip import make_clip

# Ours beside the reference, a process each.
COMPARED = ("forward", "postprocess", "train")
# Variants of ours, which take turns in one process: modules of `benchmarking`.
WITH_CLIP = ("alignment", "two_stage", "query_stages")
ON_HOST = ("panoptic_quality", "input_pipeline")
TASKS = (*COMPARED, *WITH_CLIP, *ON_HOST)


def make_cases(given: cli.Flags) -> list[Case]:
    """The cases that the flags ask for; ValueError for a flag without meaning."""
    cases = []
    for task in given.tasks:
        check_choice(task, TASKS, "--tasks names no task:")
        fields: dict[str, Any] = {"segments": given.segments, "dtype": given.dtype}
        if task in ("two_stage", *ON_HOST):
            fields |= {"num_images": given.two_stage_images, "source": given.images}
        if task in WITH_CLIP:
            fields["clip"] = parse_clip(given.clip)
        if task in ("train", "alignment"):
            sizes, fields["batch"] = given.train_sizes, given.train_batch
        elif task == "two_stage":
            sizes, fields["batch"] = given.two_stage_sizes, given.batch
            masks = given.two_stage_masks
            if not masks or not all(text.isdigit() and int(text) > 0 for text in masks):
                raise ValueError(f"--two_stage_masks={','.join(masks)} is not like 10 or 10,100.")
            fields["num_masks"] = tuple(dict.fromkeys(map(int, masks)))
            if given.images:
                fields["files"] = image_files(given.images, given.two_stage_images)
        elif task == "panoptic_quality":
            sizes = ["480x640"]
        elif task == "query_stages":
            sizes = ["32"]  # queries have none
        elif task == "input_pipeline":
            sizes = [f"{given.input_size}"]
            fields |= {"batch": 4, "num_images": 100}
            if not given.images:
                raise ValueError(
                    "--tasks=input_pipeline needs --images=COCO, a folder with train2017 and "
                    "annotations."
                )
        else:
            sizes, fields["batch"] = given.sizes, given.batch
        cases += [Case(task, *parse_size(text), **fields) for text in sizes]
    return cases


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of "512" or "800x1088"; ValueError for anything else."""
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


def image_files(given: str, number: int) -> list[str]:
    """The first images of a folder or a glob; ValueError if there are fewer."""
    path = Path(given)
    found = path.iterdir() if path.is_dir() else map(Path, glob.glob(given, recursive=True))
    files = sorted(f for f in found if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
    if len(files) < number:
        raise ValueError(
            f"--images={given} stands for {len(files)} images where {number} are wanted; name more "
            "or lower --two_stage_images."
        )
    return [str(file) for file in files[:number]]
