"""What a stage is: parameters it trains and reads, its loss, and a rule for each parameter."""

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


# Norms, biases, embeddings and scalars have no weight decay: Mask2Former's rule, and CLIP's.
NO_DECAY = r".*(norm|bias|embedding|positions|class_token|scale|offsets|log_scale).*"
