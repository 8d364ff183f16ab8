"""Real vision queries of many images, extracted once, so that stages 2 and 3 see no image."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np


class QueryBank:
    """Vision queries and their classes, one row an image.

    Attributes:
      queries: [M, N, D] float32.
      labels: [M, N] int16, class index or -1 where the query holds no segment.
    """

    def __init__(
        self,
        queries: np.ndarray,
        labels: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Args:
        queries: [M, N, D].
        labels: [M, N].
        batch_size: rows of the global batch, a multiple of process_count.
        seed: of the order.
        process_index: this host among those that share a batch; each holds the whole bank.
        process_count: number of hosts.

        Raises:
          ValueError: if the bank is smaller than a batch, or the hosts cannot share one evenly.
        """
        if batch_size % process_count:
            raise ValueError(
                f"A batch of {batch_size} images' queries cannot be shared by {process_count} "
                "hosts; make the batch size a multiple of it."
            )
        if len(queries) < batch_size:
            raise ValueError(
                f"The query bank holds {len(queries)} images, fewer than the batch size "
                f"{batch_size}; extract more or make the batch smaller."
            )
        self.queries, self.labels = queries, labels
        self._batch_size, self._seed = batch_size, seed
        share = batch_size // process_count
        self._own = slice(process_index * share, (process_index + 1) * share)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This host's rows of a step's batch, the same whenever asked.

        Returns:
          With B = batch_size / process_count: queries [B, N, D] float32 and query_labels [B, N]
          int32.
        """
        rng = np.random.default_rng([self._seed, step])
        rows = rng.choice(len(self.queries), self._batch_size, replace=False)[self._own]
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
    """Read the bank at `path`, or extract it, on all hosts together, and write it there.

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
    if jax.process_index() == 0:
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, queries=queries, labels=labels, identity=stamp)
        os.replace(partial, path)
    return queries, labels
