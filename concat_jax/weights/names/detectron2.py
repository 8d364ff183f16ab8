"""The names of a Detectron2 Mask2Former, and its architecture read off them.

Source: Mask2Former `mask2former/modeling/`, whose checkpoints (`.pkl` of the model zoo, `.pth` of a
training run, and those of PADing, which is built on it) carry no config. Depths and widths are
counted in names and shapes; the number of attention heads, which leaves no trace but one, is read
from that one: the encoder's attention weights have a row a head, level and point.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from concat_jax.models.backbones.resnet import ResNet
from concat_jax.models.backbones.swin import Swin
from concat_jax.models.segmentor import DEFAULTS
from concat_jax.weights.model_folder import Params, parameter_shapes
from concat_jax.weights.names.rename import (
    FROZEN_NORM,
    Rename,
    linear_rows,
    norm_rows,
    params_from_state_dict,
    stacked_rows,
    state_dict_from_params,
)
from concat_jax.weights.report import LoadingReport

PIXEL_DECODER = "sem_seg_head.pixel_decoder"
PREDICTOR = "sem_seg_head.predictor"
CLASS_HEAD = f"{PREDICTOR}.class_embed"
# Bookkeeping, and weights that no output depends on.
IGNORED_SUFFIXES = (
    ".num_batches_tracked",
    ".relative_position_index",
    "criterion.empty_weight",
    "pixel_mean",
    "pixel_std",
)
# Modules that PADing adds at the top for its second stage (`PADing/PADing_model.py`): a generator
# of queries with its losses' networks, and the classifier trained on what it generates.
PADING_MODULES = (
    "new_fc",
    "fc_projection",
    "dict_feature",
    "generator",
    "projection_related",
    "projection_unrelated",
    "relation",
    "decoder",
)
# Of the pixel decoder's attention, in every published config.
_NUM_LEVELS, _NUM_POINTS = 3, 4


def resnet_table(source: str, target: str, backbone: Mapping[str, Any]) -> Iterator[Rename]:
    """Rows of a Detectron2 ResNet below `source` ("backbone."), from the fields of our ResNet."""
    yield Rename(f"{source}stem.conv1.weight", f"{target}/stem_conv/kernel", "conv")
    yield from norm_rows(f"{source}stem.conv1.norm", f"{target}/stem_norm", FROZEN_NORM)
    is_bottleneck = backbone.get("block", ResNet.block) == "bottleneck"
    kinds = ("pointwise", "conv", "pointwise") if is_bottleneck else ("conv", "conv")
    for stage, num_blocks in enumerate(backbone.get("stage_sizes", ResNet.stage_sizes)):
        for block in range(num_blocks):
            theirs = f"{source}res{stage + 2}.{block}"
            ours = f"{target}/res{stage + 2}_block{block}"
            for i, kind in enumerate(kinds, start=1):
                yield Rename(f"{theirs}.conv{i}.weight", f"{ours}/conv{i}/kernel", kind)
                yield from norm_rows(f"{theirs}.conv{i}.norm", f"{ours}/norm{i}", FROZEN_NORM)
            # A basic block of the first stage changes neither size nor width.
            if block == 0 and (is_bottleneck or stage > 0):
                yield Rename(f"{theirs}.shortcut.weight", f"{ours}/shortcut/kernel", "pointwise")
                yield from norm_rows(
                    f"{theirs}.shortcut.norm", f"{ours}/shortcut_norm", FROZEN_NORM
                )


def swin_table(source: str, target: str, backbone: Mapping[str, Any]) -> Iterator[Rename]:
    """Rows of the reference's Swin below `source` ("backbone."), from the fields of our Swin."""
    yield from linear_rows(f"{source}patch_embed.proj", f"{target}/patch_projection", "conv")
    yield from norm_rows(f"{source}patch_embed.norm", f"{target}/patch_norm")
    for stage, num_blocks in enumerate(backbone.get("stage_sizes", Swin.stage_sizes)):
        if stage > 0:
            # Theirs ends a stage with the merging, ours begins the next one with it.
            merging = f"{source}layers.{stage - 1}.downsample"
            yield from norm_rows(f"{merging}.norm", f"{target}/merging_{stage}/norm")
            yield from linear_rows(
                f"{merging}.reduction", f"{target}/merging_{stage}/reduction", bias=False
            )
        for index in range(num_blocks):
            block = f"{source}layers.{stage}.blocks.{index}"
            ours = f"{target}/stage_{stage}_block_{index}"
            yield from norm_rows(f"{block}.norm1", f"{ours}/attention_norm")
            qkv = f"{block}.attn.qkv"
            yield from stacked_rows(f"{qkv}.weight", f"{qkv}.bias", f"{ours}/attention")
            yield Rename(
                f"{block}.attn.relative_position_bias_table",
                f"{ours}/attention/relative_position_bias",
            )
            yield from linear_rows(f"{block}.attn.proj", f"{ours}/attention/output")
            yield from norm_rows(f"{block}.norm2", f"{ours}/ffn_norm")
            yield from linear_rows(f"{block}.mlp.fc1", f"{ours}/ffn_in")
            yield from linear_rows(f"{block}.mlp.fc2", f"{ours}/ffn_out")
        yield from norm_rows(f"{source}norm{stage}", f"{target}/output_norm_{stage}")


