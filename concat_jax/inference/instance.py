"""Instances from mask logits and class probabilities, on the host, mask by mask."""

from __future__ import annotations

import dataclasses

import numpy as np

from concat_jax.core.mask_codes import decode_rle, encode_rle
from concat_jax.inference.resize import resize_on_host


@dataclasses.dataclass(frozen=True)
class Instance:
    """One instance, which others may overlap: its query, class, score (class by mask), mask."""

    query: int
    label: int
    score: float
    rle: dict

    @property
    def mask(self) -> np.ndarray:
        """[H, W] bool."""
        return decode_rle(self.rle)


def instance_inference(
    mask_logits: np.ndarray,
    class_probs: np.ndarray,
    *,
    image_size: tuple[int, int],
    source_size: tuple[float, float] | None = None,
    is_thing: np.ndarray | None = None,
    top: int = 100,
    score_threshold: float = 0.0,
) -> list[Instance]:
    """Mask2Former's instance post-processing of one image; instances by descending score.

    The `top` best of all N * K pairs of query and class are taken, so a query may appear with
    several classes. A pair's score is its class probability times its mask's quality, the mean
    mask probability inside the mask; the mask is where the logit is above 0. The reference is
    `instance_inference` in Mask2Former mask2former/maskformer_model.py.

    Args:
      mask_logits: [N, h, w] float32, before the sigmoid.
      class_probs: [N, K+1] float32 probabilities, the last one no-object.
      source_size: (height, width) of the valid extent of mask_logits, may be a fraction. None: all.
      is_thing: [K] bool: only these classes' pairs are kept, after the best `top` are chosen, as
        the reference does for panoptic models. None keeps all.
      top: 100, COCO's limit of detections an image.
      score_threshold: to be exceeded; 0 in the reference, where average precision wants all.
    """
    probs = class_probs[:, :-1]
    num_classes = probs.shape[1]
    source_size = mask_logits.shape[1:] if source_size is None else source_size
    # Stable, so that equal scores stay in the order of queries and classes.
    best = np.argsort(-probs, axis=None, kind="stable")[:top]
    masks: dict[int, tuple[dict, float]] = {}
    instances = []
    for pair in best:
        query, label = divmod(int(pair), num_classes)
        # The quality is at most 1: a hopeless pair needs no mask.
        if probs[query, label] <= score_threshold:
            continue
        if is_thing is not None and not is_thing[label]:
            continue
        if query not in masks:
            masks[query] = _mask_and_quality(mask_logits[query], source_size, image_size)
        rle, quality = masks[query]
        # An empty mask has the quality 0.
        score = float(probs[query, label]) * quality
        if score > score_threshold:
            instances.append(Instance(query, label, score, rle))
    return sorted(instances, key=lambda instance: -instance.score)


def _mask_and_quality(
    logits: np.ndarray, source_size: tuple[float, float], image_size: tuple[int, int]
) -> tuple[dict, float]:
    logits = resize_on_host(np.asarray(logits, np.float32), source_size, image_size)
    mask = logits > 0
    inside = 1.0 / (1.0 + np.exp(-logits[mask]))
    return encode_rle(mask), float(inside.sum(dtype=np.float64) / (len(inside) + 1e-6))
