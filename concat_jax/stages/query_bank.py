"""Real vision queries of many images, extracted once, so that stages 2 and 3 see no image."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np


class QueryBank:
    """Vision queries and their classes, one row an image.

    Attributes:
      queries: [M, N, D] float32.
      labels: [M, N] int16, class index or -1 where the query holds no segment.
    """

    def __init__(self, queries: np.ndarray, labels: np.ndarray, *, batch_size: int, seed: int):
        """Args:
        queries: [M, N, D].
        labels: [M, N].
        batch_size: rows of a batch.
        seed: of the order.

        Raises:
          ValueError: if the bank is smaller than a batch.
        """
        if len(queries) < batch_size:
            raise ValueError(
                f"The query bank holds {len(queries)} images, fewer than the batch size "
                f"{batch_size}; extract more or make the batch smaller."
            )
        self.queries, self.labels = queries, labels
        self._batch_size, self._seed = batch_size, seed

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Batch of a step, the same whenever asked: queries [B, N, D] and query_labels [B, N]."""
        rng = np.random.default_rng([self._seed, step])
        rows = rng.choice(len(self.queries), self._batch_size, replace=False)
        return {
            "queries": self.queries[rows].astype(np.float32),
            "query_labels": self.labels[rows].astype(np.int32),
        }


def fill_bank(
    path: Path,
    identity: Mapping[str, object],
    extract: Callable[[Mapping[str, np.ndarray]], tuple[np.ndarray, np.ndarray]],
    batch_fn: Callable[[int], Mapping[str, np.ndarray]],
    num_batches: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Read the bank at `path`, or extract it and write it there.

    Args:
      path: an .npz file.
      identity: what the bank depends on; a file with another identity is refused.
      extract: batch of images -> queries [B, N, D], labels [B, N].
      batch_fn: batch of images of a step.
      num_batches: steps 0 .. num_batches - 1 are extracted.

    Returns:
      queries [M, N, D] float32 and labels [M, N] int16.

    Raises:
      ValueError: if the file holds another bank.
    """
    stamp = json.dumps(dict(identity), sort_keys=True)
    if path.exists():
        with np.load(path, allow_pickle=False) as file:
            if str(file["identity"]) != stamp:
                raise ValueError(
                    f"The query bank {path} was made from {file['identity']}, not from {stamp}; "
                    "delete it or use another workdir."
                )
            return file["queries"], file["labels"]
    parts = [extract(batch_fn(step)) for step in range(num_batches)]
    queries = np.concatenate([np.asarray(q, np.float32) for q, _ in parts])
    labels = np.concatenate([np.asarray(l, np.int16) for _, l in parts])
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, queries=queries, labels=labels, identity=stamp)
    os.replace(partial, path)
    return queries, labels
