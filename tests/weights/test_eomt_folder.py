"""EoMT's folders through transformers and back, and DINOs as encoders."""

import json

import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.models.segmentor import make_segmentor
from concat_jax.weights.convert import load_source
from concat_jax.weights.hugging_face_folder import (
    check_preprocessing,
    config_to_hf,
    preprocessing_to_hf,
    save_hf_folder,
    segmentor_config_from_hf,
)
from concat_jax.weights.model_folder import (
    ModelCard,
    load_model,
    parameter_shapes,
    save_model,
)
from tests.golden.cases import draw_weights

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=64)
HEADS = dict(num_blocks=1, num_queries=3, num_labels=2)
BACKBONE = dict(width=16, depth=2, num_heads=2, ffn_width=32, grid=4)
CONFIG = dict(kind="eomt", backbone=BACKBONE, num_queries=3, num_blocks=1)
ROTARY = {k: v for k, v in BACKBONE.items() if k != "grid"}
ROTARY |= {"positions": "rotary", "key_bias": False}
VOCABULARY = Vocabulary(("cat", "sky"), (True, False), (True, True), (1, 2))


def saved(folder, name: str, config: str, **fields):
    """A folder of transformers with weights off their initial ones."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, name)(getattr(transformers, config)(**fields))
    state = model.state_dict()
    shapes = {k: tuple(v.shape) for k, v in state.items() if "empty_weight" not in k}
    with torch.no_grad():
        for key, array in draw_weights(shapes).items():
            state[key].copy_(torch.from_numpy(array))
        if hasattr(model, "attn_mask_probs"):
            model.attn_mask_probs.zero_()  # as after training
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", ["eomt", "eomt_dinov3"])
def test_to_ours_and_back_bit_for_bit(family, tmp_path):
    if family == "eomt":
        sizes, names = {**SIZES, "mlp_ratio": 2}, ("EomtForUniversalSegmentation", "EomtConfig")
    else:
        sizes = {**SIZES, "intermediate_size": 32}
        names = "EomtDinov3ForUniversalSegmentation", "EomtDinov3Config"
    saved(tmp_path / "theirs", *names, **sizes, **HEADS)
    source = load_source(tmp_path / "theirs")
    assert source.kind == "a Hugging Face EoMT"
    # No preprocessor_config.json: as config.json says.
    assert (source.card.short_side, source.card.long_side) == (64, 64)
    assert ["pictures are 64 square" in note for note in source.notes] == [True]
    wanted = BACKBONE if family == "eomt" else ROTARY
    assert make_segmentor(source.card.segmentor) == make_segmentor({**CONFIG, "backbone": wanted})
    save_model(tmp_path / "ours", source.params, source.card)
    params, card = load_model(tmp_path / "ours")
    save_hf_folder(tmp_path / "back", params, card)
    theirs, back = (
        safetensors.numpy.load_file(tmp_path / folder / "model.safetensors")
        for folder in ("theirs", "back")
    )
    assert theirs.keys() == back.keys()
    for key, array in theirs.items():
        np.testing.assert_array_equal(back[key], array, key)
    again = json.loads((tmp_path / "back/config.json").read_text())
    before = json.loads((tmp_path / "theirs/config.json").read_text())
    changed = {key for key in again.keys() & before.keys() if again[key] != before[key]}
    assert changed <= ({"image_size"} if family == "eomt_dinov3" else set())  # rotary knows none


@pytest.mark.parametrize(
    "name, config, fields, wanted",
    [
        ("Dinov2Model", "Dinov2Config", {"mlp_ratio": 2, "patch_size": 14}, {"patch_size": 14}),
        (
            *("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"),
            *({"mlp_ratio": 2, "patch_size": 16}, {"num_registers": 4}),
        ),
        (
            *("DINOv3ViTModel", "DINOv3ViTConfig"),
            *({"intermediate_size": 32, "num_register_tokens": 4}, {"positions": "rotary"}),
        ),
    ],
)
def test_a_dino_is_an_encoder(name, config, fields, wanted, tmp_path):
    saved(tmp_path / "dino", name, config, **SIZES, **fields)
    source = load_source(tmp_path / "dino")
    backbone = source.card.segmentor["backbone"]
    assert backbone.items() >= wanted.items() and set(source.params["segmentor"]) == {"backbone"}
    save_model(tmp_path / "ours", source.params, source.card)
    assert load_model(tmp_path / "ours")[1].segmentor == source.card.segmentor


@pytest.mark.parametrize("family", ["Dinov2", "Dinov2WithRegisters"])
def test_a_dino_that_classifies_is_an_encoder_too(family, tmp_path):
    name = f"{family}ForImageClassification"
    saved(tmp_path / "dino", name, f"{family}Config", **SIZES, mlp_ratio=2, patch_size=16)
    source = load_source(tmp_path / "dino")
    assert {"classifier.weight", "classifier.bias"} <= set(source.report.ignored)
    bare = safetensors.numpy.load_file(tmp_path / "dino" / "model.safetensors")
    (norm,) = (array for name, array in bare.items() if name.endswith(".layernorm.weight"))
    np.testing.assert_array_equal(source.params["segmentor"]["backbone"]["norm"]["scale"], norm)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({**ROTARY, "rotary_theta": 50.0}, "rotary_theta is 50.0, and 100.0 in"),
        ({**ROTARY, "key_bias": True}, "key_bias is True, and False in"),
        ({**BACKBONE, "key_bias": False}, "key_bias is False, and True in"),
        ({**BACKBONE, "layer_scale": False}, "layer_scale is False, and True in"),
    ],
)
def test_what_transformers_would_compute_otherwise_is_not_written(fields, said):
    with pytest.raises(ValueError, match=f"The backbone's {said} transformers' EoMT; it cannot"):
        config_to_hf(ModelCard({**CONFIG, "backbone": fields}, VOCABULARY))
    # It means nothing to learned positions.
    config_to_hf(ModelCard({**CONFIG, "backbone": {**BACKBONE, "rotary_theta": 5.0}}, VOCABULARY))


@pytest.mark.parametrize("family", ["Eomt", "EomtDinov3"])
def test_an_eomt_without_registers(family, tmp_path):
    sizes = {**SIZES, **HEADS, "mlp_ratio": 2, "intermediate_size": 32, "num_register_tokens": 0}
    saved(tmp_path / "theirs", f"{family}ForUniversalSegmentation", f"{family}Config", **sizes)
    source = load_source(tmp_path / "theirs")
    assert source.card.segmentor["backbone"]["num_registers"] == 0
    save_hf_folder(tmp_path / "back", source.params, source.card)
    assert json.loads((tmp_path / "back/config.json").read_text())["num_register_tokens"] == 0


@pytest.mark.parametrize(
    "processor, sides, note",
    [
        ({}, 96, "asks for no size to keep; by config.json, pictures are 96 square"),
        ({"size": {"height": 96, "width": 96}}, 96, "by config.json, pictures are 96 square"),
        ({"do_resize": False}, 96, "by config.json, pictures are 96 square"),
        ({"size": {"shortest_edge": 64}}, 64, "shorter side of 64 and a longer one of at most 64"),
        ({"resample": 3}, 96, "the filter is Pillow's 3; here bilinear"),
    ],
)
def test_an_eomt_whose_processor_says_no_size(processor, sides, note, tmp_path):
    """Its positions are for one size: that of Mask2Former's processor is not it."""
    card = ModelCard(CONFIG, VOCABULARY, "panoptic", "a", True, None, 64, 64)
    params = draw_weights(parameter_shapes(CONFIG, 2))
    params = traverse_util.unflatten_dict(params, sep="/")
    save_hf_folder(tmp_path / "hf", params, card)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    # Six patches a side, of which the table of positions must have the room.
    config["image_size"] = 96
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    weights = safetensors.numpy.load_file(tmp_path / "hf/model.safetensors")
    weights["embeddings.position_embeddings.weight"] = np.zeros((36, 16), np.float32)
    safetensors.numpy.save_file(weights, tmp_path / "hf/model.safetensors")
    (tmp_path / "hf/preprocessor_config.json").write_text(json.dumps(processor))
    source = load_source(tmp_path / "hf")
    assert (source.card.short_side, source.card.long_side) == (sides, sides)
    assert note in " ".join(source.notes) and "--short_side" not in " ".join(source.notes)


