"""The compiled program of inference holds nothing of CLIP: neither weights nor work.

The towers of the CLIP here have widths that are no other size of the program (primes), so that any
array of theirs would be seen in it. Its joint space is the projector's too and has another width.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.evaluate import EvalConfig, Sizes, make_predict
from concat_jax.models.networks import make_networks
from concat_jax.stages.clip_targets import CropConfig, clip_targets

IMAGE_WIDTH, TEXT_WIDTH, JOINT_WIDTH = 37, 41, 16
# MLPs are as wide as no multiple of anything else here.
WIDTHS = {IMAGE_WIDTH, TEXT_WIDTH, 3 * IMAGE_WIDTH, 3 * TEXT_WIDTH}
NETWORKS = make_networks(
    {
        "clip": dict(
            embed_dim=JOINT_WIDTH,
            image_size=16,
            patch_size=8,
            image_width=IMAGE_WIDTH,
            image_depth=1,
            image_heads=1,
            image_mlp_ratio=3.0,
            text_width=TEXT_WIDTH,
            text_depth=1,
            text_heads=1,
            text_mlp_ratio=3.0,
            vocab_size=12,
            context_length=5,
        ),
        "segmentor": dict(
            backbone=dict(stage_sizes=(1, 1, 1, 1), width=8, block="basic", norm="group"),
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
)
VOCABULARY = Vocabulary(
    ("cat", "sky", "tree"), (True, False, False), (True, True, False), (1, 2, 3)
)
SIZE = 64
# Nothing is run, so machine code need not be good; the passes on the program itself all run.
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
NEEDED = ("segmentor", "projector")
IMAGES = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.uint8)


def dimensions(hlo: str) -> set[int]:
    """Every size that an array of the program has."""
    shapes = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", hlo)
    return {int(size) for shape in shapes for size in shape.split(",")}


def shapes_of(name):
    return jax.eval_shape(lambda key: NETWORKS.init(name, key), jax.random.key(0))


@functools.cache
def compile_prediction(names, image_size):
    """`make_predict` as evaluation calls it, compiled for parameters of the networks named."""
    params = {name: shapes_of(name) for name in names}
    predict = make_predict(NETWORKS, VOCABULARY, EvalConfig())
    sizes = Sizes(np.array([image_size], np.int32), np.array([[SIZE, SIZE]], np.int32))
    text = jax.ShapeDtypeStruct((len(VOCABULARY), JOINT_WIDTH), jnp.float32)
    program = jax.jit(lambda params, text, images: predict(params, text, images, sizes))
    return program.lower(params, text, IMAGES).compile(FAST_COMPILE)


@pytest.mark.parametrize("image_size", [(SIZE, SIZE), (SIZE, 40)], ids=["whole", "padded"])
def test_inference_compiles_without_clip(image_size):
    """CLIP's parameters are offered to it, and none becomes an argument of the program."""
    hlo = compile_prediction((*NEEDED, "clip"), image_size).as_text()
    found = dimensions(hlo)
    assert {JOINT_WIDTH, SIZE} < found, "the search reads no shapes"
    assert not WIDTHS & found

    num_arguments = len(re.findall(r"= \S+ parameter\(\d+\)", hlo[hlo.index("ENTRY") :]))
    needed = len(jax.tree.leaves([shapes_of(name) for name in NEEDED]))
    # With text and images; fewer where inference has no use for a parameter of training.
    assert 0.8 * needed < num_arguments <= needed + 2


def test_inference_costs_the_same_with_and_without_clip_at_hand():
    programs = [compile_prediction(names, (SIZE, SIZE)) for names in (NEEDED, (*NEEDED, "clip"))]
    without, offered = (program.cost_analysis()["flops"] for program in programs)
    assert without == offered > 0


def test_the_search_finds_clip_where_it_is():
    """The image tower is found in the program that makes stage 1's targets."""

    def targets(params, images, ids):
        return clip_targets(NETWORKS.clip, params, images, ids, 2, CropConfig())

    ids = jax.ShapeDtypeStruct(IMAGES.shape[:3], jnp.uint8)
    program = jax.jit(targets).lower(shapes_of("clip"), IMAGES, ids).compile(FAST_COMPILE)
    found = dimensions(program.as_text())
    assert {IMAGE_WIDTH, 3 * IMAGE_WIDTH} <= found and TEXT_WIDTH not in found
