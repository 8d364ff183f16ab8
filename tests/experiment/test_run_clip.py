"""A run whose CLIP, tokenizer and all, is a folder that somebody downloaded."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import traverse_util

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.experiment import parameters
from concat_jax.experiment.experiment import Experiment
from concat_jax.weights.clip import read_clip
from configs import coco_zps
from tests.tiny import no_data

transformers = pytest.importorskip("transformers")

TOWER = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1}
TOWER |= {"num_attention_heads": 2}
FIELDS = dict(
    embed_dim=12, image_size=16, patch_size=8, image_width=16, image_depth=1, image_heads=2,
    text_width=16, text_depth=1, text_heads=2,
)  # fmt: skip
TOKENS = ["c", "a", "t", "c</w>", "a</w>", "t</w>", "ca", "<|startoftext|>", "<|endoftext|>"]


@pytest.fixture
def folder(tmp_path):
    """config.json, model.safetensors, vocab.json and merges.txt."""
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=dict(
                TOWER, vocab_size=len(TOKENS), max_position_embeddings=8, eos_token_id=8,
                bos_token_id=7,
            ),
            vision_config=dict(TOWER, image_size=16, patch_size=8),
            projection_dim=12,
        )
    )  # fmt: skip
    folder = tmp_path / "clip"
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(TOKENS)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\n")
    return folder


def make_run(folder, tmp_path, con=None, **clip):
    config = coco_zps.get_config()
    config.init.clip = str(folder)
    with config.unlocked():
        config.train.con.method.update(con or {})
    config.text.update(tokenizer="clip", bpe_path="", context_length=8, templates="name")
    with config.unlocked():
        config.model.clip = FIELDS | clip
    vocabulary = Vocabulary(("cat", "act"), (True, True), (True, False), (1, 2))
    data = no_data(vocabulary, caption_words=())
    return Experiment(config, tmp_path / "run", data)


def test_weights_and_tokenizer_come_from_one_folder(folder, tmp_path, capsys):
    run = make_run(folder, tmp_path)
    np.testing.assert_array_equal(run.setup.tokenizer(["cat"])[0, :4], [7, 6, 5, 8])
    clip = run.setup.networks.clip
    assert (clip.vocab_size, clip.context_length, clip.eot_id) == (9, 8, 8)
    params = run.parameters.get("clip", "init")
    flat = traverse_util.flatten_dict(params, sep="/")
    assert flat["text_model/token_embedding/embedding"].shape == (9, 16)
    line = capsys.readouterr().out.strip().splitlines()[-1]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert line.startswith("CLIP: ViT of 16 x 1 on patches of 8 with text of 16 x 1 at 16 pixels")
    assert f"{folder} (Hugging Face): {count:,} numbers in {len(flat)} arrays loaded" in line


def test_an_owl_vit_serves_what_learns_from_names_alone(folder, tmp_path, monkeypatch):
    weights = read_clip(folder)
    report = dataclasses.replace(weights.report, new={"visual_projection/kernel": (16, 12)})
    owl_vit = dataclasses.replace(weights, report=report)
    monkeypatch.setattr(parameters, "read_clip", lambda path: owl_vit)
    run = make_run(folder, tmp_path)
    with pytest.raises(ValueError, match="no projection to the joint space, and stage 'con' emb"):
        run.parameters.get("clip", "init")
    run = make_run(folder, tmp_path, con=dict(global_weight=0.0, instance_weight=0.0))
    assert run.parameters.get("clip", "init")


def test_a_folder_without_a_tokenizer_and_one_of_another_size(folder, tmp_path):
    run = make_run(folder, tmp_path, text_width=32)
    with pytest.raises(
        ValueError,
        match=r"does not fit config\.model\.clip: text_width is 16 not 32; "
        r"set config\.model\.clip to have text_width=16",
    ):
        run.parameters.get("clip", "init")
    (folder / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"none lies beside config\.init\.clip: set config\.text"):
        make_run(folder, tmp_path)
