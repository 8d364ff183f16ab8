"""What several rooms do with arrays: tables of segments, unit vectors, fingerprints."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

# Labels or crowd flags of segments: an array whose row g - 1 belongs to id g, or a map from id.
Table = np.ndarray | list | tuple | Mapping[int, int]


def table_rows(labels: Table) -> tuple[np.ndarray, np.ndarray]:
    """Ids [M] and labels [M], both int64, of a table, padded rows left out.

    `labels` are [G] ints, row g - 1 for id g, negative where there is no such segment, or a mapping
    from positive id to label. ValueError for another shape or for id 0, which is void.
    """
    if isinstance(labels, Mapping):
        ids = np.fromiter(labels.keys(), np.int64, len(labels))
        values = np.fromiter(labels.values(), np.int64, len(labels))
        if (ids <= 0).any():
            raise ValueError(f"Segment ids must be positive, got {ids.min()}; 0 is void.")
    else:
        values = np.asarray(labels, np.int64)
        if values.ndim != 1:
            raise ValueError(f"A label table must be one-dimensional, got shape {values.shape}.")
        ids = np.arange(1, len(values) + 1)
    present = values >= 0
    return ids[present], values[present]


def unit(vectors: np.ndarray) -> np.ndarray:
    """[..., C] float vectors of norm 1; those of norm 0 stay zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def fingerprint(tree: Mapping[str, Any]) -> str:
    """sha256 in hex of a tree's names, shapes, types and numbers, in the order of the names."""
    from flax import traverse_util

    digest = hashlib.sha256()
    for name, leaf in sorted(traverse_util.flatten_dict(tree, sep="/").items()):
        array = np.asarray(leaf, order="C")
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()
