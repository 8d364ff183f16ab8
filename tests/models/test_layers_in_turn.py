"""Layers in a loop: the parameters, outputs and gradients of the same layers written out."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.models.clip import make_clip
from concat_jax.models.ops import layers_in_turn
from concat_jax.models.segmentor import make_segmentor
from tests import tiny

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 64, 64, 3)).astype(np.float32)
CHANNELS = ((16, 8), (8, 16), (4, 32), (2, 64))
MAPS = [RNG.normal(size=(2, s, s, c)).astype(np.float32) for s, c in CHANNELS]
WIDE = [RNG.normal(size=(2, s, s, 32)).astype(np.float32) for s in (2, 4, 8, 16)]
TOKENS = np.array([[10, 4, 2, 11, 0], [10, 3, 11, 0, 0]], np.int32)

# At least two rounds of everything that is looped over.
CLIP = dict(tiny.MODEL["clip"], image_depth=3, text_depth=2)
SEGMENTOR = dict(tiny.MODEL["segmentor"], num_encoder_layers=2, num_decoder_layers=6)
RESNET = SEGMENTOR | {"backbone": dict(tiny.STRIDE_4, stage_sizes=(3, 1, 1, 1))}
SWIN = dict(kind="swin", width=8, stage_sizes=(4, 2, 2, 2), num_heads=(1, 1, 2, 2), window_size=4)
SWIN = SEGMENTOR | {"backbone": SWIN}


@pytest.mark.parametrize(
    "config, part, inputs",
    [
        (RESNET, "backbone", (IMAGES,)),
        pytest.param(SWIN, "backbone", (IMAGES,), marks=pytest.mark.slow),
        (SEGMENTOR, "pixel_decoder", (MAPS,)),
        (SEGMENTOR, "transformer_decoder", (WIDE[:3], WIDE[3])),
        (CLIP, "", (IMAGES[:, :16, :16], TOKENS)),
    ],
    ids=["resnet", "swin", "encoder", "decoder", "clip"],
)
def test_a_loop_changes_nothing_but_the_program(config, part, inputs, monkeypatch):
    def module(scan_layers):
        if not part:
            return make_clip(config | {"scan_layers": scan_layers})
        return getattr(make_segmentor(config | {"scan_layers": scan_layers}), part)

    def shapes(module):
        return jax.eval_shape(lambda: module.init(tiny.KEY, *inputs))["params"]

    def loss(params, module):
        outputs = module.apply({"params": params}, *inputs)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(outputs)), outputs

    def lower(module):
        lowered = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1).lower(params, module)
        count = len(re.findall("stablehlo.(dot_general|convolution)", lowered.as_text()))
        return lowered, count

    assert shapes(module(True)) == shapes(module(False))
    params = tiny.fill(shapes(module(True)), 1)
    (apart, written), (_, on_cpu) = lower(module(False)), lower(module(True))
    jax.clear_caches()  # of traces that know nothing of the patch
    loops = lambda *args, cpu, default: default(*args)  # noqa: E731
    monkeypatch.setattr(layers_in_turn, "platform_dependent", loops)
    looped, once = lower(module(True))
    assert once < on_cpu <= written
    expected, actual = (x.compile(tiny.FAST_COMPILE)(params) for x in (apart, looped))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[0]))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * max(largest, 1))
