"""Geometry of training and evaluation images: pure functions of arrays and an explicit generator.

Large-scale jitter is that of Mask2Former's `coco_panoptic_new_baseline_dataset_mapper.py`
(detectron2 `ResizeScale`, `FixedSizeCrop`, `RandomFlip`; Ghiasi et al., arXiv 2012.07177); the
semantic recipe is that of `mask_former_semantic_dataset_mapper.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from concat_jax.core.batch import SEGMENT_TABLES, pad_table
from data_pipelines.colour import colour_jitter
from data_pipelines.placement import Placement, pad_ids, place, resize_then_cut

# What `augment_example` knows.
KINDS = ("lsj", "semantic", "none")


def sample_jitter(
    rng: np.random.Generator,
    height: int,
    width: int,
    size: int,
    *,
    scale_range: tuple[float, float] = (0.1, 2.0),
) -> Placement:
    """Draws a large-scale jitter of an image onto a canvas `size` x `size`.

    A scale is drawn uniformly from `scale_range`; the image is resized, aspect kept, to the largest
    that fits into a square of scale x size; a window of the canvas's size is cut uniformly where
    the image is larger than the canvas.
    """
    # The draws are made in a fixed order and number, whatever the image's size.
    scale = rng.uniform(*scale_range)
    where = rng.uniform(size=2)
    mirrored = bool(rng.uniform() < 0.5)
    resized = _fit(height, width, scale * size)
    offset = _offset(where, resized, size)
    return resize_then_cut((height, width), resized, offset, size, mirrored=mirrored)


def letterbox_placement(height: int, width: int, size: int) -> Placement:
    """Whole image, aspect kept, its longest side equal to the canvas: no crop, no flip."""
    return Placement((0, height), (0, width), _fit(height, width, size))


def sample_semantic(
    rng: np.random.Generator,
    height: int,
    width: int,
    size: int,
    *,
    shortest_edges: Sequence[int],
    longest_edge: int,
) -> Placement:
    """Draws the placement of semantic training: shortest edge, crop, flip.

    The image is resized so that its shorter side is one of `shortest_edges`, chosen uniformly, or
    less if its longer side would exceed `longest_edge` (detectron2 `ResizeShortestEdge`).

    Args:
      shortest_edges: Mask2Former takes 0.5 to 1.5 times the crop in steps of a tenth on COCO-Stuff.
      longest_edge: Mask2Former's is four times the crop.
    """
    edge = shortest_edges[rng.integers(len(shortest_edges))]
    mirrored = bool(rng.uniform() < 0.5)
    where = rng.uniform(size=2)
    factor = min(edge / min(height, width), longest_edge / max(height, width))
    resized = (max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5)))
    offset = _offset(where, resized, size)
    return resize_then_cut((height, width), resized, offset, size, mirrored=mirrored)


def augment_example(
    kind: str,
    rng: np.random.Generator,
    image: Image.Image | np.ndarray,
    segment_ids: np.ndarray,
    size: int,
    *,
    scale_range: tuple[float, float],
    max_segments: int,
    canvas: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A training example by one of the recipes `KINDS`; returns as `place`.

    Args:
      kind: "lsj", large-scale jitter; "semantic", shortest edge from `scale_range` times the size
        in steps of a tenth, crop and colours; "none", letterboxed.
      image: RGB, [H, W], with segment_ids [H, W].
      max_segments, canvas: as for `place`.
    """
    height, width = segment_ids.shape
    if kind == "lsj":
        placement = sample_jitter(rng, height, width, size, scale_range=scale_range)
    elif kind == "semantic":
        low, high = (round(10 * scale) for scale in scale_range)
        edges = [max(1, int(0.1 * step * size)) for step in range(low, high + 1)]
        placement = sample_semantic(
            rng, height, width, size, shortest_edges=edges, longest_edge=4 * size
        )
        # Before the resize, where there are fewer pixels, not after it as the reference does.
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        image = colour_jitter(rng, image)
    else:
        placement = letterbox_placement(height, width, size)
    return place(image, segment_ids, placement, size, max_segments=max_segments, canvas=canvas)


def resize_longest(example: Mapping[str, Any], size: int) -> dict[str, Any]:
    """An evaluation example whose image's longer side becomes `size`, padded to a square [S, S].

    Segments that lose their last pixel leave the tables; fields that are no image are handed on.
    """
    where = letterbox_placement(*example["segment_ids"].shape, size)
    number = len(example["segment_labels"])
    image, ids, rows = place(
        example["image"], example["segment_ids"], where, size, max_segments=number
    )
    valid = np.array(ids.shape, np.int32)
    resized = dict(example, image=image, segment_ids=pad_ids(ids, size), image_size=valid)
    for name in SEGMENT_TABLES:
        resized[name] = pad_table(example[name][rows], name, number)
    return resized


def _fit(height: int, width: int, side: float) -> tuple[int, int]:
    factor = min(side / height, side / width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def _offset(where: np.ndarray, resized: tuple[int, int], size: int) -> tuple[int, int]:
    # (top, left) of a window: `where` in [0, 1)² picks uniformly among the places it fits into.
    top, left = (int(u * (max(r - size, 0) + 1)) for u, r in zip(where, resized, strict=True))
    return top, left
