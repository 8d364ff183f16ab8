"""Stage 2, CAT: a generator of pseudo vision queries, by cycle transition.

Semantic to vision: pseudo queries of seen classes are matched to real ones (query contrast, MMD).
Vision to semantic: the frozen projector must read the class back from every pseudo query, of
unseen names too where the setting knows them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from concat_jax.configuration import check_choice
from concat_jax.losses import transition
from concat_jax.losses.alignment import cosine_alignment
from concat_jax.losses.classification import weighted_cross_entropy
from concat_jax.models.networks import Networks
from concat_jax.stages.real_queries import QUERY_FIELDS
from concat_jax.stages.stage import NO_DECAY, Stage
from concat_jax.text.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class CatConfig:
    """Constants of CAT. Contrast and cycle are the paper's terms, MMD is PADing's; values are ours.

    Attributes:
      contrast_weight: of the query contrast.
      contrast_temperature: of its similarity.
      contrast_distance: "cosine" or "euclidean".
      class_negatives: also contrast with real queries of other classes.
      mmd_weight: of the MMD term.
      mmd_bandwidths: squared kernel widths; PADing's for 256-d queries.
      mmd_per_class: compare the distributions class by class (ours) and not pooled (PADing).
      cycle_weight: of classifying P(v̂) and of pulling it to the text embedding; weights near 1
        distort the generated distribution.
      unseen_names: the setting knows unseen names in training (generalized); False is inductive.
      unseen_per_class: pseudo queries of each unseen class in a step, for the cycle.
    """

    contrast_weight: float = 0.1
    contrast_temperature: float = 0.1
    contrast_distance: str = "euclidean"
    class_negatives: bool = True
    mmd_weight: float = 1.0
    mmd_bandwidths: tuple[float, ...] = (2.0, 5.0, 10.0, 20.0, 40.0, 80.0)
    mmd_per_class: bool = False
    cycle_weight: float = 0.1
    unseen_names: bool = True
    unseen_per_class: int = 4

    def __post_init__(self):
        check_choice(self.contrast_distance, transition.DISTANCES, "CAT contrast_distance is")


def generate(networks: Networks, params, text: jax.Array, rng: jax.Array) -> jax.Array:
    """Pseudo queries [..., D] of text embeddings [..., C], on the scale of real ones.

    Args:
      networks: for the generator.
      params: holds "generator" and "segmentor", whose last LayerNorm gives the scale.
      text: [..., C].
      rng: PRNG key of the noise.
    """
    norm = jax.lax.stop_gradient(params["segmentor"]["transformer_decoder"]["decoder_norm"])
    return networks.generator.apply(
        {"params": params["generator"]}, text, rng, norm["scale"], norm["bias"]
    )


def make_stage(networks: Networks, vocabulary: Vocabulary, config: CatConfig) -> Stage:
    """CAT as a `Stage` on query batches: trains the generator, reads segmentor and projector."""

    def loss(params, frozen, batch, rng):
        width = batch["queries"].shape[-1]
        real = batch["queries"].reshape(-1, width)  # contrast and MMD compare across images
        labels = batch["query_labels"].reshape(-1)
        matched = labels >= 0
        text = frozen["text"]
        everything = {**frozen, **params}

        rng_seen, rng_unseen = jax.random.split(rng)
        pseudo = generate(networks, everything, text[jnp.clip(labels, 0)], rng_seen)

        same = None
        if config.mmd_per_class:
            indicator = (labels[:, None] == labels[None]).astype(jnp.float32)
            same = (indicator, indicator, indicator)
        loss_mmd = transition.mmd(
            pseudo, real, matched, matched, same, bandwidths=config.mmd_bandwidths
        )
        losses, valid = transition.query_contrast(
            pseudo,
            labels,
            real,
            labels,
            temperature=config.contrast_temperature,
            distance=config.contrast_distance,
            class_negatives=config.class_negatives,
        )
        loss_contrast = jnp.where(valid, losses, 0.0).sum() / jnp.maximum(valid.sum(), 1)

        # The cycle back needs no real query, so it can train unseen names as well.
        known = vocabulary.seen
        cycle_labels, cycle_queries = labels, pseudo
        if config.unseen_names:
            known = jnp.arange(len(vocabulary))
            unseen = jnp.repeat(jnp.asarray(vocabulary.unseen), config.unseen_per_class)
            cycle_labels = jnp.concatenate([cycle_labels, unseen])
            extra = generate(networks, everything, text[unseen], rng_unseen)
            cycle_queries = jnp.concatenate([cycle_queries, extra])
        projector = {"params": frozen["projector"]}
        semantic = networks.projector.apply(projector, cycle_queries)
        logits = networks.projector.apply(projector, semantic, text[known], method="classify")
        rows = jnp.full(len(vocabulary) + 1, -1).at[known].set(jnp.arange(len(known)))
        cross_entropy, weights = weighted_cross_entropy(
            logits, rows[cycle_labels], jnp.ones(logits.shape[-1])
        )
        pull = cosine_alignment(semantic, text[jnp.clip(cycle_labels, 0)]) * weights
        loss_cycle = (cross_entropy.sum() + pull.sum()) / jnp.maximum(weights.sum(), 1)

        total = (
            config.mmd_weight * loss_mmd
            + config.contrast_weight * loss_contrast
            + config.cycle_weight * loss_cycle
        )
        spread = _class_spread(pseudo, labels, len(vocabulary))
        return total, {
            "loss": total,
            "loss_mmd": loss_mmd,
            "loss_contrast": loss_contrast,
            "loss_cycle": loss_cycle,
            "spread_ratio": spread
            / jnp.maximum(_class_spread(real, labels, len(vocabulary)), 1e-6),
        }

    rules = ((NO_DECAY, 1.0, 0.0), (r".*", 1.0, 1.0))
    return Stage(("generator",), ("segmentor", "projector"), loss, rules, QUERY_FIELDS)


def _class_spread(queries: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
    """Mean distance of queries [M, D] to the mean of their class; collapse shows as a small one."""
    member = jax.nn.one_hot(labels, num_classes)  # a label of -1 is a row of zeros
    means = jnp.einsum("mk,md->kd", member, queries)
    means = means / jnp.maximum(member.sum(axis=0), 1)[:, None]
    matched = labels >= 0
    distances = jnp.linalg.norm(queries - means[jnp.clip(labels, 0)] + 1e-9, axis=-1)
    return jnp.where(matched, distances, 0.0).sum() / jnp.maximum(matched.sum(), 1)
