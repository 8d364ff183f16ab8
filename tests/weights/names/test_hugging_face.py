"""Weights between a Hugging Face Mask2Former and our tree."""

import json

import numpy as np
import pytest

from concat_jax.models.backbones.swin import relative_position_index
from concat_jax.models.segmentor import make_segmentor
from concat_jax.weights.convert import load_source
from concat_jax.weights.names.mask2former import backbone_format
from concat_jax.weights.report import MAX_KEYS_NAMED
from concat_jax.weights.segmentors import segmentor_params_from_hf, segmentor_params_to_hf


def test_round_trip_is_exact(hf_arrays, config, kind):
    file = dict(hf_arrays)
    if kind == "swin":
        # Files of earlier versions hold the index table as well.
        block = "model.pixel_level_module.encoder.encoder.layers.0.blocks.0"
        file[f"{block}.attention.self.relative_position_index"] = relative_position_index(3)
    params, report = segmentor_params_from_hf(file, config)
    weights = {k: v for k, v in file.items() if k not in report.ignored}
    assert set(report.loaded.values()) == set(weights)
    assert report.num_parameters == sum(v.size for v in weights.values())
    assert params["classifier"]["class_embed"]["kernel"].shape == (32, 4)
    back = segmentor_params_to_hf(params, config)
    assert set(back) == set(weights)
    for name, array in back.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, file[name], err_msg=name)
    # Nothing of the file is passed over but torch's counters and tables.
    suffixes = ("num_batches_tracked", "empty_weight", "position_index")
    assert all(k.endswith(suffixes) or ".layernorm." in k for k in report.ignored)


@pytest.mark.parametrize("kind", ["resnet"], indirect=True)
def test_axes_by_hand(hf_arrays, config):
    params, _ = segmentor_params_from_hf(hf_arrays, config)
    # torch [out, in, h, w] against ours [h, w, in, out].
    name = "model.pixel_level_module.encoder.embedder.embedder.convolution.weight"
    ours = params["segmentor"]["backbone"]["stem_conv"]["kernel"]
    assert ours[1, 2, 0, 7] == hf_arrays[name][7, 0, 1, 2]
    # The stacked projection is query, key, value.
    name = "model.transformer_module.decoder.layers.1.cross_attn.in_proj_weight"
    ours = params["segmentor"]["transformer_decoder"]["layer_1"]["cross_attention"]["key"]["kernel"]
    assert ours[3, 5] == hf_arrays[name][32 + 5, 3]


def test_names_in_memory_are_understood(hf_model, hf_arrays, config):
    """transformers 5 calls parts of a Swin otherwise in memory than in its files."""
    memory = {k: v.numpy() for k, v in hf_model.state_dict().items()}
    from_memory, report = segmentor_params_from_hf(memory, config)
    assert set(report.loaded.values()) == set(memory) - set(report.ignored)
    from_file, _ = segmentor_params_from_hf(hf_arrays, config)
    again = segmentor_params_to_hf(from_file, config)
    for name, array in segmentor_params_to_hf(from_memory, config).items():
        np.testing.assert_array_equal(array, again[name], err_msg=name)


def test_half_precision_becomes_float32(hf_arrays, config):
    half = {k: v.astype(np.float16) for k, v in hf_arrays.items() if v.dtype == np.float32}
    params, _ = segmentor_params_from_hf(half, config)
    kernel = params["segmentor"]["pixel_decoder"]["output_conv"]["kernel"]
    assert kernel.dtype == np.float32
    name = "model.pixel_level_module.decoder.layer_1.0.weight"
    np.testing.assert_array_equal(kernel[0, 1, 2], half[name][:, 2, 0, 1].astype(np.float32))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors.index.json"])