def test_config_and_preprocessing_round_trip():
    card = ModelCard(CONFIG, VOCABULARY, "panoptic", "a", True, None, 640, 640)
    content = config_to_hf(card)
    assert make_segmentor(segmentor_config_from_hf(content)) == make_segmentor(CONFIG)
    sides, _ = check_preprocessing(preprocessing_to_hf(card))
    assert sides == {"short_side": 640, "long_side": 640}
    windows = {"short_side": 512, "long_side": 512, "windows": True}
    content = preprocessing_to_hf(ModelCard(CONFIG, **windows))
    assert content["size"] == {"shortest_edge": 512, "longest_edge": None}
    assert check_preprocessing(content)[0] == windows
    with pytest.raises(ValueError, match="windows of size None; give size a shortest_edge"):
        check_preprocessing({"do_split_image": True})


@pytest.mark.parametrize(
    "content, message",
    [
        ({"model_type": "eomt", "use_swiglu_ffn": True}, "use_swiglu_ffn True, which is not done"),
        ({"model_type": "eomt_dinov3", "key_bias": True}, "key_bias True, which is not done"),
        ({"model_type": "eomt_dinov3", "rope_theta": 50.0}, "'rope_theta': 50.0.*not done here"),
        (
            {"model_type": "eomt_dinov3", "rope_theta": 50.0, "rope_parameters": None},
            "'rope_theta': 50.0.*not done here",
        ),
        ({"model_type": "eomt", "image_size": 8}, "image_size 8, less than one patch of 16 pixels"),
        ({"model_type": "dinov2", "image_size": 8}, "image_size 8, less than one patch of 14"),
        ({"model_type": "eomt", "image_size": 70}, "image_size 70, which is not so many patches"),
        ({"model_type": "eomt_dinov3", "image_size": 70}, "70, which is not so many patches of 16"),
        (
            {"model_type": "eomt", "patch_size": 14, "image_size": 70},
            "patch_size 14, which num_upscale_blocks 2 do not halve evenly",
        ),
        ({"model_type": "eomt", "num_queries": 0}, "num_queries 0; it must be a whole number, 1"),
        ({"model_type": "eomt", "layer_norm_eps": -1}, "layer_norm_eps -1; it must be a number ab"),
        ({"model_type": "dinov3_vit", "num_register_tokens": -1}, "tokens -1; it must be a whole"),
        ({"model_type": "videomt"}, "only 'mask2former', 'eomt', 'eomt_dinov3', 'dinov2'"),
    ],
)
def test_what_ours_does_not_do_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        segmentor_config_from_hf(content)


def test_a_frozen_one_is_not_written():
    with pytest.raises(ValueError, match="no EoMT with a frozen encoder"):
        config_to_hf(ModelCard({**CONFIG, "frozen": True}, VOCABULARY))
