"""What a workdir was made with, and whether a config may go on in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import ml_collections

from concat_jax.core import config as configuration
from concat_jax.core.files import write_json

# Config keys that may differ when a run is started again in its workdir: they change what is
# shown or run next, not what was trained. The model is judged by the checkpoints themselves.
EVALUATION_KEYS = ("eval.", "model.", "data.eval_", "data.num_eval_images")
# Cached targets are those that the run would compute, up to augmentation.
FREE_KEYS = (*EVALUATION_KEYS, "stages", "tensorboard", "mesh.", "text.cache", "data.clip_targets")
# Keys of the model that change no parameter's shape, so that no checkpoint can tell them.
_SHAPELESS_KEYS = ("_heads", "num_groups", "activation", "position_interpolation")


def evaluation_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Dotted key to value of what decides a report besides the checkpoints, as JSON has it."""
    keys = configuration.flat(config).items()
    return json.loads(json.dumps({k: v for k, v in keys if k.startswith(EVALUATION_KEYS)}))


def claim_workdir(workdir: Path, config: ml_collections.ConfigDict, *, write: bool) -> None:
    """Write the config if told to, or refuse a workdir that was trained with another one.

    Raises:
      ValueError: naming the first key that differs, with both values.
    """
    path = workdir / "config.json"
    mine = json.loads(json.dumps(configuration.flat(config)))
    if path.exists():
        theirs = json.loads(path.read_text())
        for key in sorted(mine.keys() | theirs.keys()):
            old, new = theirs.get(key), mine.get(key)
            free = key.startswith(FREE_KEYS) and not key.endswith(_SHAPELESS_KEYS)
            if old != new and not free:
                raise ValueError(
                    f"The workdir {workdir} was made with config.{key} = {old!r}, now it is "
                    f"{new!r}; use another workdir or the config it was made with."
                )
        return
    if write and jax.process_index() == 0:
        write_json(path, mine)
