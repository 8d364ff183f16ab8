"""Weights of other code bases in, ours out.

One table of `Rename` rows says where each array of a Hugging Face Mask2Former (`transformers`
`Mask2FormerForUniversalSegmentation` on a `ResNetBackbone` or `SwinBackbone`) lives in our
parameter tree and how its axes turn; it is read in both directions. Arrays are numpy on both sides.
Names are those of the published files; transformers 5 calls parts of a Swin otherwise in memory,
and those names are understood on the way in.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from concat_jax.models.segmentor import DEFAULTS, LinearClassifier, make_segmentor
from concat_jax.models.swin import Swin

# Entries of a torch state dict that are bookkeeping, or weights that no output depends on: a Swin
# backbone carries the final norm of its classifier.
IGNORED_SUFFIXES = (
    ".num_batches_tracked",
    "criterion.empty_weight",
    ".relative_position_index",
    ".encoder.swin.layernorm.weight",
    ".encoder.swin.layernorm.bias",
)
_BACKBONE = "model.pixel_level_module.encoder"
# A Swin's names in memory (transformers 5) and in the published files.
_SWIN_FILE_NAMES = {
    f"{_BACKBONE}.swin.": f"{_BACKBONE}.",
    ".attention.q_proj.": ".attention.self.query.",
    ".attention.k_proj.": ".attention.self.key.",
    ".attention.v_proj.": ".attention.self.value.",
    ".attention.o_proj.": ".attention.output.dense.",
    ".attention.relative_position_bias.": ".attention.self.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}
# An error names at most this many keys: enough to see the pattern, short enough to read.
MAX_KEYS_NAMED = 5

_NORM = {"weight": "scale", "bias": "bias"}
_FROZEN_NORM = {
    "weight": "frozen_scale",
    "bias": "frozen_bias",
    "running_mean": "frozen_mean",
    "running_var": "frozen_variance",
}


@dataclasses.dataclass(frozen=True)
class Rename:
    """Where one of our arrays comes from.

    Attributes:
        source: key of the torch weights file.
        target: path in our tree, joined by "/".
        kind: "same", "dense" ([out, in] -> [in, out]), "pointwise" ([out, in, 1, 1] -> [in, out])
            or "conv" ([out, in, h, w] -> [h, w, in, out]).
        third: which third of the rows, where torch stacks query, key and value; else None.
    """

    source: str
    target: str
    kind: str = "same"
    third: int | None = None


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What a conversion did with each array.

    Attributes:
        loaded: our path -> the source key it was filled from; every parameter is in it.
        ignored: source keys that are bookkeeping and were left out.
        num_parameters: scalars loaded.
    """

    loaded: Mapping[str, str]
    ignored: tuple[str, ...]
    num_parameters: int

    def __str__(self) -> str:
        return (
            f"loaded {len(self.loaded)} arrays ({self.num_parameters:,} numbers), "
            f"ignored {len(self.ignored)} bookkeeping entries, nothing new, nothing missing"
        )


def _to_ours(array: np.ndarray, kind: str) -> np.ndarray:
    if kind == "dense":
        return array.T
    if kind == "pointwise":
        return array[:, :, 0, 0].T
    if kind == "conv":
        return array.transpose(2, 3, 1, 0)
    return array


def _to_torch(array: np.ndarray, kind: str) -> np.ndarray:
    if kind == "dense":
        return array.T
    if kind == "pointwise":
        return array.T[:, :, None, None]
    if kind == "conv":
        return array.transpose(3, 2, 0, 1)
    return array


def _norm(source: str, target: str, leaves: Mapping[str, str] = _NORM) -> Iterator[Rename]:
    for theirs, ours in leaves.items():
        yield Rename(f"{source}.{theirs}", f"{target}/{ours}")


def _linear(source: str, target: str, kind: str = "dense", bias: bool = True) -> Iterator[Rename]:
    yield Rename(f"{source}.weight", f"{target}/kernel", kind)
    if bias:
        yield Rename(f"{source}.bias", f"{target}/bias")


