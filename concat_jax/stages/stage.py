"""What a stage is: parameters it trains and reads, its loss, a rule for each; and its settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, Metrics]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage is data and one pure function; the training loop knows no stage by name.

    Attributes:
      trains: names of the parameter subtrees that this stage updates and gives.
      reads: names of the subtrees that it needs as they are.
      loss: (params, frozen, batch, rng) -> (scalar loss, scalar metrics). `params` holds the
        `trains` subtrees; `frozen` the `reads` subtrees and, under "text", the embeddings [K, C].
      rules: (regex, learning-rate multiplier, weight-decay multiplier); the first that matches
        "subtree/module/…/leaf" decides. A multiplier of 0 freezes the parameter.
      batch_fields: what of a batch the loss uses; the rest stays on the host.
    """

    trains: tuple[str, ...]
    reads: tuple[str, ...]
    loss: LossFn
    rules: tuple[tuple[str, float, float], ...]
    batch_fields: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One entry of `config.train`.

    Attributes:
      kind: "pretrain_clip", "con", "cat" or "finetune".
      takes: subtree -> name of the stage that gave it, or "init" for a file of `config.init`.
      steps: batches.
      batch_size: images a step, over all hosts.
      optimizer: fields of `OptimizerConfig`.
      method: fields of the kind's own config.
      log_every: steps between progress lines.
      save_every: steps between checkpoints, 0 for the last only.
      bank_images: images whose vision queries stages 2 and 3 learn from.
      queries: where stages 2 and 3 have their vision queries from: "bank", extracted once, or
        "images", augmented anew in every step, at the price of the segmentor's forward pass.
      oracle: the bank's images show unseen classes too: an upper bound, which is not zero-shot.
      generator: the network that this stage trains in place of `config.model.generator`, in the
        same form; stages that take its generator follow. {} for the config's.
      copies: part of a fresh subtree -> part of a taken one that it starts from, as
        "segmentor/backbone": "clip/vision_model/patch_embedding/trunk".
    """

    kind: str
    takes: Mapping[str, str]
    steps: int
    batch_size: int
    optimizer: Mapping[str, Any]
    method: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    log_every: int = 50
    save_every: int = 0
    bank_images: int = 0
    queries: str = "bank"
    oracle: bool = False
    generator: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)


# Norms, biases, embeddings and scalars have no weight decay, as in CLIP; Mask2Former decays biases.
NO_DECAY = r".*(scale|bias|embedding|bias_table)"
