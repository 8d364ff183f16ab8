"""The names of a Hugging Face Mask2Former, on a `ResNetBackbone` or `SwinBackbone`.

Source: `transformers` `models/mask2former/modeling_mask2former.py`. Names are those of the
published files; transformers 5 calls parts of a Swin otherwise in memory, and those names are
understood on the way in. What config.json says is in `hugging_face_config.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

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

# Entries of a torch state dict that are bookkeeping, or weights that no output depends on: a Swin
# backbone carries the final norm of its classifier.
IGNORED_SUFFIXES = (
    ".num_batches_tracked",
    "criterion.empty_weight",
    ".relative_position_index",
    ".encoder.swin.layernorm.weight",
    ".encoder.swin.layernorm.bias",
)
BACKBONE = "model.pixel_level_module.encoder"
# A Swin's names in memory (transformers 5) and in the published files.
_SWIN_FILE_NAMES = {
    f"{BACKBONE}.swin.": f"{BACKBONE}.",
    ".attention.q_proj.": ".attention.self.query.",
    ".attention.k_proj.": ".attention.self.key.",
    ".attention.v_proj.": ".attention.self.value.",
    ".attention.o_proj.": ".attention.output.dense.",
    ".attention.relative_position_bias.": ".attention.self.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}


def resnet_table(source: str, target: str, backbone: Mapping[str, Any]) -> Iterator[Rename]:
    """Rows of a `ResNetBackbone` below `source`, from the fields of our ResNet."""
    yield Rename(
        f"{source}.embedder.embedder.convolution.weight", f"{target}/stem_conv/kernel", "conv"
    )
    yield from norm_rows(
        f"{source}.embedder.embedder.normalization", f"{target}/stem_norm", FROZEN_NORM
    )
    is_bottleneck = backbone.get("block", "bottleneck") == "bottleneck"
    kinds = ("pointwise", "conv", "pointwise") if is_bottleneck else ("conv", "conv")
    for stage, num_blocks in enumerate(backbone.get("stage_sizes", (3, 4, 6, 3))):
        for block in range(num_blocks):
            theirs = f"{source}.encoder.stages.{stage}.layers.{block}"
            ours = f"{target}/res{stage + 2}_block{block}"
            for i, kind in enumerate(kinds):
                layer = f"{theirs}.layer.{i}"
                yield Rename(f"{layer}.convolution.weight", f"{ours}/conv{i + 1}/kernel", kind)
                yield from norm_rows(f"{layer}.normalization", f"{ours}/norm{i + 1}", FROZEN_NORM)
            # A basic block of the first stage changes neither size nor width.
            if block == 0 and (is_bottleneck or stage > 0):
                yield Rename(
                    f"{theirs}.shortcut.convolution.weight", f"{ours}/shortcut/kernel", "pointwise"
                )
                yield from norm_rows(
                    f"{theirs}.shortcut.normalization", f"{ours}/shortcut_norm", FROZEN_NORM
                )


def swin_table(source: str, target: str, backbone: Mapping[str, Any]) -> Iterator[Rename]:
    """Rows of a `SwinBackbone` below `source`, from the fields of our Swin."""
    yield from linear_rows(
        f"{source}.embeddings.patch_embeddings.projection", f"{target}/patch_projection", "conv"
    )
    yield from norm_rows(f"{source}.embeddings.norm", f"{target}/patch_norm")
    for stage, num_blocks in enumerate(backbone.get("stage_sizes", Swin.stage_sizes)):
        theirs = f"{source}.encoder.layers.{stage}"
        if stage > 0:
            # Theirs ends a stage with the merging, ours begins the next one with it.
            merging = f"{source}.encoder.layers.{stage - 1}.downsample"
            yield from norm_rows(f"{merging}.norm", f"{target}/merging_{stage}/norm")
            yield from linear_rows(
                f"{merging}.reduction", f"{target}/merging_{stage}/reduction", bias=False
            )
        for index in range(num_blocks):
            block, ours = f"{theirs}.blocks.{index}", f"{target}/stage_{stage}_block_{index}"
            yield from norm_rows(f"{block}.layernorm_before", f"{ours}/attention_norm")
            for name in ("query", "key", "value"):
                yield from linear_rows(f"{block}.attention.self.{name}", f"{ours}/attention/{name}")
            yield Rename(
                f"{block}.attention.self.relative_position_bias_table",
                f"{ours}/attention/relative_position_bias",
            )
            yield from linear_rows(f"{block}.attention.output.dense", f"{ours}/attention/output")
            yield from norm_rows(f"{block}.layernorm_after", f"{ours}/ffn_norm")
            yield from linear_rows(f"{block}.intermediate.dense", f"{ours}/ffn_in")
            yield from linear_rows(f"{block}.output.dense", f"{ours}/ffn_out")
        yield from norm_rows(
            f"{source}.hidden_states_norms.stage{stage + 1}", f"{target}/output_norm_{stage}"
        )


def file_name(key: str) -> str:
    """The name in the published files of an array whose name in memory may differ."""
    if key.startswith(f"{BACKBONE}."):
        for in_memory, in_file in _SWIN_FILE_NAMES.items():
            key = key.replace(in_memory, in_file)
    return key


def _pixel_decoder_table(source: str, target: str, num_layers: int) -> Iterator[Rename]:
    yield Rename(f"{source}.level_embed", f"{target}/level_embedding")
    for level in range(3):
        theirs = f"{source}.input_projections.{level}"
        yield from linear_rows(f"{theirs}.0", f"{target}/input_projection_{level}", "pointwise")
        yield from norm_rows(f"{theirs}.1", f"{target}/input_norm_{level}")
    for index in range(num_layers):
        theirs, ours = f"{source}.encoder.layers.{index}", f"{target}/layer_{index}"
        for their_name, our_name in (
            ("sampling_offsets", "sampling_offsets"),
            ("attention_weights", "attention_weights"),
            ("value_proj", "value_projection"),
            ("output_proj", "output_projection"),
        ):
            yield from linear_rows(
                f"{theirs}.self_attn.{their_name}", f"{ours}/self_attention/{our_name}"
            )
        yield from norm_rows(f"{theirs}.self_attn_layer_norm", f"{ours}/self_attention_norm")
        yield from linear_rows(f"{theirs}.fc1", f"{ours}/ffn_in")
        yield from linear_rows(f"{theirs}.fc2", f"{ours}/ffn_out")
        yield from norm_rows(f"{theirs}.final_layer_norm", f"{ours}/ffn_norm")
    yield from linear_rows(
        f"{source}.adapter_1.0", f"{target}/lateral_projection", "pointwise", False
    )
    yield from norm_rows(f"{source}.adapter_1.1", f"{target}/lateral_norm")
    yield from linear_rows(f"{source}.layer_1.0", f"{target}/output_conv", "conv", False)
    yield from norm_rows(f"{source}.layer_1.1", f"{target}/output_norm")
    yield from linear_rows(f"{source}.mask_projection", f"{target}/mask_projection", "pointwise")


def _transformer_decoder_table(source: str, target: str, num_layers: int) -> Iterator[Rename]:
    yield Rename(f"{source}.queries_features.weight", f"{target}/query_feature_embedding")
    yield Rename(f"{source}.queries_embedder.weight", f"{target}/query_position_embedding")
    yield Rename(f"{source}.level_embed.weight", f"{target}/level_embedding")
    for index in range(num_layers):
        theirs, ours = f"{source}.decoder.layers.{index}", f"{target}/layer_{index}"
        cross = f"{theirs}.cross_attn.in_proj"
        yield from stacked_rows(f"{cross}_weight", f"{cross}_bias", f"{ours}/cross_attention")
        for name in ("query", "key", "value"):
            yield from linear_rows(
                f"{theirs}.self_attn.{name[0]}_proj", f"{ours}/self_attention/{name}"
            )
        for name in ("cross", "self"):
            attention = f"{theirs}.{name}_attn"
            yield from linear_rows(f"{attention}.out_proj", f"{ours}/{name}_attention/output")
            yield from norm_rows(f"{attention}_layer_norm", f"{ours}/{name}_attention_norm")
        yield from linear_rows(f"{theirs}.fc1", f"{ours}/ffn_in")
        yield from linear_rows(f"{theirs}.fc2", f"{ours}/ffn_out")
        yield from norm_rows(f"{theirs}.final_layer_norm", f"{ours}/ffn_norm")
    yield from norm_rows(f"{source}.decoder.layernorm", f"{target}/decoder_norm")
    for i in range(3):
        yield from linear_rows(
            f"{source}.decoder.mask_predictor.mask_embedder.{i}.0", f"{target}/mask_mlp_{i}"
        )


_BACKBONE_TABLES = {"resnet": resnet_table, "swin": swin_table}


def hf_rename_table(
    config: Mapping[str, Any], *, with_classifier: bool = True
) -> tuple[Rename, ...]:
    """All rows between a Hugging Face Mask2Former and our tree.

    Args:
        config: as `make_segmentor` takes it; the backbone is a Swin, or a ResNet with norm
            "frozen_batch" and stem "standard".
        with_classifier: whether the rows of the linear class head are in.

    Returns:
        One `Rename` for each of our parameters; targets start with "segmentor/" or "classifier/".

    Raises:
        ValueError: the backbone is one that these checkpoints do not hold.
    """
    settings = {**DEFAULTS, **config}
    backbone = settings["backbone"]
    kind = backbone.get("kind", "resnet")
    if kind not in _BACKBONE_TABLES:
        raise ValueError(
            f"Hugging Face weights need a backbone with kind {' or '.join(_BACKBONE_TABLES)}, but "
            f"the config has {kind!r}; change it."
        )
    for field, needed in (("norm", "frozen_batch"), ("stem", "standard")):
        if kind == "resnet" and backbone.get(field, needed) != needed:
            raise ValueError(
                f"Hugging Face weights need a backbone with {field} {needed!r}, but the config has "
                f"{backbone[field]!r}; change it."
            )
    rows = [
        *_BACKBONE_TABLES[kind](BACKBONE, "segmentor/backbone", backbone),
        *_pixel_decoder_table(
            "model.pixel_level_module.decoder",
            "segmentor/pixel_decoder",
            settings["num_encoder_layers"],
        ),
        *_transformer_decoder_table(
            "model.transformer_module",
            "segmentor/transformer_decoder",
            settings["num_decoder_layers"],
        ),
    ]
    if with_classifier:
        rows += linear_rows("class_predictor", "classifier/class_embed")
    return tuple(rows)


def segmentor_params_from_hf(
    state_dict: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[Params, LoadingReport]:
    """Our parameters from the weights of a Hugging Face Mask2Former.

    Args:
        state_dict: name -> array, e.g. `{k: v.numpy() for k, v in model.state_dict().items()}` or
            the content of its safetensors file. The class head may be absent.
        config: the matching `make_segmentor` config.

    Returns:
        `{"segmentor": ..., "classifier": {"class_embed": ...}}` of float32 numpy arrays, for
        `Segmentor.apply({"params": params["segmentor"]}, ...)` and `LinearClassifier`
        ("classifier" only if the state dict has the head), and a report.

    Raises:
        ValueError: the state dict lacks a key that the config needs, holds one that the config has
            no place for, or an array has another shape than the config asks for.
    """
    head = state_dict.get("class_predictor.weight")
    return params_from_state_dict(
        state_dict,
        hf_rename_table(config, with_classifier=head is not None),
        parameter_shapes(config, None if head is None else len(head) - 1),
        file_name=file_name,
        is_ignored=lambda key: key.endswith(IGNORED_SUFFIXES),
    )


def segmentor_params_to_hf(
    params: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The inverse of `segmentor_params_from_hf`, without torch's bookkeeping entries.

    Args:
        params: `{"segmentor": ...}` and optionally "classifier".
        config: the matching `make_segmentor` config.

    Returns:
        name -> float32 array, named as in the published files. Save it as a safetensors file, or
        pass it as `from_pretrained(None, config=..., state_dict=...)`, which maps them to the names
        in memory; `load_state_dict(..., strict=False)` does not, and with transformers 5 would pass
        over a Swin backbone in silence.

    Raises:
        ValueError: `params` and the config do not describe the same arrays.
    """
    return state_dict_from_params(
        params, hf_rename_table(config, with_classifier="classifier" in params)
    )
