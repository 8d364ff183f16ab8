"""A model on disk: what is written is what is read, whole or not at all."""

import json

import jax
import numpy as np
import pytest
from flax import traverse_util

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.weights import model_folder
from concat_jax.weights.model_folder import (
    ModelCard,
    load_card,
    load_model,
    parameter_shapes,
    save_model,
)

CONFIG = {
    "backbone": {"kind": "resnet", "stage_sizes": (1, 1), "width": 8, "block": "basic"},
    "width": 32,
    "num_queries": 3,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "ffn_width": 8,
    "decoder_ffn_width": 8,
}
CONFIG["backbone"]["stage_sizes"] = (1, 1, 1, 1)
VOCABULARY = Vocabulary(("cat", "sky"), (True, False), (True, True), (17, 187))
CARD = ModelCard(CONFIG, VOCABULARY, "panoptic", "model_final.pkl", True)


@pytest.fixture(scope="module")
def shapes():
    return parameter_shapes(CONFIG, 2)


@pytest.fixture(scope="module")
def params(shapes):
    rng = np.random.default_rng(0)
    flat = {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def check_equal(found, wanted):
    found, wanted = (traverse_util.flatten_dict(tree, sep="/") for tree in (found, wanted))
    assert set(found) == set(wanted)
    for path, array in wanted.items():
        assert type(found[path]) is np.ndarray and found[path].dtype == array.dtype
        np.testing.assert_array_equal(found[path], array, err_msg=path)


def test_shapes(shapes):
    assert shapes["classifier/class_embed/kernel"] == (32, 3)
    assert shapes["segmentor/transformer_decoder/query_feature_embedding"] == (3, 32)
    assert not any(path.startswith("classifier") for path in parameter_shapes(CONFIG))


def test_round_trip(params, tmp_path):
    save_model(tmp_path / "deep" / "model", params, CARD)
    assert sorted(p.name for p in (tmp_path / "deep" / "model").iterdir()) == [
        "model.json",
        "params",
    ]
    found, card = load_model(tmp_path / "deep" / "model")
    check_equal(found, params)
    assert card.vocabulary == VOCABULARY
    assert (card.task, card.source, card.knows_things) == ("panoptic", "model_final.pkl", True)
    assert model_folder.make_segmentor(card.segmentor) == model_folder.make_segmentor(CONFIG)


def test_device_arrays_are_saved_too(params, tmp_path):
    save_model(tmp_path / "model", jax.tree.map(jax.numpy.asarray, params), CARD)
    check_equal(load_model(tmp_path / "model")[0], params)


def test_half_the_room(params, tmp_path):
    save_model(tmp_path / "model", params, CARD, float16=True)
    assert not list((tmp_path / "model").rglob("commit_success.txt"))  # names our folders
    half = jax.tree.map(lambda array: array.astype(np.float16).astype(np.float32), params)
    check_equal(load_model(tmp_path / "model")[0], half)
    sizes = [
        sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        for folder in (tmp_path / "model", tmp_path / "whole")
        if folder.name == "model" or not save_model(folder, params, CARD)
    ]
    assert sizes[0] < 0.7 * sizes[1]
    params["classifier"]["class_embed"]["bias"][0] = 1e5
    with pytest.raises(ValueError, match="exceeds 65504.0, the most of float16"):
        save_model(tmp_path / "large", params, CARD, float16=True)
    assert not (tmp_path / "large").exists()


def test_backbone_alone(params, tmp_path):
    backbone = {"segmentor": {"backbone": params["segmentor"]["backbone"]}}
    save_model(tmp_path / "model", backbone, ModelCard({"backbone": CONFIG["backbone"]}))
    found, card = load_model(tmp_path / "model")
    check_equal(found, backbone)
    assert card.vocabulary is None and card.task == ""


def test_a_taken_name(params, tmp_path):
    folder = tmp_path / "model"
    save_model(folder, params, CARD)
    with pytest.raises(ValueError, match="is there already"):
        save_model(folder, params, CARD)
    other = ModelCard(CONFIG, VOCABULARY, "semantic")
    save_model(folder, params, other, overwrite=True)
    assert load_card(folder).task == "semantic"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="leaves it alone"):
        save_model(tmp_path / "photos", params, CARD, overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").exists()
    with pytest.raises(ValueError, match="is a file"):
        save_model(folder / "model.json", params, CARD, overwrite=True)


def test_a_failure_leaves_nothing_behind(params, tmp_path, monkeypatch):
    folder = tmp_path / "model"

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(json, "dumps", fail)
    with pytest.raises(OSError, match="No space"):
        save_model(folder, params, CARD)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    save_model(folder, params, CARD)
    monkeypatch.setattr(json, "dumps", fail)
    with pytest.raises(OSError, match="No space"):
        save_model(folder, params, ModelCard(CONFIG, VOCABULARY, "semantic"), overwrite=True)
    assert load_card(folder).task == "panoptic"
    assert list(tmp_path.iterdir()) == [folder]


def test_params_and_card_belong_together(params, tmp_path):
    with pytest.raises(ValueError, match="have a class head but the vocabulary is absent"):
        save_model(tmp_path / "model", params, ModelCard(CONFIG))
    with pytest.raises(ValueError, match=r"\(3, 32\) at .*query_feature.* has \(4, 32\)"):
        save_model(tmp_path / "model", params, ModelCard({**CONFIG, "num_queries": 4}, VOCABULARY))
    assert list(tmp_path.iterdir()) == []


def test_damaged_folders(params, tmp_path):
    with pytest.raises(ValueError, match="holds no model.json; make"):
        load_model(tmp_path)
    folder = tmp_path / "model"
    save_model(folder, params, CARD)
    card = folder / "model.json"
    good = json.loads(card.read_text())
    for content, message in (
        ("{", "not valid JSON"),
        ("[]", "no card of format"),
        (json.dumps({**good, "extra": 1}), "has no key 'extra'"),
        (json.dumps({**good, "format": 99}), "no card of format"),
        (json.dumps({**good, "task": "depth"}), "names the task 'depth'"),
        (json.dumps({**good, "vocabulary": {"names": ["a"]}}), "no usable vocabulary"),
        (json.dumps({**good, "segmentor": 5}), "no usable segmentor: it is 5"),
        (json.dumps({**good, "segmentor": {"widht": 3}}), "did you mean 'width'"),
        (json.dumps({**good, "vocabulary": None}), "have a class head"),
    ):
        card.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_model(folder)
    card.write_text(json.dumps(good))
    manifest = folder / "params" / "_METADATA"
    content = manifest.read_bytes()
    manifest.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot be read .*; convert"):
        load_model(folder)
    manifest.unlink()
    with pytest.raises(ValueError, match="cannot be read .*; convert"):
        load_model(folder)
