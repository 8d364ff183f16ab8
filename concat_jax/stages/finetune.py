"""Stage 3, union finetune: the projector side on real seen and pseudo unseen queries.

One cross-entropy over seen and unseen classes and no-object. Without pseudo queries it is the
control that a claim for CAT has to beat.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.core.batch import QUERY_FIELDS, QUERY_TARGETS
from concat_jax.core.config import Count
from concat_jax.losses.alignment import cosine_alignment
from concat_jax.losses.segmentation import weighted_cross_entropy
from concat_jax.models.semantic_projector import class_vectors
from concat_jax.stages.cat import generate, known_text, require_unseen
from concat_jax.stages.stage import PLAIN_RULES, TEXT, Context, Stage

LEARNS_FROM = "queries"


@dataclasses.dataclass(frozen=True)
class Config:
    """Constants of the union finetune.

    Attributes:
      no_object_weight: class weight of no-object, as in stage 1.
      unseen_weight: class weight of unseen classes; 5 is PADing's.
      pseudo_per_class: pseudo queries of each class in a step; 0 is the control.
      pseudo_seen: also pseudo queries of seen classes, so that what sets pseudo queries apart
        from real ones is not learned as a mark of being unseen (ours).
      unseen_names: the setting knows unseen names in training (generalized); False is inductive:
        no unseen name is a class or a pseudo query then.
      deviation: a real query's deviation from its class mean, times this, is added to each pseudo
        query (ours). Generated classes are narrower than real ones and their means are off by
        about a class's width; values over 1 cover that error too. 0 is the paper's form.
      con_weight: of CON's instance term on the real queries, over the cross-entropy's (ours): what
        stage 1 was taught of instances is otherwise forgotten, and then a finetune with pseudo
        queries is compared to one that forgets.
    """

    no_object_weight: float = 0.1
    unseen_weight: float = 5.0
    pseudo_per_class: Count = 8
    pseudo_seen: bool = False
    unseen_names: bool = True
    deviation: float = 0.0
    con_weight: float = 0.0

    def __post_init__(self):
        if self.pseudo_per_class and not (self.unseen_names or self.pseudo_seen):
            raise ValueError(
                f"The finetune is to use {self.pseudo_per_class} pseudo queries of each class, but "
                "of neither unseen nor seen classes; set --config.train.STAGE.method."
                "pseudo_seen=True, or --config.train.STAGE.method.pseudo_per_class=0."
            )


def sample_deviations(
    rng: jax.Array, queries: jax.Array, labels: jax.Array, num_classes: int, count: int
) -> jax.Array:
    """Deviations [M, D] of random matched queries from the mean of their class in the batch.

    From queries [B, N, D] and labels [B, N], -1 without a segment; `count` M are drawn with
    replacement, zero where no class has two queries. A deviation from the mean of n that holds the
    query itself is short by a factor of (1 - 1/n)^½, which is given back.
    """
    member = jax.nn.one_hot(labels, num_classes)  # a label of -1 is a row of zeros
    counts = member.sum(axis=(0, 1))
    means = jnp.einsum("bnk,bnd->kd", member, queries) / jnp.maximum(counts, 1)[:, None]
    n = counts[jnp.clip(labels, 0)]
    usable = ((labels >= 0) & (n > 1)).reshape(-1)
    deviations = (queries - means[jnp.clip(labels, 0)]) * jnp.sqrt(n / jnp.maximum(n - 1, 1))[
        ..., None
    ]
    deviations = jnp.where(usable[:, None], deviations.reshape(-1, queries.shape[-1]), 0.0)
    share = usable + 1e-9  # keeps the distribution proper where no query is usable
    rows = jax.random.choice(rng, len(usable), (count,), p=share / share.sum())
    return deviations[rows]


def make_stage(context: Context, config: Config) -> Stage:
    """Union finetune as a `Stage` on query batches: trains the projector only.

    Raises:
      ValueError: if pseudo queries of unseen classes are asked for and there is no such class.
    """
    networks, vocabulary = context.networks, context.vocabulary
    if config.pseudo_per_class and config.unseen_names:
        method = "--config.train.STAGE.method"
        remedy = f"{method}.unseen_names=False {method}.pseudo_seen=True"
        require_unseen(vocabulary, "The finetune", remedy)
    pseudo_classes = np.concatenate(
        [
            vocabulary.seen if config.pseudo_seen else [],
            vocabulary.unseen if config.unseen_names else [],
        ]
    ).astype(np.int32)
    with_pseudo = config.pseudo_per_class > 0 and len(pseudo_classes) > 0

    def loss(params, frozen, batch, rng):
        num_classes = len(vocabulary)
        text = known_text(frozen[TEXT], vocabulary, config.unseen_names)
        queries = batch["queries"]  # [B, N, D]
        labels = jnp.where(batch["query_labels"] >= 0, batch["query_labels"], num_classes)
        weights = jnp.ones(num_classes + 1).at[vocabulary.unseen].set(config.unseen_weight)
        weights = weights.at[num_classes].set(config.no_object_weight)

        projector = {"params": params["projector"]}

        def classify(semantic):
            logits = networks.projector.apply(projector, semantic, text, method="classify")
            return (
                logits if config.unseen_names else logits.at[..., vocabulary.unseen].set(-jnp.inf)
            )

        semantic = networks.projector.apply(projector, queries)
        logits = classify(semantic)
        losses, row_weights = weighted_cross_entropy(logits, labels, weights)
        total, count = losses.sum(), row_weights.sum()
        hit = (jnp.argmax(logits, axis=-1) == labels) & (labels < num_classes)
        metrics = {"accuracy_real": hit.sum() / jnp.maximum((labels < num_classes).sum(), 1)}
        if with_pseudo:
            pseudo_labels = jnp.repeat(jnp.asarray(pseudo_classes), config.pseudo_per_class)
            rng_noise, rng_deviation = jax.random.split(rng)
            vectors = class_vectors(text)
            pseudo = generate(networks, frozen, vectors[pseudo_labels], rng_noise)
            if config.deviation:
                pseudo += config.deviation * sample_deviations(
                    rng_deviation, queries, batch["query_labels"], num_classes, len(pseudo)
                )
            pseudo_logits = classify(networks.projector.apply(projector, pseudo))
            # Among names alone: what was made to be one tells nothing of what is none.
            pseudo_logits = pseudo_logits.at[..., num_classes].set(-jnp.inf)
            losses, row_weights = weighted_cross_entropy(pseudo_logits, pseudo_labels, weights)
            total, count = total + losses.sum(), count + row_weights.sum()
            hit = jnp.argmax(pseudo_logits, axis=-1) == pseudo_labels
            metrics["accuracy_pseudo"] = jnp.mean(hit)
        value = total / jnp.maximum(count, 1e-6)
        if config.con_weight:
            targets = batch[QUERY_TARGETS]
            matched = jnp.any(targets != 0, axis=-1)
            pull = jnp.where(matched, cosine_alignment(semantic, targets), 0.0)
            metrics["loss_instance"] = pull.sum() / jnp.maximum(matched.sum(), 1)
            value += config.con_weight * metrics["loss_instance"]
        return value, {"loss": value, **metrics}

    reads = (TEXT, "segmentor", "generator") if with_pseudo else (TEXT,)
    fields = QUERY_FIELDS + ((QUERY_TARGETS,) if config.con_weight else ())
    return Stage(("projector",), reads, loss, PLAIN_RULES, fields)
