"""What is measured: the inputs of every case, the same for every implementation."""

from __future__ import annotations

import dataclasses

import numpy as np

# Classes of COCO panoptic; the class head's size hardly matters to speed.
NUM_CLASSES = 133
# Queries that hold a segment in the post-processing case; COCO images have about eleven.
NUM_HELD = 15
TASKS = ("forward", "postprocess", "train")


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
      task: "forward" (image to class and mask logits), "postprocess" (those logits to a panoptic
        map) or "train" (forward, losses, gradients, AdamW).
      height, width: of the network's input.
      batch: images at once.
      segments: annotated segments an image ("train").
      dtype: compute type, "float32" or "bfloat16".
    """

    task: str
    height: int
    width: int
    batch: int = 1
    segments: int = 12
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """Short name for tables and file names."""
        return f"{self.task} {self.height}x{self.width}, batch {self.batch}, {self.dtype}"


def images(case: Case) -> np.ndarray:
    """[B, H, W, 3] uint8 of smooth random colours, seeded."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (case.batch, 9, 9, 3)).astype(np.float32)
    rows = np.linspace(0, 7.999, case.height)
    columns = np.linspace(0, 7.999, case.width)
    top, left = rows.astype(int), columns.astype(int)
    down, right = (rows - top)[:, None, None], (columns - left)[:, None]
    upper = coarse[:, top][:, :, left] * (1 - right) + coarse[:, top][:, :, left + 1] * right
    lower = (
        coarse[:, top + 1][:, :, left] * (1 - right) + coarse[:, top + 1][:, :, left + 1] * right
    )
    return (upper * (1 - down) + lower * down).astype(np.uint8)


def segments(case: Case) -> tuple[np.ndarray, np.ndarray]:
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
    labels = rng.integers(0, NUM_CLASSES, (case.batch, case.segments)).astype(np.int32)
    return ids, labels


def logits(case: Case, num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits like a trained network's: some confident blobs among queries that hold nothing.

    Returns:
      class logits [B, N, K + 1] and mask logits [B, N, H / 4, W / 4], float32, seeded.
    """
    rng = np.random.default_rng(2)
    height, width = -(-case.height // 4), -(-case.width // 4)
    classes = rng.normal(size=(case.batch, num_queries, NUM_CLASSES + 1)).astype(np.float32)
    classes[..., -1] += 8
    masks = rng.normal(-6, 1, (case.batch, num_queries, height, width)).astype(np.float32)
    held = rng.permutation(num_queries)[:NUM_HELD]
    y, x = np.mgrid[:height, :width]
    for index in range(case.batch):
        centres = rng.uniform(size=(NUM_HELD, 2)) * (height, width)
        distance = np.hypot(y - centres[:, :1, None], x - centres[:, 1:, None])
        second = np.sort(distance, axis=0)[1]
        masks[index, held] = np.clip((second - distance) / 3 - 0.5, -8, 8)
        classes[index, held, rng.integers(0, NUM_CLASSES, NUM_HELD)] += 14
    return classes, masks


def native_size(case: Case) -> tuple[int, int]:
    """Size of the picture that post-processing writes: 0.6 of the input, as COCO's mostly is."""
    return round(case.height * 0.6), round(case.width * 0.6)
