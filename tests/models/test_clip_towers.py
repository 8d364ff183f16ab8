"""The convolutional towers of CLIP beside OpenAI's and open_clip's own, by golden files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from concat_jax.models.clip import CLIP_VARIANTS, make_clip
from concat_jax.models.clip_pooling import AttentionPool, make_conv_tower
from concat_jax.weights.clip import read_clip
from tests import tiny
from tests.golden import cases

PREFIX = "backbone.clip_model."


def clip_file(name, folder):
    """open_clip's safetensors of the golden case."""
    weights = cases.draw_weights(cases.unpack_text(cases.load(name)["layout"]))
    path = folder / "open_clip_model.safetensors"
    clip = {k.removeprefix(PREFIX): v for k, v in weights.items() if k.startswith(PREFIX)}
    safetensors.numpy.save_file(clip, path)
    return path


def compare(name, folder):
    """Relative errors of the image's and the text's embeddings, and the CLIP that was read."""
    ours, golden = read_clip(clip_file(name, folder)), cases.load(name)
    side = cases.FCCLIPS[name]["image_size"]
    clip = make_clip({**ours.config, "image_size": side})
    tokens = cases.fcclip_tokenizer()(cases.FCCLIP_ASKED[2:5])
    images = cases.fcclip_clip_images(side)
    image, text, _ = jax.jit(clip.apply)({"params": ours.params}, images, tokens)
    for key in ("image", "text"):
        assert np.ptp(golden[key], axis=0).max() > 0.1 * np.abs(golden[key]).max()
    found = {"image": image, "text": text}
    return {key: cases.relative_error(found[key], golden[key]) for key in found}, ours


@pytest.mark.parametrize("name", ["fcclip_resnet", "fcclip_convnext"])
def test_equals_open_clip(name, tmp_path):
    errors, ours = compare(name, tmp_path)
    assert max(errors.values()) < 1e-5, errors
    assert ours.kind == "open_clip"
    assert ("image_size" in ours.assumed) is ("convnext" in name)


@pytest.mark.parametrize("tower", ["resnet", "convnext"])
def test_a_padded_image_is_pooled_as_it_is_alone(tower):
    sizes = dict(variant="RN50" if tower == "resnet" else "convnext_large_d")
    sizes |= dict(image_width=16, image_stages=(1, 1, 1, 1), image_size=64, image_heads=2)
    clip = make_clip({**sizes, "text_depth": 1, "embed_dim": 8})
    backbone, pooling = make_conv_tower(clip)
    images = np.random.default_rng(0).normal(size=(1, 128, 96, 3)).astype(np.float32)
    variables = tiny.fill(jax.eval_shape(backbone.init, tiny.KEY, images), 0)
    alone = jax.jit(backbone.apply)(variables, images)
    padded = np.pad(images, ((0, 0), (0, 32), (0, 64), (0, 0)), constant_values=9)
    size = jnp.array([[128, 96]])
    inside = jax.jit(backbone.apply)(variables, padded, size)
    for ours, theirs in zip(inside, alone, strict=True):
        height, width = theirs.shape[1:3]
        assert cases.relative_error(ours[:, :height, :width], theirs) < 1e-5
    masks = np.random.default_rng(1).random((1, 5, 4, 3)) < 0.5
    heads = tiny.fill(jax.eval_shape(pooling.init, tiny.KEY, alone[-1], masks), 1)
    theirs = jax.jit(pooling.apply)(heads, alone[-1], masks)
    wide = np.pad(masks, ((0, 0), (0, 0), (0, 1), (0, 2)), constant_values=True)
    ours = jax.jit(pooling.apply)(heads, inside[-1], wide, size // 32)
    assert cases.relative_error(ours, theirs) < 1e-5
    assert np.ptp(theirs, axis=1).max() > 0.1 * np.abs(theirs).max()


def test_all_of_an_image_as_a_mask_leaves_out_the_mean_alone():
    """OpenAI's pooling has the mean among what is attended to; FC-CLIP's, over masks, has not."""
    pool = AttentionPool(embed_dim=3, side=2, num_heads=1)
    features = jnp.zeros((1, 2, 2, 4)).at[0, 0, 0].set(1.0)
    variables = tiny.fill(jax.eval_shape(pool.init, tiny.KEY, features), 0)
    apply = jax.jit(pool.apply)
    whole = apply(variables, features)
    masked = apply(variables, features, jnp.ones((1, 1, 2, 2), bool))[:, 0]
    assert np.abs(whole - masked).max() > 1e-4


def test_published_sizes_have_as_many_numbers_as_published():
    """Of both towers, in millions: open_clip `docs/model_profile.csv`."""
    published = {"RN50": 102.01, "RN101": 119.69, "RN50x4": 178.3, "convnext_base_w": 179.39}
    published |= {"convnext_large_d_320": 351.77}
    for variant, millions in published.items():
        # Of the text tower's layers, all alike, one is traced.
        clip = make_clip({**CLIP_VARIANTS[variant], "text_depth": 1})
        depth, side = make_clip(CLIP_VARIANTS[variant]).text_depth, clip.image_size
        shapes = jax.eval_shape(
            clip.init, jax.random.key(0), jnp.zeros((1, side, side, 3)), jnp.zeros((1, 4), int)
        )["params"]
        flat = jax.tree_util.tree_leaves_with_path(shapes)
        times = {("text_model", "layers_0"): depth}
        # The statistics of frozen norms are none of torch's parameters.
        count = sum(
            leaf.size * times.get(tuple(key.key for key in path[:2]), 1)
            for path, leaf in flat
            if not path[-1].key.endswith(("frozen_mean", "frozen_variance"))
        )
        assert abs(count / 1e6 - millions) < 0.01, variant
