"""Parameters of a segmentor between our tree and the arrays of other code bases, strict both ways.

Parameters are `{"segmentor": ..., "classifier": {"class_embed": ...}}` of float32 numpy arrays, for
`Segmentor.apply({"params": params["segmentor"]}, ...)` and `LinearClassifier`; "classifier" only
where there is a class head, and "backbone" alone in "segmentor" for a classifier of ImageNet.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from concat_jax.models.segmentor import segmentor_settings
from concat_jax.weights import eomt
from concat_jax.weights.backbones import FORMATS, PREFIX
from concat_jax.weights.model_folder import Params, parameter_shapes
from concat_jax.weights.names.mask2former import OURS_FIXED, detectron2, hugging_face, imagenet
from concat_jax.weights.names.table import Found, Naming, find, to_ours, to_theirs
from concat_jax.weights.names.vit import as_segmentors
from concat_jax.weights.names.vit import hugging_face as vit_names
from concat_jax.weights.report import LoadingReport, name_keys
from concat_jax.weights.sizes import read_sizes

Arrays = Mapping[str, np.ndarray]
_HEAD = "classifier/"
_PIXEL, _DECODER = "segmentor/pixel_decoder", "segmentor/transformer_decoder"
# Where Detectron2's checkpoints, which carry no config, show how large a Mask2Former is. The number
# of heads leaves no trace but one: the attention weights have a row a head, level and point.
_SIZES = {
    "width": f"{_DECODER}/query_feature_embedding [_, n]",
    "num_queries": f"{_DECODER}/query_feature_embedding [n, _]",
    "num_decoder_layers": f"{_DECODER}/layer_#",
    "num_encoder_layers": f"{_PIXEL}/layer_#",
    "num_heads": f"{_PIXEL}/layer_0/self_attention/attention_weights/kernel [_, n]",
    "ffn_width": f"{_PIXEL}/layer_0/ffn_in/kernel [_, n]",
    "decoder_ffn_width": f"{_DECODER}/layer_0/ffn_in/kernel [_, n]",
}
# Caffe2's names, in which Detectron2 publishes the ResNets of MSRA.
_CAFFE2 = re.compile(r"(conv1_w|res\d+_\d+_branch\d\w?_(w|b)|res_conv1_bn_\w+)$")
# Scales that the pixel decoder attends to, in every published config.
_NUM_LEVELS = 3


def _load(found: Found, config: Mapping[str, Any]) -> tuple[Params, LoadingReport]:
    """The parameters in a file, with a class head if it has one."""
    heads = [found.arrays[key] for path, (_, key) in found.places.items() if path.startswith(_HEAD)]
    # The last is no-object.
    count = len(np.atleast_1d(heads[0])) - 1 if heads else None
    return to_ours(found, parameter_shapes(config, count))


def segmentor_params_from_hf(
    arrays: Arrays, config: Mapping[str, Any]
) -> tuple[Params, LoadingReport]:
    """Our parameters from the weights of a Hugging Face Mask2Former of a `make_segmentor` config.

    Arrays are named as in the published files or `model.state_dict()`. Raises ValueError if an
    array is missing, one too many, of another shape than the config asks for or not finite, or
    other code bases do not have the config's backbone.
    """
    return _load(find(arrays, _hugging_face(config)), config)


def segmentor_params_to_hf(params: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `segmentor_params_from_hf`, without torch's bookkeeping entries.

    The names are those of the published files. Save the float32 arrays as a safetensors file, or
    pass them as `from_pretrained(None, config=..., state_dict=...)`, which maps them to the names
    in memory; `load_state_dict(..., strict=False)` does not, and with transformers 5 would pass
    over a Swin backbone in silence. Raises ValueError if `params` and the config do not describe
    the same arrays.
    """
    naming = _hugging_face(config)
    head = params.get("classifier", {}).get("class_embed", {}).get("bias")
    wanted = parameter_shapes(config, None if head is None else len(head) - 1)
    if different := traverse_util.flatten_dict(dict(params), sep="/").keys() ^ wanted.keys():
        raise ValueError(
            f"The parameters and the config differ in {len(different)} arrays "
            f"({name_keys(different)}); pass the config that they were made with."
        )
    arrays = to_theirs(params, naming)
    if config.get("kind") == "eomt" and head is not None:
        arrays |= eomt.buffers(segmentor_settings(config)["num_blocks"], len(head) - 1)
    return arrays


