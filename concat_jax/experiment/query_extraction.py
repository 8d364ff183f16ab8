"""From a stage's segmentor and the training images to the query bank of its workdir."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from concat_jax.core.prefetch import prefetch
from concat_jax.core.progress import Progress
from concat_jax.core.runtime import light_compiler_options
from concat_jax.models.networks import Params
from concat_jax.stages.bank_files import BankConfig, ShardedRows, fill_bank
from concat_jax.stages.queries import IMAGE_FIELDS, extract_queries
from concat_jax.stages.stage import Context
from concat_jax.training.sharding import shard_batch


def extract_bank(
    folder: Path,
    identity: Mapping[str, Any],
    context: Context,
    params: Params,
    text: np.ndarray,
    batch_fn: Callable[[int], Mapping[str, np.ndarray]],
    *,
    num_batches: int,
    batch_size: int,
    seed: int,
    config: BankConfig,
    mesh: Mesh,
) -> tuple[ShardedRows, np.ndarray]:
    """The bank in `folder`, extracted on all devices of all hosts as far as it is not there.

    Args:
      folder: of the bank, which all hosts see.
      identity: what the queries depend on, see `fill_bank`.
      context: for the networks, the label space and the weights of the matching cost.
      params: holds "segmentor" and "projector", trained together.
      text: [K, C] or [K, S, C] text embeddings.
      batch_fn: this host's rows of the batch of images of a step.
      num_batches: steps 0 .. num_batches - 1 make the bank.
      batch_size: images of a global batch.
      seed: of the matching points.
      config: how the bank lies on disk.
      mesh: devices that share a batch.

    Returns:
      queries [M, N, D], on disk, and labels [M, N] int16.

    Raises:
      ValueError: as `fill_bank`.
    """
    extract_fn = jax.jit(
        functools.partial(extract_queries, context),
        compiler_options=light_compiler_options(),
    )
    rng = jax.random.key(seed)

    def extract(batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        inputs = shard_batch({name: batch[name] for name in IMAGE_FIELDS}, mesh)
        with jax.set_mesh(mesh):
            queries = extract_fn(params, text, inputs, rng)
        # A batch of queries is small, and so any host can write any shard.
        return multihost_utils.process_allgather(queries, tiled=True)

    def batches(steps: Sequence[int]):
        return prefetch(lambda i: batch_fn(steps[i]), 0, len(steps), depth=2, num_threads=1)

    def progress(done: int, total: int) -> Callable[[int], object]:
        if jax.process_index():
            return lambda done: None
        return Progress("queries", done, total).report

    return fill_bank(
        folder,
        identity,
        extract,
        batches,
        num_batches=num_batches,
        batch_size=batch_size,
        config=config,
        progress=progress,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
