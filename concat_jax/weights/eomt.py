"""Configs of a Hugging Face EoMT, and of the DINOs that can be its encoder, to ours and back.

Sources: `transformers` `models/eomt`, `eomt_dinov3`, `dinov2`, `dinov2_with_registers` and
`dinov3_vit`, `configuration_*.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from concat_jax.models.vit import ViT
from concat_jax.weights.names import vit as names
from concat_jax.weights.names.table import Naming
from concat_jax.weights.sizes import HubConfig

# model_type -> the class that transformers has for it.
ARCHITECTURES = {
    "eomt": "EomtForUniversalSegmentation",
    "eomt_dinov3": "EomtDinov3ForUniversalSegmentation",
}
# model_type -> the family of names.
ENCODERS = {"dinov2": "dinov2", "dinov2_with_registers": "dinov2", "dinov3_vit": "dinov3"}
_ENCODER_FIELDS = {
    "width": ("hidden_size", 1024),
    "depth": ("num_hidden_layers", 24),
    "num_heads": ("num_attention_heads", 16),
    "patch_size": ("patch_size", 16),
    "norm_epsilon": ("layer_norm_eps", 1e-6),
}
_HEADS = {
    "num_registers": ("num_register_tokens", 4),
    "image_size": ("image_size", 640),
    "num_queries": ("num_queries", 200),
    "num_blocks": ("num_blocks", 4),
    "num_upscales": ("num_upscale_blocks", 2),
}
_FIXED = {"hidden_act": "gelu", "num_channels": 3}
_LEARNED = {**_FIXED, "use_swiglu_ffn": False}
_ROTARY = {**_FIXED, "use_gated_mlp": False, "key_bias": False}
_ROTARY |= dict.fromkeys(("query_bias", "value_bias", "proj_bias", "mlp_bias"), True)
_RATIO, _FFN = {"mlp_ratio": ("mlp_ratio", 4)}, {"ffn_width": ("intermediate_size", 4096)}
_THETA = {"rope_theta": 100.0, "rope_type": "default"}
_REGISTERS = {"may_be_none": ("num_register_tokens",)}
_EOMT = {
    "eomt": HubConfig({**_ENCODER_FIELDS, **_HEADS, **_RATIO}, _LEARNED, **_REGISTERS),
    "eomt_dinov3": HubConfig(
        {**_ENCODER_FIELDS, **_HEADS, **_FFN},
        {**_ROTARY, "rope_parameters": _THETA},
        **_REGISTERS,
    ),
}
_BASE = {"width": ("hidden_size", 768), "depth": ("num_hidden_layers", 12)}
_BASE |= {"num_heads": ("num_attention_heads", 12), "image_size": ("image_size", 224)}
_SMALL = {"width": ("hidden_size", 384), "num_heads": ("num_attention_heads", 6)}
_SMALL |= {"norm_epsilon": ("layer_norm_eps", 1e-5), "ffn_width": ("intermediate_size", 1536)}
_BASE |= {"num_registers": ("num_register_tokens", 0)}
_DINO = {
    "dinov2": HubConfig(
        {**_ENCODER_FIELDS, **_BASE, **_RATIO}, {**_LEARNED, "qkv_bias": True}, **_REGISTERS
    ),
    "dinov3": HubConfig(
        {**_ENCODER_FIELDS, **_BASE, **_SMALL}, {**_ROTARY, "rope_theta": 100.0}, **_REGISTERS
    ),
}
# What transformers assumes otherwise where it is absent; model_type -> fields.
_ASSUMED = {"dinov2": {"patch_size": 14}, "dinov2_with_registers": {"num_register_tokens": 4}}


def config_from_hf(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A `make_segmentor` config of kind "eomt" from the config.json of an EoMT.

    Raises ValueError for settings that our segmentor does not have.
    """
    if content.get("rope_theta") is not None:  # transformers reads it of either place
        rotary = {**_THETA, "rope_theta": content["rope_theta"]}
        content = {**content, "rope_parameters": content.get("rope_parameters") or rotary}
    fields = _EOMT[content["model_type"]].read(content, where)
    own = {name: fields.pop(name) for name in ("num_queries", "num_blocks", "num_upscales")}
    side, patch = fields["image_size"], fields["patch_size"]
    backbone = _backbone(fields, where)
    if side % patch:
        raise ValueError(
            f"{where} has image_size {side}, which is not so many patches of {patch} pixels: "
            "transformers leaves the rest of a picture out, which is not done here"
        )
    if patch % 2 ** own["num_upscales"]:
        raise ValueError(
            f"{where} has patch_size {patch}, which num_upscale_blocks {own['num_upscales']} do "
            "not halve evenly; that is not done here"
        )
    return {"kind": "eomt", "backbone": backbone, **own}


