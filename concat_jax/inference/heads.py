"""What names the queries: a linear head of converted weights, text, or CLIP on their masks."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Protocol, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from concat_jax.models.segmentor_output import ClipEmbeddings, LinearClassifier
from concat_jax.models.semantic_projector import SemanticProjector, best_synonyms, unit

Array = jax.Array | np.ndarray


class ClipQueries(NamedTuple):
    """Vision queries [B, N, D], and what CLIP says of their masks."""

    queries: jax.Array
    clip: ClipEmbeddings


# Vision queries [B, N, D], or more where the segmentor stands on CLIP.
Queries = jax.Array | ClipQueries


class ClassScores(NamedTuple):
    """Class probabilities [B, N, K+1], the last no-object, and objectness [B, N]; float32."""

    class_probs: jax.Array
    objectness: jax.Array


class Head(Protocol):
    """Queries to class probabilities. A pytree: other arrays of the same shapes compile nothing.

    `KEEP_RULE` is the rule of `panoptic.rank_queries` that suits its scores, `SCORE_THRESHOLD` what
    the rule "score" then wants.
    """

    KEEP_RULE: ClassVar[str]
    SCORE_THRESHOLD: ClassVar[float]

    @property
    def num_classes(self) -> int: ...

    def __call__(self, queries: Queries) -> ClassScores:
        """Of what the segmentor says of its queries."""
        ...


@flax.struct.dataclass
class LinearHead:
    """Mask2Former's own class head.

    Attributes:
      params: of `LinearClassifier`.
    """

    params: Any
    KEEP_RULE: ClassVar[str] = "score"
    SCORE_THRESHOLD: ClassVar[float] = 0.8

    @property
    def num_classes(self) -> int:
        """K, the bias's length less no-object."""
        return self.params["class_embed"]["bias"].shape[0] - 1

    def __call__(self, queries: jax.Array) -> ClassScores:
        """As `Head`."""
        classifier = LinearClassifier(self.num_classes)
        return _scores(classifier.apply({"params": self.params}, queries))


@flax.struct.dataclass
class TextHead:
    """The semantic projector and the texts of the names that compete.

    Attributes:
      text: [K, C] L2-normalised text embeddings, or [K, S, C] with one of each synonym.
      is_name: [K] bool, False for rows that only fill K up; None where there are none.
      training_text: as `text`, of the names of training, against which a query is an object or not:
        against all names asked for it would be one the likelier the more they are. None where the
        names are those of training.
    """

    params: Any
    text: jax.Array
    is_name: jax.Array | None
    training_text: jax.Array | None
    projector: SemanticProjector = flax.struct.field(pytree_node=False)
    KEEP_RULE: ClassVar[str] = "objectness"
    SCORE_THRESHOLD: ClassVar[float] = 0.8

    @property
    def num_classes(self) -> int:
        """K, filling included."""
        return self.text.shape[0]

    def without_filling(self, count: int) -> Self:
        """The head of its first `count` names, if that is all of them."""
        return self.replace(text=self.text[:count], is_name=None)

    def __call__(self, queries: Queries) -> ClassScores:
        """As `Head`; a name that only fills up has probability 0."""
        queries = queries.queries if isinstance(queries, ClipQueries) else queries
        variables = {"params": self.params}
        semantic = self.projector.apply(variables, queries)

        def classify(text: jax.Array) -> jax.Array:
            return self.projector.apply(variables, semantic, text, method="classify")

        logits = classify(self.text)
        if self.is_name is not None:
            is_column = jnp.append(self.is_name, True)  # no-object is always asked for
            logits = jnp.where(is_column, logits, -jnp.inf)
        scores = _scores(logits)
        if self.training_text is None:
            return scores
        return scores._replace(objectness=_scores(classify(self.training_text)).objectness)


@flax.struct.dataclass
class EnsembleHead(TextHead):
    """FC-CLIP's: the names that a `TextHead` gives and those that CLIP itself gives, multiplied.

    Both are distributions over the names alone, raised to powers that add up to 1, as CLIP knows
    better what training did not show (arXiv 2308.02487, section 3.4). No-object is the
    `TextHead`'s.

    Attributes:
      is_seen: [K] bool, the names that training showed.
      scale: [], of CLIP's cosines.
      alpha, beta: CLIP's power for a name that training showed, and for another.
      needs_places: leave CLIP out where a mask has no place on its map, as FC-CLIP does with
        ResNets.
      void_weight: w of p(no-object) · (1 - w · max p), with p of CLIP's names: what CLIP is sure of
        is an object the likelier (OVRCOAT). FC-CLIP has none.
    """

    is_seen: jax.Array = None
    scale: jax.Array = None
    alpha: float = flax.struct.field(pytree_node=False, default=0.4)
    beta: float = flax.struct.field(pytree_node=False, default=0.8)
    needs_places: bool = flax.struct.field(pytree_node=False, default=False)
    void_weight: float = flax.struct.field(pytree_node=False, default=0.0)
    KEEP_RULE: ClassVar[str] = "score"
    SCORE_THRESHOLD: ClassVar[float] = 0.0

    def without_filling(self, count: int) -> Self:
        """As `TextHead`."""
        return TextHead.without_filling(self, count).replace(is_seen=self.is_seen[:count])

    def __call__(self, queries: Queries) -> ClassScores:
        """As `Head`, of `ClipQueries`."""
        own = TextHead.__call__(self, queries)
        is_name = True if self.is_name is None else self.is_name
        by_clip = _named_by_clip(queries.clip, self.text, is_name, self.scale)
        names, no_object = own.class_probs[..., :-1], own.class_probs[..., -1:]
        power = jnp.broadcast_to(jnp.where(self.is_seen, self.alpha, self.beta), names.shape)
        if self.needs_places:
            power = power * queries.clip.is_seen[..., None]
        tiny = jnp.finfo(jnp.float32).tiny
        by_head = jnp.log(jnp.maximum(names / jnp.maximum(1 - no_object, tiny), tiny))
        both = jnp.where(is_name, (1 - power) * by_head + power * by_clip, -jnp.inf)
        objectness = own.objectness
        if self.void_weight:
            sure = jnp.exp(by_clip.max(axis=-1)) * queries.clip.is_seen
            kept = 1 - self.void_weight * sure
            no_object = no_object * kept[..., None]
            objectness = 1 - (1 - objectness) * kept
        named = jax.nn.softmax(both, axis=-1) * (1 - no_object)
        return ClassScores(jnp.concatenate([named, no_object], axis=-1), objectness)


