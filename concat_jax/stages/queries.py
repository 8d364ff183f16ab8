"""Real vision queries and their classes: what stages 2 and 3 learn from.

A query bank holds one view of each image. With images in the loop every step sees new, augmented
ones, at the price of the frozen segmentor's forward pass; the loss is that of the bank.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.core.batch import MEMORY_FIELDS, QUERY_TARGETS, TARGET_FIELDS
from concat_jax.core.shard_store import ShardedRows
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.losses.matching import labels_of_queries
from concat_jax.losses.segmentation import match_queries
from concat_jax.models.networks import Params
from concat_jax.stages.clip_targets import clip_targets
from concat_jax.stages.con import training_labels
from concat_jax.stages.stage import MATCHING_PROJECTOR, TEXT, Batch, Context, Stage

IMAGE_FIELDS = ("image", "segment_ids", "segment_labels", "segment_is_crowd")


def extract_queries(
    context: Context,
    params: Params,
    text: jax.Array,
    batch: Batch,
    rng: jax.Array,
    *,
    with_targets: bool = False,
) -> Batch:
    """Vision queries [B, N, D] float32 of a batch of images, and classes [B, N] int32, -1 for none.

    `params` holds "segmentor" and "projector", frozen; `text` is [K, C]; `rng` draws matching
    points. With targets also CLIP's embeddings [B, N, C] float32 of the segments that queries hold,
    0 for none: those of the batch where it has them, else by "clip" of `params`.
    """
    networks, vocabulary = context.networks, context.vocabulary
    rows = training_labels(batch["segment_labels"], batch["segment_is_crowd"], vocabulary)
    output = networks.segmentor.apply(
        {"params": params["segmentor"]}, networks.segmentor.normalize(batch["image"])
    )
    queries = output.queries[:, -1]
    logits = networks.projector.apply(
        {"params": params["projector"]}, queries, text[vocabulary.seen], method="predict"
    )
    query_of_segment = match_queries(
        rng,
        logits[:, None],
        output.mask_embeddings[:, -1:],
        output.mask_features,
        batch["segment_ids"],
        rows,
        context.loss,
    )
    labels = jnp.where(rows >= 0, batch["segment_labels"], -1)
    query_labels = labels_of_queries(query_of_segment, labels, queries.shape[1], no_object=-1)
    found = {"queries": queries, "query_labels": query_labels[:, 0]}
    if with_targets:
        found[QUERY_TARGETS] = _targets_of_queries(
            segment_targets(context, params, batch), query_of_segment[:, 0], queries.shape[1]
        )
    return jax.lax.stop_gradient(found)


def segment_targets(context: Context, params: Params, batch: Batch) -> jax.Array:
    """CLIP's embeddings [B, G, C] of a batch's segments, cached or made here."""
    cached = TARGET_FIELDS[1]
    if cached in batch:
        return batch[cached]
    _, targets = clip_targets(
        context.networks.clip,
        params["clip"],
        batch["image"],
        batch["segment_ids"],
        batch["segment_labels"].shape[1],
        context.crops,
        image_size=batch["image_size"],
    )
    return targets


def _targets_of_queries(targets: jax.Array, query_of_segment: jax.Array, count: int) -> jax.Array:
    """Targets [B, G, C] of segments at the queries [B, G] that hold them, -1 none: [B, N, C]."""
    holds = jax.nn.one_hot(query_of_segment, count, dtype=targets.dtype)  # -1 is a row of zeros
    return jnp.einsum("bgn,bgc->bnc", holds, targets)


def matching_key(rng: jax.Array) -> jax.Array:
    """The key of the matching points, apart from those that a stage's loss splits off `rng`."""
    return jax.random.fold_in(rng, 1 << 16)


def on_images(stage: Stage, context: Context) -> Stage:
    """A stage on batches of queries as one on batches of images, with the same loss.

    It reads what finds the queries; no gradient reaches that. Raises ValueError if the stage draws
    a memory, which only a bank can give.
    """
    if set(MEMORY_FIELDS) & set(stage.batch_fields):
        raise ValueError(
            "A memory of every class (memory_per_class) is drawn from a query bank, and the stage "
            "is to learn from images; set --config.train.STAGE.queries=bank, or "
            "--config.train.STAGE.method.memory_per_class=0."
        )

    with_targets = QUERY_TARGETS in stage.batch_fields
    extra_fields, extra_reads = target_inputs(context) if with_targets else ((), ())

    def loss(params, frozen, batch, rng):
        namers = {"segmentor": frozen["segmentor"], "projector": frozen[MATCHING_PROJECTOR]}
        namers |= {name: frozen[name] for name in extra_reads}
        namers, text = jax.lax.stop_gradient((namers, frozen[TEXT]))
        queries = extract_queries(
            context, namers, text, batch, matching_key(rng), with_targets=with_targets
        )
        return stage.loss(params, frozen, queries, rng)

    reads = (*stage.reads, "segmentor", TEXT, MATCHING_PROJECTOR, *extra_reads)
    fields = IMAGE_FIELDS + extra_fields
    reads = tuple(dict.fromkeys(reads))
    return dataclasses.replace(stage, reads=reads, loss=loss, batch_fields=fields)


