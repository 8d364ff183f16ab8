"""Detectron2's names: against the reference's spelling by hand, and against Hugging Face's."""

import numpy as np
import pytest
import safetensors.numpy

from concat_jax.models.segmentor import make_segmentor
from concat_jax.weights.files.readers import read_weights
from concat_jax.weights.model_folder import parameter_shapes
from concat_jax.weights.names.mask2former import PADING_MODULES, detectron2
from concat_jax.weights.names.table import find, to_theirs, torch_shape
from concat_jax.weights.segmentors import (
    detectron2_config,
    segmentor_params_from_detectron2,
    segmentor_params_from_hf,
    segmentor_params_to_hf,
)

# Keys and shapes of the real networks, spelt from the modules' attributes in the reference:
# modeling/backbone/swin.py, pixel_decoder/msdeformattn.py, mask2former_transformer_decoder.py, and
# detectron2's BasicStem and BottleneckBlock.
HEAD_KEYS = {
    "sem_seg_head.pixel_decoder.input_proj.0.0.weight": (256, "C5", 1, 1),
    "sem_seg_head.pixel_decoder.input_proj.2.0.weight": (256, "C3", 1, 1),
    "sem_seg_head.pixel_decoder.input_proj.2.1.bias": (256,),
    "sem_seg_head.pixel_decoder.transformer.level_embed": (3, 256),
    "sem_seg_head.pixel_decoder.transformer.encoder.layers.5.self_attn.sampling_offsets.weight": (
        192,
        256,
    ),
    "sem_seg_head.pixel_decoder.transformer.encoder.layers.5.self_attn.attention_weights.bias": (
        96,
    ),
    "sem_seg_head.pixel_decoder.transformer.encoder.layers.0.norm2.weight": (256,),
    "sem_seg_head.pixel_decoder.transformer.encoder.layers.0.linear1.weight": (1024, 256),
    "sem_seg_head.pixel_decoder.adapter_1.weight": (256, "C2", 1, 1),
    "sem_seg_head.pixel_decoder.adapter_1.norm.weight": (256,),
    "sem_seg_head.pixel_decoder.layer_1.weight": (256, 256, 3, 3),
    "sem_seg_head.pixel_decoder.mask_features.bias": (256,),
    "sem_seg_head.predictor.transformer_self_attention_layers.8.self_attn.in_proj_weight": (
        768,
        256,
    ),
    "sem_seg_head.predictor.transformer_self_attention_layers.0.norm.bias": (256,),
    "sem_seg_head.predictor.transformer_cross_attention_layers.0.multihead_attn.in_proj_bias": (
        768,
    ),
    "sem_seg_head.predictor.transformer_cross_attention_layers.0.multihead_attn.out_proj.weight": (
        256,
        256,
    ),
    "sem_seg_head.predictor.transformer_ffn_layers.8.linear2.weight": (256, 2048),
    "sem_seg_head.predictor.decoder_norm.weight": (256,),
    "sem_seg_head.predictor.query_feat.weight": (100, 256),
    "sem_seg_head.predictor.query_embed.weight": (100, 256),
    "sem_seg_head.predictor.level_embed.weight": (3, 256),
    "sem_seg_head.predictor.class_embed.weight": (134, 256),
    "sem_seg_head.predictor.mask_embed.layers.2.weight": (256, 256),
}
RESNET_KEYS = {
    "backbone.stem.conv1.weight": (64, 3, 7, 7),
    "backbone.stem.conv1.norm.running_var": (64,),
    "backbone.res2.0.shortcut.weight": (256, 64, 1, 1),
    "backbone.res2.0.shortcut.norm.running_mean": (256,),
    "backbone.res3.3.conv2.weight": (128, 128, 3, 3),
    "backbone.res5.2.conv3.norm.weight": (2048,),
}
SWIN_KEYS = {
    "backbone.patch_embed.proj.weight": (96, 3, 4, 4),
    "backbone.patch_embed.norm.bias": (96,),
    "backbone.layers.2.blocks.5.norm1.weight": (384,),
    "backbone.layers.0.blocks.1.attn.relative_position_bias_table": (169, 3),
    "backbone.layers.0.blocks.1.attn.qkv.weight": (288, 96),
    "backbone.layers.0.blocks.1.attn.qkv.bias": (288,),
    "backbone.layers.3.blocks.0.attn.proj.bias": (768,),
    "backbone.layers.1.blocks.0.mlp.fc1.weight": (768, 192),
    "backbone.layers.2.downsample.reduction.weight": (768, 1536),
    "backbone.layers.2.downsample.norm.weight": (1536,),
    "backbone.norm3.weight": (768,),
}