@flax.struct.dataclass
class ClipHead:
    """The two-stage way: another head says which queries hold an object, and CLIP names those.

    A mask that CLIP was not shown is none.

    Attributes:
      own: the head whose names are not asked for.
      text, is_name: as of `TextHead`.
      scale: [], of CLIP's cosines.
    """

    own: Any
    text: jax.Array
    is_name: jax.Array | None
    scale: jax.Array
    KEEP_RULE: ClassVar[str] = "objectness"
    SCORE_THRESHOLD: ClassVar[float] = 0.0

    @property
    def num_classes(self) -> int:
        """K, filling included."""
        return self.text.shape[0]

    def __call__(self, queries: ClipQueries) -> ClassScores:
        """As `Head`."""
        objectness = self.own(queries.queries).objectness * queries.clip.is_seen
        is_name = True if self.is_name is None else self.is_name
        by_clip = _named_by_clip(queries.clip, self.text, is_name, self.scale)
        named = jnp.exp(by_clip) * objectness[..., None]
        return ClassScores(jnp.append(named, 1 - objectness[..., None], axis=-1), objectness)


def _named_by_clip(
    clip: ClipEmbeddings, text: jax.Array, is_name: jax.Array | bool, scale: jax.Array
) -> jax.Array:
    """Logarithms of probabilities [B, N, K] of the names alone."""
    words = text.reshape(-1, text.shape[-1])
    logits = scale * jnp.einsum("bnc,kc->bnk", unit(clip.embeddings), words)
    logits = best_synonyms(logits, text)
    return jax.nn.log_softmax(jnp.where(is_name, logits, -jnp.inf), axis=-1)


def _scores(logits: jax.Array) -> ClassScores:
    probs = jax.nn.softmax(logits, axis=-1)
    return ClassScores(probs, 1.0 - probs[..., -1])


def bias_names(class_probs: Array, is_seen: Array, gamma: Array | float) -> Array:
    """Probabilities [..., K+1] as if γ had been taken from the logits of the seen names.

    No-object, the last, keeps its probability: γ says which name a query has, and not whether it
    has one. Calibrated stacking (Chao et al., arXiv 1605.04253) takes γ from scores; taken from
    probabilities, as ZegFormer does, no γ undoes what a confident model says, and a model that is
    more confident is at a disadvantage that has nothing to do with naming.

    Args:
      class_probs: float, the last no-object.
      is_seen: [K] bool.
      gamma: one number, which may be infinite: then one side's names alone compete.
    """
    xp = jnp if isinstance(class_probs, jax.Array) else np
    real = class_probs[..., :-1]
    # Factors of at most 1: nothing overflows.
    biased = real * xp.where(is_seen, xp.exp(-xp.maximum(gamma, 0)), xp.exp(xp.minimum(gamma, 0)))
    left = biased.sum(axis=-1, keepdims=True)
    biased = biased * (real.sum(axis=-1, keepdims=True) / xp.where(left > 0, left, 1))
    return xp.concatenate([biased, class_probs[..., -1:]], axis=-1)


# Names asked for are filled up to so many times a power of two, so that other names in another
# number mostly meet a program that is there.
FEWEST_NAMES = 32


def text_head_for(
    head: TextHead | ClipHead,
    text: np.ndarray,
    training_text: np.ndarray | None,
    is_seen: np.ndarray,
) -> TextHead | ClipHead:
    """A head for other names, its K filled up to `FEWEST_NAMES` times a power of two.

    `is_seen` [K] bool says which of them training showed; a `ClipHead` has no `training_text`.
    """
    count = FEWEST_NAMES
    while count < len(text):
        count *= 2
    filled = np.concatenate([text, np.repeat(text[:1], count - len(text), axis=0)])
    flags = {}
    if training_text is not None:
        flags["training_text"] = jnp.asarray(training_text)
    if isinstance(head, EnsembleHead):
        flags["is_seen"] = jnp.asarray(np.pad(is_seen, (0, count - len(text))))
    return head.replace(
        text=jnp.asarray(filled),
        is_name=jnp.asarray(np.arange(count) < len(text)),
        **flags,
    )
