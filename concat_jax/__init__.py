"""Zero-shot panoptic segmentation in JAX: segments with the names that you ask for.

>>> import concat_jax
>>> from data_pipelines.synthetic.world import draw_scenes
>>> model = concat_jax.load("demo")
>>> image, other = draw_scenes(2)
>>> result = model(image, classes=["red plain balloon", "grey smooth ground"])
>>> {segment.name for segment in result.segments} <= {"red plain balloon", "grey smooth ground"}
True
>>> [result.panoptic.shape for result in model([image, other], mask_threshold=0.4)]
[(64, 64), (64, 64)]
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concat_jax.inference.model import Model


def load(
    path: str | os.PathLike[str],
    *,
    stage: str = "",
    dtype: str = "",
    clip: str | os.PathLike[str] = "",
) -> Model:
    """A model from a workdir of `concat_jax.main`, or a folder that `concat_jax.convert` made.

    Compiled programs are kept for the next process, in `~/.cache/concat_jax` unless
    JAX_COMPILATION_CACHE_DIR names a folder.

    Args:
      path: "demo" is the model that ships: the finished demo, which knows its synthetic world.
      stage: of a workdir; the last that is evaluated by default.
      dtype: float32 or bfloat16; the model's own by default.
      clip: a CLIP's file or folder, for a model that knows its own names alone: CLIP names its
        masks by any others, which takes a forward pass of CLIP a mask.

    Raises ValueError if there is no model, the stage has not finished, or what is there is damaged.
    """
    # The package itself is imported in no time; JAX is not.
    from concat_jax.core.runtime import enable_compilation_cache
    from concat_jax.experiment.model import open_model

    enable_compilation_cache()
    return open_model(path, stage=stage, dtype=dtype, clip=clip)


def _say_stopped(kind, *error) -> None:
    if kind is not KeyboardInterrupt:
        return sys.__excepthook__(kind, *error)
    print("\nStopped.", file=sys.stderr)


if sys.argv[:1] == ["-m"]:  # Python imports a command, and `core.cli` is not there yet.
    sys.excepthook = _say_stopped
