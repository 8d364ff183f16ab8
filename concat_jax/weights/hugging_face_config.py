"""config.json and preprocessor_config.json of a Hugging Face Mask2Former, read and written.

Source: `transformers` `models/mask2former/configuration_mask2former.py`. What our segmentor has no
place for is refused by name, so that a folder which is read gives the outputs it gives there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from concat_jax.models.segmentor import DEFAULTS, IMAGENET_MEAN, IMAGENET_STD
from concat_jax.weights.backbones import FORMATS
from concat_jax.weights.model_folder import ModelCard
from concat_jax.weights.names.mask2former import backbone_format
from concat_jax.weights.sizes import HubConfig

_CONFIG = HubConfig(
    {
        "width": ("hidden_dim", 256),
        "feature_size": ("feature_size", 256),
        "mask_feature_size": ("mask_feature_size", 256),
        "num_queries": ("num_queries", 100),
        # transformers counts the prediction from the learned queries as a layer.
        "num_decoder_layers": ("decoder_layers", 10),
        "num_encoder_layers": ("encoder_layers", 6),
        "num_heads": ("num_attention_heads", 8),
        "ffn_width": ("encoder_feedforward_dim", 1024),
        "decoder_ffn_width": ("dim_feedforward", 2048),
    },
    {
        "activation_function": "relu",
        "pre_norm": False,
        "enforce_input_projection": False,
        "common_stride": 4,
        "feature_strides": [4, 8, 16, 32],
    },
)
# Values of the segmentor that other code bases have no field for.
OURS_FIXED = {"num_points": 4, "num_groups": 32}
# Published files round the statistics of ImageNet to three digits or to float32.
_STATISTICS_TOLERANCE = 1e-3
# Our own entry of config.json: what the format has no field for; transformers passes over it.
EXTRA_KEY = "concat_jax"
_WHERE = "config.json"


def segmentor_config_from_hf(content: Mapping[str, Any]) -> dict[str, Any]:
    """A `make_segmentor` config of every size from config.json or `Mask2FormerConfig.to_dict()`.

    Raises:
      ValueError: it is another model, on a backbone that is none of ours, or set to something that
        our segmentor does not do.
    """
    if (kind := content.get("model_type")) != "mask2former":
        raise ValueError(
            f"{_WHERE} is of a model of type {kind!r}; only 'mask2former' can be converted."
        )
    backbone = content.get("backbone_config")
    if not isinstance(backbone, Mapping):
        named = content.get("backbone")
        raise ValueError(
            f"{_WHERE} names the backbone {named!r} without a backbone_config; save the model with "
            "its backbone's config."
            if named
            else f"{_WHERE} has no backbone_config; save the model again with save_pretrained."
        )
    fields = _CONFIG.read(content, _WHERE)
    for field in ("feature_size", "mask_feature_size"):
        if (size := fields.pop(field)) != fields["width"]:
            raise ValueError(
                f"{_WHERE} has {field} {size} and hidden_dim {fields['width']}; the segmentor has "
                "one width for both."
            )
    fields["num_decoder_layers"] -= 1
    return {"backbone": _backbone_from_hf(backbone), **fields, **OURS_FIXED}


def _backbone_from_hf(content: Mapping[str, Any]) -> dict[str, Any]:
    kind, where = content.get("model_type"), f"backbone_config in {_WHERE}"
    if not isinstance(kind, str) or kind not in FORMATS:
        kinds = " and ".join(map(repr, FORMATS))
        raise ValueError(f"{where} is of a {kind!r}; only {kinds} can be converted.")
    fields = FORMATS[kind].config.read(content, where)
    for field, needed in FORMATS[kind].derived(fields).items():
        if (value := fields.pop(field)) != needed:
            raise ValueError(
                f"{where} has {field} {value}; by its other fields they must be {needed}."
            )
    return {"kind": kind, **fields}


def config_to_hf(card: ModelCard) -> dict[str, Any]:
    """Content of config.json for a whole segmentor, the inverse of `segmentor_config_from_hf`.

    What the format has no field for stands under `EXTRA_KEY`.

    Raises:
      ValueError: the config asks for something that transformers does not do.
    """
    settings = {**DEFAULTS, **card.segmentor}
    for field, needed in OURS_FIXED.items():
        if settings[field] != needed:
            raise ValueError(
                f"The segmentor has {field} {settings[field]}, but a Hugging Face Mask2Former "
                f"always has {needed}; it cannot be written."
            )
    backbone = settings["backbone"]
    form, kind = backbone_format(backbone), backbone.get("kind", "resnet")
    backbone = {
        ours: backbone.get(ours, default) for ours, (_, default) in form.config.fields.items()
    }
    width = settings["width"]
    sizes = {**settings, "feature_size": width, "mask_feature_size": width}
    sizes["num_decoder_layers"] += 1
    content = {
        "architectures": ["Mask2FormerForUniversalSegmentation"],
        "model_type": "mask2former",
        "backbone_config": {
            "model_type": kind,
            **form.config.write({**backbone, **form.derived(backbone)}),
        },
        **_CONFIG.write(sizes),
    }
    extra: dict[str, Any] = {"task": card.task, "source": card.source}
    if (classes := card.vocabulary) is not None:
        content["id2label"] = {str(index): name for index, name in enumerate(classes.names)}
        content["label2id"] = {name: index for index, name in enumerate(classes.names)}
        extra["knows_things"] = card.knows_things
        extra |= {
            key: list(getattr(classes, key)) for key in ("is_thing", "is_seen", "category_ids")
        }
    return {**content, EXTRA_KEY: extra}


def check_preprocessing(content: Mapping[str, Any]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Refuse a preprocessor_config.json that feeds the model other numbers than we do.

    Returns:
      The sides of the network's input that it asks for, as fields of `ModelCard`, empty where it
      asks for none that a card can hold; and sentences to be read.

    Raises:
      ValueError: the images are not scaled to 0..1 and normalised with ImageNet's statistics.
    """
    where = "preprocessor_config.json"
    for field in ("do_normalize", "do_rescale"):
        if content.get(field, True) is not True:
            raise ValueError(
                f"{where} has {field} {content[field]!r}; the segmentor is fed images that are "
                "rescaled and normalised."
            )
    for field, ours in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
        needed = np.asarray(ours) / 255
        value = content.get(field, needed.tolist())
        if not is_close(value, needed, _STATISTICS_TOLERANCE):
            raise ValueError(
                f"{where} has {field} {value!r}, but the segmentor normalises with "
                f"{needed.round(4).tolist()}."
            )
    size = content.get("size")
    if not content.get("do_resize", True) or size in (None, {}):
        return {}, ()
    if not isinstance(size, Mapping):  # as transformers before 4.27 wrote it
        size = {"shortest_edge": size, "longest_edge": content.get("max_size")}
    short, longest = size.get("shortest_edge"), size.get("longest_edge")
    long = round(short * 1333 / 800) if type(short) is int and longest is None else longest
    if type(short) is not int or type(long) is not int or not 1 <= short <= long:
        asked = ", ".join(f"{side} {value!r}" for side, value in sorted(size.items()))
        return {}, (
            f"By {where}, images are to have the size {asked}; here they keep their shape, and "
            "predict takes the shorter side as --short_side.",
        )
    note = f"By {where}, images get a shorter side of {short} and a longer one of at most {long}."
    return {"short_side": short, "long_side": long}, (note,)


def is_close(value: Any, needed: Any, tolerance: float) -> bool:
    """Whether a value of a config is a list of these numbers."""
    try:
        value = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        return False
    return value.shape == np.shape(needed) and bool(np.all(np.abs(value - needed) <= tolerance))


def preprocessing_to_hf(card: ModelCard) -> dict[str, Any]:
    """Content of preprocessor_config.json: the card's sizes, ImageNet's statistics."""
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
        "size": {"shortest_edge": card.short_side, "longest_edge": card.long_side},
        "size_divisor": 32,
    }
