"""Which query holds which segment of the ground truth, and what it is named."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from concat_jax.evaluation.bias_curve import NamedQueries, name_queries
from concat_jax.inference.predictor import Queries
from concat_jax.inference.resize import resize_on_host

# A query holds a segment as a prediction matches one in panoptic quality.
LEAST_IOU = 0.5


class QueryNames:
    """Of images one by one the queries that hold a segment, and their names."""

    def __init__(self, is_seen: np.ndarray):
        self._is_seen = np.asarray(is_seen, bool)
        self._found: list[NamedQueries] = []

    def add(self, native: Mapping, queries: Queries) -> None:
        """Of every segment of an example at native size the query whose mask fits it best."""
        held, labels = held_queries(native, queries)
        log_probs = np.log(np.maximum(queries.class_probs[held, :-1], np.finfo(np.float32).tiny))
        images = np.full(len(held), len(self._found))
        self._found.append(name_queries(log_probs, labels, self._is_seen, images))

    def queries(self) -> NamedQueries:
        """Those of all images."""
        return NamedQueries(*map(np.concatenate, zip(*self._found, strict=True)))


def held_queries(native: Mapping, queries: Queries) -> tuple[np.ndarray, np.ndarray]:
    """Rows [M] of the queries that hold a segment of an example at native size, and its classes."""
    labels = np.asarray(native["segment_labels"])
    wanted = (labels >= 0) & ~np.asarray(native["segment_is_crowd"])
    iou = mask_overlaps(native["segment_ids"], len(labels), queries)  # [N, G]
    best = iou.argmax(axis=0)
    held = np.flatnonzero(wanted & (iou[best, np.arange(len(labels))] > LEAST_IOU))
    return best[held], labels[held]


def mask_overlaps(segment_ids: np.ndarray, num_segments: int, queries: Queries) -> np.ndarray:
    """IoU [N, G] of the queries' masks with segments 1..G of a map [H, W], outside of void."""
    logits = queries.mask_logits
    shape = segment_ids.shape
    flat = segment_ids.ravel().astype(np.int64)
    inside = np.stack(
        [
            np.bincount(flat[mask.ravel()], minlength=num_segments + 1)
            for mask in (resize_on_host(row, queries.source_size, shape) > 0 for row in logits)
        ]
    ).astype(np.float64)
    areas = np.bincount(flat, minlength=num_segments + 1)[1:]
    own = inside[:, 1:]
    union = own.sum(axis=1, keepdims=True) + areas - own
    return own / np.maximum(union, 1)
