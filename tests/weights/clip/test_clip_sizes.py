"""CLIP's sizes: where they are read, the published ones, and weights of others."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from concat_jax.models.clip import CLIP, CLIP_VARIANTS, make_clip
from concat_jax.weights.clip import clip_params_for, read_clip
from concat_jax.weights.clip_sizes import clip_config_from_hf

transformers = pytest.importorskip("transformers")


def open_clip_config(tools, **changes):
    """The parsed open_clip_config.json of the small CLIP; "vision_cfg.width" is a changed key."""
    config = tools.config
    vision = {k: config[k] for k in ("image_size", "patch_size")}
    vision |= {"layers": config["image_depth"], "width": config["image_width"]}
    text = {k: config[k] for k in ("context_length", "vocab_size")}
    text |= {"layers": config["text_depth"], "width": config["text_width"], "heads": 4}
    model = {"embed_dim": config["embed_dim"], "vision_cfg": vision, "text_cfg": text}
    for key, value in changes.items():
        *sections, key = key.split(".")
        (model[sections[0]] if sections else model)[key] = value
    return {"model_cfg": model, "preprocess_cfg": {"mean": [0.48145466, 0.4578275, 0.40821073]}}


def test_open_clips_config_says_heads_and_activation(open_clip_file, tmp_path, tools):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(open_clip_file.read_bytes())
    beside = tmp_path / "open_clip_config.json"
    beside.write_text(json.dumps(open_clip_config(tools, **{"vision_cfg.head_width": 32})))
    weights = read_clip(file)
    assert weights.config == {
        **tools.config,
        "image_heads": 6,
        "text_heads": 4,
        "activation": "gelu",
    }
    assert weights.assumed == ()
    beside.write_text(json.dumps(open_clip_config(tools, quick_gelu=True)))
    assert read_clip(file).config == {**tools.config, "text_heads": 4}
    for change, value in (
        ("vision_cfg.global_average_pool", True),
        ("vision_cfg.timm_model_name", "vit_base"),
        ("text_cfg.pool_type", "last"),
        ("text_cfg.no_causal_mask", True),
    ):
        beside.write_text(json.dumps(open_clip_config(tools, **{change: value})))
        with pytest.raises(ValueError, match=rf"its {change} is {value!r}, which CLIP here"):
            read_clip(file)
    for damage in ({"model_cfg": []}, {"preprocess_cfg": [1]}):
        beside.write_text(json.dumps(open_clip_config(tools) | damage))
        with pytest.raises(ValueError, match="its model_cfg or preprocess_cfg is no JSON object"):
            read_clip(file)
    beside.write_text(json.dumps(open_clip_config(tools) | {"preprocess_cfg": {"mean": [0.5] * 3}}))
    with pytest.raises(ValueError, match=r"preprocess_cfg has mean \[0\.5, 0\.5, 0\.5\], but"):
        read_clip(file)


def test_config_from_hf_fills_in_what_transformers_leaves_out():
    # to_diff_dict is what save_pretrained writes: only what differs from the defaults.
    whole = transformers.CLIPConfig(vision_config=dict(patch_size=16))
    assert clip_config_from_hf(whole.to_diff_dict()) == clip_config_from_hf(whole.to_dict())
    built = make_clip(clip_config_from_hf(whole.to_dict()))
    assert built == CLIP(eot_id=49407)  # the defaults are ViT-B/16
    # OpenAI's own L/14 folder has both sections of each tower; the newer reading wins.
    older = dict(text_config=dict(eos_token_id=2), text_config_dict=dict(hidden_size=768))
    theirs = transformers.CLIPConfig(**json.loads(json.dumps(older))).text_config
    ours = clip_config_from_hf(older)
    assert (ours["text_width"], ours["eot_id"]) == (theirs.hidden_size, theirs.eos_token_id)


@pytest.mark.parametrize("variant", [v for v in CLIP_VARIANTS if v.startswith("ViT")])
def test_variants_are_openais(variant, tools):
    """Numbers of parameters as published, and sizes as the Hub's configs have them."""
    clip = make_clip({"variant": variant})
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(tools.abstract_of(clip)))
    assert (
        count
        == {
            "ViT-B/32": 151_277_313,
            "ViT-B/16": 149_620_737,
            "ViT-L/14": 427_616_513,
            "ViT-L/14@336": 427_944_193,
        }[variant]
    )
    assert clip.image_heads * 64 == clip.image_width and clip.text_heads * 64 == clip.text_width