@pytest.mark.parametrize(
    "backbone, keys, channels",
    [
        ({"kind": "resnet"}, RESNET_KEYS, {"C2": 256, "C3": 512, "C5": 2048}),
        ({"kind": "swin"}, SWIN_KEYS, {"C2": 96, "C3": 192, "C5": 768}),
    ],
    ids=["R50", "Swin-T"],
)
def test_names_shapes_and_architecture_of_published_networks(backbone, keys, channels):
    config = {"backbone": backbone}
    table = detectron2_shapes(config, 133)
    for name, shape in {**HEAD_KEYS, **keys}.items():
        assert table[name] == tuple(channels.get(n, n) for n in shape), name
    assert make_segmentor(config_of(table, backbone["kind"])) == make_segmentor(config)


def detectron2_shapes(config, num_classes=None):
    """Name in a Detectron2 checkpoint -> shape."""
    naming = detectron2(config["backbone"]["kind"])
    ours = parameter_shapes(config, num_classes)
    rows = {path: naming.row(path) for path in ours}
    return {row.theirs: torch_shape(ours[path], row) for path, row in rows.items()}


def config_of(shapes, kind):
    """The config by arrays that need no memory."""
    arrays = {k: np.broadcast_to(np.float32(0), shape) for k, shape in shapes.items()}
    return detectron2_config(find(arrays, detectron2(kind)), kind)


def test_resnet_101_and_swin_large_are_recognised():
    for config in (
        {"backbone": {"kind": "resnet", "stage_sizes": (3, 4, 23, 3)}},
        {
            "backbone": {
                "kind": "swin",
                "stage_sizes": (2, 2, 18, 2),
                "width": 192,
                "num_heads": (6, 12, 24, 48),
                "window_size": 12,
            },
            "num_queries": 200,
        },
    ):
        found = config_of(detectron2_shapes(config), config["backbone"]["kind"])
        assert make_segmentor(found) == make_segmentor(config)


@pytest.fixture(scope="module")
def params(hf_arrays, config):
    return segmentor_params_from_hf(hf_arrays, config)[0]


@pytest.fixture(scope="module")
def arrays(params, config):
    return to_theirs(params, detectron2(config["backbone"]["kind"]))


def test_agrees_with_hugging_face(arrays, hf_arrays, config):
    """From the Hugging Face file through Detectron2's names and back, bit by bit."""
    params, found, report = segmentor_params_from_detectron2(arrays)
    assert make_segmentor(found) == make_segmentor(config)
    assert not report.ignored and not report.new
    for name, array in segmentor_params_to_hf(params, config).items():
        np.testing.assert_array_equal(array, hf_arrays[name], err_msg=name)


