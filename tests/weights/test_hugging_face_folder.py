"""config.json and preprocessor_config.json: read, written, and refused where we differ."""

import re

import pytest

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.models.backbones.swin import SWIN_VARIANTS
from concat_jax.models.mask2former import DEFAULTS
from concat_jax.models.segmentor import make_segmentor
from concat_jax.weights.class_names import classes_from_hf
from concat_jax.weights.hugging_face_folder import (
    check_preprocessing,
    config_to_hf,
    preprocessing_to_hf,
    segmentor_config_from_hf,
)
from concat_jax.weights.model_folder import ModelCard


def test_sizes_are_those_of_the_model(hf_model, config):
    found = segmentor_config_from_hf(hf_model.config.to_dict())
    make_segmentor(found)
    wanted = {**DEFAULTS, **config}
    assert {key: found[key] for key in found if key != "backbone"} == {
        key: wanted[key] for key in found if key != "backbone"
    }
    for field, value in config["backbone"].items():
        got = found["backbone"][field]
        assert (tuple(got) if isinstance(got, list) else got) == value


@pytest.mark.parametrize("variant", SWIN_VARIANTS)
def test_swin_variants(variant):
    """As the published files' backbone_config spells them."""
    fields = SWIN_VARIANTS[variant]
    backbone = {
        "model_type": "swin",
        "depths": list(fields["stage_sizes"]),
        "embed_dim": fields["width"],
        "num_heads": list(fields["num_heads"]),
        "window_size": fields.get("window_size", 7),
        "mlp_ratio": 4.0,
        "layer_norm_eps": 1e-05,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
    content = {"model_type": "mask2former", "backbone_config": backbone, "num_queries": 200}
    found = segmentor_config_from_hf(content)
    assert found["num_queries"] == 200
    assert (
        make_segmentor(found).backbone
        == make_segmentor({"backbone": {"kind": "swin", **fields}}).backbone
    )


def test_resnet_101():
    backbone = {"model_type": "resnet", "depths": [3, 4, 23, 3]}
    found = segmentor_config_from_hf({"model_type": "mask2former", "backbone_config": backbone})
    assert found["backbone"]["stage_sizes"] == [3, 4, 23, 3]
    assert found["num_decoder_layers"] == 9
    make_segmentor(found)


SWIN = {"model_type": "swin"}


@pytest.mark.parametrize(
    "content, message",
    [
        ({"model_type": "maskformer"}, "type 'maskformer'; only 'mask2former'"),
        ({}, "type None"),
        ({"model_type": ["mask2former"]}, "type \\[.mask2former.\\]; only"),
        ({"model_type": "mask2former"}, "no backbone_config"),
        (
            {"model_type": "mask2former", "backbone": "resnet50"},
            "no backbone_config for its backbone 'resnet50'",
        ),
        ({"backbone_config": {"model_type": "convnext"}}, "of a 'convnext'; only"),
        ({"backbone_config": SWIN, "pre_norm": True}, "pre_norm True"),
        (
            {"backbone_config": SWIN, "mask_feature_size": 128},
            "mask_feature_size 128, .* it must be 256",
        ),
        ({"backbone_config": SWIN, "common_stride": 8}, "common_stride 8"),
        ({"backbone_config": {**SWIN, "use_absolute_embeddings": True}}, "use_absolute_embedd"),
        ({"backbone_config": {**SWIN, "out_features": ["stage4"]}}, "out_features"),
        ({"backbone_config": {**SWIN, "layer_norm_eps": 1e-6}}, "layer_norm_eps 1e-06"),
        (
            {"backbone_config": {"model_type": "resnet", "downsample_in_bottleneck": True}},
            "downsample_in_bottleneck",
        ),
        (
            {"backbone_config": {"model_type": "resnet", "hidden_sizes": [1, 2, 3, 4]}},
            r"hidden_sizes \[1, 2, 3, 4\]",
        ),
    ],
)
def test_what_is_none_of_ours_is_refused(content, message):
    content = {"model_type": "mask2former", **content} if "backbone_config" in content else content
    with pytest.raises(ValueError, match=message):
        segmentor_config_from_hf(content)


def test_preprocessing_of_published_models_is_ours():
    check_preprocessing(preprocessing_to_hf(ModelCard({})))
    check_preprocessing({"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]})
    check_preprocessing(
        {"image_mean": [0.48500001430511475, 0.4560000002384186, 0.4059999883174896]}
    )
    check_preprocessing({})
    with pytest.raises(ValueError, match="image_mean 'grey'"):
        check_preprocessing({"image_mean": "grey"})
    with pytest.raises(ValueError, match=r"image_mean \[0.5, 0.5, 0.5\], but pictures"):
        check_preprocessing({"image_mean": [0.5, 0.5, 0.5]})
    with pytest.raises(ValueError, match="image_std"):
        check_preprocessing({"image_std": [0.225]})
    with pytest.raises(ValueError, match="rescale_factor 1.0, but pictures are .* with 0.0039"):
        check_preprocessing({"rescale_factor": 1.0})
    with pytest.raises(ValueError, match="do_normalize False"):
        check_preprocessing({"do_normalize": False})


@pytest.mark.parametrize(
    "content, sides, note",
    [
        (
            preprocessing_to_hf(ModelCard({})),
            (800, 1333),
            "side of 800 and a longer one of at most",
        ),
        ({"size": 640, "max_size": 1024}, (640, 1024), "640"),
        ({"size": {"shortest_edge": 480, "longest_edge": None}}, (480, 800), "480"),
        ({"size": {"height": 384, "width": 512}}, (), "size height 384, width 512; .*--short_side"),
        ({"size": {"shortest_edge": 9, "longest_edge": 3}}, (), "longest_edge 3"),
        ({"size": [512, 512]}, (), "512, 512"),
        ({"do_resize": False}, (), "keep their size .* shorter side 800, or what --short_side"),
        ({}, (), ""),
    ],
)
def test_the_size_that_a_preprocessor_asks_for(content, sides, note):
    found, notes = check_preprocessing(content)
    assert tuple(found.values()) == sides and bool(notes) == bool(note)
    assert re.search(note, " ".join(notes))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_queries": "many"}, "num_queries 'many'; it must be a whole number"),
        ({"hidden_dim": None, "num_queries": [1, 2]}, r"num_queries \[1, 2\]; it must be"),
        ({"encoder_layers": 2.5}, "encoder_layers 2.5"),
        ({"encoder_layers": 10**6}, "encoder_layers 1000000; at most 1000 are read"),
        ({"num_attention_heads": True}, "num_attention_heads True"),
        ({"dim_feedforward": -1}, "dim_feedforward -1"),
        ({"feature_strides": 4}, "feature_strides 4"),
        ({"backbone_config": {**SWIN, "depths": 3}}, "depths 3; it must be a list of whole"),
        ({"backbone_config": {**SWIN, "num_heads": [1, "x"]}}, "num_heads"),
        ({"backbone_config": {**SWIN, "mlp_ratio": 2.5}}, "mlp_ratio 2.5"),
        ({"backbone_config": {"model_type": ["swin"]}}, "only 'resnet' and 'swin'"),
        ({"backbone_config": [SWIN]}, "no backbone_config"),
    ],
)
def test_values_of_another_type_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        segmentor_config_from_hf({"model_type": "mask2former", "backbone_config": SWIN, **change})


def test_round_trip_of_config_and_classes(config):
    vocabulary = Vocabulary(("cat", "sky", "dog"), (True, False, True), (True,) * 3, (17, 90, 18))
    card = ModelCard(config, vocabulary, "panoptic", "a.pkl", True)
    content = config_to_hf(card)
    found = segmentor_config_from_hf(content)
    assert make_segmentor(found) == make_segmentor(config)
    classes = classes_from_hf(content, 3)
    assert classes.vocabulary == vocabulary and classes.knows_things


def test_what_transformers_cannot_hold_is_refused(config):
    with pytest.raises(ValueError, match="num_points 3, but"):
        config_to_hf(ModelCard({**config, "num_points": 3}))
