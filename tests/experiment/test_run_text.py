"""A run's text embeddings: which settings reach them, and what the cache spares."""

import jax
import numpy as np
import pytest

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.experiment.experiment import Experiment
from concat_jax.inference import text_tower
from configs import demo_zps
from tests.tiny import no_data

VOCABULARY = Vocabulary(
    names=("cat", "sky-other"),
    is_thing=(True, False),
    is_seen=(True, False),
    category_ids=(1, 2),
    synonyms=(("kitty", "tomcat"), ()),
)


def make_run(workdir, model=(), **text):
    """A run on data that is not there, whose CLIP was never trained."""
    config = demo_zps.get_config("smoke")
    with config.unlocked(), config.ignore_type():  # a list of templates in place of a set's name
        config.text.update(text)
        config.model.clip.update(dict(model))
    data = no_data(
        VOCABULARY, caption_words=("cat", "kitty", "tomcat", "sky", "other", "a", "map", "of")
    )
    return Experiment(config, workdir, data)


@pytest.fixture(scope="module")
def clip_params(tmp_path_factory):
    networks = make_run(tmp_path_factory.mktemp("run") / "run").setup.networks
    shapes = jax.eval_shape(lambda: networks.init("clip", jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), shapes)


def embed(workdir, params, **settings):
    """Text embeddings of a new run, and whether its text tower was run for them."""
    run = make_run(workdir, **settings)
    run.parameters.keep("clip", "clip", params)
    ran = []
    encode = text_tower._encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_tower, "_encode", lambda *given: ran.append(given) or encode(*given))
        text = run.embeddings.get("clip", run.setup.vocabulary)
    assert run.embeddings.get("clip", run.setup.vocabulary) is text
    return text, bool(ran)


def test_the_cache_spares_the_text_tower_across_runs(tmp_path, clip_params):
    cache = str(tmp_path / "cache")
    first, ran = embed(tmp_path / "a", clip_params, cache=cache)
    assert ran
    again, ran = embed(tmp_path / "b", clip_params, cache=cache)
    assert not ran
    np.testing.assert_array_equal(again, first)
    # Other weights, and a field of the text tower that no weight shows.
    other = jax.tree.map(lambda leaf: leaf + 0.01, clip_params)
    assert embed(tmp_path / "c", other, cache=cache)[1]
    heads, ran = embed(tmp_path / "d", clip_params, cache=cache, model={"text_heads": 2})
    assert ran and np.abs(heads - first).max() > 1e-4
    # The folder may move between two starts in one workdir.
    moved, ran = embed(tmp_path / "a", clip_params, cache=str(tmp_path / "moved"))
    assert ran
    np.testing.assert_array_equal(moved, first)
    assert embed(tmp_path / "a", clip_params, cache="")[1]


def test_settings_reach_the_embeddings(tmp_path, clip_params):
    mean, _ = embed(tmp_path / "mean", clip_params)
    best, _ = embed(tmp_path / "max", clip_params, synonyms="max")
    none, _ = embed(tmp_path / "none", clip_params, synonyms="none")
    own, _ = embed(tmp_path / "own", clip_params, templates=["a map of a {}", "{}"])
    assert mean.shape == none.shape == own.shape == (2, 64) and best.shape == (2, 3, 64)
    np.testing.assert_allclose(best[:, 0], none, atol=1e-6)
    np.testing.assert_array_equal(mean[1], none[1])
    assert min(np.abs(mean[0] - none[0]).max(), np.abs(own - mean).max()) > 1e-4


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(templates="ate"), "no template set 'ate'"),
        (dict(templates=["a photo"]), "'a photo' must hold '{}' once"),
        (dict(synonyms="best"), "config.text.synonyms is 'best'"),
        (dict(templates=["a map of " * 20 + "{}"]), "Class names take more than the .* tokens"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_written(tmp_path, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_run(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()