def _pixel_decoder_table(num_layers: int) -> Iterator[Rename]:
    source, target = PIXEL_DECODER, "segmentor/pixel_decoder"
    yield Rename(f"{source}.transformer.level_embed", f"{target}/level_embedding")
    for level in range(_NUM_LEVELS):
        theirs = f"{source}.input_proj.{level}"
        yield from linear_rows(f"{theirs}.0", f"{target}/input_projection_{level}", "pointwise")
        yield from norm_rows(f"{theirs}.1", f"{target}/input_norm_{level}")
    for index in range(num_layers):
        theirs = f"{source}.transformer.encoder.layers.{index}"
        ours = f"{target}/layer_{index}"
        for their_name, our_name in (
            ("sampling_offsets", "sampling_offsets"),
            ("attention_weights", "attention_weights"),
            ("value_proj", "value_projection"),
            ("output_proj", "output_projection"),
        ):
            yield from linear_rows(
                f"{theirs}.self_attn.{their_name}", f"{ours}/self_attention/{our_name}"
            )
        yield from norm_rows(f"{theirs}.norm1", f"{ours}/self_attention_norm")
        yield from linear_rows(f"{theirs}.linear1", f"{ours}/ffn_in")
        yield from linear_rows(f"{theirs}.linear2", f"{ours}/ffn_out")
        yield from norm_rows(f"{theirs}.norm2", f"{ours}/ffn_norm")
    yield from linear_rows(
        f"{source}.adapter_1", f"{target}/lateral_projection", "pointwise", bias=False
    )
    yield from norm_rows(f"{source}.adapter_1.norm", f"{target}/lateral_norm")
    yield from linear_rows(f"{source}.layer_1", f"{target}/output_conv", "conv", bias=False)
    yield from norm_rows(f"{source}.layer_1.norm", f"{target}/output_norm")
    yield from linear_rows(f"{source}.mask_features", f"{target}/mask_projection", "pointwise")


def _transformer_decoder_table(num_layers: int) -> Iterator[Rename]:
    source, target = PREDICTOR, "segmentor/transformer_decoder"
    yield Rename(f"{source}.query_feat.weight", f"{target}/query_feature_embedding")
    yield Rename(f"{source}.query_embed.weight", f"{target}/query_position_embedding")
    yield Rename(f"{source}.level_embed.weight", f"{target}/level_embedding")
    for index in range(num_layers):
        ours = f"{target}/layer_{index}"
        for kind, name in (("cross", "multihead_attn"), ("self", "self_attn")):
            theirs = f"{source}.transformer_{kind}_attention_layers.{index}"
            attention = f"{theirs}.{name}"
            yield from stacked_rows(
                f"{attention}.in_proj_weight",
                f"{attention}.in_proj_bias",
                f"{ours}/{kind}_attention",
            )
            yield from linear_rows(f"{attention}.out_proj", f"{ours}/{kind}_attention/output")
            yield from norm_rows(f"{theirs}.norm", f"{ours}/{kind}_attention_norm")
        theirs = f"{source}.transformer_ffn_layers.{index}"
        yield from linear_rows(f"{theirs}.linear1", f"{ours}/ffn_in")
        yield from linear_rows(f"{theirs}.linear2", f"{ours}/ffn_out")
        yield from norm_rows(f"{theirs}.norm", f"{ours}/ffn_norm")
    yield from norm_rows(f"{source}.decoder_norm", f"{target}/decoder_norm")
    for i in range(3):
        yield from linear_rows(f"{source}.mask_embed.layers.{i}", f"{target}/mask_mlp_{i}")


