"""Where a run's networks start: the files that a config's `init` section names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_collections

from concat_jax.core.config import check_choice
from concat_jax.models.networks import Networks, Params
from concat_jax.weights.clip import clip_params_for, read_clip
from concat_jax.weights.model_folder import load_card
from concat_jax.weights.warm_start import segmentor_from_folder


def initial_path(config: ml_collections.ConfigDict, subtree: str) -> Path | None:
    """Where the weights of a subtree are; None where it starts from random numbers.

    Args:
      config: whole, for `init`.
      subtree: "clip" or "segmentor".

    Raises:
      ValueError: for another subtree, or if nothing usable is there.
    """
    check_choice(subtree, ("clip", "segmentor"), "config.init cannot hold")
    path = config.get("init", {}).get(subtree, "")
    if subtree == "segmentor":
        if path:
            load_card(path)
        return Path(path) if path else None
    if not path:
        raise ValueError(
            "No CLIP weights are configured: set config.init.clip to a Hugging Face folder, an "
            "OpenAI .pt or an open_clip file, or use a config that trains its own."
        )
    if not Path(path).exists():
        raise ValueError(f"config.init.clip names {path}, which is not a file or folder.")
    return Path(path)


def initial_params(
    config: ml_collections.ConfigDict,
    subtree: str,
    networks: Networks,
    abstract: Params,
    fresh: Callable[[], Params],
) -> Params:
    """Parameters of a subtree that no stage gives; what was loaded is printed.

    Args:
      config: whole, for `init` and `model.segmentor`.
      subtree: "clip" or "segmentor".
      networks: of the config.
      abstract: shapes of the subtree.
      fresh: makes random parameters, for what the file does not hold.

    Raises:
      ValueError: as `initial_path`, or if the file does not fit the config.
    """
    path = initial_path(config, subtree)
    if subtree == "clip":
        weights = read_clip(path)
        print(f"CLIP: {weights}.")
        return clip_params_for(weights, abstract, networks.clip)
    if path is None:
        print(
            "Warning: the segmentor starts from random numbers (config.init.segmentor is empty); "
            "the published recipe starts from ImageNet weights of the backbone."
        )
        return fresh()
    params, loaded = segmentor_from_folder(path, config.model.segmentor, fresh())
    print(f"The segmentor starts from {path}: {loaded}")
    return params
