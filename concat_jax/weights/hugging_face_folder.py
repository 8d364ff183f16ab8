"""Folders of a Hugging Face Mask2Former: config.json, preprocessor_config.json and the weights.

Source: `transformers` `models/mask2former/configuration_mask2former.py`. What our segmentor has no
place for is refused by name, so that a folder which is read gives the outputs it gives there, of
the same input; its processor makes other pixels at times (docs/faq.md).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from concat_jax.core import files
from concat_jax.models.segmentor import segmentor_settings
from concat_jax.models.segmentor_output import IMAGENET_MEAN, IMAGENET_STD
from concat_jax.weights import eomt
from concat_jax.weights.backbones import FORMATS
from concat_jax.weights.disk import new_folder
from concat_jax.weights.files.readers import INDEX_SUFFIX
from concat_jax.weights.model_folder import ModelCard
from concat_jax.weights.names.mask2former import OURS_FIXED, backbone_format
from concat_jax.weights.segmentors import segmentor_params_to_hf
from concat_jax.weights.sizes import HubConfig, check_statistics

CONFIG_NAME = "config.json"
PREPROCESSOR_NAME = "preprocessor_config.json"
TIMM_KEY = "architecture"  # of timm's config.json, which has no model_type
BILINEAR = 2  # as Pillow counts its filters
WEIGHTS_NAME = "model.safetensors"
# Where save_pretrained puts the weights, in the order transformers looks for them.
WEIGHTS_NAMES = tuple(
    name + end for name in (WEIGHTS_NAME, "pytorch_model.bin") for end in ("", INDEX_SUFFIX)
)
# Our own entry of config.json: what the format has no field for; transformers passes over it.
EXTRA_KEY = "concat_jax"
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
    # The segmentor has one width.
    lambda fields: dict.fromkeys(("feature_size", "mask_feature_size"), fields["width"]),
)
# Of pixels in 0..1.
_MEAN, _STD = (np.asarray(numbers) / 255 for numbers in (IMAGENET_MEAN, IMAGENET_STD))
_STATISTICS = {"image_mean": _MEAN, "image_std": _STD, "rescale_factor": 1 / 255}


def segmentor_config_from_hf(content: Mapping[str, Any]) -> dict[str, Any]:
    """A `make_segmentor` config of every size from config.json or `Mask2FormerConfig.to_dict()`.

    Raises ValueError if it is another model, on a backbone that is none of ours, or set to
    something that our segmentor does not do.
    """
    kind = content.get("model_type")
    if kind in [*eomt.ARCHITECTURES]:  # whatever JSON has there can be looked for in a list
        return eomt.config_from_hf(content, CONFIG_NAME)
    if kind in [*eomt.ENCODERS]:
        return eomt.encoder_config_from_hf(content, CONFIG_NAME)
    if kind != "mask2former":
        raise ValueError(
            f"{CONFIG_NAME} is of a model of type {kind!r}; only 'mask2former', "
            f"{', '.join(map(repr, (*eomt.ARCHITECTURES, *eomt.ENCODERS, *FORMATS)))} can be "
            "converted."
        )
    backbone = content.get("backbone_config")
    if not isinstance(backbone, Mapping):
        named = f" for its backbone {name!r}" if (name := content.get("backbone")) else ""
        raise ValueError(
            f"{CONFIG_NAME} has no backbone_config{named}; save the model again with "
            "save_pretrained, and with its backbone's config."
        )
    fields = _CONFIG.read(content, CONFIG_NAME)
    if fields["num_decoder_layers"] < 2:
        raise ValueError(
            f"{CONFIG_NAME} has decoder_layers 1, which is the prediction from the learned queries "
            "alone; it must be 2 or more."
        )
    fields["num_decoder_layers"] -= 1
    kind, where = backbone.get("model_type"), f"backbone_config in {CONFIG_NAME}"
    if not isinstance(kind, str) or kind not in FORMATS:
        kinds = " and ".join(map(repr, FORMATS))
        raise ValueError(f"{where} is of a {kind!r}; only {kinds} can be converted.")
    backbone = {"kind": kind, **FORMATS[kind].config.read(backbone, where)}
    return {"backbone": backbone, **fields, **OURS_FIXED}


def check_classifier(content: Mapping[str, Any]) -> None:
    """Refuse the config.json of a classifier of ImageNet whose backbone is none of ours.

    It is transformers' or timm's. Raises ValueError as `segmentor_config_from_hf`, or for pictures
    that are normalised otherwise.
    """
    if kind := content.get("model_type"):
        # Which stages a config puts out is nothing to ours, which puts out all four.
        sizes = {key: value for key, value in content.items() if key != "out_features"}
        FORMATS[kind].config.read(sizes, CONFIG_NAME)
        return
    # Others have the arrays of a ResNet and compute something else with them, as resnetblur50.
    name = content.get(TIMM_KEY)
    if not isinstance(name, str) or not re.fullmatch(r"resnet\d+", name):
        raise ValueError(f"{CONFIG_NAME} is of timm's {name!r}, of which a plain resnet50 is read")
    where, given = f"pretrained_cfg in {CONFIG_NAME}", content.get("pretrained_cfg")
    if isinstance(given, Mapping):
        check_statistics(given, where, {"mean": _MEAN, "std": _STD})


def config_to_hf(card: ModelCard) -> dict[str, Any]:
    """Content of config.json for a whole segmentor, the inverse of `segmentor_config_from_hf`.

    What the format has no field for stands under `EXTRA_KEY`. Raises ValueError if the config asks
    for something that transformers does not do.
    """
    settings = segmentor_settings(card.segmentor)
    if settings["kind"] == "eomt":
        return {**eomt.config_to_hf(settings, card.long_side), **_classes_to_hf(card)}
    for field, needed in OURS_FIXED.items():
        if settings[field] != needed:
            raise ValueError(
                f"The segmentor has {field} {settings[field]}, but a Hugging Face Mask2Former "
                f"always has {needed}; it cannot be written."
            )
    backbone = settings["backbone"]
    kind, fields = backbone.get("kind", "resnet"), backbone_format(backbone).config.write(backbone)
    settings["num_decoder_layers"] += 1
    content = {
        "architectures": ["Mask2FormerForUniversalSegmentation"],
        "model_type": "mask2former",
        "backbone_config": {"model_type": kind, **fields},
        **_CONFIG.write(settings),
    }
    return {**content, **_classes_to_hf(card)}


def _classes_to_hf(card: ModelCard) -> dict[str, Any]:
    """What config.json says of a card besides the network."""
    content: dict[str, Any] = {}
    extra: dict[str, Any] = {"task": card.task, "source": card.source}
    if (classes := card.vocabulary) is not None:
        content["id2label"] = {str(index): name for index, name in enumerate(classes.names)}
        content["label2id"] = {name: index for index, name in enumerate(classes.names)}
        columns = ("is_thing", "is_seen", "category_ids")
        extra |= {key: list(getattr(classes, key)) for key in columns}
        extra["knows_things"] = card.knows_things
    return {**content, EXTRA_KEY: extra}


def check_preprocessing(
    content: Mapping[str, Any], *, is_square: bool = False
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Refuse a preprocessor_config.json that feeds the model other numbers than we do.

    Returns the sides of the network's input that it asks for, and whether semantic maps are made
    through windows, as fields of `ModelCard`, empty where it asks for none that a card can hold;
    and sentences to be read. `is_square`: the longer side is at most the shorter one where it is
    not given, as `EomtImageProcessor` has it, not 5/3 of it.
    """
    where = PREPROCESSOR_NAME
    for field in ("do_normalize", "do_rescale"):
        if content.get(field, True) is not True:
            raise ValueError(
                f"{where} has {field} {content[field]!r}; the segmentor is fed images that are "
                "rescaled and normalised."
            )
    check_statistics(content, where, _STATISTICS)
    size = content.get("size")
    if content.get("do_split_image"):
        side = size.get("shortest_edge") if isinstance(size, Mapping) else size
        if type(side) is not int or side < 1:
            raise ValueError(
                f"{where} cuts pictures into windows of size {size!r}; give size a shortest_edge."
            )
        note = f"By {where}, semantic maps are made through windows of {side} pixels."
        return {"short_side": side, "long_side": side, "windows": True}, (note,)
    if not content.get("do_resize", True):
        side = ModelCard.short_side
        return {}, (
            f"By {where}, images keep their size (do_resize false); here predict makes the shorter "
            f"side {side}, or what --short_side says.",
        )
    if size in (None, {}):
        return {}, ()
    if not isinstance(size, Mapping):  # as transformers before 4.27 wrote it
        size = {"shortest_edge": size, "longest_edge": content.get("max_size")}
    short, longest = size.get("shortest_edge"), size.get("longest_edge")
    long = longest
    if type(short) is int and longest is None:
        long = short if is_square else round(short * 1333 / 800)
    if type(short) is not int or type(long) is not int or not 1 <= short <= long:
        asked = ", ".join(f"{side} {value!r}" for side, value in sorted(size.items()))
        return {}, (
            f"By {where}, images are to have the size {asked}; here they keep their shape, and "
            "predict takes the shorter side as --short_side.",
        )
    note = f"By {where}, images get a shorter side of {short} and a longer one of at most {long}."
    return {"short_side": short, "long_side": long}, (note,)


