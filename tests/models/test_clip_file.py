"""CLIP weights from a safetensors file, and files that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers

from concat_jax.models.clip import make_clip
from concat_jax.models.clip_weights import clip_params_from_file

TINY = dict(hidden_size=16, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    config = transformers.CLIPConfig(
        text_config=dict(TINY, vocab_size=40, max_position_embeddings=8),
        vision_config=dict(TINY, image_size=16, patch_size=8),
        projection_dim=12,
    )
    model = transformers.CLIPModel(config)
    path = tmp_path_factory.mktemp("clip") / "model.safetensors"
    state = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    safetensors.numpy.save_file(state, path)
    return path


def abstract(**changes):
    fields = dict(
        embed_dim=12, image_size=16, patch_size=8, image_width=16, image_depth=1, image_heads=2,
        text_width=16, text_depth=1, text_heads=2, vocab_size=40, context_length=8,
    )  # fmt: skip
    clip = make_clip(fields | changes)
    size = clip.image_size
    return jax.eval_shape(
        clip.init, jax.random.key(0), jnp.zeros((1, size, size, 3)), jnp.zeros((1, 8), jnp.int32)
    )["params"]


def test_a_file_that_fits_is_loaded(file):
    params = clip_params_from_file(file, abstract())
    state = safetensors.numpy.load_file(file)
    np.testing.assert_array_equal(
        params["visual_projection"]["kernel"], state["visual_projection.weight"].T
    )


def test_a_file_of_another_size_names_the_first_difference(file):
    with pytest.raises(
        ValueError, match=r"holds \(16,\) for .* has \(32,\); make config.model.clip"
    ):
        clip_params_from_file(file, abstract(text_width=32))


def test_what_is_no_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        clip_params_from_file(path, abstract())
