"""Stage 3, union finetune: the projector side on real seen and pseudo unseen queries.

One cross-entropy over seen and unseen classes and no-object. Without pseudo queries it is the
control that a claim for CAT has to beat.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from concat_jax.losses.classification import weighted_cross_entropy
from concat_jax.stages.cat import generate
from concat_jax.stages.networks import Networks
from concat_jax.stages.real_queries import QUERY_FIELDS
from concat_jax.stages.stage import NO_DECAY, Stage
from concat_jax.text.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Constants of the union finetune.

    Attributes:
      no_object_weight: class weight of no-object, as in stage 1.
      unseen_weight: class weight of unseen classes; PADing takes 5 with few pseudo queries.
      pseudo_per_class: pseudo queries of each unseen class in a step; 0 is the control.
    """

    no_object_weight: float = 0.1
    unseen_weight: float = 1.0
    pseudo_per_class: int = 8


def make_stage(networks: Networks, vocabulary: Vocabulary, config: FinetuneConfig) -> Stage:
    """Union finetune as a `Stage` on query batches: trains the projector only."""
    with_pseudo = config.pseudo_per_class > 0 and len(vocabulary.unseen) > 0

    def loss(params, frozen, batch, rng):
        num_classes = len(vocabulary)
        queries = batch["queries"]  # [B, N, D]
        labels = jnp.where(batch["query_labels"] >= 0, batch["query_labels"], num_classes)
        weights = jnp.ones(num_classes + 1).at[vocabulary.unseen].set(config.unseen_weight)
        weights = weights.at[num_classes].set(config.no_object_weight)

        def classify(x):
            return networks.projector.apply(
                {"params": params["projector"]}, x, frozen["text"], method="predict"
            )

        logits = classify(queries)
        losses, row_weights = weighted_cross_entropy(logits, labels, weights)
        total, count = losses.sum(), row_weights.sum()
        hit = (jnp.argmax(logits, axis=-1) == labels) & (labels < num_classes)
        metrics = {"accuracy_real": hit.sum() / jnp.maximum((labels < num_classes).sum(), 1)}
        if with_pseudo:
            unseen = jnp.repeat(jnp.asarray(vocabulary.unseen), config.pseudo_per_class)
            pseudo = generate(networks, frozen, frozen["text"][unseen], rng)
            pseudo_logits = classify(pseudo)
            losses, row_weights = weighted_cross_entropy(pseudo_logits, unseen, weights)
            total, count = total + losses.sum(), count + row_weights.sum()
            metrics["accuracy_pseudo"] = jnp.mean(jnp.argmax(pseudo_logits, axis=-1) == unseen)
        value = total / jnp.maximum(count, 1e-6)
        return value, {"loss": value, **metrics}

    reads = ("segmentor", "generator") if with_pseudo else ()
    rules = ((NO_DECAY, 1.0, 0.0), (r".*", 1.0, 1.0))
    return Stage(("projector",), reads, loss, rules, QUERY_FIELDS)