def test_arrays_by_hand(arrays, hf_arrays, kind):
    predictor = "sem_seg_head.predictor.transformer_self_attention_layers.1.self_attn"
    decoder = "model.transformer_module.decoder.layers.1.self_attn"
    np.testing.assert_array_equal(
        arrays[f"{predictor}.in_proj_weight"],
        np.concatenate([hf_arrays[f"{decoder}.{name}_proj.weight"] for name in "qkv"]),
    )
    encoder = "model.pixel_level_module.encoder"
    if kind == "resnet":
        np.testing.assert_array_equal(
            arrays["backbone.res3.1.conv2.weight"],
            hf_arrays[f"{encoder}.encoder.stages.1.layers.1.layer.1.convolution.weight"],
        )
    else:
        attention = f"{encoder}.encoder.layers.0.blocks.1.attention.self"
        np.testing.assert_array_equal(
            arrays["backbone.layers.0.blocks.1.attn.qkv.bias"],
            np.concatenate([hf_arrays[f"{attention}.{n}.bias"] for n in ("query", "key", "value")]),
        )


def old_name(name):
    """As checkpoints before the reference's version 2 spell it."""
    name = name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.")
    return name.replace("query_feat", "static_query")


@pytest.mark.parametrize("spell", [old_name, lambda name: f"module.{name}"], ids=["old", "wrapped"])
def test_other_spellings(arrays, params, spell, tmp_path):
    safetensors.numpy.save_file({spell(k): v for k, v in arrays.items()}, tmp_path / "a.pth")
    again, _, report = segmentor_params_from_detectron2(read_weights(tmp_path / "a.pth").arrays)
    assert "segmentor/transformer_decoder/query_feature_embedding" in report.loaded
    ours, theirs = again["segmentor"], params["segmentor"]
    for part, name in (
        ("transformer_decoder", "query_feature_embedding"),
        ("pixel_decoder", "level_embedding"),
    ):
        np.testing.assert_array_equal(ours[part][name], theirs[part][name])


def test_pading_modules_and_bookkeeping_are_ignored_by_name(arrays):
    extra = {f"{name}.0.weight": np.zeros((2, 3)) for name in PADING_MODULES}
    extra |= {"criterion.empty_weight": np.zeros(4), "pixel_mean": np.zeros((3, 1, 1))}
    _, _, report = segmentor_params_from_detectron2({**arrays, **extra})
    assert report.ignored == {name: value.shape for name, value in extra.items()}
    assert "decoder.0.weight [2, 3]" in str(report)
    # The same words elsewhere are none of PADing's.
    for name in ("sem_seg_head.predictor.generator.weight", "generators.weight"):
        with pytest.raises(ValueError, match=f"no place for .*{name}"):
            segmentor_params_from_detectron2({**arrays, name: np.zeros(2)})


@pytest.mark.parametrize(
    "name",
    [
        "sem_seg_head.predictor.query_feat.weight",
        "sem_seg_head.predictor.decoder_norm.bias",
        "sem_seg_head.predictor.transformer_cross_attention_layers.0.norm.bias",
        "sem_seg_head.pixel_decoder.transformer.encoder.layers.0.linear1.weight",
        "sem_seg_head.predictor.class_embed.bias",
    ],
)
def test_missing_key_is_named(arrays, name):
    with pytest.raises(ValueError, match=f"lacks .*{name}"):
        segmentor_params_from_detectron2({k: v for k, v in arrays.items() if k != name})


def test_misshapen_key_is_named(arrays):
    for name, shape in (
        ("sem_seg_head.predictor.query_embed.weight", (6, 32)),
        ("sem_seg_head.predictor.query_feat.weight", (5,)),
        (
            "sem_seg_head.predictor.transformer_self_attention_layers.0.self_attn.in_proj_bias",
            (95,),
        ),
    ):
        with pytest.raises(ValueError, match=f"{name} has shape"):
            segmentor_params_from_detectron2({**arrays, name: np.zeros(shape)})


def test_other_backbones_are_refused(arrays):
    other = {k: v for k, v in arrays.items() if not k.startswith("backbone.")}
    with pytest.raises(ValueError, match="lacks .*stem.conv1.weight of a resnet and .* of a swin"):
        segmentor_params_from_detectron2({**other, "backbone.cls_token": np.zeros(2)})
