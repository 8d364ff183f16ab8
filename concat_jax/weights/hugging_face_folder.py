"""Folders of `save_pretrained`: config.json, weights and preprocessor_config.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from concat_jax.weights.files.readers import INDEX_SUFFIX, read_weights
from concat_jax.weights.hugging_face_config import (
    check_preprocessing,
    config_to_hf,
    preprocessing_to_hf,
    segmentor_config_from_hf,
)
from concat_jax.weights.model_folder import ModelCard, Params, new_folder
from concat_jax.weights.names.hugging_face import segmentor_params_from_hf, segmentor_params_to_hf
from concat_jax.weights.report import LoadingReport

CONFIG_NAME = "config.json"
PREPROCESSOR_NAME = "preprocessor_config.json"
WEIGHTS_NAME = "model.safetensors"
# Where save_pretrained puts the weights, in the order transformers looks for them.
WEIGHTS_NAMES = (
    WEIGHTS_NAME,
    f"{WEIGHTS_NAME}{INDEX_SUFFIX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX_SUFFIX}",
)


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file that holds one object.

    Raises:
        ValueError: it is not JSON, or another thing than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; it must be a JSON object.")
    return content


def load_hf_folder(
    folder: str | os.PathLike[str],
) -> tuple[Params, dict[str, Any], LoadingReport, dict[str, Any]]:
    """Read a Hugging Face Mask2Former.

    Args:
        folder: with config.json and the weights; preprocessor_config.json may be absent.

    Returns:
        Parameters and report as `segmentor_params_from_hf` gives them, in between the
        `make_segmentor` config; and the parsed config.json.

    Raises:
        ValueError: a file is missing or broken, the model is none of ours, or its images are
            normalised otherwise.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{folder} holds no {CONFIG_NAME}.")
    content = read_json(folder / CONFIG_NAME)
    config = segmentor_config_from_hf(content)
    if (folder / PREPROCESSOR_NAME).is_file():
        check_preprocessing(read_json(folder / PREPROCESSOR_NAME))
    names = [name for name in WEIGHTS_NAMES if (folder / name).is_file()]
    if not names:
        raise ValueError(f"{folder} holds no weights; they are {' or '.join(WEIGHTS_NAMES)}.")
    params, report = segmentor_params_from_hf(read_weights(folder / names[0]).arrays, config)
    return params, config, report, content


def save_hf_folder(
    folder: str | os.PathLike[str],
    params: Mapping[str, Any],
    card: ModelCard,
    *,
    overwrite: bool = False,
) -> None:
    """Write a folder that transformers' `from_pretrained` loads, complete or not at all.

    Args:
        folder: to make.
        params: `{"segmentor": ..., "classifier": ...}` of a whole segmentor with its class head.
        card: what it is.
        overwrite: replace a model that is there.

    Raises:
        ValueError: it is a backbone alone or has no class head, transformers does not do what the
            config asks for, or the folder's name is taken.
        OSError: the disk refuses.
    """
    if set(params.get("segmentor", {})) == {"backbone"}:
        raise ValueError(
            "The weights are those of a backbone alone, and a Hugging Face Mask2Former is a whole "
            "segmentor; write them with --to=orbax."
        )
    if card.vocabulary is None or "classifier" not in params:
        raise ValueError(
            "The weights have no class head, and a Hugging Face Mask2Former has one; pass "
            "--classes and --reinit_head to add a new one."
        )
    content = config_to_hf(card)
    state_dict: dict[str, np.ndarray] = segmentor_params_to_hf(params, card.segmentor)
    with new_folder(folder, overwrite=overwrite) as temporary:
        for name, entries in ((CONFIG_NAME, content), (PREPROCESSOR_NAME, preprocessing_to_hf())):
            (temporary / name).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
        # transformers asks for the format before it reads the file.
        safetensors.numpy.save_file(state_dict, temporary / WEIGHTS_NAME, metadata={"format": "pt"})
