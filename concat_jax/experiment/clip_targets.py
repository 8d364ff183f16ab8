"""Which cached CLIP targets a stage may learn from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax

from concat_jax.core.arrays import fingerprint
from concat_jax.experiment.parameters import INIT
from concat_jax.stages import con

if TYPE_CHECKING:
    from concat_jax.experiment.experiment import Experiment


def clip_target_identity(experiment: Experiment, source: str) -> dict[str, Any]:
    """What CON's targets depend on besides the images: `weights`, `clip` and `crops`.

    Args:
      source: stage whose CLIP makes them, or "init".
    """
    weights = fingerprint(jax.device_get(experiment.parameters.get("clip", source)))
    return {"weights": weights, **_settings(experiment)}


def _settings(experiment: Experiment) -> dict[str, Any]:
    context = experiment.setup.context
    return con.target_identity(context.networks.clip, context.crops)


def check_clip_targets(experiment: Experiment, name: str, *, with_weights: bool) -> None:
    """Refuses cached targets that a stage must not learn from, before it compiles.

    CLIP's parameters have to be read for `with_weights`. Raises ValueError saying what to do.
    """
    setup = experiment.setup
    if not set(con.TARGET_FIELDS) <= set(setup.make_stage(name).batch_fields):
        return
    check = experiment.datasets.check_clip_targets
    if check is None:
        raise ValueError(
            f"Stage {name!r} is to learn from cached CLIP targets, and none are configured: "
            "set config.data.clip_targets to the folder that `python -m "
            "concat_jax.cache_clip_targets` filled, or "
            f"config.train.{name}.method.targets to 'online'."
        )
    source = setup.stages[name].takes["clip"]
    if source != INIT and not experiment.parameters.is_finished(source):
        raise ValueError(
            f"Stage {name!r} is to learn from cached targets of the CLIP of stage {source!r}, "
            f"which has not finished in {experiment.workdir}: train that stage alone "
            "(config.stages), then fill the cache with `python -m "
            "concat_jax.cache_clip_targets`."
        )
    check(clip_target_identity(experiment, source) if with_weights else _settings(experiment))
