"""A segmentor that starts from a converted model: the whole of it, or its backbone."""

import jax
import numpy as np
import pytest

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.models.segmentor import make_segmentor
from concat_jax.weights.model_folder import ModelCard, save_model, segmentor_from_folder

CONFIG = {
    "backbone": {"kind": "resnet", "stage_sizes": (1, 1, 1, 1), "width": 8, "block": "basic"},
    "width": 32,
    "num_queries": 3,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "ffn_width": 8,
    "decoder_ffn_width": 8,
}


def random_params(seed, config=CONFIG):
    """Parameters of the configured segmentor, all of them random."""
    shapes = jax.eval_shape(
        make_segmentor(config).init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32)
    )["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def equal(first, second):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, first, second)))


@pytest.fixture(scope="module")
def fresh():
    return random_params(0)


@pytest.fixture(scope="module")
def other():
    return random_params(1)


def test_backbone_alone(fresh, other, tmp_path):
    backbone = {"segmentor": {"backbone": other["backbone"]}}
    save_model(tmp_path / "m", backbone, ModelCard({"backbone": CONFIG["backbone"]}))
    params, report = segmentor_from_folder(tmp_path / "m", CONFIG, fresh)
    assert equal(params["backbone"], other["backbone"])
    assert equal(params["pixel_decoder"], fresh["pixel_decoder"])
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    count = len(jax.tree.leaves(other["backbone"]))
    assert len(report.loaded) == count
    assert len(report.new) == len(jax.tree.leaves(fresh)) - count


def test_whole_segmentor_without_its_head(fresh, other, tmp_path):
    head = {"kernel": np.ones((32, 2), np.float32), "bias": np.ones(2, np.float32)}
    whole = {"segmentor": other, "classifier": {"class_embed": head}}
    card = ModelCard(CONFIG, Vocabulary(("cat",), (True,), (True,), (1,)))
    save_model(tmp_path / "m", whole, card)
    params, report = segmentor_from_folder(tmp_path / "m", CONFIG, fresh)
    assert equal(params, other) and not report.new
    assert set(report.ignored) == {
        "classifier/class_embed/kernel",
        "classifier/class_embed/bias",
    }


def test_another_architecture_is_refused(fresh, other, tmp_path):
    save_model(tmp_path / "m", {"segmentor": other}, ModelCard(CONFIG))
    wider = {**CONFIG, "num_queries": 4}
    with pytest.raises(
        ValueError, match=r"holds \(3, 32\) for .*query_f.* segmentor has \(4, 32\)"
    ):
        segmentor_from_folder(tmp_path / "m", wider, random_params(0, wider))
    deeper = {**CONFIG, "num_decoder_layers": 2}
    save_model(tmp_path / "d", {"segmentor": random_params(0, deeper)}, ModelCard(deeper))
    with pytest.raises(ValueError, match="layer_1.* segmentor has nothing; make config.model"):
        segmentor_from_folder(tmp_path / "d", CONFIG, fresh)
    # Four heads of 8 with two points have the shapes of two heads of 16 with four.
    with pytest.raises(ValueError, match="num_heads 2 where the config's has 4"):
        segmentor_from_folder(tmp_path / "m", {**CONFIG, "num_heads": 4, "num_points": 2}, fresh)
