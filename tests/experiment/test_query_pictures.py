"""The pictures of a run's stages: whose queries they hold."""

import contextlib
import dataclasses
import types

import numpy as np
import pytest
from matplotlib.figure import Figure

from concat_jax import query_space
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.experiment import looks, query_pictures
from concat_jax.stages.registry import make_stage
from concat_jax.stages.stage import Context, StageConfig
from concat_jax.training.sharding import make_mesh
from configs import demo_zps

VOCABULARY = Vocabulary(
    ("cat", "dog", "sky"), (True, True, False), (True, False, True), category_ids=(1, 2, 3)
)


def stage(kind, **fields):
    return StageConfig(kind=kind, steps=1, batch_size=1, bank_images=1, optimizer={}, **fields)


class FakeSetup:
    vocabulary = eval_vocabulary = VOCABULARY
    predict = types.SimpleNamespace(batch_size=2)
    networks = types.SimpleNamespace(
        clip=None,
        segmentor=types.SimpleNamespace(frozen=False, anneals=False),
        projector=types.SimpleNamespace(apply=lambda variables, queries: queries[..., :3]),
    )
    stages = {
        "clip": stage("pretrain_clip", takes={}),
        "con": stage("con", takes={"clip": "clip"}),
        "cat": stage("cat", takes={"clip": "clip", "segmentor": "con", "projector": "con"}),
        "finetune": stage(
            "finetune",
            takes={"clip": "clip", "segmentor": "con", "generator": "cat"},
            method={"deviation": 2.0},
        ),
        "control": stage(
            "finetune",
            takes={"clip": "clip", "segmentor": "con"},
            method={"pseudo_per_class": 0},
        ),
    }

    def make_stage(self, name):
        return make_stage(name, self.stages[name], Context(self.networks, VOCABULARY))

    def networks_of(self, name):
        return f"networks of {name}"


class FakeExperiment:
    setup = FakeSetup()
    mesh = make_mesh(devices=2)
    parameters = types.SimpleNamespace(whole=lambda subtree, source: f"{subtree} of {source}")
    embeddings = types.SimpleNamespace(
        get=lambda source, vocabulary: np.eye(3, 4, dtype=np.float32)
    )


@pytest.fixture
def drawn(monkeypatch):
    """What reaches the picture: real and pseudo queries, and the title."""
    rng = np.random.default_rng(0)
    real = rng.normal(size=(40, 5)).astype(np.float32), np.arange(40) % 3
    calls = []

    def generate(networks, params, text, rng):
        assert networks == "networks of cat"
        assert params == {"generator": "generator of cat", "segmentor": "segmentor of con"}
        return np.zeros((len(text), 5), np.float32)

    def picture(real, real_labels, pseudo, labels, vocabulary, title):
        calls.append(dict(real=real, pseudo=pseudo, labels=labels, title=title))

    monkeypatch.setattr(query_pictures, "real_queries", lambda run, source, count: real)
    monkeypatch.setattr(query_pictures, "generate", generate)
    monkeypatch.setattr(query_pictures, "copy_to_host", lambda tree, mesh: tree)
    monkeypatch.setattr(query_pictures.plots, "query_space", picture)

    def draw(name):
        query_pictures.query_figure(FakeExperiment(), name, per_class=4)
        return calls[-1]

    return draw


def test_stage_1_has_real_queries_only(drawn):
    seen = drawn("con")
    assert len(seen["real"]) == 40 and not len(seen["pseudo"])
    assert seen["title"] == "Real vision queries after stage con"


