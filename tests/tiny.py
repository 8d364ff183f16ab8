"""Networks, classes and batches that are small enough to compile in a test, in one place."""

from __future__ import annotations

import functools
import json
import pathlib
import re
import string
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.losses.segmentation import SegmentationLossConfig
from concat_jax.models.networks import SUBTREES, Networks, make_networks
from concat_jax.stages.stage import TEXT, Context, Stage
from concat_jax.training.optimizer import FROZEN, label_params, path_name
from data_pipelines.datasets import Datasets

KEY = jax.random.key(3)
SEEN, UNSEEN = [1, 2, 4, 5], [0, 3]  # of `vocabulary`
# A backbone whose first map has the stride of published ones; that of `MODEL` has half of it.
STRIDE_4 = dict(stage_sizes=(1, 1, 1, 1), width=8, block="basic", norm="group")

# The `model` section of a config; 16-d joint space, queries of width 32.
MODEL: Mapping[str, Mapping[str, Any]] = {
    "clip": dict(
        embed_dim=16,
        image_size=16,
        patch_size=8,
        image_width=16,
        image_depth=1,
        image_heads=2,
        text_width=16,
        text_depth=1,
        text_heads=2,
        vocab_size=12,
        context_length=5,
        eot_id=11,
    ),
    "segmentor": dict(
        # Frozen statistics: the only parameters that CON must leave alone.
        backbone=dict(
            stage_sizes=(1, 1, 1, 1), width=8, block="basic", norm="frozen_batch", stem="small"
        ),
        width=32,
        num_queries=6,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_heads=4,
        num_points=2,
        ffn_width=32,
        decoder_ffn_width=32,
        num_groups=8,
    ),
    "projector": dict(hidden_width=16, num_layers=2),
    "generator": dict(hidden_width=16, num_layers=1, noise_width=4),
}


def model(**sections: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`MODEL` with fields of its sections changed."""
    return {name: {**fields, **sections.get(name, {})} for name, fields in MODEL.items()}


@functools.cache
def networks() -> Networks:
    """The networks of `MODEL`."""
    return make_networks(MODEL)


def vocabulary() -> Vocabulary:
    """Six classes. Class 0 is unseen: a padded label that is clipped to 0 would leak it."""
    return Vocabulary(
        names=("red cat", "dog", "blue cat", "sky", "sea", "grass"),
        is_thing=(True, True, True, False, False, False),
        is_seen=(False, True, True, False, True, True),
        category_ids=(1, 2, 3, 4, 5, 6),
    )


def no_data(classes: Vocabulary, **given: Any) -> Datasets:
    """Data that is not there, of these classes."""
    nothing = dict(
        eval_size=64,
        train=lambda batch_size: None,
        bank=lambda batch_size: None,
        captions=lambda batch_size, side: None,
        caption_words=classes.names,
        evaluation=lambda: (),
    )
    return Datasets(vocabulary=classes, **(nothing | given))


def context(**fields: Any) -> Context:
    """What the stages of tests are made with."""
    given = dict(loss=SegmentationLossConfig(num_points=32), networks=networks()) | fields
    return Context(vocabulary=vocabulary(), **given)


def fill(shapes: Any, seed: int) -> Any:
    """Random arrays of these shapes with nothing at zero, which would hide gradients behind it."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        if path_name(path).endswith("variance"):
            return rng.uniform(0.5, 2.0, leaf.shape).astype(np.float32)
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 25
        offset = 1.0 if path_name(path).endswith("scale") else 0.0
        return (offset + rng.normal(size=leaf.shape) / fan_in**0.5).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, shapes)


@functools.cache
def params(name: str, seed: int | None = None, of: Networks | None = None) -> Any:
    """Random parameters of one network, by default the same ones for the same name."""
    of = of or networks()
    shapes = jax.eval_shape(lambda: of.init(name, jax.random.key(0)))
    return fill(shapes, SUBTREES.index(name) if seed is None else seed)


def assert_nothing_is_gathered(loss: Callable, params: Any, *arguments: Any) -> None:
    """Gradients over eight devices that share the batch: sums are sent, and nothing else."""
    if (count := len(jax.devices())) < 8:
        pytest.skip(f"needs 8 devices, found {count}")
    mesh = Mesh(np.asarray(jax.devices()[:8]), ("data",))
    replicated, by_image = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))

    def placed(tree, how):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=how), tree)

    step = jax.jit(jax.grad(loss), out_shardings=replicated)
    text = step.lower(placed(params, replicated), *placed(arguments, by_image)).compile().as_text()
    assert "all-reduce" in text  # the parameter gradients are summed over the devices
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text


