"""Weights between a Hugging Face Mask2Former and our tree."""

import numpy as np
import pytest

from concat_jax import convert

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONFIG = {
    "backbone": {"kind": "resnet", "stage_sizes": (1, 2, 1, 1), "width": 8},
    "width": 32,
    "num_queries": 5,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "ffn_width": 16,
    "decoder_ffn_width": 24,
}
NUM_CLASSES = 3


@pytest.fixture(scope="module")
def state_dict() -> dict[str, np.ndarray]:
    backbone = transformers.ResNetConfig(
        depths=[1, 2, 1, 1],
        hidden_sizes=[32, 64, 128, 256],
        embedding_size=8,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        num_queries=5,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=4,
        encoder_feedforward_dim=16,
        dim_feedforward=24,
        num_labels=NUM_CLASSES,
    )
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    return {k: v.numpy() for k, v in model.state_dict().items()}


def test_every_array_is_loaded_and_counted(state_dict):
    params, report = convert.segmentor_params_from_hf(state_dict, CONFIG)
    weights = {k: v for k, v in state_dict.items() if k not in report.ignored}
    assert report.num_parameters == sum(v.size for v in weights.values())
    assert set(report.loaded.values()) == set(weights)
    assert all(k.endswith(("num_batches_tracked", "empty_weight")) for k in report.ignored)
    assert params["classifier"]["class_embed"]["kernel"].shape == (32, NUM_CLASSES + 1)
    # Axes by hand: torch [out, in, h, w] against ours [h, w, in, out].
    theirs = state_dict["model.pixel_level_module.encoder.embedder.embedder.convolution.weight"]
    ours = params["segmentor"]["backbone"]["stem_conv"]["kernel"]
    assert ours[1, 2, 0, 7] == theirs[7, 0, 1, 2]
    # The stacked projection is query, key, value.
    theirs = state_dict["model.transformer_module.decoder.layers.1.cross_attn.in_proj_weight"]
    ours = params["segmentor"]["transformer_decoder"]["layer_1"]["cross_attention"]["key"]["kernel"]
    assert ours[3, 5] == theirs[32 + 5, 3]
    assert str(report).startswith(f"loaded {len(report.loaded)} arrays")


def test_round_trip_is_exact(state_dict):
    params, report = convert.segmentor_params_from_hf(state_dict, CONFIG)
    back = convert.segmentor_params_to_hf(params, CONFIG)
    assert set(back) == set(state_dict) - set(report.ignored)
    for name, array in back.items():
        np.testing.assert_array_equal(array, state_dict[name], err_msg=name)


def test_without_class_head(state_dict):
    headless = {k: v for k, v in state_dict.items() if not k.startswith("class_predictor")}
    params, _ = convert.segmentor_params_from_hf(headless, CONFIG)
    assert set(params) == {"segmentor"}


def test_missing_key_is_named(state_dict):
    name = "model.transformer_module.decoder.layernorm.bias"
    broken = {k: v for k, v in state_dict.items() if k != name}
    with pytest.raises(ValueError, match=f"lacks 1 arrays.*{name}"):
        convert.segmentor_params_from_hf(broken, CONFIG)


def test_unknown_key_is_named(state_dict):
    with pytest.raises(ValueError, match="no place for .*model.surprise.weight"):
        convert.segmentor_params_from_hf(
            {**state_dict, "model.surprise.weight": np.zeros(2)}, CONFIG
        )


def test_deeper_checkpoint_is_refused_in_one_short_sentence(state_dict):
    with pytest.raises(ValueError, match=r"no place for .* and \d+ more") as error:
        convert.segmentor_params_from_hf(state_dict, {**CONFIG, "num_decoder_layers": 1})
    assert str(error.value).count("decoder.layers.1") == convert.MAX_KEYS_NAMED


def test_wrong_width_is_named_with_both_shapes(state_dict):
    with pytest.raises(ValueError, match=r"queries_features.*\(5, 32\).*needs \(6, 32\)"):
        convert.segmentor_params_from_hf(state_dict, {**CONFIG, "num_queries": 6})


@pytest.mark.parametrize("field, value", [("norm", "group"), ("stem", "small"), ("kind", "vgg")])
def test_backbones_the_format_cannot_hold(field, value):
    config = {**CONFIG, "backbone": {**CONFIG["backbone"], field: value}}
    with pytest.raises(ValueError, match=f"{field} .*{value}"):
        convert.hf_rename_table(config)


def test_inverse_checks_the_config(state_dict):
    params, _ = convert.segmentor_params_from_hf(state_dict, CONFIG)
    with pytest.raises(ValueError, match="differ in .*layer_1"):
        convert.segmentor_params_to_hf(params, {**CONFIG, "num_encoder_layers": 2})