def test_cat_shows_its_pseudo_queries_of_every_class(drawn):
    seen = drawn("cat")
    assert seen["labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert seen["pseudo"].shape == (12, 5) and not seen["pseudo"].any()


def test_the_finetune_shows_what_it_learnt_from_as_unit_semantic_queries(drawn):
    seen = drawn("finetune")
    assert seen["real"].shape == (40, 3) and seen["pseudo"].shape == (12, 3)
    # The generator gave zeros: what is there are the deviations.
    np.testing.assert_allclose(np.linalg.norm(seen["pseudo"], axis=-1), 1, rtol=1e-5)
    assert not len(drawn("control")["pseudo"])


def test_a_stage_without_queries_is_refused(drawn):
    with pytest.raises(ValueError, match="'clip' is of kind 'pretrain_clip', which has no queries"):
        drawn("clip")


def test_evaluation_images_of_other_classes_are_refused(drawn, monkeypatch):
    """Their labels count another list of names, which the picture would pass off as this one's."""
    other = dataclasses.replace(VOCABULARY, names=tuple(f"{n}!" for n in VOCABULARY.names))
    monkeypatch.setattr(FakeSetup, "eval_vocabulary", other)
    with pytest.raises(ValueError, match="evaluates on others; set config.data.eval_kind to ''"):
        drawn("con")


def test_real_queries_are_the_matched_ones_of_evaluation_images(monkeypatch):
    """All classes may be matched; the last images, which fill no batch, are left out."""
    matched = []

    def extract(context, params, text, batch, rng):
        matched.append(context.vocabulary.is_seen)
        images = np.asarray(batch["image"])
        labels = np.where(images[:, :1] == 2, -1, 1)
        queries = np.repeat(images[:, None, :], 1, axis=1)
        return {"queries": queries, "query_labels": labels}

    monkeypatch.setattr(query_pictures, "_extract", extract)
    parameters = types.SimpleNamespace(whole=lambda subtree, source: np.ones(1))
    run = FakeExperiment()
    run.parameters = parameters
    run.setup.context = Context(run.setup.networks, VOCABULARY)
    fields = {name: np.zeros(3) for name in query_pictures.IMAGE_FIELDS}
    examples = [{**fields, "image": np.full(3, float(i))} for i in range(7)]
    run.datasets = types.SimpleNamespace(evaluation=lambda: examples, eval_size=3)
    monkeypatch.setattr(query_pictures, "resize_longest", lambda example, size: example)
    queries, labels = query_pictures.real_queries(run, "con", 100)
    assert queries[:, 0].tolist() == [0, 1, 3, 4, 5] and labels.tolist() == [1] * 5
    assert matched[0] == (True, True, True)
    queries, _ = query_pictures.real_queries(run, "con", 2)
    assert len(queries) == 2
    monkeypatch.setattr(run.datasets, "evaluation", lambda: [examples[2]] * 2)
    too_few = query_pictures.TooFewQueriesError
    with pytest.raises(too_few, match="Of 2 evaluation images 0 segments"):
        query_pictures.real_queries(run, "con", 100)
    monkeypatch.setattr(run.setup.predict, "batch_size", 8)
    with pytest.raises(too_few, match="fewer images than config.eval.settings.batch_size = 8"):
        query_pictures.real_queries(run, "con", 100)


def test_a_look_that_shows_too_little_ends_no_training(monkeypatch, tmp_path, capsys):
    def write_picture(*args, **kwargs):
        raise query_pictures.TooFewQueriesError("Of 4 images none.")

    monkeypatch.setattr(query_pictures, "write_picture", write_picture)
    run = FakeExperiment()
    run.workdir, run.setup = tmp_path, FakeSetup()
    run.setup.config, run.setup.predicts = demo_zps.get_config("smoke"), lambda name: False
    run.parameters = types.SimpleNamespace(holding=lambda name, params: contextlib.nullcontext())
    assert looks.look(run, "cat")(7, {}, None) == {}
    assert "cat, step 7: no picture of queries. Of 4 images none." in capsys.readouterr().out


def test_a_workdir_without_a_finished_stage_is_refused(tmp_path):
    flags = ["--config=configs/demo_zps.py:smoke", f"--workdir={tmp_path}"]
    with pytest.raises(SystemExit, match="No stage of .* from CON on has finished; train it"):
        query_space.main(["query_space", *flags])
    assert not list(tmp_path.iterdir())


def test_the_picture_lies_in_the_folder_of_its_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(query_pictures, "query_figure", lambda run, name, num_images: Figure())
    path = query_pictures.write_picture(types.SimpleNamespace(workdir=tmp_path), "con")
    assert path == tmp_path / "con" / "query_space.png"
    assert path.read_bytes().startswith(b"\x89PNG")