def unit(x: np.ndarray) -> np.ndarray:
    """Rows at length 1, float32."""
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def text(seed: int = 10) -> np.ndarray:
    """[K, C] text embeddings of `vocabulary`."""
    return unit(np.random.default_rng(seed).normal(size=(len(vocabulary()), 16)))


def batch() -> dict[str, np.ndarray]:
    """Two images of 32² with two and three seen segments in tables of four rows."""
    rng = np.random.default_rng(12)
    ids = np.zeros((2, 32, 32), np.uint8)
    ids[:, :16], ids[:, 16:, :12] = 1, 2
    ids[1, 20:, 20:] = 3
    return {
        "image": rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8),
        "segment_ids": ids,
        "segment_labels": np.array([[1, 4, -1, -1], [2, 5, 4, -1]], np.int32),
        "segment_is_crowd": np.zeros((2, 4), bool),
        "image_size": np.full((2, 2), 32, np.int32),
    }


def query_batch() -> dict[str, np.ndarray]:
    """Vision queries of three images; classes sit apart, as real queries do."""
    rng = np.random.default_rng(13)
    labels = np.array([[1, -1, 4, -1], [2, 1, -1, -1], [5, 4, 2, -1]], np.int32)
    centres = rng.normal(size=(len(vocabulary()) + 1, 32))
    queries = centres[labels] + 0.3 * rng.normal(size=(*labels.shape, 32))
    return {"queries": queries.astype(np.float32), "query_labels": labels}


def caption_batch() -> dict[str, np.ndarray]:
    """Four pictures and their token rows; the first and the third are captioned alike."""
    tokens = np.array([[10, 1, 2, 11, 0], [10, 3, 11, 0, 0], [10, 1, 2, 11, 0], [10, 4, 5, 6, 11]])
    images = np.random.default_rng(14).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    return {"image": images, "tokens": tokens.astype(np.int32)}


def trained(stage: Stage) -> dict[str, Any]:
    """Parameters of what the stage trains."""
    return {name: params(name) for name in stage.trains}


def frozen(stage: Stage, embeddings: np.ndarray | None = None) -> dict[str, Any]:
    """What the stage says it reads, and nothing else."""
    embeddings = text() if embeddings is None else embeddings
    return {name: embeddings if name == TEXT else params(name) for name in stage.reads}


def evaluate(stage: Stage) -> Callable:
    """(params, frozen, batch, rng) -> ((loss, metrics), gradients of params and of frozen)."""
    gradient = jax.value_and_grad(stage.loss, argnums=(0, 1), has_aux=True)
    return jax.jit(gradient)


def reached(gradients: Any) -> set[str]:
    """Names of the parameters with a gradient above rounding."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(gradients))
    return {path_name(path) for path, g in leaves if np.abs(g).max() > 1e-6}


def unreached(stage: Stage, gradients: Any) -> set[str]:
    """Parameters that the stage trains and that have no gradient.

    Not counted: biases of attention's keys, which shift all logits of a query alike.
    """
    labels = label_params(gradients, stage.rules)
    leaves = jax.tree_util.tree_leaves_with_path(labels)
    to_train = {path_name(path) for path, label in leaves if label != FROZEN}
    missing = to_train - reached(gradients)
    return {name for name in missing if not re.search(r"/(key|k_proj)/bias$", name)}


def assert_finite(loss: Any, metrics: Mapping[str, Any], gradients: Any) -> None:
    """A loss, its scalar metrics and all gradients are numbers."""
    assert np.isfinite(loss) and metrics["loss"] == loss
    for name, metric in metrics.items():
        assert np.isfinite(metric) and np.shape(metric) == (), name
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), path_name(path)


def assert_same(first: Any, second: Any) -> None:
    """Two trees hold the very same numbers."""
    jax.tree.map(np.testing.assert_array_equal, first, second)


def clip_folder(folder: pathlib.Path) -> pathlib.Path:
    """A tiny Hugging Face CLIP: config.json, model.safetensors, and a tokenizer of letters."""
    import transformers

    letters = [*string.ascii_lowercase, ".", ","]
    tokens = [*letters, *(f"{one}</w>" for one in letters), "<|startoftext|>", "<|endoftext|>"]
    tower = dict(hidden_size=16, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    ids = dict(vocab_size=len(tokens), bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1)
    config = transformers.CLIPConfig(
        text_config=dict(tower, max_position_embeddings=77, **ids),
        vision_config=dict(tower, image_size=16, patch_size=8),
        projection_dim=12,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder
