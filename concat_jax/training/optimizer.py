"""AdamW with a rule for each parameter: its learning rate, its decay, or frozen."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import optax

from concat_jax.core.config import Share, check_choice

FROZEN = "frozen"
SCHEDULES = ("cosine", "constant", "steps")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW's constants, of a config; a step is a batch.

    Attributes:
      learning_rate, weight_decay: for multiplier 1, peak and decoupled; 0.05 is Mask2Former's.
      warmup_steps: linear from 0.
      schedule: after the warm-up: "cosine" to 0, "constant", or "steps" (x 0.1 at `decay_at` of the
        steps; Mask2Former's).
      clip_norm: global gradient norm over all trained parameters; 0 for none. 0.01 is
        Mask2Former's.
      accumulate: batches whose gradients are averaged for one update. Each is normalised by its own
        segments, and shows its own images alone to losses that contrast images.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 0.05
    warmup_steps: int = 0
    schedule: str = "steps"
    decay_at: tuple[Share, ...] = (0.889, 0.963)
    clip_norm: float = 0.01
    accumulate: int = 1

    def __post_init__(self):
        check_choice(self.schedule, SCHEDULES, "There is no schedule")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step, over `steps` steps."""
    peak, warmup = config.learning_rate, min(config.warmup_steps, steps)
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, max(steps - warmup, 1))
    elif config.schedule == "constant":
        main = optax.constant_schedule(peak)
    else:
        ends = [int(share * steps) - warmup for share in config.decay_at]
        boundaries = {end: 0.1 ** ends.count(end) for end in ends}
        main = optax.piecewise_constant_schedule(peak, boundaries)
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup])


def label_params(params: Any, rules: Sequence[tuple[str, float, float]]) -> Any:
    """Label of every parameter in a tree: "frozen", or "lr x0.1, decay x1".

    `rules` are (regex, learning-rate multiplier, weight-decay multiplier); the first that matches
    "subtree/module/leaf" decides. Raises ValueError for a parameter that no rule matches.
    """

    def label(path, _):
        name = path_name(path)
        for pattern, rate, decay in rules:
            if re.fullmatch(pattern, name):
                return FROZEN if rate == 0 else f"lr x{rate:.12g}, decay x{decay:.12g}"
        raise ValueError(f"No optimizer rule matches the parameter {name!r}.")

    return jax.tree_util.tree_map_with_path(label, params)


def path_name(path) -> str:
    """ "a/b/c" of a jax key path through dicts."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def make_optimizer(
    config: OptimizerConfig, steps: int, labels: Any
) -> optax.GradientTransformation:
    """AdamW by label, gradients clipped by their global norm over what is trained.

    Of `config.accumulate` steps the last one updates; a checkpoint holds the mean so far.

    Frozen gradients are masked before the clip: they would shrink the live ones, and XLA drops
    their backward pass only when nothing reads them.
    """
    of_step = make_schedule(config, max(steps, 1))

    def schedule(updates: jax.Array) -> jax.Array:
        return of_step(updates * config.accumulate)

    transforms: dict[str, optax.GradientTransformation] = {FROZEN: optax.set_to_zero()}
    for label in set(jax.tree.leaves(labels)) - {FROZEN}:
        rate, decay = (float(x) for x in re.findall(r"x([^,]+)", label))
        transforms[label] = optax.chain(
            optax.adamw(schedule, weight_decay=config.weight_decay * decay), optax.scale(rate)
        )
    optimizer = optax.multi_transform(transforms, labels)
    if config.clip_norm:
        trained = jax.tree.map(lambda label: label != FROZEN, labels)
        clip = optax.masked(optax.clip_by_global_norm(config.clip_norm), trained)
        optimizer = optax.chain(clip, optimizer)
    if config.accumulate > 1:
        optimizer = optax.MultiSteps(optimizer, config.accumulate).gradient_transformation()
    return optimizer