BACKBONE_TABLES = {"resnet": resnet_table, "swin": swin_table}


def detectron2_rename_table(
    config: Mapping[str, Any], *, with_classifier: bool = True
) -> tuple[Rename, ...]:
    """All rows between a Detectron2 Mask2Former and our tree.

    Args:
        config: as `make_segmentor` takes it.
        with_classifier: whether the rows of the linear class head are in.

    Returns:
        One `Rename` for each of our parameters; targets start with "segmentor/" or "classifier/".
    """
    settings = {**DEFAULTS, **config}
    backbone = settings["backbone"]
    table = BACKBONE_TABLES[backbone.get("kind", "resnet")]
    rows = [
        *table("backbone.", "segmentor/backbone", backbone),
        *_pixel_decoder_table(settings["num_encoder_layers"]),
        *_transformer_decoder_table(settings["num_decoder_layers"]),
    ]
    if with_classifier:
        rows += linear_rows(CLASS_HEAD, "classifier/class_embed")
    return tuple(rows)


def current_name(key: str) -> str:
    """The name in today's reference of an array that an older checkpoint calls otherwise.

    The learned queries were once `static_query`, and the pixel decoder's modules once lay directly
    in the head (the reference's `_load_from_state_dict`).
    """
    key = key.removeprefix("module.")  # of torch's data parallel wrapper
    key = key.replace(f"{PREDICTOR}.static_query.", f"{PREDICTOR}.query_feat.")
    if key.startswith("sem_seg_head.") and not key.startswith((f"{PIXEL_DECODER}.", PREDICTOR)):
        key = key.replace("sem_seg_head.", f"{PIXEL_DECODER}.", 1)
    return key


def is_ignored(key: str) -> bool:
    """Whether a key is bookkeeping, or belongs to a module that only PADing's training uses."""
    key = key.removeprefix("module.")
    return key.endswith(IGNORED_SUFFIXES) or key.split(".")[0] in PADING_MODULES


def backbone_config(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, Any]:
    """Fields of the backbone whose names begin with `prefix`.

    Args:
        shapes: name -> shape.
        prefix: "backbone." in a Mask2Former, "" in the weights of a backbone alone.

    Raises:
        ValueError: it is neither a ResNet nor a Swin, or an array that tells its size is missing.
    """
    if f"{prefix}patch_embed.proj.weight" in shapes:
        width, _, patch_size, _ = _shape(shapes, f"{prefix}patch_embed.proj.weight", 4)
        sizes = [
            _count(shapes, rf"{re.escape(prefix)}layers\.{stage}\.blocks\.(\d+)\.")
            for stage in range(_count(shapes, rf"{re.escape(prefix)}layers\.(\d+)\.blocks\."))
        ]
        tables = [
            _shape(shapes, f"{prefix}layers.{i}.blocks.0.attn.relative_position_bias_table", 2)
            for i in range(len(sizes))
        ]
        if not tables:
            raise ValueError(f"The checkpoint's Swin lacks {prefix}layers.0; use a whole one.")
        hidden, _ = _shape(shapes, f"{prefix}layers.0.blocks.0.mlp.fc1.weight", 2)
        return {
            "kind": "swin",
            "stage_sizes": sizes,
            "width": width,
            "num_heads": [heads for _, heads in tables],
            # A table has a row for each of the (2 w - 1)**2 steps from token to token of a window.
            "window_size": (math.isqrt(tables[0][0]) + 1) // 2,
            "patch_size": patch_size,
            "mlp_ratio": hidden // width,
        }
    if f"{prefix}stem.conv1.weight" in shapes:
        is_bottleneck = f"{prefix}res2.0.conv3.weight" in shapes
        return {
            "kind": "resnet",
            "stage_sizes": [
                _count(shapes, rf"{re.escape(prefix)}res{stage}\.(\d+)\.") for stage in range(2, 6)
            ],
            "width": _shape(shapes, f"{prefix}stem.conv1.weight", 4)[0],
            "block": "bottleneck" if is_bottleneck else "basic",
        }
    raise ValueError(
        f"The checkpoint's backbone is neither a ResNet ({prefix}stem.conv1.weight) nor a Swin "
        f"({prefix}patch_embed.proj.weight); only these can be converted."
    )