def _backbone_table(source: str, target: str, backbone: Mapping[str, Any]) -> Iterator[Rename]:
    yield Rename(
        f"{source}.embedder.embedder.convolution.weight", f"{target}/stem_conv/kernel", "conv"
    )
    yield from _norm(
        f"{source}.embedder.embedder.normalization", f"{target}/stem_norm", _FROZEN_NORM
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
                yield from _norm(f"{layer}.normalization", f"{ours}/norm{i + 1}", _FROZEN_NORM)
            # A basic block of the first stage changes neither size nor width.
            if block == 0 and (is_bottleneck or stage > 0):
                yield Rename(
                    f"{theirs}.shortcut.convolution.weight", f"{ours}/shortcut/kernel", "pointwise"
                )
                yield from _norm(
                    f"{theirs}.shortcut.normalization", f"{ours}/shortcut_norm", _FROZEN_NORM
                )


def _swin_table(source: str, target: str, backbone: Mapping[str, Any]) -> Iterator[Rename]:
    yield from _linear(
        f"{source}.embeddings.patch_embeddings.projection", f"{target}/patch_projection", "conv"
    )
    yield from _norm(f"{source}.embeddings.norm", f"{target}/patch_norm")
    for stage, num_blocks in enumerate(backbone.get("stage_sizes", Swin.stage_sizes)):
        theirs = f"{source}.encoder.layers.{stage}"
        if stage > 0:
            # Theirs ends a stage with the merging, ours begins the next one with it.
            merging = f"{source}.encoder.layers.{stage - 1}.downsample"
            yield from _norm(f"{merging}.norm", f"{target}/merging_{stage}/norm")
            yield from _linear(
                f"{merging}.reduction", f"{target}/merging_{stage}/reduction", bias=False
            )
        for index in range(num_blocks):
            block, ours = f"{theirs}.blocks.{index}", f"{target}/stage_{stage}_block_{index}"
            yield from _norm(f"{block}.layernorm_before", f"{ours}/attention_norm")
            for name in ("query", "key", "value"):
                yield from _linear(f"{block}.attention.self.{name}", f"{ours}/attention/{name}")
            yield Rename(
                f"{block}.attention.self.relative_position_bias_table",
                f"{ours}/attention/relative_position_bias",
            )
            yield from _linear(f"{block}.attention.output.dense", f"{ours}/attention/output")
            yield from _norm(f"{block}.layernorm_after", f"{ours}/ffn_norm")
            yield from _linear(f"{block}.intermediate.dense", f"{ours}/ffn_in")
            yield from _linear(f"{block}.output.dense", f"{ours}/ffn_out")
        yield from _norm(
            f"{source}.hidden_states_norms.stage{stage + 1}", f"{target}/output_norm_{stage}"
        )


def _file_name(key: str) -> str:
    """The name in the published files of an array whose name in memory may differ."""
    if key.startswith(f"{_BACKBONE}."):
        for in_memory, in_file in _SWIN_FILE_NAMES.items():
            key = key.replace(in_memory, in_file)
    return key


def _pixel_decoder_table(source: str, target: str, num_layers: int) -> Iterator[Rename]:
    yield Rename(f"{source}.level_embed", f"{target}/level_embedding")
    for level in range(3):
        theirs = f"{source}.input_projections.{level}"
        yield from _linear(f"{theirs}.0", f"{target}/input_projection_{level}", "pointwise")
        yield from _norm(f"{theirs}.1", f"{target}/input_norm_{level}")
    for index in range(num_layers):
        theirs, ours = f"{source}.encoder.layers.{index}", f"{target}/layer_{index}"
        for their_name, our_name in (
            ("sampling_offsets", "sampling_offsets"),
            ("attention_weights", "attention_weights"),
            ("value_proj", "value_projection"),
            ("output_proj", "output_projection"),
        ):
            yield from _linear(
                f"{theirs}.self_attn.{their_name}", f"{ours}/self_attention/{our_name}"
            )
        yield from _norm(f"{theirs}.self_attn_layer_norm", f"{ours}/self_attention_norm")
        yield from _linear(f"{theirs}.fc1", f"{ours}/ffn_in")
        yield from _linear(f"{theirs}.fc2", f"{ours}/ffn_out")
        yield from _norm(f"{theirs}.final_layer_norm", f"{ours}/ffn_norm")
    yield from _linear(f"{source}.adapter_1.0", f"{target}/lateral_projection", "pointwise", False)
    yield from _norm(f"{source}.adapter_1.1", f"{target}/lateral_norm")
    yield from _linear(f"{source}.layer_1.0", f"{target}/output_conv", "conv", False)
    yield from _norm(f"{source}.layer_1.1", f"{target}/output_norm")
    yield from _linear(f"{source}.mask_projection", f"{target}/mask_projection", "pointwise")


def _transformer_decoder_table(source: str, target: str, num_layers: int) -> Iterator[Rename]:
    yield Rename(f"{source}.queries_features.weight", f"{target}/query_feature_embedding")
    yield Rename(f"{source}.queries_embedder.weight", f"{target}/query_position_embedding")
    yield Rename(f"{source}.level_embed.weight", f"{target}/level_embedding")
    for index in range(num_layers):
        theirs, ours = f"{source}.decoder.layers.{index}", f"{target}/layer_{index}"
        for third, name in enumerate(("query", "key", "value")):
            cross, path = f"{theirs}.cross_attn.in_proj", f"{ours}/cross_attention/{name}"
            yield Rename(f"{cross}_weight", f"{path}/kernel", "dense", third)
            yield Rename(f"{cross}_bias", f"{path}/bias", "same", third)
            yield from _linear(
                f"{theirs}.self_attn.{name[0]}_proj", f"{ours}/self_attention/{name}"
            )
        for name in ("cross", "self"):
            yield from _linear(f"{theirs}.{name}_attn.out_proj", f"{ours}/{name}_attention/output")
            yield from _norm(f"{theirs}.{name}_attn_layer_norm", f"{ours}/{name}_attention_norm")
        yield from _linear(f"{theirs}.fc1", f"{ours}/ffn_in")
        yield from _linear(f"{theirs}.fc2", f"{ours}/ffn_out")
        yield from _norm(f"{theirs}.final_layer_norm", f"{ours}/ffn_norm")
    yield from _norm(f"{source}.decoder.layernorm", f"{target}/decoder_norm")
    for i in range(3):
        yield from _linear(
            f"{source}.decoder.mask_predictor.mask_embedder.{i}.0", f"{target}/mask_mlp_{i}"
        )


_BACKBONE_TABLES = {"resnet": _backbone_table, "swin": _swin_table}


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
        *_BACKBONE_TABLES[kind](_BACKBONE, "segmentor/backbone", backbone),
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
        rows += _linear("class_predictor", "classifier/class_embed")
    return tuple(rows)


def _name_keys(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    named = ", ".join(keys[:MAX_KEYS_NAMED])
    return (
        named if len(keys) <= MAX_KEYS_NAMED else f"{named} and {len(keys) - MAX_KEYS_NAMED} more"
    )


def _expected_shapes(config: Mapping[str, Any], num_classes: int | None) -> dict[str, tuple]:
    """Our path -> shape for every parameter of the configured model."""
    # Parameter shapes do not depend on the image size; the smallest one traces fastest.
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    key = jax.random.key(0)
    tree = {"segmentor": jax.eval_shape(make_segmentor(config).init, key, image)["params"]}
    if num_classes is not None:
        width = {**DEFAULTS, **config}["width"]
        queries = jax.ShapeDtypeStruct((1, 1, width), jnp.float32)
        classifier = LinearClassifier(num_classes)
        tree["classifier"] = jax.eval_shape(classifier.init, key, queries)["params"]
    return {k: v.shape for k, v in traverse_util.flatten_dict(tree, sep="/").items()}


def segmentor_params_from_hf(
    state_dict: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[dict[str, Any], ConversionReport]:
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
    ignored = tuple(k for k in state_dict if k.endswith(IGNORED_SUFFIXES))
    keys = {_file_name(k): k for k in state_dict if k not in ignored}
    with_classifier = "class_predictor.weight" in state_dict
    table = hf_rename_table(config, with_classifier=with_classifier)
    needed = {row.source for row in table}
    if missing := needed - set(keys):
        raise ValueError(
            f"The checkpoint lacks {len(missing)} arrays that the config needs "
            f"({_name_keys(missing)}); check the depths and the backbone of the config."
        )
    if unused := set(keys) - needed:
        raise ValueError(
            f"The checkpoint holds {len(unused)} arrays that the config has no place for "
            f"({_name_keys(unused)}); check the depths and the backbone of the config."
        )

    num_classes = state_dict["class_predictor.weight"].shape[0] - 1 if with_classifier else None
    shapes = _expected_shapes(config, num_classes)
    flat: dict[str, np.ndarray] = {}
    for row in table:
        array = np.asarray(state_dict[keys[row.source]])
        if row.third is not None:
            array = np.split(array, 3, axis=0)[row.third]
        array = np.ascontiguousarray(_to_ours(array, row.kind), dtype=np.float32)
        if array.shape != shapes[row.target]:
            raise ValueError(
                f"The checkpoint's {row.source} becomes {row.target} of shape {array.shape}, but "
                f"the config needs {shapes[row.target]}; check the widths of the config."
            )
        flat[row.target] = array
    if unfilled := set(shapes) - set(flat):
        raise ValueError(f"The rename table has no row for {_name_keys(unfilled)}; add one.")
    report = ConversionReport(
        loaded={row.target: keys[row.source] for row in table},
        ignored=ignored,
        num_parameters=sum(math.prod(array.shape) for array in flat.values()),
    )
    return traverse_util.unflatten_dict(flat, sep="/"), report


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
    flat = traverse_util.flatten_dict(params, sep="/")
    table = hf_rename_table(config, with_classifier="classifier" in params)
    if different := set(flat) ^ {row.target for row in table}:
        raise ValueError(
            f"The parameters and the config differ in {len(different)} arrays "
            f"({_name_keys(different)}); pass the config that they were made with."
        )
    parts: dict[str, list[np.ndarray]] = {}
    for row in table:
        array = np.ascontiguousarray(_to_torch(np.asarray(flat[row.target], np.float32), row.kind))
        # The table lists query, key, value in torch's order, so the thirds stack as they come.
        parts.setdefault(row.source, []).append(array)
    return {name: np.concatenate(p) if len(p) > 1 else p[0] for name, p in parts.items()}
