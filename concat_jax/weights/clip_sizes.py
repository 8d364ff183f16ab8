"""Fields of CLIP from where they stand: a Hugging Face or open_clip config, or the arrays' shapes.

A config that asks for something that `concat_jax.models.clip.CLIP` does not do is refused here,
before its weights give wrong numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from concat_jax.models.clip import CLIP_VARIANTS
from concat_jax.models.clip_images import CLIP_MEAN, CLIP_STD
from concat_jax.models.clip_pooling import STRIDE, resnet_heads
from concat_jax.weights.names.clip import BACKBONE, POOLING, TEXT, VISION
from concat_jax.weights.names.table import Naming, Shape
from concat_jax.weights.sizes import HubConfig, check_statistics, read_sizes

Config = dict[str, Any]
# Of an attention head in every CLIP of OpenAI (`clip/model.py build_model`).
HEAD_WIDTH = 64


def _tower(name: str, width: int, heads: int, **own: tuple[str, Any]) -> HubConfig:
    """A tower's section, with transformers' defaults."""
    fields = {
        f"{name}_width": ("hidden_size", width),
        f"{name}_hidden": ("intermediate_size", 4 * width),
        f"{name}_depth": ("num_hidden_layers", 12),
        f"{name}_heads": ("num_attention_heads", heads),
        "activation": ("hidden_act", "quick_gelu"),
    }
    return HubConfig(fields | own, {"num_channels": 3, "layer_norm_eps": 1e-5})


_TOWERS = {
    "vision_config": _tower(
        "image", 768, 12, image_size=("image_size", 224), patch_size=("patch_size", 32)
    ),
    "text_config": _tower(
        "text",
        512,
        8,
        vocab_size=("vocab_size", 49408),
        context_length=("max_position_embeddings", 77),
        eot_id=("eos_token_id", 49407),
    ),
}
_BOTH = HubConfig({"embed_dim": ("projection_dim", 512)}, {"model_type": "clip"})
# What shapes show: all but heads, activation and end of text.
_TEXT_SIZES = {
    "embed_dim": "text_projection/kernel [_, n]",
    "vocab_size": f"{TEXT}/token_embedding/embedding [n, _]",
    "context_length": f"{TEXT}/position_embedding [n, _]",
    "text_width": f"{TEXT}/token_embedding/embedding [_, n]",
    "text_depth": f"{TEXT}/layers_#",
    "text_hidden": f"{TEXT}/layers_0/fc1/kernel [_, n]",
}
_VIT_SIZES = {
    "patch_numbers": f"{VISION}/patch_embedding/projection/kernel [n, _]",
    "image_positions": f"{VISION}/position_embedding [n, _]",
    "image_width": f"{VISION}/class_embedding [n]",
    "image_depth": f"{VISION}/layers_#",
    "image_hidden": f"{VISION}/layers_0/fc1/kernel [_, n]",
}
# The side that open_clip's ConvNeXts are trained at where nothing tells.
_CONVNEXT_SIDE = 256
_OPEN_CLIP = {
    "vision_cfg": HubConfig(
        {"head_width": ("head_width", HEAD_WIDTH), "image_size": ("image_size", 224)}
    ),
    "text_cfg": HubConfig({"text_heads": ("heads", 8)}),
}
# Keys of open_clip's vision_cfg and text_cfg (open_clip src/open_clip/{model,transformer}.py) that
# change what the same parameters compute, and their values in the plain CLIP. Keys that are not
# here only matter in training, or add parameters, which the rename table then names.
_OPEN_CLIP_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "timm_model_name": (None, "", "convnext_base", "convnext_large"),
    "timm_pool": ("", "avg"),
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


def clip_config_from_hf(content: Mapping[str, Any]) -> Config:
    """Fields for `make_clip` from the config.json of a Hugging Face CLIP.

    The legacy `eos_token_id` 2 becomes `eot_id` None, which is how transformers reads it: pool at
    the largest id. Raises ValueError if it describes another model, the towers' activations differ,
    or a value is one that `CLIP` does not have.
    """
    config = _BOTH.read(content, "it")
    for name, section in _TOWERS.items():
        # OpenAI's own folders have both; transformers lets the second win, its defaults included.
        given = content.get(f"{name}_dict") or content.get(name) or {}
        fields = section.read(given, f"its {name}")
        if (activation := config.get("activation", fields["activation"])) != fields["activation"]:
            raise ValueError(
                f"its towers have different activations, {activation!r} and "
                f"{fields['activation']!r}, and CLIP here takes one for both"
            )
        config |= fields
    config["eot_id"] = None if config["eot_id"] == 2 else config["eot_id"]
    for tower in ("image", "text"):
        config[f"{tower}_mlp_ratio"] = config.pop(f"{tower}_hidden") / config[f"{tower}_width"]
    return config


def sizes_from_shapes(shapes: Mapping[str, Shape], naming: Naming | None = None) -> Config:
    """Fields for `make_clip` that shapes show: all but heads, activation and end of text.

    Shapes are by our path ("vision_model/class_embedding"), of a CLIP with patch stem or a
    convolutional tower; errors use the file's `naming`. Raises ValueError if the shapes are no
    CLIP's.
    """
    config = read_sizes(_TEXT_SIZES, shapes, naming)
    config["text_mlp_ratio"] = config.pop("text_hidden") / config["text_width"]
    if any(path.startswith(BACKBONE) for path in shapes):
        return config | _conv_sizes(shapes, naming)
    config |= read_sizes(_VIT_SIZES, shapes, naming)
    config["image_mlp_ratio"] = config.pop("image_hidden") / config["image_width"]
    numbers, positions = config.pop("patch_numbers"), config.pop("image_positions")
    patch_size, side = math.isqrt(numbers // 3), math.isqrt(positions - 1)
    if 3 * patch_size**2 != numbers or side**2 != positions - 1:
        raise ValueError(
            f"its {positions} positions and patches of {numbers} numbers are no square pictures of "
            "square patches"
        )
    return {**config, "image_size": side * patch_size, "patch_size": patch_size}


def _conv_sizes(shapes: Mapping[str, Shape], naming: Naming | None) -> Config:
    """Fields for `make_clip` of a convolutional image tower.

    A ConvNeXt's image_size, which none of its shapes shows, is that of open_clip's smaller ones.
    """
    is_resnet = f"{POOLING}positions" in shapes
    stage = f"{BACKBONE}{'res' if is_resnet else 'stage'}"
    first = 2 if is_resnet else 0
    places = {f"{k}": f"{stage}{first + k}_block#" for k in range(4)}
    stem = f"{BACKBONE}stem_conv{'3' if is_resnet else ''}/kernel [_, _, _, n]"
    places["image_width"] = stem
    found = read_sizes(places, shapes, naming)
    width = found.pop("image_width")
    config = {
        "image_tower": "resnet" if is_resnet else "convnext",
        "image_stages": tuple(found.values()),
        "image_width": width,
        "patch_size": STRIDE,
    }
    if not is_resnet:
        is_mlp = f"{POOLING}fc1/kernel" in shapes
        own = {"projection": "mlp" if is_mlp else "linear", "image_size": _CONVNEXT_SIDE}
        return config | own
    positions = read_sizes({"n": f"{POOLING}positions [n, _]"}, shapes, naming)["n"]
    side = math.isqrt(positions - 1)
    if side**2 != positions - 1:
        raise ValueError(f"its {positions} positions are no square")
    return config | {"image_size": side * STRIDE, "image_heads": resnet_heads(width)}


def clip_config_from_open_clip(content: Mapping[str, Any], sizes: Config) -> Config:
    """Fields for `make_clip` from the open_clip_config.json beside open_clip's weights.

    It adds what shapes do not show to `sizes`, which they do. Raises ValueError if it describes
    towers that `CLIP` does not have.
    """
    model = content.get("model_cfg", content)
    preprocessing = content.get("preprocess_cfg") or {}
    if not (isinstance(model, Mapping) and isinstance(preprocessing, Mapping)):
        raise ValueError("its model_cfg or preprocess_cfg is no JSON object")
    config = {**sizes, "activation": "quick_gelu" if model.get("quick_gelu", False) else "gelu"}
    for name, section in _OPEN_CLIP.items():
        entries = model.get(name)
        if not isinstance(entries, Mapping):
            raise ValueError("it has no vision_cfg and text_cfg")
        for key, value in entries.items():
            if key in _OPEN_CLIP_PLAIN and value not in _OPEN_CLIP_PLAIN[key]:
                raise ValueError(f"its {name}.{key} is {value!r}, which CLIP here does not do")
        config |= section.read(entries, f"its {name}")
    tower = config.get("image_tower", "vit")
    if bool(model["vision_cfg"].get("timm_model_name")) != (tower == "convnext"):
        raise ValueError(f"its vision_cfg is of another image tower than the weights' {tower}")
    check_statistics(preprocessing, "its preprocess_cfg", {"mean": CLIP_MEAN, "std": CLIP_STD})
    head_width, side = config.pop("head_width"), config["image_size"]
    if tower != "convnext":
        config["image_size"] = sizes["image_size"]  # positions may have been resized since
    elif side % STRIDE:
        raise ValueError(f"its vision_cfg has image_size {side}, no multiple of {STRIDE}")
    if tower == "vit":
        config["image_heads"] = config["image_width"] // head_width
    return config


def heads_as_openai(sizes: Config) -> Config:
    """`sizes` with heads of OpenAI's width, for files that do not say how many there are.

    Raises ValueError if a tower's width is no multiple of it.
    """
    heads = {}
    for tower in ("image", "text") if "image_tower" not in sizes else ("text",):
        heads[f"{tower}_heads"], rest = divmod(width := sizes[f"{tower}_width"], HEAD_WIDTH)
        if rest:
            raise ValueError(
                f"its {tower} tower is {width} wide, so its heads cannot all be {HEAD_WIDTH} wide "
                "as in OpenAI's CLIPs; put its config.json or open_clip_config.json beside it"
            )
    return {**sizes, **heads}


def variant_of(config: Mapping[str, Any]) -> str:
    """The name in `CLIP_VARIANTS` of a CLIP of these sizes, "" where it has none."""
    fitting = (name for name, fields in CLIP_VARIANTS.items() if fields.items() <= config.items())
    return next(fitting, "")
