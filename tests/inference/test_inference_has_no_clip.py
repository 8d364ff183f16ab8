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

from concat_jax.inference.heads import TextHead
from concat_jax.inference.programs import Network, name_queries, run_segmentor
from concat_jax.models.networks import make_networks
from concat_jax.stages.clip_targets import CropConfig, clip_targets
from tests import tiny

IMAGE_WIDTH, TEXT_WIDTH, JOINT_WIDTH = 37, 41, 16
# MLPs are as wide as no multiple of anything else here.
WIDTHS = {IMAGE_WIDTH, TEXT_WIDTH, 3 * IMAGE_WIDTH, 3 * TEXT_WIDTH}
NETWORKS = make_networks(
    tiny.model(
        clip=dict(
            embed_dim=JOINT_WIDTH,
            image_width=IMAGE_WIDTH,
            image_heads=1,
            image_mlp_ratio=3.0,
            text_width=TEXT_WIDTH,
            text_heads=1,
            text_mlp_ratio=3.0,
        ),
        segmentor=dict(backbone=tiny.STRIDE_4),
    )
)
NAMES = ("cat", "sky", "tree")
SIZE = 64
IMAGES = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.uint8)


def dimensions(hlo: str) -> set[int]:
    """Every size that an array of the program has."""
    shapes = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", hlo)
    return {int(size) for shape in shapes for size in shape.split(",")}


def shapes_of(name):
    return jax.eval_shape(lambda key: NETWORKS.init(name, key), jax.random.key(0))


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
def test_inference_compiles_without_clip(is_padded):
    network = Network(shapes_of("segmentor"), NETWORKS.segmentor)
    text = jax.ShapeDtypeStruct((len(NAMES), JOINT_WIDTH), jnp.float32)
    head = TextHead(shapes_of("projector"), text, None, None, NETWORKS.projector)
    image_size = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    how = {"is_padded": is_padded, "canvas": (SIZE, SIZE)}
    _, queries = jax.eval_shape(
        functools.partial(run_segmentor, **how), network, IMAGES, image_size
    )
    flags = jax.ShapeDtypeStruct((len(NAMES),), bool)
    thresholds = {"score_threshold": 0.8, "objectness_threshold": 0.5}
    naming = head, queries, flags, flags, np.zeros(1, np.float32), thresholds
    programs = (
        run_segmentor.lower(network, IMAGES, image_size, **how),
        name_queries.lower(*naming, keep_rule=head.KEEP_RULE),
    )
    texts = [program.compile().as_text() for program in programs]
    found = dimensions("".join(texts))
    assert {JOINT_WIDTH, SIZE} < found, "the search reads no shapes"
    assert not WIDTHS & found


def test_the_search_finds_clip_where_it_is():
    """The image tower is found in the program that makes stage 1's targets."""

    def targets(params, images, ids):
        return clip_targets(NETWORKS.clip, params, images, ids, 2, CropConfig())

    ids = jax.ShapeDtypeStruct(IMAGES.shape[:3], jnp.uint8)
    program = jax.jit(targets).lower(shapes_of("clip"), IMAGES, ids).compile()
    found = dimensions(program.as_text())
    assert {IMAGE_WIDTH, 3 * IMAGE_WIDTH} <= found and TEXT_WIDTH not in found
