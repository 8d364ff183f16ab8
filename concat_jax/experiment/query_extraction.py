"""From a stage's segmentor and the training images to the query bank of its workdir.

All hosts see the bank's folder, and hold the queries of a batch once they are extracted; each
writes its own shards, index modulo the number of hosts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from concat_jax.core.config import check_choice
from concat_jax.core.hosts import gathered, of_first_host, wait_for_hosts
from concat_jax.core.prefetch import prefetch
from concat_jax.core.progress import Progress
from concat_jax.core.runtime import light_compiler_options
from concat_jax.core.shard_store import ShardedRows, ShardStore, StoreKind
from concat_jax.models.networks import Params
from concat_jax.stages.queries import IMAGE_FIELDS, extract_queries
from concat_jax.stages.stage import Context
from concat_jax.training.sharding import shard_batch

FORMAT = 1
DTYPES = ("float16", "float32")
LABEL_DTYPE = np.int16
KIND = StoreKind(
    "the query bank", ("queries", "labels"), "start again: it is extracted anew", "bank.json"
)

Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class BankConfig:
    """`config.bank`, how queries lie on disk.

    Attributes:
      dtype: "float16" halves the bank: a query leaves a LayerNorm, so its numbers are near 1 and
      move
        by a few ten-thousandths, where those of one class differ by tenths. bfloat16 would move
        them eight times as far.
      images_per_shard: rounded up to whole batches; a kill costs as many at most.
    """

    dtype: str = "float32"
    images_per_shard: int = 1024

    def __post_init__(self):
        check_choice(self.dtype, DTYPES, "config.bank.dtype is")
        if self.images_per_shard < 1:
            raise ValueError(
                f"config.bank.images_per_shard is {self.images_per_shard} and must be at least 1."
            )


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
      context: for the networks, the label space and the weights of the matching cost.
      params: holds "segmentor" and "projector", trained together.
      text: [K, C] or [K, S, C] text embeddings.

    Otherwise, and in what it returns and raises, as `fill_bank`.
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
        return gathered(queries)

    return fill_bank(
        folder,
        identity,
        extract,
        lambda steps: prefetch(lambda i: batch_fn(steps[i]), 0, len(steps), num_threads=1),
        num_batches=num_batches,
        batch_size=batch_size,
        config=config,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def fill_bank(
    folder: Path,
    identity: Mapping[str, Any],
    extract: Callable[[Batch], tuple[np.ndarray, np.ndarray]],
    batches: Callable[[Sequence[int]], Generator[Batch]],
    *,
    num_batches: int,
    batch_size: int,
    config: BankConfig,
    process_index: int = 0,
    process_count: int = 1,
) -> tuple[ShardedRows, np.ndarray]:
    """Opens the bank in `folder`, after extracting the shards that it lacks, on all hosts together.

    Args:
      folder: the same for all hosts; made if absent.
      identity: what the queries depend on; a bank with another identity is refused.
      extract: batch of images -> queries [B, N, D] and labels [B, N] of the global batch, class
        index or -1, on every host. All hosts call it as often.
      num_batches: steps 0 .. num_batches - 1 make the bank.

    Returns:
      queries [M, N, D] of the config's dtype, on disk, and labels [M, N] int16, in memory, 9 MB of
      COCO's. Row s·B + b is image b of step s.

    Raises ValueError for another or a damaged bank, nothing to extract, or a query not storable.
    """
    if num_batches < 1:
        raise ValueError(
            "The query bank is to hold no image; set bank_images of the stage to the number of "
            "images whose queries it learns from."
        )
    manifest = {"format": FORMAT, **identity, **dataclasses.asdict(config), "batch": batch_size}
    store = ShardStore(folder, KIND, manifest)
    store.claim(leads=process_index == 0)
    steps_per_shard = -(-config.images_per_shard // batch_size)
    steps = range(num_batches)
    shards = [steps[i : i + steps_per_shard] for i in range(0, num_batches, steps_per_shard)]
    missing = np.zeros(len(shards), bool)
    missing[store.missing(range(len(shards)))] = True
    # Extraction is one program of all hosts: they must agree on what there is to extract.
    todo = [int(index) for index in np.flatnonzero(of_first_host(missing))]
    if todo:
        if process_index == 0:
            print(
                f"Query bank {folder}: {len(shards) - len(todo)} of {len(shards)} shards are "
                f"finished, {len(todo)} to extract.",
                flush=True,
            )
        done = batch_size * (num_batches - sum(len(shards[index]) for index in todo))
        progress = Progress("queries", done, batch_size * num_batches)
        ahead = batches([step for index in todo for step in shards[index]])
        with contextlib.closing(ahead), _kept_if_interrupted():
            for index in todo:
                parts = []
                for step in shards[index]:
                    part = _stored(*extract(next(ahead)), config.dtype, step)
                    if index % process_count == process_index:
                        parts.append(part)
                    done += batch_size
                    if process_index == 0:
                        progress.tick(done)
                if parts:
                    queries, labels = (np.concatenate(x) for x in zip(*parts, strict=True))
                    store.write(index, {"queries": queries, "labels": labels})
        wait_for_hosts("query bank")
    opened = [store.open(index) for index in range(len(shards))]
    for index, shard in enumerate(opened):
        if shard["queries"].shape[:2] != shard["labels"].shape:
            raise store.damaged(index, "it does not hold a label for each query")
    labels = np.concatenate([shard["labels"] for shard in opened])
    return ShardedRows([shard["queries"] for shard in opened]), labels


@contextlib.contextmanager
def _kept_if_interrupted() -> Generator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "Stopped; what is finished of the query bank is kept, and the same command goes on."
        ) from None


def _stored(
    queries: np.ndarray, labels: np.ndarray, dtype: str, step: int
) -> tuple[np.ndarray, np.ndarray]:
    queries = np.asarray(queries)
    if not np.isfinite(queries).all():
        raise ValueError(
            f"The segmentor gives vision queries that are not finite for batch {step} of the "
            "training images; train it again with a smaller learning rate."
        )
    with np.errstate(over="ignore"):
        stored = queries.astype(dtype)
    if not np.isfinite(stored).all():
        raise ValueError(
            f"A vision query holds {np.abs(queries).max():g}, too large for {dtype}; set "
            "config.bank.dtype to 'float32'."
        )
    return stored, np.asarray(labels).astype(LABEL_DTYPE)
