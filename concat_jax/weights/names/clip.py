"""What Hugging Face and OpenAI call CLIP's parameters, as tables of `Rename` rows.

Hugging Face's names are those of `transformers.CLIPModel.state_dict()`. OpenAI's are those of
`openai/CLIP clip/model.py`, which open_clip took over: there query, key and value are stacked, and
the projections to the joint space are matrices that multiply from the right.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

import numpy as np

from concat_jax.weights.names.rename import Rename, linear_rows, norm_rows

Arrays = Mapping[str, np.ndarray]

VISION = "vision_model"
TEXT = "text_model"

# The kernels of the patch embeddings, which are a convolution theirs and a matrix product ours.
HF_PATCHES = f"{VISION}.embeddings.patch_embedding.weight"
OPENAI_PATCHES = "visual.conv1.weight"
# Sizes that OpenAI's files hold as numbers.
OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")
# Last parts of the names of what is no parameter: index vectors (0, 1, 2, ...) that transformers
# stored before version 4.31, those sizes, and the causal mask, one or one a layer.
BUFFERS = ("position_ids", *OPENAI_SIZES, "attn_mask")


def is_buffer(name: str) -> bool:
    """Whether an array is none of the parameters, and follows from the sizes."""
    return name.split(".")[-1] in BUFFERS


def hf_rows(names: Collection[str]) -> list[Rename]:
    """The table of a Hugging Face CLIPModel as deep as `names` say."""
    vision, text = f"{VISION}.embeddings", f"{TEXT}.embeddings"
    rows = [
        Rename("logit_scale", "logit_scale"),
        *linear_rows("visual_projection", "visual_projection", bias=False),
        *linear_rows("text_projection", "text_projection", bias=False),
        Rename(f"{vision}.class_embedding", f"{VISION}/class_embedding"),
        Rename(HF_PATCHES, f"{VISION}/patch_embedding/projection/kernel", "dense"),
        Rename(f"{vision}.position_embedding.weight", f"{VISION}/position_embedding"),
        *norm_rows(f"{VISION}.pre_layrnorm", f"{VISION}/pre_layrnorm"),
        *norm_rows(f"{VISION}.post_layernorm", f"{VISION}/post_layernorm"),
        Rename(f"{text}.token_embedding.weight", f"{TEXT}/token_embedding/embedding"),
        Rename(f"{text}.position_embedding.weight", f"{TEXT}/position_embedding"),
        *norm_rows(f"{TEXT}.final_layer_norm", f"{TEXT}/final_layer_norm"),
    ]
    for tower in (VISION, TEXT):
        for layer in range(_depth(names, f"{tower}.encoder.layers")):
            rows += _hf_layer(f"{tower}.encoder.layers.{layer}", f"{tower}/layers_{layer}")
    return rows


def openai_rows(names: Collection[str]) -> list[Rename]:
    """The table of OpenAI's CLIP as deep as `names` say."""
    rows = [
        Rename("logit_scale", "logit_scale"),
        Rename("visual.proj", "visual_projection/kernel"),
        Rename("text_projection", "text_projection/kernel"),
        Rename("visual.class_embedding", f"{VISION}/class_embedding"),
        Rename(OPENAI_PATCHES, f"{VISION}/patch_embedding/projection/kernel", "dense"),
        Rename("visual.positional_embedding", f"{VISION}/position_embedding"),
        *norm_rows("visual.ln_pre", f"{VISION}/pre_layrnorm"),
        *norm_rows("visual.ln_post", f"{VISION}/post_layernorm"),
        Rename("token_embedding.weight", f"{TEXT}/token_embedding/embedding"),
        Rename("positional_embedding", f"{TEXT}/position_embedding"),
        *norm_rows("ln_final", f"{TEXT}/final_layer_norm"),
    ]
    for tower, theirs in ((VISION, "visual.transformer"), (TEXT, "transformer")):
        for layer in range(_depth(names, f"{theirs}.resblocks")):
            rows += _openai_layer(f"{theirs}.resblocks.{layer}", f"{tower}/layers_{layer}")
    return rows


def _hf_layer(theirs: str, ours: str) -> Iterator[Rename]:
    for norm in ("layer_norm1", "layer_norm2"):
        yield from norm_rows(f"{theirs}.{norm}", f"{ours}/{norm}")
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
        name = f"self_attn.{projection}"
        yield from linear_rows(f"{theirs}.{name}", f"{ours}/self_attn/{projection}")
    for linear in ("fc1", "fc2"):
        yield from linear_rows(f"{theirs}.mlp.{linear}", f"{ours}/{linear}")


def _openai_layer(theirs: str, ours: str) -> Iterator[Rename]:
    yield from norm_rows(f"{theirs}.ln_1", f"{ours}/layer_norm1")
    yield from norm_rows(f"{theirs}.ln_2", f"{ours}/layer_norm2")
    for third, name in enumerate(("q_proj", "k_proj", "v_proj")):
        target = f"{ours}/self_attn/{name}"
        yield Rename(f"{theirs}.attn.in_proj_weight", f"{target}/kernel", "dense", third)
        yield Rename(f"{theirs}.attn.in_proj_bias", f"{target}/bias", "same", third)
    yield from linear_rows(f"{theirs}.attn.out_proj", f"{ours}/self_attn/out_proj")
    yield from linear_rows(f"{theirs}.mlp.c_fc", f"{ours}/fc1")
    yield from linear_rows(f"{theirs}.mlp.c_proj", f"{ours}/fc2")


def _depth(names: Collection[str], layers: str) -> int:
    pattern = re.compile(rf"{re.escape(layers)}\.(\d{{1,4}})\.")
    found = {int(match.group(1)) for name in names if (match := pattern.match(name))}
    return 1 + max(found, default=-1)


def with_flat_patches(arrays: Arrays, name: str) -> dict[str, np.ndarray]:
    """`arrays` with the convolution `name` [D, 3, p, p] as rows of whole patches [D, p * p * 3].

    Raises:
        ValueError: it is no convolution of square patches of three channels.
    """
    kernel = arrays[name]
    if kernel.ndim != 4 or kernel.shape[1] != 3 or kernel.shape[2] != kernel.shape[3]:
        raise ValueError(
            f"its {name} has shape {kernel.shape}, which is no convolution of square patches of "
            "RGB pictures"
        )
    return {**arrays, name: kernel.transpose(0, 2, 3, 1).reshape(len(kernel), -1)}


def our_shapes(arrays: Arrays, rows: list[Rename]) -> dict[str, tuple[int, ...]]:
    """Our path -> the shape that the array there would have, by the arrays' own shapes.

    Raises:
        ValueError: an array has fewer axes than its place asks for.
    """
    shapes = {}
    for row in rows:
        shape = arrays[row.source].shape
        if row.kind == "dense" and len(shape) != 2:
            raise ValueError(f"its {row.source} has shape {shape}, which is no matrix")
        if row.third is not None:
            shape = (shape[0] // 3, *shape[1:])
        shapes[row.target] = shape[::-1] if row.kind == "dense" else shape
    return shapes