def test_a_variant_can_be_changed_and_its_name_be_wrong():
    clip = make_clip({"variant": "ViT-L/14", "image_size": 448, "dtype": "bfloat16"})
    assert (clip.image_width, clip.image_size) == (1024, 448)
    assert make_clip({"variant": "ViT-B/16"}) == CLIP()
    with pytest.raises(ValueError, match=r"no variant 'ViT-L/14@33'; did you mean 'ViT-L/14@336'"):
        make_clip({"variant": "ViT-L/14@33"})
    with pytest.raises(ValueError, match="no field 'varient'; did you mean 'variant'"):
        make_clip({"varient": "ViT-L/14"})


def test_weights_that_fit_the_config(clip_archive, clip_hf_folder, tools):
    clip = make_clip(tools.config)
    for path in (clip_archive, clip_hf_folder):
        weights = read_clip(path)
        assert clip_params_for(weights, tools.abstract_of(clip), clip) is weights.params


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(text_width=64, text_heads=1),
            r"text_width is 128 not 64, text_heads is 2 not 1; set config\.model\.clip to have "
            r"text_width=128, text_heads=2\.$",
        ),
        (dict(image_depth=1), "image_depth is 2 not 1"),
        (dict(patch_size=8), "patch_size is 4 not 8"),
        (dict(image_size=32), r"image_size is 16 not 32; .* image_size=16\.$"),
        (dict(image_mlp_ratio=2.0), "image_mlp_ratio is 4.0 not 2.0"),
        (dict(image_heads=6), "image_heads is 3 not 6"),
        (dict(activation="gelu"), "activation is 'quick_gelu' not 'gelu'"),
        (
            dict(vocab_size=60),
            r"vocab_size is 50 not 60; give config\.text the vocabulary and context_length of this",
        ),
        (dict(stem="conv"), r"set config\.model\.clip\.stem to 'patch'\.$"),
    ],
)
def test_weights_of_another_size_than_the_config(clip_archive, change, message, tools):
    clip = make_clip(tools.config | change)
    with pytest.raises(ValueError, match=rf"clip\.pt does not fit config\.model\.clip.*{message}"):
        clip_params_for(read_clip(clip_archive), tools.abstract_of(clip), clip)


def test_what_was_assumed_is_said_where_it_does_not_fit(open_clip_file, tools):
    clip = make_clip(tools.config)  # quick GELU, as OpenAI's
    with pytest.raises(
        ValueError,
        match=r"activation is 'gelu' not 'quick_gelu'; set .* activation='gelu', or put its .* "
        r"open_clip_config\.json beside it, since nothing there tells which it is\.$",
    ):
        clip_params_for(read_clip(open_clip_file), tools.abstract_of(clip), clip)


def test_published_sizes_are_called_by_their_names(clip_archive, tools):
    weights = read_clip(clip_archive)
    weights = dataclasses.replace(
        weights, config=weights.config | make_clip({"variant": "ViT-L/14@336"}).__dict__
    )
    assert str(weights).startswith("ViT-L/14@336 at 336 pixels from ")
    clip = make_clip({"variant": "ViT-L/14"})
    with pytest.raises(
        ValueError,
        match=r"image_size is 336 not 224; set config\.model\.clip to have "
        r"variant='ViT-L/14@336'\.$",
    ):
        clip_params_for(weights, tools.abstract_of(clip), clip)
