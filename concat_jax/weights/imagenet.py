"""Backbones trained on ImageNet, as the published recipes start from them.

ResNets come from torchvision (or timm, which kept its names), directly or through Detectron2's
`tools/convert-torchvision-to-d2.py`; Swins from the Swin repository, directly or through
Mask2Former's `tools/convert-pretrained-swin-model-to-d2.py`, which keeps the names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from concat_jax.weights.model_folder import Params, parameter_shapes
from concat_jax.weights.names.detectron2 import BACKBONE_TABLES, backbone_config
from concat_jax.weights.names.rename import params_from_state_dict
from concat_jax.weights.report import LoadingReport

# The classifier, and index tables that follow from the architecture.
_IGNORED = re.compile(
    r"(stem\.)?fc\.(weight|bias)$|head\.(weight|bias)$|norm\.(weight|bias)$"
    r"|.*(\.num_batches_tracked|\.relative_position_index|\.attn_mask)$"
)
# Caffe2's names, in which Detectron2 publishes the ResNets of MSRA.
_CAFFE2 = re.compile(r"(conv1_w|res\d+_\d+_branch\d\w?_(w|b)|res_conv1_bn_\w+)$")


def is_imagenet_backbone(keys: Mapping[str, Any]) -> bool:
    """Whether these names are those of a ResNet or Swin with nothing around it."""
    names = {detectron2_name(key) for key in keys}
    return bool(names & {"stem.conv1.weight", "patch_embed.proj.weight"}) or any(
        _CAFFE2.match(key) for key in keys
    )


def detectron2_name(key: str) -> str:
    """torchvision's name of an array of a ResNet as Detectron2's; other names are left alone."""
    key = key.removeprefix("module.").removeprefix("backbone.")
    key = re.sub(r"^layer([1-4])\.", lambda match: f"res{int(match[1]) + 1}.", key)
    key = re.sub(r"^(conv1|bn1)\.", r"stem.\1.", key)
    key = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", key)
    return key.replace(".downsample.0.", ".shortcut.").replace(".downsample.1.", ".shortcut.norm.")


def backbone_params_from_imagenet(
    state_dict: Mapping[str, np.ndarray],
) -> tuple[Params, dict[str, Any], LoadingReport]:
    """Our backbone's parameters and config from a classifier's weights.

    Args:
        state_dict: name -> array of a ResNet (torchvision's or Detectron2's names) or a Swin.

    Returns:
        `{"segmentor": {"backbone": ...}}` of float32 numpy arrays, the config `{"backbone": ...}`
        for `make_segmentor`, and a report. A Swin's output norms, which a classifier does not
        have, are newly initialised (scale 1, bias 0).

    Raises:
        ValueError: it is a ResNet of MSRA; or a key is missing, one too many or of another shape.
    """
    if any(_CAFFE2.match(key) for key in state_dict):
        raise ValueError(
            "The weights are MSRA's in Caffe2's names (such as MSRA/R-50.pkl), which are for BGR "
            "images and have their stride in the 1x1 convolutions; use torchvision's, on which "
            "Mask2Former is built (torchvision/R-50.pkl)."
        )

    fields = backbone_config(
        {detectron2_name(k): np.shape(v) for k, v in state_dict.items() if not _IGNORED.match(k)},
        "",
    )
    config = {"backbone": fields}
    rows = list(BACKBONE_TABLES[fields["kind"]]("", "segmentor/backbone", fields))
    shapes = {
        path: shape
        for path, shape in parameter_shapes(config).items()
        if path.startswith("segmentor/backbone/")
    }
    names = {detectron2_name(key) for key in state_dict}
    norms = [row for row in rows if re.match(r"norm\d\.", row.source)]
    absent = [] if names & {row.source for row in norms} else norms
    new = {row.target: shapes.pop(row.target) for row in absent}
    params, report = params_from_state_dict(
        state_dict,
        [row for row in rows if row not in absent],
        shapes,
        file_name=detectron2_name,
        is_ignored=lambda key: bool(_IGNORED.match(key.removeprefix("module."))),
    )
    for path, shape in new.items():
        *folders, leaf = path.split("/")
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = (np.ones if leaf == "scale" else np.zeros)(shape, np.float32)
    report = LoadingReport(report.loaded, report.shapes, new, report.ignored)
    return params, config, report
