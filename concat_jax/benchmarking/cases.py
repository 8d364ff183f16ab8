"""From the benchmark's flags to its cases, and their inputs, the same for all implementations."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from concat_jax.core import cli
from concat_jax.core.config import check_choice
from concat_jax.inference.images import SUFFIXES, read_image, resized_within
from concat_jax.inference.inputs import find_images
from concat_jax.models.clip import make_clip

# Ours beside the reference, a process each.
COMPARED = ("forward", "postprocess", "train")
# Variants of ours, which take turns in one process: modules of `benchmarking`.
WITH_CLIP = ("alignment", "two_stage", "query_stages")
ON_HOST = ("panoptic_quality", "input_pipeline")
OF_CONFIG = ("scaling",)
WITHOUT_MODEL = (*OF_CONFIG, *ON_HOST, "matching")
TASKS = (*COMPARED, *WITH_CLIP, *WITHOUT_MODEL)
# Sizes of tasks that have some, and images at once where that is not 1, unless flags say others.
SIZES = {
    **dict.fromkeys(("forward", "postprocess"), ("512", "800")),
    **dict.fromkeys(("train", "alignment", "two_stage"), ("512",)),
    "panoptic_quality": ("480x640",),
    "input_pipeline": ("1024",),
}
BATCH = {"train": 2, "alignment": 2, "input_pipeline": 4}
# Classes of COCO panoptic; the class head's size hardly matters to speed.
NUM_CLASSES = 133
# Queries that hold a segment in the post-processing case; COCO images have about eleven.
NUM_HELD = 15


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to measure; what a task does not name below it does not read.

    Attributes:
      task: "forward" (image to class and mask logits), "postprocess" (those logits to a panoptic
        map), "train" (forward, losses, gradients, AdamW), "alignment" (stage 1 without CLIP's
        targets, with cached and with online ones), "two_stage" (images to panoptic maps by our
        path, and with CLIP on every mask), "panoptic_quality" (id maps to counts), "query_stages"
        (stages 2 and 3 from a query bank), "scaling" (a config's step of stage 1 at many sizes),
        "input_pipeline" (files to training batches) or "matching" (costs to assignments).
      height, width: of the network's input, or of drawn maps.
      segments: annotated segments an image.
      clip: config for `make_clip` ("alignment", "two_stage", "query_stages").
      num_images: images in all, a multiple of `batch` ("two_stage", "panoptic_quality").
      num_masks: how many masks of an image CLIP sees, a variant each ("two_stage").
      source: where images are from, in words or as a path; "" draws them.
      recipe: "FILE" or "FILE:ARGUMENT" ("scaling").
      compiled: by the reference's compiler.
    """

    task: str
    height: int = 0
    width: int = 0
    batch: int = 1
    segments: int = 12
    dtype: str = "float32"
    clip: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    num_images: int = 20
    num_masks: Sequence[int] = (10,)
    source: str = ""
    recipe: str = ""
    files: Sequence[str] = ()
    model: str = ""
    compiled: bool = False

    def __post_init__(self):
        if self.task == "two_stage" and self.num_images % self.batch:
            raise ValueError(
                f"{self.num_images} images do not fill batches of {self.batch}; choose a batch "
                "that divides their number."
            )

    @property
    def name(self) -> str:
        if self.task == "panoptic_quality":
            drawn = self.source or f"drawn, {self.height}x{self.width}"
            return f"{self.task} of {self.num_images} pairs ({drawn})"
        if self.task == "scaling":
            return f"{self.task} of {self.recipe}"
        if self.task == "matching":
            return self.task
        if self.task == "query_stages":
            return f"{self.task}, {self.segments} of an image's queries hold a segment"
        if self.task == "input_pipeline":
            return f"{self.task}, large-scale jitter to {self.height} ({self.source})"
        batch = f"batch {self.batch}"
        if self.task == "two_stage":
            source = self.source or "random pixels"
            batch = f"{self.num_images} images ({source}), {self.batch} at once"
        return f"{self.task} {self.height}x{self.width}, {batch}, {self.dtype}"


def make_cases(given: cli.Flags) -> list[Case]:
    """The cases that the flags ask for; ValueError for a flag without meaning."""
    cases = []
    if not given.tasks:
        raise ValueError(f"--tasks names no task; give any of {', '.join(TASKS)}.")
    for task in given.tasks:
        check_choice(task, TASKS, "--tasks names no task:")
        fields: dict[str, Any] = {"segments": given.segments, "dtype": given.dtype}
        fields |= {"batch": given.batch or BATCH.get(task, 1), "recipe": given.recipe}
        if task in ("two_stage", *ON_HOST):
            fields |= {"num_images": given.two_stage_images, "source": given.images}
        if task in WITH_CLIP:
            fields["clip"] = parse_clip(given.clip)
        if task == "two_stage":
            masks = given.two_stage_masks
            if not masks or not all(text.isdigit() and int(text) > 0 for text in masks):
                raise ValueError(f"--two_stage_masks={','.join(masks)} is not like 10 or 10,100.")
            fields["num_masks"] = tuple(dict.fromkeys(map(int, masks)))
            if given.images:
                fields["files"] = image_files(given.images, given.two_stage_images)
        elif task == "input_pipeline":
            fields["num_images"] = 100
            if not given.images:
                raise ValueError(
                    "--tasks=input_pipeline needs --images=COCO, a folder with train2017 and "
                    "annotations."
                )
        sizes = (given.sizes or SIZES[task]) if task in SIZES else ["32"]
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
    found = find_images([given]).paths  # of a glob whatever it matches
    files = [file for file in found if file.suffix.lower() in SUFFIXES and file.name[0] != "."]
    if len(files) < number:
        raise ValueError(
            f"--images={given} stands for {len(files)} images where {number} are wanted; name more "
            "or lower --two_stage_images."
        )
    return [str(file) for file in files[:number]]


