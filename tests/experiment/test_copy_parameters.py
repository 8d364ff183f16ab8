"""Copying a trunk into a backbone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.experiment.copy_parameters import copy_parameters
from concat_jax.models.backbones.resnet import ResNet
from concat_jax.models.clip import make_clip


def tree():
    return {
        "segmentor": {"backbone": {"a": jnp.zeros(2), "b": jnp.zeros(3)}, "decoder": jnp.zeros(1)}
    }


def test_shared_parameters_are_copied_and_counted(capsys):
    taken = {"clip": {"trunk": {"a": jnp.ones(2), "other": jnp.ones(5)}}}
    params = tree()
    copied = copy_parameters(params, "segmentor/backbone", taken, "clip/trunk")
    np.testing.assert_array_equal(copied["segmentor"]["backbone"]["a"], 1)
    np.testing.assert_array_equal(copied["segmentor"]["backbone"]["b"], 0)
    np.testing.assert_array_equal(params["segmentor"]["backbone"]["a"], 0)
    assert jax.tree.structure(copied) == jax.tree.structure(params)
    assert "1 of 2 parameters start from clip/trunk" in capsys.readouterr().out


def test_other_shapes_and_missing_parts_are_named():
    with pytest.raises(ValueError, match="segmentor/backbone/a has shape .2,. but clip/trunk/a"):
        copy_parameters(tree(), "segmentor/backbone", {"clip": {"trunk": {"a": jnp.ones(4)}}},
                        "clip/trunk")  # fmt: skip
    with pytest.raises(ValueError, match="no parameters at 'clip/trunk'"):
        copy_parameters(tree(), "segmentor/backbone", {"clip": {"x": jnp.ones(1)}}, "clip/trunk")
    with pytest.raises(ValueError, match="segmentor/backbone and clip have no parameter in common"):
        copy_parameters(tree(), "segmentor/backbone", {"clip": {"x": jnp.ones(1)}}, "clip")


def test_the_hybrid_stem_is_the_start_of_a_resnet():
    """Every parameter of CLIP's trunk has a place in the demo's backbone, of the same shape."""
    clip = make_clip(
        dict(
            embed_dim=8,
            image_size=32,
            patch_size=8,
            stem="resnet",
            image_width=16,
            image_depth=1,
            image_heads=2,
            text_width=8,
            text_depth=1,
            text_heads=2,
            vocab_size=9,
            context_length=4,
        )  # fmt: skip
    )
    shapes = jax.eval_shape(
        clip.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 4), jnp.int32)
    )
    trunk = shapes["params"]["vision_model"]["patch_embedding"]["trunk"]
    resnet = ResNet(
        stage_sizes=(1, 1, 1, 1), width=16, block="basic", norm="group", stem="small", num_groups=8
    )
    backbone = jax.eval_shape(resnet.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    shared = {name: backbone[name] for name in trunk}
    assert jax.tree.map(lambda x: x.shape, shared) == jax.tree.map(lambda x: x.shape, trunk)
    assert {name.split("_")[0] for name in backbone} - {n.split("_")[0] for n in trunk} == {"res5"}