def target_inputs(context: Context) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Fields of a batch, and subtrees of the parameters, that targets are made of."""
    if context.has_clip_targets:
        return TARGET_FIELDS[1:], ()
    return ("image_size",), ("clip",)


@dataclasses.dataclass(frozen=True)
class Targets:
    """CLIP's embeddings of the segments that queries hold.

    Attributes:
      values: [T, C] float, may lie on disk.
      rows: [M, N] int32, which of them is a query's, -1 for none.
    """

    values: np.ndarray | ShardedRows
    rows: np.ndarray

    def of_images(self, images: np.ndarray) -> np.ndarray:
        """[B, N, C] float32, 0 where a query has none."""
        rows = self.rows[images]
        found = self.values[np.maximum(rows, 0)].astype(np.float32)
        return np.where(rows[..., None] >= 0, found, 0)


class QueryBank:
    """Vision queries and their classes, one row an image.

    Beside a batch of images it can draw a memory: so many real queries of every class, however
    rare the class is in the batch. PADing and CONCAT keep a queue of recent ones; the bank holds
    all of them, so a draw needs no state.
    """

    def __init__(
        self,
        queries: np.ndarray | ShardedRows,
        labels: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        memory_per_class: int = 0,
        num_classes: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        targets: Targets | None = None,
    ):
        """Queries [M, N, D] float32 or float16 may lie on disk: a batch reads its own rows.

        Labels [M, N] int16 are -1 where a query holds no segment. Batches have `targets`, if any.
        The `batch_size` rows of the global batch are shared by `process_count` hosts evenly; a
        memory needs `num_classes`.
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
        self.queries, self.labels, self.targets = queries, labels, targets
        self._batch_size, self._seed = batch_size, seed
        share = batch_size // process_count
        self._own = slice(process_index * share, (process_index + 1) * share)
        self._memory_per_class = memory_per_class
        if memory_per_class:
            # Rows are classes, and hosts and devices share them as evenly as a batch's images.
            rows = -(-num_classes // batch_size) * batch_size
            share = rows // process_count
            self._own_classes = slice(process_index * share, (process_index + 1) * share)
            # The bank's matched queries in the order of their class, and where each class starts.
            flat = np.asarray(labels).reshape(-1)
            matched = np.flatnonzero(flat >= 0)
            self._of_class = matched[np.argsort(flat[matched], kind="stable")]
            self._counts = np.bincount(flat[matched], minlength=rows)
            self._starts = np.cumsum(self._counts) - self._counts

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This host's rows of a step's batch, the same whenever asked.

        With B = batch_size / process_count: queries [B, N, D] float32 and query_labels [B, N]
        int32. With a memory also memory_queries [K', M, D] float32 and memory_valid [K', M] bool: M
        queries of class k in row k, drawn with replacement where there are fewer, and none of them
        valid where there is none. Rows from K on, up to a multiple of the batch size, are padding;
        a host has its share K' of them.
        """
        rng = np.random.default_rng([self._seed, step])
        rows = rng.choice(len(self.queries), self._batch_size, replace=False)[self._own]
        batch = {
            "queries": self.queries[rows].astype(np.float32),
            "query_labels": self.labels[rows].astype(np.int32),
        }
        if self.targets is not None:
            batch[QUERY_TARGETS] = self.targets.of_images(rows)
        return batch | self._memory(step) if self._memory_per_class else batch

    def _memory(self, step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([self._seed, step, 1])  # apart from the draw of the images
        size = self._memory_per_class
        places = np.zeros((len(self._counts), size), np.int64)
        # Every host draws for every class, so that all hosts see the same memory.
        for row, (start, count) in enumerate(zip(self._starts, self._counts, strict=True)):
            if count:
                drawn = rng.choice(count, size, replace=bool(count < size))
                places[row] = self._of_class[start + drawn]
        places = places[self._own_classes]
        valid = np.repeat(self._counts[self._own_classes, None] > 0, size, axis=1)
        images, numbers = np.divmod(places, self.labels.shape[1])
        queries = self.queries[images, numbers].astype(np.float32)
        return {"memory_queries": np.where(valid[..., None], queries, 0), "memory_valid": valid}


def missing_classes(labels: np.ndarray, vocabulary: Vocabulary) -> str:
    """A sentence on seen classes that a bank's labels [M, N] lack, or ""; ValueError if all are."""
    counts = np.bincount(labels[labels >= 0], minlength=len(vocabulary))
    missing = [vocabulary.names[k] for k in vocabulary.seen if not counts[k]]
    if len(missing) == len(vocabulary.seen):
        raise ValueError(
            f"The query bank's {len(labels)} images hold no segment of a seen class; check that "
            "the training data show seen classes, or extract more images (bank_images)."
        )
    if not missing:
        return ""
    shown = ", ".join(missing[:10]) + (", …" if len(missing) > 10 else "")
    return (
        f"The query bank's {len(labels)} images hold no real query of {len(missing)} of "
        f"{len(vocabulary.seen)} seen classes ({shown}); the generator cannot learn from those, "
        "and more bank_images may help."
    )