def images(case: Case) -> np.ndarray:
    """[B, H, W, 3] uint8 of smooth random colours, seeded."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (case.batch, 9, 9, 3)).astype(np.float32)
    rows, columns = np.linspace(0, 7.999, case.height), np.linspace(0, 7.999, case.width)
    top, left = rows.astype(int), columns.astype(int)
    down, right = (rows - top)[:, None, None], (columns - left)[:, None]
    across = coarse[:, :, left] * (1 - right) + coarse[:, :, left + 1] * right
    return (across[:, top] * (1 - down) + across[:, top + 1] * down).astype(np.uint8)


def segments(case: Case, num_classes: int = NUM_CLASSES) -> tuple[np.ndarray, np.ndarray]:
    """Id map [B, H, W] uint8 of `segments` blobs and void, and labels [B, G] int32, seeded.

    A pixel belongs to the nearest of G + 1 random centres; the last of them is void.
    """
    rng = np.random.default_rng(1)
    ids = np.empty((case.batch, case.height, case.width), np.uint8)
    for index in range(case.batch):
        centres = rng.uniform(size=(case.segments + 1, 2)) * (case.height, case.width)
        y, x = np.mgrid[: case.height, : case.width]
        distance = (y[..., None] - centres[:, 0]) ** 2 + (x[..., None] - centres[:, 1]) ** 2
        nearest = distance.argmin(axis=-1)
        ids[index] = np.where(nearest == case.segments, 0, nearest + 1)
    labels = rng.integers(0, num_classes, (case.batch, case.segments)).astype(np.int32)
    return ids, labels


def logits(case: Case, num_queries: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits like a trained network's: some confident blobs among queries that hold nothing.

    Returns:
      class logits [B, N, K + 1] and mask logits [B, N, H / 4, W / 4], float32, seeded.
    """
    rng = np.random.default_rng(2)
    height, width = -(-case.height // 4), -(-case.width // 4)
    classes = rng.normal(size=(case.batch, num_queries, num_classes + 1)).astype(np.float32)
    classes[..., -1] += 8
    masks = rng.normal(-6, 1, (case.batch, num_queries, height, width)).astype(np.float32)
    held = rng.permutation(num_queries)[:NUM_HELD]
    y, x = np.mgrid[:height, :width]
    for index in range(case.batch):
        centres = rng.uniform(size=(len(held), 2)) * (height, width)
        distance = np.hypot(y - centres[:, :1, None], x - centres[:, 1:, None])
        second = np.sort(distance, axis=0)[1]
        masks[index, held] = np.clip((second - distance) / 3 - 0.5, -8, 8)
        classes[index, held, rng.integers(0, num_classes, len(held))] += 14
    return classes, masks


def native_size(case: Case) -> tuple[int, int]:
    """Size of the picture that post-processing writes: 0.6 of the input, as COCO's mostly is."""
    return round(case.height * 0.6), round(case.width * 0.6)


def letterbox(image: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """An image [h, w, 3] as large as fits in `size`, at the top left, and its size there."""
    scale = min(size[0] / image.shape[0], size[1] / image.shape[1])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return resized_within(image, (height, width), size), (height, width)


class Pictures(NamedTuple):
    """Images [M, H, W, 3] uint8; (height, width) of the valid areas and panoptic maps, [M, 2]."""

    images: np.ndarray
    image_size: np.ndarray
    native_size: np.ndarray


def pictures(case: Case) -> Pictures:
    """The images of "two_stage": its files letterboxed, or random pixels that fill the input.

    Raises:
      ValueError: if a file cannot be read.
    """
    size = case.height, case.width
    if not case.files:
        full = np.full((case.num_images, 2), size, np.int32)
        seeded = images(dataclasses.replace(case, batch=case.num_images))
        return Pictures(seeded, full, full)
    natives = [read_image(file) for file in case.files]
    canvases, valid = zip(*(letterbox(image, size) for image in natives), strict=True)
    sizes = (np.array(s, np.int32) for s in (valid, [image.shape[:2] for image in natives]))
    return Pictures(np.stack(canvases), *sizes)