def preprocessing_to_hf(card: ModelCard) -> dict[str, Any]:
    is_eomt = card.segmentor.get("kind") == "eomt"
    own: dict[str, Any] = {"size_divisor": 32}
    if is_eomt:
        own = {"do_pad": not card.windows, "do_split_image": card.windows}
    longest = None if card.windows else card.long_side
    return {
        "image_processor_type": f"{'Eomt' if is_eomt else 'Mask2Former'}ImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_reduce_labels": False,
        "image_mean": _MEAN.round(6).tolist(),
        "image_std": _STD.round(6).tolist(),
        "resample": BILINEAR,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": card.short_side, "longest_edge": longest},
        **own,
    }


def read_json_object(path: Path) -> dict[str, Any]:
    """Content of a JSON file that holds one object, else ValueError."""
    content = files.read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; it must be a JSON object.")
    return content


def weights_in(folder: Path, names: Sequence[str], what: str = "weights") -> Path:
    """The first of these files that a folder holds, else ValueError."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    for path in sorted(folder.iterdir()):
        whole = re.sub(r"-\d+-of-\d+(?=\.\w+$)", "", path.name)
        if whole != path.name and whole in names:
            raise ValueError(
                f"{folder} holds {what} in parts, such as {path.name}, and lacks "
                f"{whole}{INDEX_SUFFIX}, which says what is in which; get it from where they are."
            )
    raise ValueError(f"{folder} holds no {what}; they are {' or '.join(names)}.")


def save_hf_folder(
    folder: str | os.PathLike[str],
    params: Mapping[str, Any],
    card: ModelCard,
    *,
    overwrite: bool = False,
) -> None:
    """Write a folder that transformers' `from_pretrained` loads, complete or not at all.

    Raises ValueError if it is a backbone alone or has no class head, transformers does not do what
    the config asks for, or the folder's name is taken; OSError if the disk refuses.
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
    with new_folder(folder, params, overwrite=overwrite) as temporary:
        files.write_json(temporary / CONFIG_NAME, content)
        files.write_json(temporary / PREPROCESSOR_NAME, preprocessing_to_hf(card))
        weights = temporary / WEIGHTS_NAME
        # transformers asks for the format before it reads the file.
        safetensors.numpy.save_file(arrays, weights, metadata={"format": "pt"})
        # safetensors lets nobody else read its file.
        weights.chmod((temporary / CONFIG_NAME).stat().st_mode)