def image_size(content: Mapping[str, Any], where: str) -> int:
    """The side of the pictures of an EoMT by its config.json; errors as above."""
    return _EOMT[content["model_type"]].read(content, where)["image_size"]


def encoder_config_from_hf(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A `make_segmentor` config around a DINO, whose config.json this is; errors as above."""
    kind = content["model_type"]
    content = {**_ASSUMED.get(kind, {}), **content}
    fields = _DINO[ENCODERS[kind]].read(content, where)
    upscales = 2 if fields["patch_size"] % 4 == 0 else 1
    heads = {"num_blocks": min(4, fields["depth"]), "num_upscales": upscales}
    return {"kind": "eomt", "backbone": _backbone(fields, where), **heads}


def _backbone(fields: dict[str, Any], where: str) -> dict[str, Any]:
    side, patch = fields.pop("image_size"), fields["patch_size"]
    if side < patch:
        raise ValueError(
            f"{where} has image_size {side}, less than one patch of {patch} pixels; take it from "
            "where the weights are from"
        )
    if "mlp_ratio" not in fields:
        return {**fields, "positions": "rotary", "key_bias": False}
    ffn_width = fields.pop("mlp_ratio") * fields["width"]
    return {**fields, "ffn_width": ffn_width, "grid": side // patch}


def family_of(config: Mapping[str, Any]) -> str:
    """The model_type of an EoMT of our config; ValueError where transformers has none such."""
    backbone = config.get("backbone", {})
    if config.get("frozen") or "kind" in backbone or "variant" in backbone:
        raise ValueError(
            "transformers has no EoMT with a frozen encoder, none on CLIP, and our variants by "
            "name are not its; it cannot be written."
        )
    is_rotary = backbone.get("positions") == "rotary"
    fixed = {"layer_scale": True, "key_bias": not is_rotary}
    fixed |= {"rotary_theta": _THETA["rope_theta"]} if is_rotary else {}
    for name, theirs in fixed.items():
        if (value := backbone.get(name, getattr(ViT, name))) != theirs:
            raise ValueError(
                f"The backbone's {name} is {value}, and {theirs} in transformers' EoMT; it cannot "
                "be written."
            )
    return "eomt_dinov3" if is_rotary else "eomt"


def config_to_hf(settings: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """The fields of config.json, the inverse of `config_from_hf`, for pictures of this side."""
    family, backbone = family_of(settings), dict(settings["backbone"])
    form = _EOMT[family]
    fields = {**{name: default for name, (_, default) in form.fields.items()}, **backbone}
    fields |= {name: settings[name] for name in ("num_queries", "num_blocks", "num_upscales")}
    fields["image_size"] = image_size
    if family == "eomt":
        fields["image_size"] = backbone.get("grid", 40) * fields["patch_size"]
        ratio, rest = divmod(backbone.get("ffn_width", 4096), fields["width"])
        if rest:
            raise ValueError(
                "An EoMT of Hugging Face has an MLP that is so many times as wide as its ViT; it "
                "cannot be written."
            )
        fields["mlp_ratio"] = ratio
    return {"architectures": [ARCHITECTURES[family]], "model_type": family, **form.write(fields)}


def naming(config: Mapping[str, Any]) -> Naming:
    """Hugging Face's names of an EoMT of our config."""
    return names.hugging_face(family_of(config))


def buffers(num_blocks: int, num_classes: int) -> dict[str, np.ndarray]:
    """What transformers keeps beside the parameters: no masks at inference, and class weights."""
    weights = np.ones(num_classes + 1, np.float32)
    weights[-1] = 0.1
    masks = np.zeros(num_blocks, np.float32)
    return {"attn_mask_probs": masks, "criterion.empty_weight": weights}
