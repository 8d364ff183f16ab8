"""What a stage is: parameters it trains and reads, its loss, a rule for each; and its settings.

A stage is a module of this folder, listed in `registry.STAGES`, that has
  Config: dataclass of its constants, the `method` of its settings;
  LEARNS_FROM: "captions", "images" or "queries";
  make_stage: (Context, Config) -> Stage.
A flag that an error of theirs names is written --config.train.STAGE.KEY=VALUE.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from concat_jax.core.config import Count
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.losses.segmentation import SegmentationLossConfig
from concat_jax.models.networks import Networks
from concat_jax.stages.clip_targets import CropConfig

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, Metrics]]

# What a stage may read that no stage gives under that name: text embeddings [K, C] or [K, S, C];
# and the projector that was trained with the segmentor, which says which query holds which
# segment, while a stage may train another one under "projector".
TEXT = "text"
MATCHING_PROJECTOR = "matching_projector"
INIT = "init"  # in `takes`, the source of what no stage gives
# The subtree whose `takes` entry decides where each of them comes from.
COMES_WITH = {TEXT: "clip", MATCHING_PROJECTOR: "segmentor"}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage is data and one pure function; the training loop knows no stage by name.

    Attributes:
      trains: names of the parameter subtrees that this stage updates and gives.
      reads: names of what it needs as it is: subtrees, `TEXT`, `MATCHING_PROJECTOR`.
      loss: (params, frozen, batch, rng) -> (scalar loss, scalar metrics). `params` holds what the
        stage trains, `frozen` what it reads.
      rules: (regex, learning-rate multiplier, weight-decay multiplier); the first that matches
        "subtree/module/…/leaf" decides. A multiplier of 0 freezes the parameter.
      batch_fields: what of a batch the loss uses; the rest stays on the host.
      start: of a stage in closed form, which has no loss: (query bank, frozen) -> the subtrees that
        it gives.
    """

    trains: tuple[str, ...]
    reads: tuple[str, ...]
    loss: LossFn | None
    rules: tuple[tuple[str, float, float], ...]
    batch_fields: tuple[str, ...]
    start: Callable[[Any, Any], dict[str, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Context:
    """What all stages of a run are made with.

    `networks.generator` is the one that the stage trains or reads; `loss` is the segmentor's, and
    the weights of the cost that matches; `has_clip_targets`, batches hold cached targets of CLIP.
    """

    networks: Networks
    vocabulary: Vocabulary
    loss: SegmentationLossConfig = SegmentationLossConfig()
    crops: CropConfig = CropConfig()
    has_clip_targets: bool = False


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One entry of `config.train`.

    Attributes:
      kind: a key of `registry.STAGES`.
      takes: subtree -> name of the stage that gave it, or "init" for a file of `config.init`.
      steps: batches; 0 for a stage in closed form.
      batch_size: images a step, over all hosts.
      optimizer: fields of `OptimizerConfig`.
      method: fields of the kind's own `Config`.
      log_every: steps between progress lines.
      save_every: steps between checkpoints, 0 for the last only.
      keep: how many of the last checkpoints are kept.
      max_skips: steps in a row whose loss or gradient may not be finite, and which change nothing
        then; 0 ends the run at the first.
      eval_every: steps between looks at evaluation images, 0 for none.
      bank_images: images whose vision queries a stage on queries learns from.
      queries: where a stage has its vision queries from: "bank", extracted once, or "images",
        augmented anew in every step, at the price of the segmentor's forward pass.
      oracle: the bank's images show unseen classes too: an upper bound, which is not zero-shot.
      generator: the network that this stage trains in place of `config.model.generator`, in the
        same form; stages that take its generator follow. {} for the config's.
      copies: part of a fresh subtree -> part of a taken one that it starts from, as
        "segmentor/backbone": "clip/vision_model/patch_embedding/trunk"; a name and a colon before
        it take it from another stage than `takes` does.
      captions: of a stage on captions: "all" classes, as the web has them, or "seen" ones alone.
    """

    kind: str
    steps: Count
    batch_size: int
    optimizer: Mapping[str, Any]
    takes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    method: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    log_every: int = 50
    save_every: int = 0
    keep: int = 2
    max_skips: int = 0
    eval_every: int = 0
    bank_images: int = 0
    queries: str = "bank"
    oracle: bool = False
    generator: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    captions: str = "all"

    @property
    def sources(self) -> dict[str, str]:
        """What this stage takes or copies, and from which stage, or "init"."""
        copied = (source.split(":") for source in self.copies.values())
        return {**self.takes, **{f"{part} of {s}": s for *stage, part in copied for s in stage}}


# Norms, biases, embeddings and scalars have no weight decay, as in CLIP; Mask2Former decays biases.
NO_DECAY = r".*(scale|bias|embedding|bias_table)"
# Of a stage that trains everything it trains alike.
PLAIN_RULES = ((NO_DECAY, 1.0, 0.0), (r".*", 1.0, 1.0))
