"""What other code bases call each backbone's parameters and sizes, by the kind of our config.

A backbone that is added brings one `BackboneFormat`. The columns of its table are transformers'
`ResNetBackbone` or `SwinBackbone`; Detectron2 and Mask2Former
(`mask2former/modeling/backbone/swin.py`); and the classifiers of ImageNet: torchvision's ResNet,
whose names timm kept, and the Swin repository's Swin.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from concat_jax.models.backbones.resnet import BOTTLENECK_EXPANSION
from concat_jax.models.backbones.swin import NORM_EPSILON
from concat_jax.weights.names.table import Naming, Shape
from concat_jax.weights.sizes import HubConfig, read_sizes

# Where the backbone is in our tree.
PREFIX = "segmentor/backbone/"
_STAGES = ["stage1", "stage2", "stage3", "stage4"]

_RESNET = """
@ -  embedder.embedder.  stem.  -
stem_conv       conv    convolution               conv1             conv1
stem_norm       frozen  normalization             conv1.norm        bn1
@ res{s+2}_block{b}/  encoder.stages.{s}.layers.{b}.  res{s+2}.{b}.  layer{s+1}.{b}.
conv{i+1}       conv    layer.{i}.convolution     conv{i+1}         conv{i+1}
norm{i+1}       frozen  layer.{i}.normalization   conv{i+1}.norm    bn{i+1}
shortcut        conv    shortcut.convolution      shortcut          downsample.0
shortcut_norm   frozen  shortcut.normalization    shortcut.norm     downsample.1
"""
# Theirs ends a stage with the merging of patches, ours begins the next one with it.
_SWIN = """
output_norm_{s}   norm    hidden_states_norms.stage{s+1}  norm{s}  =
@ patch_  embeddings.  patch_embed.  =
projection        conv    patch_embeddings.projection     proj     =
norm              norm    norm                            norm     =
@ merging_{s+1}/  encoder.layers.{s}.downsample.  layers.{s}.downsample.  =
norm              norm    norm                    norm         =
reduction         linear  reduction               reduction    =
@ stage_{s}_block_{b}/  encoder.layers.{s}.blocks.{b}.  layers.{s}.blocks.{b}.  =
attention_norm    norm    layernorm_before        norm1        =
attention/query   linear  attention.self.query    attn.qkv[0]  =
attention/key     linear  attention.self.key      attn.qkv[1]  =
attention/value   linear  attention.self.value    attn.qkv[2]  =
attention/output  linear  attention.output.dense  attn.proj    =
ffn_norm          norm    layernorm_after         norm2        =
ffn_in            linear  intermediate.dense      mlp.fc1      =
ffn_out           linear  output.dense            mlp.fc2      =
attention/relative_position_bias  array  attention.self.relative_position_bias_table \
  attn.relative_position_bias_table  =
"""


@dataclasses.dataclass(frozen=True)
class BackboneFormat:
    """A backbone in other code bases.

    Attributes:
      table: names; columns Hugging Face, Detectron2, ImageNet.
      first: our path of an array by whose name the backbone is told.
      config: fields of backbone_config in Hugging Face's config.json.
      sizes: (our path -> shape, naming) -> fields of our backbone.
      needed: what our own fields have to be, as other code bases have nothing else.
      absent: how paths begin of what a classifier of ImageNet does not have.
    """

    table: str
    first: str
    config: HubConfig
    sizes: Callable[[Mapping[str, Shape], Naming], dict[str, Any]]
    needed: Sequence[tuple[str, Any]] = ()
    absent: tuple[str, ...] = ()


def _hidden_sizes(fields: Mapping[str, Any]) -> dict[str, Any]:
    expansion = BOTTLENECK_EXPANSION if fields["block"] == "bottleneck" else 1
    return {"hidden_sizes": [fields["width"] * expansion * factor for factor in (1, 2, 4, 8)]}


def _resnet_sizes(shapes: Mapping[str, Shape], naming: Naming) -> dict[str, Any]:
    is_bottleneck = f"{PREFIX}res2_block0/conv3/kernel" in shapes
    return {
        "stage_sizes": _by_stage("res{}_block#", range(2, 6), shapes, naming),
        **read_sizes({"width": f"{PREFIX}stem_conv/kernel [_, _, _, n]"}, shapes, naming),
        "block": "bottleneck" if is_bottleneck else "basic",
    }


def _by_stage(
    place: str, stages: Iterable[int], shapes: Mapping[str, Shape], naming: Naming
) -> list[int]:
    places = {str(stage): PREFIX + place.format(stage) for stage in stages}
    return list(read_sizes(places, shapes, naming).values())


def _swin_sizes(shapes: Mapping[str, Shape], naming: Naming) -> dict[str, Any]:
    places = {
        "width": "patch_projection/kernel [_, _, _, n]",
        "patch_size": "patch_projection/kernel [n, _, _, _]",
        "rows": "stage_0_block_0/attention/relative_position_bias [n, _]",
        "hidden": "stage_0_block_0/ffn_in/kernel [_, n]",
        "stages": "stage_#_block_0",
    }
    found = read_sizes({k: PREFIX + place for k, place in places.items()}, shapes, naming)
    stages = range(found["stages"])
    heads = "stage_{}_block_0/attention/relative_position_bias [_, n]"
    return {
        "stage_sizes": _by_stage("stage_{}_block_#", stages, shapes, naming),
        "width": found["width"],
        "num_heads": _by_stage(heads, stages, shapes, naming),
        # The table has a row for each of the (2 w - 1)**2 steps from token to token of a window.
        "window_size": (math.isqrt(found["rows"]) + 1) // 2,
        "patch_size": found["patch_size"],
        "mlp_ratio": found["hidden"] // found["width"],
    }


_RESNET_CONFIG = HubConfig(
    {
        "stage_sizes": ("depths", [3, 4, 6, 3]),
        "width": ("embedding_size", 64),
        "block": ("layer_type", "bottleneck"),
        "hidden_sizes": ("hidden_sizes", [256, 512, 1024, 2048]),
    },
    {
        "num_channels": 3,
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        "out_features": _STAGES,
    },
    _hidden_sizes,
)
_SWIN_CONFIG = HubConfig(
    {
        "stage_sizes": ("depths", [2, 2, 6, 2]),
        "width": ("embed_dim", 96),
        "num_heads": ("num_heads", [3, 6, 12, 24]),
        "window_size": ("window_size", 7),
        "patch_size": ("patch_size", 4),
        "mlp_ratio": ("mlp_ratio", 4),
    },
    {
        "num_channels": 3,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "use_absolute_embeddings": False,
        "layer_norm_eps": NORM_EPSILON,
        "out_features": _STAGES,
    },
)
FORMATS: Mapping[str, BackboneFormat] = {
    "resnet": BackboneFormat(
        _RESNET,
        "stem_conv/kernel",
        _RESNET_CONFIG,
        _resnet_sizes,
        needed=(("norm", "frozen_batch"), ("stem", "standard")),
    ),
    "swin": BackboneFormat(
        _SWIN, "patch_projection/kernel", _SWIN_CONFIG, _swin_sizes, absent=("output_norm_",)
    ),
}
