"""A run's query bank: whose it is, what it lacks, and that a stage gets its memory from it."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.core.prefetch import in_threads
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.experiment.batches import query_bank
from concat_jax.experiment.experiment import Experiment
from concat_jax.stages.queries import IMAGE_FIELDS
from configs import demo_zps
from tests.tiny import no_data

VOCABULARY = Vocabulary(
    ("cat", "dog", "sky"), (True, True, False), (True, True, False), category_ids=(1, 2, 3)
)


@pytest.fixture
def make_bank(tmp_path, monkeypatch):
    """(weights, labels, …) -> the bank of a run whose stage 1 gave the weights.

    Neither pictures nor the networks that see them are there: an image has two queries, all ones.
    """
    picture = {name: np.zeros(1) for name in IMAGE_FIELDS}
    data = no_data(VOCABULARY, bank=lambda batch_size: in_threads(lambda step: picture))
    (tmp_path / "con").mkdir()

    def make(weights=1.0, labels=(0, 1), memory=0, **generator):
        config = demo_zps.get_config("smoke")
        config.mesh.devices = 1
        config.train.con.batch_size = 1
        config.train.cat.update(bank_images=1, batch_size=1)
        config.model.generator.update(generator)
        with config.unlocked():
            config.train.cat.method.memory_per_class = memory
        run = Experiment(config, tmp_path, data, trains=False)
        for subtree in ("segmentor", "projector"):
            run.parameters.keep(subtree, "con", {"kernel": np.float32(weights)})
        monkeypatch.setattr(
            "concat_jax.experiment.batches.extract_queries",
            lambda *args, **options: {
                "queries": jnp.ones((1, 2, 4)),
                "query_labels": jnp.asarray([labels]),
            },
        )
        return query_bank(run, "cat", np.zeros((3, 4), np.float32))

    return make


def test_a_bank_of_other_weights_is_refused_and_a_generator_has_no_part_in_it(make_bank):
    first = make_bank(weights=1.0)
    again = make_bank(weights=1.0, hidden_width=7, labels=(-1, -1))  # read, and not made anew
    np.testing.assert_array_equal(first.labels, again.labels)
    with pytest.raises(ValueError, match="made with weights = '[0-9a-f]{16}', now it is '[0-9a-f]"):
        make_bank(weights=1.0 + 1e-6)


def test_missing_seen_classes_are_printed_or_end_the_run(make_bank, capsys, tmp_path):
    make_bank(labels=(1, 1))
    printed = capsys.readouterr().out
    assert "Warning: " in printed and "1 of 2 seen classes (cat)" in printed
    shutil.rmtree(tmp_path / "con" / "query_bank_1")
    make_bank(labels=(0, 1))
    assert "Warning" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "con" / "query_bank_1")
    with pytest.raises(ValueError, match="hold no segment of a seen class"):
        make_bank(labels=(-1, 2))


def test_a_stage_gets_the_memory_that_its_method_asks_for(make_bank):
    assert set(make_bank().batch(0)) == {"queries", "query_labels"}
    batch = make_bank(memory=5).batch(0)
    assert batch["memory_queries"].shape == (3, 5, 4)
    np.testing.assert_array_equal(batch["memory_valid"].all(axis=1), [True, True, False])


def run_with(tmp_path, monkeypatch, change):
    """A run of stages 2 and 3 whose stage 1 is finished; what training is called with is noted."""
    config = demo_zps.get_config("smoke")
    with config.unlocked():
        change(config)
    config.stages = ("finetune",)
    monkeypatch.setattr("concat_jax.experiment.parameters.is_saved", lambda *arguments: True)
    data = no_data(VOCABULARY, train=lambda batch_size: in_threads(lambda step: (batch_size, step)))
    called = {}

    def train_stage(name, stage, **arguments):
        called.update(stage=stage, **arguments)
        return {}

    monkeypatch.setattr("concat_jax.experiment.experiment.train_stage", train_stage)
    run = Experiment(config, tmp_path, data)
    zeros = np.zeros((3, 4), np.float32)
    monkeypatch.setattr(run.embeddings, "get", lambda source, vocabulary: zeros)
    monkeypatch.setattr(run.parameters, "get", lambda subtree, source: f"{subtree} of {source}")
    run.train("finetune")
    return called


def test_a_stage_on_images_gets_images_and_the_projector_that_names_their_queries(
    tmp_path, monkeypatch
):
    def change(config):
        config.train.finetune.queries = "images"
        config.train.finetune.batch_size = 3

    called = run_with(tmp_path, monkeypatch, change)
    assert called["stage"].batch_fields == IMAGE_FIELDS
    assert called["stage"].trains == ("projector",)
    assert called["frozen"]["matching_projector"] == "projector of con"
    assert called["frozen"]["segmentor"] == "segmentor of con"
    assert list(called["batches"](5, 2)) == [(3, 5), (3, 6)]
    assert not list(tmp_path.glob("con/query_bank*"))


def queries_from_nowhere(config):
    config.train.finetune.queries = "image"


def segmentor_of_nobody(config):
    del config.train.finetune.takes["segmentor"]


def untrained_segmentor(config):
    config.train.finetune.takes.segmentor = "init"


def oracle_on_images(config):
    config.train.finetune.update(queries="images", oracle=True)


def unknown_bank(config):
    config.bank = {"dtyp": "float16"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (queries_from_nowhere, "config.train.finetune.queries is 'image'; did you mean 'images'"),
        (segmentor_of_nobody, "'finetune' learns from vision queries; say in config.train.fine"),
        (untrained_segmentor, "'finetune' learns from vision queries; say in config.train.fine"),
        (
            oracle_on_images,
            "finetune.oracle needs a bank; set --config.train.finetune.queries=bank",
        ),
        (unknown_bank, "config.bank has no key 'dtyp'; did you mean 'dtype'"),
    ],
)
def test_a_stage_without_queries_is_refused_at_once(change, sentence, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=sentence):
        run_with(tmp_path, monkeypatch, change)
