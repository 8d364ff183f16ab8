"""Hugging Face CLIP checkpoints as parameters of `concat_jax.models.clip.CLIP`; numpy only.

The names on the left are those of `transformers.CLIPModel.state_dict()`, which
`openai/clip-vit-base-patch16` and its relatives hold on the Hub as `model.safetensors`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax
import numpy as np
import safetensors
import safetensors.numpy


def _keep(array: np.ndarray) -> np.ndarray:
    return array


def _patches(kernel: np.ndarray) -> np.ndarray:
    """torch convolution [D, 3, p, p] -> matrix on row-major patches [p * p * 3, D]."""
    return kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0])


Transform = Callable[[np.ndarray], np.ndarray]


def _norm(theirs: str, ours: str) -> dict[str, tuple[str, Transform]]:
    return {
        f"{theirs}.weight": (f"{ours}/scale", _keep),
        f"{theirs}.bias": (f"{ours}/bias", _keep),
    }


def _linear(theirs: str, ours: str) -> dict[str, tuple[str, Transform]]:
    return {
        f"{theirs}.weight": (f"{ours}/kernel", np.transpose),
        f"{theirs}.bias": (f"{ours}/bias", _keep),
    }


# {} is the number of the layer in the names of a layer, and the tower in the names of both.
_LAYER = {
    **_norm("{}.layer_norm1", "{}/layer_norm1"),
    **_norm("{}.layer_norm2", "{}/layer_norm2"),
    **_linear("{}.self_attn.q_proj", "{}/self_attn/q_proj"),
    **_linear("{}.self_attn.k_proj", "{}/self_attn/k_proj"),
    **_linear("{}.self_attn.v_proj", "{}/self_attn/v_proj"),
    **_linear("{}.self_attn.out_proj", "{}/self_attn/out_proj"),
    **_linear("{}.mlp.fc1", "{}/fc1"),
    **_linear("{}.mlp.fc2", "{}/fc2"),
}

_VISION = "vision_model"
_TEXT = "text_model"

_OUTSIDE_LAYERS: dict[str, tuple[str, Transform]] = {
    "logit_scale": ("logit_scale", _keep),
    "visual_projection.weight": ("visual_projection/kernel", np.transpose),
    "text_projection.weight": ("text_projection/kernel", np.transpose),
    f"{_VISION}.embeddings.class_embedding": (f"{_VISION}/class_embedding", _keep),
    f"{_VISION}.embeddings.patch_embedding.weight": (
        f"{_VISION}/patch_embedding/projection/kernel",
        _patches,
    ),
    f"{_VISION}.embeddings.position_embedding.weight": (f"{_VISION}/position_embedding", _keep),
    **_norm(f"{_VISION}.pre_layrnorm", f"{_VISION}/pre_layrnorm"),
    **_norm(f"{_VISION}.post_layernorm", f"{_VISION}/post_layernorm"),
    f"{_TEXT}.embeddings.token_embedding.weight": (f"{_TEXT}/token_embedding/embedding", _keep),
    f"{_TEXT}.embeddings.position_embedding.weight": (f"{_TEXT}/position_embedding", _keep),
    **_norm(f"{_TEXT}.final_layer_norm", f"{_TEXT}/final_layer_norm"),
}

# Constant index vectors (0, 1, 2, ...) that transformers stored before version 4.31.
_BUFFERS = frozenset({f"{_VISION}.embeddings.position_ids", f"{_TEXT}.embeddings.position_ids"})


def _table(state_dict: Mapping[str, Any]) -> dict[str, tuple[str, Transform]]:
    """Their name -> (our path, transform) for every parameter; depths are read off the names."""
    table = dict(_OUTSIDE_LAYERS)
    for tower in (_VISION, _TEXT):
        pattern = re.compile(rf"{tower}\.encoder\.layers\.(\d+)\.")
        found = [int(m.group(1)) for key in state_dict if (m := pattern.match(key))]
        for layer in range(1 + max(found, default=-1)):
            for theirs, (ours, transform) in _LAYER.items():
                key = theirs.format(f"{tower}.encoder.layers.{layer}")
                table[key] = (ours.format(f"{tower}/layers_{layer}"), transform)
    return table


def clip_params_from_hf(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of `CLIP` from a Hugging Face `CLIPModel` state dict.

    Args:
      state_dict: name -> array, or anything `numpy.asarray` takes (safetensors' numpy loader, CPU
        torch tensors). Every parameter of both towers must be there; the index buffers of old files
        are passed over.

    Returns:
      Nested dict of float32 numpy arrays: the "params" collection of a `CLIP` with patch stem whose
      fields are `clip_config_from_hf` of the checkpoint's config.json.

    Raises:
      ValueError: if a parameter is missing or unknown, or a value is not finite.
    """
    table = _table(state_dict)
    missing = sorted(table.keys() - state_dict.keys())
    unknown = sorted(state_dict.keys() - table.keys() - _BUFFERS)
    for what, names in (("lacks", missing), ("also holds", unknown)):
        if names:
            raise ValueError(
                f"This is no state dict of a Hugging Face CLIPModel: it {what} {len(names)} "
                f"parameters, the first {names[0]!r}."
            )
    params: dict[str, Any] = {}
    for theirs, (ours, transform) in table.items():
        value = np.asarray(state_dict[theirs], dtype=np.float32)
        if not np.isfinite(value).all():
            raise ValueError(f"The CLIP checkpoint holds a non-finite value in {theirs!r}.")
        *folders, leaf = ours.split("/")
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = np.array(transform(value), order="C")  # a copy that does not alias theirs
    return params


