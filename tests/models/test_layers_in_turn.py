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
# The decoder is given two scales, which are a round.
SEGMENTOR = dict(tiny.MODEL["segmentor"], num_encoder_layers=2, num_decoder_layers=4)
RESNET = SEGMENTOR | {"backbone": dict(tiny.STRIDE_4, stage_sizes=(3, 1, 1, 1))}
SWIN = dict(kind="swin", width=8, stage_sizes=(4, 2, 2, 2), num_heads=(1, 1, 2, 2), window_size=4)
SWIN = SEGMENTOR | {"backbone": SWIN}


def count(lowered):
    return len(re.findall("stablehlo.(dot_general|convolution)", lowered.as_text()))


def take_loops(monkeypatch):
    loops = lambda *args, cpu, default: default(*args)  # noqa: E731
    monkeypatch.setattr(layers_in_turn, "platform_dependent", loops)


@pytest.mark.parametrize(
    "config, part, inputs",
    [
        (RESNET, "backbone", (IMAGES,)),
        pytest.param(SWIN, "backbone", (IMAGES,), marks=pytest.mark.slow),
        (SEGMENTOR, "pixel_decoder", (MAPS,)),
        (SEGMENTOR, "transformer_decoder", (WIDE[1:3], WIDE[3])),
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

    take_loops(monkeypatch)
    assert shapes(module(True)) == (found := shapes(module(False)))
    params, gradient = tiny.fill(found, 1), jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    apart, looped = (gradient.lower(params, module(scan)) for scan in (False, True))
    assert count(looped) < count(apart)
    expected, actual = (x.compile()(params) for x in (apart, looped))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[0]))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * max(largest, 1))


def test_on_a_cpu_loops_are_written_out(monkeypatch):
    inputs = IMAGES[:, :16, :16], TOKENS
    clips = [make_clip(CLIP | {"scan_layers": scan}) for scan in (False, True)]
    variables = jax.eval_shape(clips[0].init, tiny.KEY, *inputs)
    written, on_cpu = (count(jax.jit(clip.apply).lower(variables, *inputs)) for clip in clips)
    jax.clear_caches()  # of traces that know nothing of the patch
    take_loops(monkeypatch)
    assert count(jax.jit(clips[1].apply).lower(variables, *inputs)) < on_cpu <= written
