"""Fields of CLIP from where they stand: a Hugging Face or open_clip config, or the arrays' shapes.

A config that asks for something that `concat_jax.models.clip.CLIP` does not do is refused here,
before its weights give wrong numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from concat_jax.models.clip_images import CLIP_MEAN, CLIP_STD
from concat_jax.models.clip_variants import CLIP_VARIANTS
from concat_jax.weights.names.clip import TEXT, VISION

Config = dict[str, Any]

# Of an attention head in every CLIP of OpenAI (`clip/model.py build_model`).
HEAD_WIDTH = 64
# Pixel statistics that differ by less are the same ones, rounded.
STATISTICS_TOLERANCE = 1e-3

# transformers writes only what differs from these, the defaults of its CLIPVisionConfig and
# CLIPTextConfig.
_VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "num_channels": 3,
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

# Keys of open_clip's vision_cfg and text_cfg (open_clip src/open_clip/{model,transformer}.py) that
# change what the same parameters compute, and their values in the plain CLIP. Keys that are not
# here only matter in training, or add parameters, which the rename table then names.
_OPEN_CLIP_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "timm_model_name": (None, ""),
    "hf_model_name": (None, ""),
    "pool_type": ("tok", "argmax"),
    "global_average_pool": (False,),
    "attentional_pool": (False, None),
    "final_ln_after_pool": (False,),
    "no_ln_pre": (False,),
    "no_causal_mask": (False,),
    "embed_cls": (False,),
    "pos_embed_type": ("learnable",),
    "input_patchnorm": (False,),
    "act_kwargs": (None, {}),
    "norm_kwargs": (None, {}),
}


def clip_config_from_hf(hf_config: Mapping[str, Any]) -> Config:
    """Fields for `make_clip` from the config.json of a Hugging Face CLIP.

    Args:
        hf_config: the parsed file, or `transformers.CLIPConfig.to_dict()`.

    Returns:
        Field name -> value. The legacy `eos_token_id` 2 becomes `eot_id` None, which is how
        transformers reads it: pool at the largest id.

    Raises:
        ValueError: it describes another model, the towers' activations differ, or a value is one
            that `CLIP` does not have.
    """
    if hf_config.get("model_type", "clip") != "clip":
        raise ValueError(f"it describes a {hf_config['model_type']!r} and no 'clip'")
    vision = _section(hf_config, "vision_config", _VISION_DEFAULTS)
    text = _section(hf_config, "text_config", _TEXT_DEFAULTS)
    if vision["hidden_act"] != text["hidden_act"]:
        raise ValueError(
            f"its towers have different activations, {vision['hidden_act']!r} and "
            f"{text['hidden_act']!r}, and CLIP here takes one for both"
        )
    for epsilon in (vision["layer_norm_eps"], text["layer_norm_eps"]):
        if epsilon != 1e-5:
            raise ValueError(f"its layer_norm_eps is {epsilon}, and here it is 1e-5")
    if vision["num_channels"] != 3:
        raise ValueError(f"its pictures have {vision['num_channels']} channels, and here 3")
    end = text["eos_token_id"]
    if not isinstance(end, int):
        raise ValueError(f"its eos_token_id is {end!r}, and here texts end with one id")
    return {
        "embed_dim": hf_config.get("projection_dim", 512),
        "image_size": _side(vision["image_size"], "image_size"),
        "patch_size": _side(vision["patch_size"], "patch_size"),
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
        "eot_id": None if end == 2 else end,
    }


def _section(
    hf_config: Mapping[str, Any], name: str, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    section = {**defaults, **(hf_config.get(name) or {})}
    # OpenAI's own folders have both; transformers lets the second win, its defaults included.
    if older := hf_config.get(f"{name}_dict"):
        section |= {**defaults, **older}
    return section


def _side(size: Any, name: str) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"its {name} is {size}, and here it is one side of a square")
    return sides.pop()


def clip_config_from_open_clip(config: Mapping[str, Any], sizes: Config) -> Config:
    """Fields for `make_clip` from the open_clip_config.json beside open_clip's weights.

    Args:
        config: the parsed file, or its "model_cfg".
        sizes: fields that the weights' shapes say; the config adds what shapes do not show.

    Raises:
        ValueError: it describes towers that `CLIP` does not have.
    """
    model = config.get("model_cfg", config)
    vision, text = model.get("vision_cfg"), model.get("text_cfg")
    if not isinstance(vision, Mapping) or not isinstance(text, Mapping):
        raise ValueError("it has no vision_cfg and text_cfg")
    for section, entries in (("vision_cfg", vision), ("text_cfg", text)):
        for key, value in entries.items():
            if key in _OPEN_CLIP_PLAIN and value not in _OPEN_CLIP_PLAIN[key]:
                raise ValueError(f"its {section}.{key} is {value!r}, which CLIP here does not do")
    preprocessing = config.get("preprocess_cfg") or {}
    check_statistics(preprocessing.get("mean"), preprocessing.get("std"))
    return {
        **sizes,
        "image_heads": sizes["image_width"] // vision.get("head_width", HEAD_WIDTH),
        "text_heads": text.get("heads", 8),
        "activation": "quick_gelu" if model.get("quick_gelu", False) else "gelu",
    }


def check_statistics(mean: Any, std: Any) -> None:
    """Refuse pixel statistics that are not OpenAI's; None is not given.

    Raises:
        ValueError: they differ.
    """
    for theirs, ours, name in ((mean, CLIP_MEAN, "mean"), (std, CLIP_STD, "std")):
        if theirs is None:
            continue
        if np.shape(theirs) != (3,) or not np.allclose(theirs, ours, 0, STATISTICS_TOLERANCE):
            raise ValueError(
                f"its pictures are normalised with the {name} {list(theirs)}, and here with "
                f"CLIP's {list(ours)}"
            )


def sizes_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> Config:
    """Fields for `make_clip` that shapes show: all but heads, activation and end of text.

    Args:
        shapes: our path ("vision_model/class_embedding") -> shape, of a CLIP with patch stem.

    Raises:
        ValueError: the shapes are no CLIP's.
    """
    try:
        patch_numbers, image_width = shapes[f"{VISION}/patch_embedding/projection/kernel"]
        positions, _ = shapes[f"{VISION}/position_embedding"]
        vocab_size, text_width = shapes[f"{TEXT}/token_embedding/embedding"]
        context_length, _ = shapes[f"{TEXT}/position_embedding"]
        _, embed_dim = shapes["visual_projection/kernel"]
        hidden = {tower: shapes[f"{tower}/layers_0/fc1/kernel"][1] for tower in (VISION, TEXT)}
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError("its towers are no transformers on patches and on tokens") from error
    patch_size = math.isqrt(patch_numbers // 3)
    side = math.isqrt(positions - 1)
    if 3 * patch_size**2 != patch_numbers or side**2 != positions - 1:
        raise ValueError(
            f"its {positions} positions and patches of {patch_numbers} numbers are no square "
            "pictures of square patches"
        )
    return {
        "embed_dim": embed_dim,
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "image_width": image_width,
        "image_depth": _depth(shapes, VISION),
        "image_mlp_ratio": hidden[VISION] / image_width,
        "vocab_size": vocab_size,
        "context_length": context_length,
        "text_width": text_width,
        "text_depth": _depth(shapes, TEXT),
        "text_mlp_ratio": hidden[TEXT] / text_width,
    }


def _depth(shapes: Mapping[str, tuple[int, ...]], tower: str) -> int:
    pattern = re.compile(rf"{tower}/layers_(\d+)/")
    return len({match.group(1) for name in shapes if (match := pattern.match(name))})


def heads_as_openai(sizes: Config) -> Config:
    """`sizes` with heads of OpenAI's width, for files that do not say how many there are.

    Raises:
        ValueError: a tower's width is no multiple of it.
    """
    for tower in ("image", "text"):
        if (width := sizes[f"{tower}_width"]) % HEAD_WIDTH:
            raise ValueError(
                f"its {tower} tower is {width} wide, so its heads cannot all be {HEAD_WIDTH} wide "
                "as in OpenAI's CLIPs; put its config.json or open_clip_config.json beside it"
            )
    return {**sizes, **{f"{t}_heads": sizes[f"{t}_width"] // HEAD_WIDTH for t in ("image", "text")}}


def variant_of(config: Mapping[str, Any]) -> str:
    """The name in `CLIP_VARIANTS` of a CLIP of these sizes, "" where it has none."""
    for name, fields in CLIP_VARIANTS.items():
        if all(config.get(key) == value for key, value in fields.items()):
            return name
    return ""