def _hugging_face(config: Mapping[str, Any]) -> Naming:
    if config.get("kind") == "eomt":
        return eomt.naming(config)
    return hugging_face(config.get("backbone", {}))


def backbone_params_from_dino(
    arrays: Arrays, config: Mapping[str, Any], family: str
) -> tuple[Params, LoadingReport]:
    """The encoder of an EoMT from a DINO's weights, of a `make_segmentor` config around it."""
    if family == "dinov2":
        arrays = as_segmentors(arrays)
    whole = parameter_shapes(config)
    wanted = {path: shape for path, shape in whole.items() if path.startswith(PREFIX)}
    return to_ours(find(arrays, vit_names(family)), wanted)


def segmentor_params_from_detectron2(
    arrays: Arrays,
) -> tuple[Params, dict[str, Any], LoadingReport]:
    """Our parameters and `make_segmentor` config from a Detectron2 Mask2Former or PADing.

    Raises ValueError as `segmentor_params_from_hf`, or an array that tells a size is missing.
    """
    namings = {kind: detectron2(kind) for kind in FORMATS}
    kind, found = _find_backbone(arrays, namings.items())
    if found is None:
        firsts = {kind: n.theirs(PREFIX + FORMATS[kind].first) for kind, n in namings.items()}
        lacks = " and ".join(f"{first} of a {kind}" for kind, first in firsts.items())
        raise ValueError(f"its backbone is none that can be converted: it lacks {lacks}")
    config = detectron2_config(found, kind)
    params, report = _load(found, config)
    return params, config, report


def detectron2_config(found: Found, kind: str) -> dict[str, Any]:
    """A `make_segmentor` config by the arrays of a Detectron2 Mask2Former."""
    backbone = {"kind": kind, **FORMATS[kind].sizes(found.shapes(), found.naming)}
    return {"backbone": backbone, **decoders_config(found)}


def decoders_config(found: Found) -> dict[str, Any]:
    """What of such a config is not the backbone's."""
    config = read_sizes(_SIZES, found.shapes(), found.naming)
    config["num_heads"] //= _NUM_LEVELS * OURS_FIXED["num_points"]
    return config | OURS_FIXED


def backbone_params_from_imagenet(
    arrays: Arrays,
) -> tuple[Params, dict[str, Any], LoadingReport] | None:
    """Our backbone's parameters and config `{"backbone": ...}` from a classifier of ImageNet.

    None where these are no names of a backbone with nothing around it. A Swin's output norms, which
    a classifier has not, are newly initialised (scale 1, bias 0). Raises ValueError as
    `segmentor_params_from_hf`, or it is a ResNet of MSRA.
    """
    if any(_CAFFE2.match(key) for key in arrays):
        raise ValueError(
            "its weights are MSRA's in Caffe2's names (such as MSRA/R-50.pkl), which are for BGR "
            "images and have their stride in the 1x1 convolutions; use torchvision's, on which "
            "Mask2Former is built (torchvision/R-50.pkl)"
        )
    kind, found = _find_backbone(arrays, _IMAGENET)
    if found is None:
        return None
    form = FORMATS[kind]
    config = {"backbone": {"kind": kind, **form.sizes(found.shapes(), found.naming)}}
    whole = parameter_shapes({**config, "num_encoder_layers": 1, "num_decoder_layers": 1})
    wanted = {path: shape for path, shape in whole.items() if path.startswith(PREFIX)}
    absent = tuple(PREFIX + part for part in form.absent)
    new = {path: shape for path, shape in wanted.items() if absent and path.startswith(absent)}
    if new.keys() & found.places.keys():
        new = {}
    params, report = to_ours(found, {p: shape for p, shape in wanted.items() if p not in new})
    flat = traverse_util.flatten_dict(params, sep="/") | {
        path: (np.ones if path.endswith("/scale") else np.zeros)(shape, np.float32)
        for path, shape in new.items()
    }
    params = traverse_util.unflatten_dict(flat, sep="/")
    return params, config, dataclasses.replace(report, new=new)


_IMAGENET = [(kind, naming) for kind in FORMATS for naming in imagenet(kind)]


def _find_backbone(
    arrays: Arrays, namings: Iterable[tuple[str, Naming]]
) -> tuple[str, Found | None]:
    """The kind of backbone whose first array is there under one of these names."""
    for kind, naming in namings:
        first = naming.theirs(PREFIX + FORMATS[kind].first)
        if any(naming.spelt(key) == first for key in arrays):
            return kind, find(arrays, naming)
    return "", None
