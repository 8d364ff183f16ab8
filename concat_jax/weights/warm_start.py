"""Start a segmentor from a converted model: the whole of it, or its backbone alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from concat_jax.models.segmentor import DEFAULTS
from concat_jax.weights.model_folder import Params, load_model
from concat_jax.weights.report import LoadingReport

# Fields of a segmentor's config that no parameter's shape tells.
_SHAPELESS = ("num_heads", "num_points", "num_groups")


def segmentor_from_folder(
    folder: str | os.PathLike[str], config: Mapping[str, Any], fresh: Params
) -> tuple[Params, LoadingReport]:
    """Fill a freshly initialised segmentor with everything that a model's folder has for it.

    The folder is of a whole segmentor or of a backbone. Its class head is left out: here text tells
    the classes. What it lacks stays as in `fresh`.

    Raises:
      ValueError: the folder cannot be read, or holds a parameter that the segmentor has not, has
        in another shape, or uses otherwise.
    """
    params, card = load_model(folder)
    ours = traverse_util.flatten_dict({"segmentor": fresh}, sep="/")
    theirs = traverse_util.flatten_dict({"segmentor": params["segmentor"]}, sep="/")
    for name, value in theirs.items():
        mine = ours[name].shape if name in ours else "nothing"
        if mine != value.shape:
            raise ValueError(
                f"{folder} holds {value.shape} for {name} where the config's segmentor has {mine}; "
                "make config.model.segmentor fit the folder."
            )
    is_whole = set(params["segmentor"]) != {"backbone"}
    for field in _SHAPELESS if is_whole else ():
        mine, value = ({**DEFAULTS, **c}[field] for c in (config, card.segmentor))
        if mine != value:
            raise ValueError(
                f"{folder} is of a segmentor with {field} {value} where the config's has {mine}; "
                "make config.model.segmentor fit the folder."
            )
    head = traverse_util.flatten_dict(params.get("classifier", {}), sep="/")
    report = LoadingReport(
        loaded={name: name for name in theirs},
        shapes={name: value.shape for name, value in theirs.items()},
        new={name: value.shape for name, value in ours.items() if name not in theirs},
        ignored={f"classifier/{name}": np.shape(value) for name, value in head.items()},
    )
    return traverse_util.unflatten_dict({**ours, **theirs}, sep="/")["segmentor"], report