def test_other_files_of_weights_in_a_folder(hf_folder, hf_arrays, config, tmp_path, name):
    torch = pytest.importorskip("torch")
    (tmp_path / "config.json").write_bytes((hf_folder / "config.json").read_bytes())
    if name.endswith(".bin"):
        torch.save({k: torch.from_numpy(v) for k, v in hf_arrays.items()}, tmp_path / name)
    else:
        part = "model-00001-of-00001.safetensors"
        (tmp_path / part).write_bytes((hf_folder / "model.safetensors").read_bytes())
        index = {"weight_map": dict.fromkeys(hf_arrays, part)}
        (tmp_path / name).write_text(json.dumps(index))
    found = load_source(tmp_path)
    assert make_segmentor(found.card.segmentor) == make_segmentor(config)
    for key, array in segmentor_params_to_hf(found.params, found.card.segmentor).items():
        np.testing.assert_array_equal(array, hf_arrays[key], err_msg=key)


def test_without_class_head(hf_arrays, config):
    headless = {k: v for k, v in hf_arrays.items() if not k.startswith("class_predictor")}
    params, _ = segmentor_params_from_hf(headless, config)
    assert set(params) == {"segmentor"}


@pytest.mark.parametrize(
    "name", ["model.transformer_module.decoder.layernorm.bias", "class_predictor.bias"]
)
def test_missing_key_is_named(hf_arrays, config, name):
    broken = {k: v for k, v in hf_arrays.items() if k != name}
    with pytest.raises(ValueError, match=f"lacks 1 array .*{name}"):
        segmentor_params_from_hf(broken, config)


def test_unknown_key_is_named(hf_arrays, config):
    with pytest.raises(ValueError, match="no place for .*model.surprise.weight"):
        segmentor_params_from_hf({**hf_arrays, "model.surprise.weight": np.zeros(2)}, config)


@pytest.mark.parametrize("kind", ["swin"], indirect=True)
def test_two_names_of_one_array_are_refused(hf_arrays, config):
    stem = "model.pixel_level_module.encoder."
    name = f"{stem}embeddings.norm.bias"
    double = {**hf_arrays, f"{stem}swin.embeddings.norm.bias": hf_arrays[name]}
    with pytest.raises(ValueError, match=f"as {name} and as {stem}swin.embeddings.norm.bias"):
        segmentor_params_from_hf(double, config)


def test_misshapen_key_is_named_with_both_shapes(hf_arrays, config):
    with pytest.raises(ValueError, match=r"queries_features.*\(5, 32\).*needs \(6, 32\)"):
        segmentor_params_from_hf(hf_arrays, {**config, "num_queries": 6})
    for name, shape in (
        ("model.pixel_level_module.decoder.layer_1.0.weight", (32, 32)),
        ("model.transformer_module.decoder.layers.0.cross_attn.in_proj_weight", (95, 32)),
        ("model.transformer_module.level_embed.weight", ()),
    ):
        with pytest.raises(ValueError, match=f"{name} has shape .*, but the config needs"):
            segmentor_params_from_hf({**hf_arrays, name: np.zeros(shape)}, config)


def test_value_that_is_not_finite_is_named(hf_arrays, config):
    name = "model.transformer_module.level_embed.weight"
    broken = {**hf_arrays, name: np.full((3, 32), np.nan)}
    with pytest.raises(ValueError, match=f"{name} holds a value that is not finite"):
        segmentor_params_from_hf(broken, config)


def test_deeper_checkpoint_is_refused_in_one_short_sentence(hf_arrays, config):
    with pytest.raises(ValueError, match=r"no place for .* and \d+ more") as error:
        segmentor_params_from_hf(hf_arrays, {**config, "num_decoder_layers": 1})
    assert str(error.value).count("decoder.layers.1") == MAX_KEYS_NAMED


@pytest.mark.parametrize("kind", ["resnet"], indirect=True)
@pytest.mark.parametrize("field, value", [("norm", "group"), ("stem", "small"), ("kind", "vgg")])
def test_backbones_the_format_cannot_hold(config, field, value):
    config = {**config, "backbone": {**config["backbone"], field: value}}
    with pytest.raises(ValueError, match=f"{field} .*{value}"):
        backbone_format(config["backbone"])


def test_inverse_checks_the_config(hf_arrays, config):
    params, _ = segmentor_params_from_hf(hf_arrays, config)
    with pytest.raises(ValueError, match="differ in .*layer_1"):
        segmentor_params_to_hf(params, {**config, "num_encoder_layers": 2})
