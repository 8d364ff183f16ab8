"""config.json and preprocessor_config.json of a Hugging Face Mask2Former, read and written.

Source: `transformers` `models/mask2former/configuration_mask2former.py`, `models/swin` and
`models/resnet`. What our segmentor has no place for is refused by name, so that a folder which is
read gives the outputs it gives there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from concat_jax.models.backbones.resnet import BOTTLENECK_EXPANSION, ResNet
from concat_jax.models.backbones.swin import NORM_EPSILON, Swin
from concat_jax.models.segmentor import DEFAULTS, IMAGENET_MEAN, IMAGENET_STD
from concat_jax.weights.model_folder import ModelCard

# What transformers assumes where config.json says nothing.
_MODEL_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_dim": 256,
        "feature_size": 256,
        "mask_feature_size": 256,
        "encoder_feedforward_dim": 1024,
        "dim_feedforward": 2048,
        "encoder_layers": 6,
        "decoder_layers": 10,
        "num_attention_heads": 8,
        "num_queries": 100,
        "activation_function": "relu",
        "pre_norm": False,
        "enforce_input_projection": False,
        "common_stride": 4,
        "feature_strides": [4, 8, 16, 32],
    }
)
_SWIN_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "embed_dim": 96,
        "depths": [2, 2, 6, 2],
        "num_heads": [3, 6, 12, 24],
        "window_size": 7,
        "patch_size": 4,
        "mlp_ratio": 4.0,
        "num_channels": 3,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "use_absolute_embeddings": False,
        "layer_norm_eps": NORM_EPSILON,
        "out_features": None,
    }
)
_RESNET_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "embedding_size": 64,
        "hidden_sizes": [256, 512, 1024, 2048],
        "depths": [3, 4, 6, 3],
        "layer_type": "bottleneck",
        "num_channels": 3,
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        "out_features": None,
    }
)
_STAGES = ["stage1", "stage2", "stage3", "stage4"]
# Values that the segmentor is built for, and has no field to change.
_MODEL_FIXED = {
    "activation_function": "relu",
    "pre_norm": False,
    "enforce_input_projection": False,
    "common_stride": 4,
    "feature_strides": [4, 8, 16, 32],
}
_SWIN_FIXED = {
    "num_channels": 3,
    "qkv_bias": True,
    "hidden_act": "gelu",
    "use_absolute_embeddings": False,
    "layer_norm_eps": NORM_EPSILON,
    "out_features": _STAGES,
}
_RESNET_FIXED = {
    "num_channels": 3,
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
    "out_features": _STAGES,
}
# Values of the segmentor that transformers has no field for.
_OURS_FIXED = {"num_points": 4, "num_groups": 32}
# Published files round the statistics of ImageNet to three digits or to float32.
_STATISTICS_TOLERANCE = 1e-3
# Our own entry of config.json: what the format has no field for; transformers passes over it.
EXTRA_KEY = "concat_jax"


def segmentor_config_from_hf(content: Mapping[str, Any]) -> dict[str, Any]:
    """A `make_segmentor` config from config.json.

    Args:
        content: the parsed file, or `Mask2FormerConfig.to_dict()`.

    Returns:
        Every field that says how large the network is; precision and remat stay the defaults.

    Raises:
        ValueError: it is another model, on another backbone than a Swin or a ResNet, or set to
            something that our segmentor does not do.
    """
    kind = content.get("model_type")
    if kind != "mask2former":
        raise ValueError(
            f"config.json is of a model of type {kind!r}; only 'mask2former' can be converted."
        )
    backbone = content.get("backbone_config")
    if not isinstance(backbone, Mapping):
        named = content.get("backbone")
        raise ValueError(
            f"config.json names the backbone {named!r} without a backbone_config; save the model "
            "with its backbone's config."
            if named
            else "config.json has no backbone_config; save the model again with save_pretrained."
        )
    settings = {**_MODEL_DEFAULTS, **content}
    _check_fixed(settings, _MODEL_FIXED, "config.json")
    width = settings["hidden_dim"]
    for field in ("feature_size", "mask_feature_size"):
        if settings[field] != width:
            raise ValueError(
                f"config.json has {field} {settings[field]} and hidden_dim {width}; the segmentor "
                "has one width for both."
            )
    return {
        "backbone": _backbone_from_hf(backbone),
        "width": width,
        "num_queries": settings["num_queries"],
        # transformers counts the prediction from the learned queries as a layer.
        "num_decoder_layers": settings["decoder_layers"] - 1,
        "num_encoder_layers": settings["encoder_layers"],
        "num_heads": settings["num_attention_heads"],
        "ffn_width": settings["encoder_feedforward_dim"],
        "decoder_ffn_width": settings["dim_feedforward"],
        **_OURS_FIXED,
    }


def _backbone_from_hf(content: Mapping[str, Any]) -> dict[str, Any]:
    kind = content.get("model_type")
    where = "backbone_config in config.json"
    if kind == "swin":
        settings = {**_SWIN_DEFAULTS, **content}
        _check_fixed(settings, _SWIN_FIXED, where)
        if settings["mlp_ratio"] != int(settings["mlp_ratio"]):
            raise ValueError(f"{where} has mlp_ratio {settings['mlp_ratio']}; it must be whole.")
        return {
            "kind": "swin",
            "stage_sizes": list(settings["depths"]),
            "width": settings["embed_dim"],
            "num_heads": list(settings["num_heads"]),
            "window_size": settings["window_size"],
            "patch_size": settings["patch_size"],
            "mlp_ratio": int(settings["mlp_ratio"]),
        }
    if kind == "resnet":
        settings = {**_RESNET_DEFAULTS, **content}
        _check_fixed(settings, _RESNET_FIXED, where)
        width, block = settings["embedding_size"], settings["layer_type"]
        if list(settings["hidden_sizes"]) != _hidden_sizes(width, block):
            raise ValueError(
                f"{where} has hidden_sizes {list(settings['hidden_sizes'])}; with embedding_size "
                f"{width} and layer_type {block!r} they must be {_hidden_sizes(width, block)}."
            )
        return {
            "kind": "resnet",
            "stage_sizes": list(settings["depths"]),
            "width": width,
            "block": block,
        }
    raise ValueError(f"{where} is of a {kind!r}; only 'swin' and 'resnet' can be converted.")


def _hidden_sizes(width: int, block: str) -> list[int]:
    expansion = BOTTLENECK_EXPANSION if block == "bottleneck" else 1
    return [width * expansion * factor for factor in (1, 2, 4, 8)]


def _check_fixed(settings: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    for field, needed in fixed.items():
        value = settings[field]
        value = list(value) if isinstance(value, tuple) else value
        # Absent out_features: Mask2Former sets them itself.
        if value != needed and not (field == "out_features" and value is None):
            raise ValueError(
                f"{where} has {field} {value!r}, which the segmentor does not do; it must be "
                f"{needed!r}."
            )


def check_preprocessing(content: Mapping[str, Any]) -> None:
    """Refuse a preprocessor_config.json that feeds the model other numbers than we do.

    Raises:
        ValueError: the images are not scaled to 0..1 and normalised with ImageNet's statistics.
    """
    for field, needed in (("do_normalize", True), ("do_rescale", True)):
        if content.get(field, needed) is not needed:
            raise ValueError(
                f"preprocessor_config.json has {field} {content[field]!r}; the segmentor is fed "
                "images that are rescaled and normalised."
            )
    for field, ours in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
        needed = np.asarray(ours) / 255
        value = np.asarray(content.get(field, needed), np.float64)
        if value.shape != needed.shape or np.abs(value - needed).max() > _STATISTICS_TOLERANCE:
            raise ValueError(
                f"preprocessor_config.json has {field} {value.tolist()}, but the segmentor "
                f"normalises with {needed.round(4).tolist()}."
            )


def preprocessing_to_hf() -> dict[str, Any]:
    """Content of preprocessor_config.json: the sizes and statistics of the published models."""
    return {
        "image_processor_type": "Mask2FormerImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_reduce_labels": False,
        "image_mean": (np.asarray(IMAGENET_MEAN) / 255).round(6).tolist(),
        "image_std": (np.asarray(IMAGENET_STD) / 255).round(6).tolist(),
        "resample": 2,  # bilinear
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": 800, "longest_edge": 1333},
        "size_divisor": 32,
    }


def config_to_hf(card: ModelCard) -> dict[str, Any]:
    """Content of config.json, the inverse of `segmentor_config_from_hf`.

    Args:
        card: of a whole segmentor.

    Returns:
        What `transformers` needs to build the same network, with the classes' names; what the
        format has no field for stands under `EXTRA_KEY`.

    Raises:
        ValueError: the config asks for something that transformers does not do.
    """
    settings = {**DEFAULTS, **card.segmentor}
    for field, needed in _OURS_FIXED.items():
        if settings[field] != needed:
            raise ValueError(
                f"The segmentor has {field} {settings[field]}, but a Hugging Face Mask2Former "
                f"always has {needed}; it cannot be written."
            )
    width = settings["width"]
    content = {
        "architectures": ["Mask2FormerForUniversalSegmentation"],
        "model_type": "mask2former",
        **_MODEL_FIXED,
        "backbone_config": _backbone_to_hf(settings["backbone"]),
        "hidden_dim": width,
        "feature_size": width,
        "mask_feature_size": width,
        "encoder_feedforward_dim": settings["ffn_width"],
        "dim_feedforward": settings["decoder_ffn_width"],
        "encoder_layers": settings["num_encoder_layers"],
        "decoder_layers": settings["num_decoder_layers"] + 1,
        "num_attention_heads": settings["num_heads"],
        "num_queries": settings["num_queries"],
    }
    extra: dict[str, Any] = {"task": card.task, "source": card.source}
    if card.vocabulary is not None:
        names = card.vocabulary.names
        content["id2label"] = {str(index): name for index, name in enumerate(names)}
        content["label2id"] = {name: index for index, name in enumerate(names)}
        extra["knows_things"] = card.knows_things
        extra["is_thing"] = list(card.vocabulary.is_thing)
        extra["is_seen"] = list(card.vocabulary.is_seen)
        extra["category_ids"] = list(card.vocabulary.category_ids)
    return {**content, EXTRA_KEY: extra}


def _backbone_to_hf(backbone: Mapping[str, Any]) -> dict[str, Any]:
    backbone = dict(backbone)
    if backbone.get("kind", "resnet") == "swin":
        swin = {field: backbone.get(field, getattr(Swin, field)) for field in _SWIN_FIELDS}
        return {
            "model_type": "swin",
            **{theirs: _plain(swin[ours]) for ours, theirs in _SWIN_FIELDS.items()},
            **_SWIN_FIXED,
        }
    width = backbone.get("width", ResNet.width)
    block = backbone.get("block", ResNet.block)
    return {
        "model_type": "resnet",
        "embedding_size": width,
        "hidden_sizes": _hidden_sizes(width, block),
        "depths": list(backbone.get("stage_sizes", ResNet.stage_sizes)),
        "layer_type": block,
        **_RESNET_FIXED,
    }


_SWIN_FIELDS = {
    "stage_sizes": "depths",
    "width": "embed_dim",
    "num_heads": "num_heads",
    "window_size": "window_size",
    "patch_size": "patch_size",
    "mlp_ratio": "mlp_ratio",
}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) else value
