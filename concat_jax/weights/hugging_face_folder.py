"""Folders of `save_pretrained`: config.json, weights and preprocessor_config.json."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.numpy

from concat_jax.core import files
from concat_jax.weights.disk import one_reason
from concat_jax.weights.files.readers import INDEX_SUFFIX, read_weights
from concat_jax.weights.hugging_face_config import (
    check_preprocessing,
    config_to_hf,
    preprocessing_to_hf,
    segmentor_config_from_hf,
)
from concat_jax.weights.model_folder import ModelCard, Params, new_folder
from concat_jax.weights.report import LoadingReport
from concat_jax.weights.segmentors import segmentor_params_from_hf, segmentor_params_to_hf

CONFIG_NAME = "config.json"
PREPROCESSOR_NAME = "preprocessor_config.json"
WEIGHTS_NAME = "model.safetensors"
# Where save_pretrained puts the weights, in the order transformers looks for them.
WEIGHTS_NAMES = tuple(
    name + end for name in (WEIGHTS_NAME, "pytorch_model.bin") for end in ("", INDEX_SUFFIX)
)


def read_json_object(path: Path) -> dict[str, Any]:
    """Content of a JSON file that holds one object, else ValueError."""
    content = files.read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; it must be a JSON object.")
    return content


def load_hf_folder(
    folder: str | os.PathLike[str],
) -> tuple[Params, dict[str, Any], LoadingReport, dict[str, Any], dict[str, int], tuple[str, ...]]:
    """Read a Hugging Face Mask2Former; preprocessor_config.json may be absent.

    Returns:
      Parameters, `make_segmentor` config, report, the parsed config.json, the sides of the
      network's input as `check_preprocessing` gives them, and sentences that somebody who uses the
      weights should read.

    Raises:
      ValueError: a file is missing or broken, the model is none of ours, or its images are
        normalised otherwise.
    """
    folder = Path(folder)
    content = read_json_object(folder / CONFIG_NAME)
    config = segmentor_config_from_hf(content)
    sides: dict[str, int] = {}
    notes: tuple[str, ...] = ()
    if (folder / PREPROCESSOR_NAME).is_file():
        sides, notes = check_preprocessing(read_json_object(folder / PREPROCESSOR_NAME))
    names = [name for name in WEIGHTS_NAMES if (folder / name).is_file()]
    if not names:
        raise ValueError(f"{folder} holds no weights; they are {' or '.join(WEIGHTS_NAMES)}.")
    file = read_weights(folder / names[0])
    params, report = segmentor_params_from_hf(file.arrays, config)
    return params, config, report, content, sides, (*file.notes, *notes)


def save_hf_folder(
    folder: str | os.PathLike[str],
    params: Mapping[str, Any],
    card: ModelCard,
    *,
    overwrite: bool = False,
) -> None:
    """Write a folder that transformers' `from_pretrained` loads, complete or not at all.

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
    arrays = segmentor_params_to_hf(params, card.segmentor)
    with one_reason(folder, params), new_folder(folder, overwrite=overwrite) as temporary:
        files.write_json(temporary / CONFIG_NAME, content)
        files.write_json(temporary / PREPROCESSOR_NAME, preprocessing_to_hf(card))
        weights = temporary / WEIGHTS_NAME
        # transformers asks for the format before it reads the file.
        safetensors.numpy.save_file(arrays, weights, metadata={"format": "pt"})
        # safetensors lets nobody else read its file.
        weights.chmod((temporary / CONFIG_NAME).stat().st_mode)
