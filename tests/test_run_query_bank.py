"""A run's query bank: whose it is, what it lacks, and that a stage gets its memory from it."""

import importlib.util
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.run import Run
from concat_jax.stages.real_queries import IMAGE_FIELDS
from concat_jax.text.vocabulary import Vocabulary
from data_pipelines.datasets import Datasets

ROOT = pathlib.Path(__file__).resolve().parents[1]
VOCABULARY = Vocabulary(
    ("cat", "dog", "sky"), (True, True, False), (True, True, False), category_ids=(1, 2, 3)
)


@pytest.fixture
def make_bank(tmp_path, monkeypatch):
    """(weights, labels, …) -> the bank of a run whose stage 1 gave the weights.

    Neither pictures nor the networks that see them are there: an image has two queries, all ones.
    """
    spec = importlib.util.spec_from_file_location("demo_zps", ROOT / "configs" / "demo_zps.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    picture = {name: np.zeros(1) for name in IMAGE_FIELDS}
    data = Datasets(
        vocabulary=VOCABULARY,
        train=lambda batch_size: lambda step: picture,
        captions=lambda batch_size, side: None,
        caption_words=VOCABULARY.names,
        evaluation=lambda: (),
    )
    (tmp_path / "con").mkdir()

    def make(weights=1.0, labels=(0, 1), memory=0, **generator):
        config = module.get_config("smoke")
        config.mesh.devices = 1
        config.train.con.batch_size = 1
        config.train.cat.update(bank_images=1, batch_size=1)
        config.model.generator.update(generator)
        with config.unlocked():
            config.train.cat.method.memory_per_class = memory
        run = Run(config, tmp_path, data, trains=False)
        for subtree in ("segmentor", "projector"):
            run._given[subtree, "con"] = {"kernel": np.float32(weights)}
        monkeypatch.setattr(
            "concat_jax.run.extract_queries",
            lambda *args: (jnp.ones((1, 2, 4)), jnp.asarray([labels])),
        )
        return run._query_bank("cat", {}, np.zeros((3, 4), np.float32))

    return make


def test_a_bank_of_other_weights_is_refused_and_a_generator_has_no_part_in_it(make_bank):
    first = make_bank(weights=1.0)
    again = make_bank(weights=1.0, hidden_width=7, labels=(-1, -1))  # read, and not made anew
    np.testing.assert_array_equal(first.labels, again.labels)
    with pytest.raises(
        ValueError, match="was made from weights '[0-9a-f]{16}', not from '[0-9a-f]"
    ):
        make_bank(weights=1.0 + 1e-6)


def test_missing_seen_classes_are_printed_or_end_the_run(make_bank, capsys, tmp_path):
    make_bank(labels=(1, 1))
    printed = capsys.readouterr().out
    assert "Warning: " in printed and "1 of 2 seen classes (cat)" in printed
    (next(tmp_path.glob("con/*.npz"))).unlink()
    make_bank(labels=(0, 1))
    assert "Warning" not in capsys.readouterr().out
    (next(tmp_path.glob("con/*.npz"))).unlink()
    with pytest.raises(ValueError, match="hold no segment of a seen class"):
        make_bank(labels=(-1, 2))


def test_a_stage_gets_the_memory_that_its_method_asks_for(make_bank):
    assert set(make_bank().batch(0)) == {"queries", "query_labels"}
    batch = make_bank(memory=5).batch(0)
    assert batch["memory_queries"].shape == (3, 5, 4)
    np.testing.assert_array_equal(batch["memory_valid"].all(axis=1), [True, True, False])