def segmentor_config_from_detectron2(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """A `make_segmentor` config from the names and shapes of a Detectron2 Mask2Former.

    Args:
        shapes: name -> shape; older names are understood.

    Raises:
        ValueError: an array that tells a size is missing or of another rank, or the backbone is
            none of ours.
    """
    shapes = {current_name(key): shape for key, shape in shapes.items() if not is_ignored(key)}
    num_queries, width = _shape(shapes, f"{PREDICTOR}.query_feat.weight", 2)
    encoder = f"{PIXEL_DECODER}.transformer.encoder.layers"
    decoder = f"{PREDICTOR}.transformer_ffn_layers"
    rows, _ = _shape(shapes, f"{encoder}.0.self_attn.attention_weights.weight", 2)
    return {
        "backbone": backbone_config(shapes, "backbone."),
        "width": width,
        "num_queries": num_queries,
        "num_decoder_layers": _count(shapes, rf"{re.escape(decoder)}\.(\d+)\."),
        "num_encoder_layers": _count(shapes, rf"{re.escape(encoder)}\.(\d+)\."),
        # Both transformers have the same number in the reference's config.
        "num_heads": rows // (_NUM_LEVELS * _NUM_POINTS),
        "num_points": _NUM_POINTS,
        "ffn_width": _shape(shapes, f"{encoder}.0.linear1.weight", 2)[0],
        "decoder_ffn_width": _shape(shapes, f"{decoder}.0.linear1.weight", 2)[0],
        "num_groups": 32,
    }


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, rank: int) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(
            f"The checkpoint lacks {name}, which tells a size of the network; use a whole one."
        )
    if len(shapes[name]) != rank:
        raise ValueError(
            f"The checkpoint's {name} has shape {shapes[name]}, but {rank} axes are needed; it is "
            "of another network."
        )
    return tuple(shapes[name])


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """One more than the highest number in the names that begin like the pattern."""
    found = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
    return 1 + max(found, default=-1)


def segmentor_params_from_detectron2(
    state_dict: Mapping[str, np.ndarray],
) -> tuple[Params, dict[str, Any], LoadingReport]:
    """Our parameters and config from the weights of a Detectron2 Mask2Former or PADing.

    Args:
        state_dict: name -> array. The class head may be absent.

    Returns:
        Parameters as `segmentor_params_from_hf` gives them, the `make_segmentor` config, a report.

    Raises:
        ValueError: as `segmentor_params_from_hf` and `segmentor_config_from_detectron2`.
    """
    config = segmentor_config_from_detectron2({k: np.shape(v) for k, v in state_dict.items()})
    heads = [
        v for k, v in state_dict.items() if current_name(k) == f"{CLASS_HEAD}.weight" and np.ndim(v)
    ]
    params, report = params_from_state_dict(
        state_dict,
        detectron2_rename_table(config, with_classifier=bool(heads)),
        parameter_shapes(config, len(heads[0]) - 1 if heads else None),
        file_name=current_name,
        is_ignored=is_ignored,
    )
    return params, config, report


def segmentor_params_to_detectron2(
    params: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The inverse of `segmentor_params_from_detectron2`, without bookkeeping entries.

    Raises:
        ValueError: `params` and the config do not describe the same arrays.
    """
    return state_dict_from_params(
        params, detectron2_rename_table(config, with_classifier="classifier" in params)
    )