# transformers writes only what differs from these, the defaults of CLIPVisionConfig and
# CLIPTextConfig.
_VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}


def clip_config_from_hf(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields for `make_clip` from the config.json of a Hugging Face CLIP checkpoint.

    Args:
      hf_config: the parsed file, or `transformers.CLIPConfig.to_dict()`.

    Returns:
      Field name -> value. The legacy `eos_token_id` 2 becomes `eot_id` None, which is how
      transformers reads
      it: pool at the largest id.

    Raises:
      ValueError: if the towers' activations differ, or a layer norm epsilon is not 1e-5.
    """
    vision = {**_VISION_DEFAULTS, **hf_config.get("vision_config", {})}
    text = {**_TEXT_DEFAULTS, **hf_config.get("text_config", {})}
    if vision["hidden_act"] != text["hidden_act"]:
        raise ValueError(
            f"The CLIP checkpoint's towers have different activations, {vision['hidden_act']!r} "
            f"and {text['hidden_act']!r}; CLIP here takes one for both."
        )
    for epsilon in (vision["layer_norm_eps"], text["layer_norm_eps"]):
        if epsilon != 1e-5:
            raise ValueError(f"The CLIP checkpoint has layer_norm_eps {epsilon}; here it is 1e-5.")
    return {
        "embed_dim": hf_config.get("projection_dim", 512),
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "image_width": vision["hidden_size"],
        "image_depth": vision["num_hidden_layers"],
        "image_heads": vision["num_attention_heads"],
        "image_mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
        "vocab_size": text["vocab_size"],
        "context_length": text["max_position_embeddings"],
        "text_width": text["hidden_size"],
        "text_depth": text["num_hidden_layers"],
        "text_heads": text["num_attention_heads"],
        "text_mlp_ratio": text["intermediate_size"] / text["hidden_size"],
        "activation": vision["hidden_act"],
        "eot_id": None if text["eos_token_id"] == 2 else text["eos_token_id"],
    }


def clip_params_from_file(path: Path, abstract: Any) -> dict[str, Any]:
    """Parameters of `CLIP` from a Hugging Face `model.safetensors`, checked against the config.

    Args:
      path: the file.
      abstract: tree of shapes that the configured CLIP has.

    Returns:
      As `clip_params_from_hf`.

    Raises:
      ValueError: if the file is no safetensors file, holds another model, or one of another size.
    """
    try:
        state_dict = safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}.") from error
    params = clip_params_from_hf(state_dict)
    ours = flax.traverse_util.flatten_dict(params, sep="/")
    wanted = flax.traverse_util.flatten_dict(abstract, sep="/")
    for name in sorted(ours.keys() | wanted.keys()):
        theirs = ours[name].shape if name in ours else "nothing"
        mine = wanted[name].shape if name in wanted else "nothing"
        if theirs != mine:
            raise ValueError(
                f"{path} holds {theirs} for {name} where the config's CLIP has {mine}; make "
                "config.model.clip fit the file."
            )
    return params
