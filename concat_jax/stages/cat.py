"""Stage 2, CAT: a generator of pseudo vision queries, by cycle transition.

Semantic to vision: pseudo queries of seen classes are matched to real ones (contrast, MMD), to
those of a batch of images or, in the contrast, to a memory of every class as well.
Vision to semantic: the frozen projector must read the class back from every pseudo query, of
unseen names too where the setting knows them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.core.batch import MEMORY_FIELDS, QUERY_FIELDS
from concat_jax.core.config import Positive, check_choice
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.losses import transition
from concat_jax.losses.alignment import cosine_alignment
from concat_jax.losses.segmentation import weighted_cross_entropy
from concat_jax.models.networks import Networks
from concat_jax.models.semantic_projector import class_vectors
from concat_jax.stages.stage import PLAIN_RULES, TEXT, Batch, Context, Metrics, Stage

LEARNS_FROM = "queries"
# Pseudo queries of each unseen class in a step, for the cycle. Ours, not tuned: noise is drawn anew
# in every step, so that a few make many over a stage.
UNSEEN_PER_CLASS = 4
# Squared widths of the MMD's kernels: PADing's, for 256-d queries.
BANDWIDTHS = (2.0, 5.0, 10.0, 20.0, 40.0, 80.0)


@dataclasses.dataclass(frozen=True)
class Config:
    """Constants of CAT. Contrast and cycle are the paper's terms, MMD is PADing's; values are ours.

    Attributes:
      contrast_temperature: low ones (0.1) are content with a pseudo query that is nearer to its
        class than to other queries, two spreads off; 1 keeps pulling.
      contrast_distance: "cosine" or "euclidean".
      memory_per_class: real queries of each class that the contrast sees beside the batch's; 0 for
        none. The MMD compares with the batch alone, which holds classes as they occur.
      cycle_weight: of classifying P(v̂) and of pulling it to the text embedding; weights near 1
        distort the generated distribution.
      unseen_names: the setting knows unseen names in training (generalized); False is inductive.
    """

    contrast_weight: float = 0.3
    contrast_temperature: Positive = 1.0
    contrast_distance: str = "euclidean"
    memory_per_class: int = 0
    mmd_weight: float = 1.0
    cycle_weight: float = 0.03
    unseen_names: bool = True

    def __post_init__(self):
        check_choice(self.contrast_distance, transition.DISTANCES, "CAT contrast_distance is")


def generate(networks: Networks, params, text: jax.Array, rng: jax.Array) -> jax.Array:
    """Pseudo queries [..., D] of text embeddings [..., C], on the scale of real ones.

    The segmentor's last LayerNorm gives the scale.
    """
    norm = jax.lax.stop_gradient(networks.segmentor.query_norm(params["segmentor"]))
    return networks.generator.apply(
        {"params": params["generator"]}, text, rng, norm["scale"], norm["bias"]
    )


def known_text(text: jax.Array, vocabulary: Vocabulary, unseen_names: bool) -> jax.Array:
    """Text embeddings [K, C] or [K, S, C] with zeros for names that are not known.

    Masking at the end would not do: a loss may multiply an unknown row by zero, or clip a label of
    "none" to a class that is unseen.
    """
    if unseen_names:
        return text
    rows = np.asarray(vocabulary.is_seen).reshape(-1, *[1] * (text.ndim - 1))
    return jnp.where(rows, text, 0.0)


def require_unseen(vocabulary: Vocabulary, what: str, remedy: str) -> None:
    """Raises ValueError if there is no unseen class, for a setting that generates them."""
    if not len(vocabulary.unseen):
        raise ValueError(
            f"{what} is to generate queries of unseen classes, and all {len(vocabulary)} classes "
            "of the vocabulary are seen; mark some as unseen in the split file, or train without "
            f"unseen names, as configs/coco_zps_inductive.py does: {remedy}."
        )


def make_stage(context: Context, config: Config) -> Stage:
    """CAT as a `Stage` on query batches; ValueError for unseen names where there are none."""
    networks, vocabulary = context.networks, context.vocabulary
    num_classes = len(vocabulary)
    if config.unseen_names:
        require_unseen(vocabulary, "CAT", "--config.train.STAGE.method.unseen_names=False")

    def loss(params, frozen, batch, rng):
        text = known_text(frozen[TEXT], vocabulary, config.unseen_names)
        vectors = class_vectors(text)
        everything = {**frozen, **params}
        rng_seen, rng_unseen = jax.random.split(rng)

        # The batch's own queries come first, those of the memory behind them.
        real, labels, valid = _real_queries(batch)
        pseudo_labels = labels[: batch["query_labels"].size]
        pseudo = generate(networks, everything, vectors[jnp.clip(pseudo_labels, 0)], rng_seen)

        matched = pseudo_labels >= 0
        compared = (pseudo, real[: len(pseudo)], matched, matched)
        terms = {"mmd": transition.mmd(*compared, bandwidths=BANDWIDTHS)}
        sides = (pseudo, pseudo_labels, real, labels)
        losses, has_positive = transition.query_contrast(
            *sides,
            temperature=config.contrast_temperature,
            distance=config.contrast_distance,
            real_valid=valid,
        )
        contrast = jnp.where(has_positive, losses, 0.0).sum()
        terms["contrast"] = contrast / jnp.maximum(has_positive.sum(), 1)

        # The cycle back needs no real query, so it can train unseen names as well.
        known = vocabulary.seen
        cycle_labels, cycle_queries = pseudo_labels, pseudo
        if config.unseen_names:
            known = np.arange(num_classes)
            unseen = jnp.repeat(jnp.asarray(vocabulary.unseen), UNSEEN_PER_CLASS)
            cycle_labels = jnp.concatenate([cycle_labels, unseen])
            extra = generate(networks, everything, vectors[unseen], rng_unseen)
            cycle_queries = jnp.concatenate([cycle_queries, extra])
        projector = {"params": frozen["projector"]}
        semantic = networks.projector.apply(projector, cycle_queries)
        logits = networks.projector.apply(projector, semantic, text[known], method="classify")
        rows = np.full(num_classes + 1, -1)  # the last entry: label -1
        rows[known] = np.arange(len(known))
        cross_entropy, counted = weighted_cross_entropy(
            logits, jnp.asarray(rows)[cycle_labels], jnp.ones(logits.shape[-1])
        )
        pull = cosine_alignment(semantic, vectors[jnp.clip(cycle_labels, 0)]) * counted
        terms["cycle"] = (cross_entropy.sum() + pull.sum()) / jnp.maximum(counted.sum(), 1)

        total = sum(getattr(config, f"{name}_weight") * term for name, term in terms.items())
        return total, {
            "loss": total,
            **{f"loss_{name}": term for name, term in terms.items()},
            **_class_statistics(*sides, num_classes),
        }

    fields = QUERY_FIELDS + (MEMORY_FIELDS if config.memory_per_class else ())
    return Stage(("generator",), (TEXT, "segmentor", "projector"), loss, PLAIN_RULES, fields)


def _real_queries(batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Real queries [R, D] of the batch and of its memory, labels [R] or -1, and valid [R] bool."""
    width = batch["queries"].shape[-1]
    real = batch["queries"].reshape(-1, width)  # contrast and MMD compare across images
    labels = batch["query_labels"].reshape(-1)
    valid = jnp.ones(labels.shape, bool)
    if "memory_queries" not in batch:
        return real, labels, valid
    kept = batch["memory_valid"]
    memory = jnp.where(kept[..., None], batch["memory_queries"], 0.0)
    classes = jnp.where(kept, jnp.arange(len(kept))[:, None], -1)
    return (
        jnp.concatenate([real, memory.reshape(-1, width)]),
        jnp.concatenate([labels, classes.reshape(-1)]),
        jnp.concatenate([valid, kept.reshape(-1)]),
    )


def _class_statistics(pseudo, pseudo_labels, real, labels, num_classes: int) -> Metrics:
    """How pseudo classes lie against real ones, in units of the real classes' spread.

    "spread_ratio" is the mean distance of pseudo queries to the mean of their class; a collapse
    shows as a small one. "offset_ratio" is the mean distance between the means of a class's pseudo
    and real queries; classes that are off show as a large one.
    """
    means = transition.class_means(pseudo, pseudo_labels, num_classes)
    real_means = transition.class_means(real, labels, num_classes)
    spread = _mean_distance(pseudo, means, pseudo_labels)
    real_spread = jnp.maximum(_mean_distance(real, real_means, labels), 1e-6)
    offset = _mean_distance(real_means[jnp.clip(pseudo_labels, 0)], means, pseudo_labels)
    return {"spread_ratio": spread / real_spread, "offset_ratio": offset / real_spread}


def _mean_distance(queries: jax.Array, means: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean distance of queries [M, D] to their own of means [K, D], over labels [M] but -1."""
    matched = labels >= 0
    distances = jnp.linalg.norm(queries - means[jnp.clip(labels, 0)] + 1e-9, axis=-1)
    return jnp.where(matched, distances, 0.0).sum() / jnp.maximum(matched.sum(), 1)
