"""Six vocabularies in one table, each in its data set's own layout, by one trained stage."""

import pytest

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.panoptic_quality import PanopticQuality
from concat_jax.experiment.elsewhere import Elsewhere
from concat_jax.experiment.experiment import Experiment
from concat_jax.inference.text_tower import TextTower
from configs import ade20k_ovss
from data_pipelines.datasets import make_datasets
from tests.data_pipelines.test_layouts import MAPS, write_ade, write_map_dataset
from tests.experiment.test_model import STAGES, finish, tiny_config


@pytest.fixture
def config(tmp_path, shared_data):
    """A tiny run in the synthetic world, and the recipe's data sets with two images each."""
    config = tiny_config()
    bpe = shared_data / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz"
    config.text.update(tokenizer="clip", bpe_path=str(bpe), context_length=77)
    roots = {}
    for kind in MAPS:
        write_map_dataset(kind, tmp_path / kind)
        roots[kind] = str(tmp_path / kind)
    write_ade(tmp_path / "ade")
    with config.unlocked():
        config.data.update(eval_size=64, num_threads=1)
        config.eval.elsewhere = ade20k_ovss.get_config().eval.elsewhere
        config.eval.elsewhere.a150 = dict(
            kind="ade20k_panoptic",
            root=str(tmp_path / "ade"),
            part="validation",
            tasks=("panoptic", "semantic"),
        )
    for name in ("a847", "pc59", "voc20", "voc21"):
        config.eval.elsewhere[name].root = roots[config.eval.elsewhere[name].kind]
    return config


def test_one_table_and_each_vocabulary_is_embedded_once(config, tmp_path, monkeypatch):
    run = Experiment(config, tmp_path / "run", make_datasets(config.data, seed=0))
    for name, subtrees in STAGES.items():
        finish(run, name, subtrees)
    embedded, embed = [], TextTower.embed

    def count(self, vocabulary, **how):
        embedded.append(len(vocabulary))
        return embed(self, vocabulary, **how)

    monkeypatch.setattr(TextTower, "embed", count)
    found = {stage: run.elsewhere.score(run, stage) for stage in ("con", "finetune")}
    assert sorted(embedded) == sorted([len(run.setup.vocabulary), 847, 59, 20, 21, 150])
    table = run.elsewhere.format({"finetune": run.evaluate("finetune")}, found)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")]
    assert rows[0] == ["data set", "run", "classes", "images", "PQ", "mIoU", "AP"]
    by_set = {row[0]: row[2:] for row in rows[2:13] if row[1] == "finetune"}
    assert rows[2][:2] == ["synthetic", "finetune"] and len(by_set) == 6
    assert by_set.pop("synthetic")[0] == str(len(run.setup.vocabulary))
    sizes = {name: (int(row[0]), int(row[1])) for name, row in by_set.items()}
    assert sizes["a847"] == (847, 2) and sizes["voc20"] == (20, 1) and sizes["voc21"] == (21, 1)
    for name, (_, _, quality, miou, precision) in by_set.items():
        assert 0 <= float(miou) <= 100 and precision == "-"
        assert (quality != "-") == (name == "a150")
    assert table.endswith("Without a root, so not scored: pc459.")


def test_a_further_part_of_the_own_data_set_is_a_row_beside(config):
    nothing = PanopticQuality(2).summarize(
        Vocabulary(("a", "b"), (True,) * 2, (True, False), (1, 2))
    )
    summary = {**nothing, "classes": 2, "images": 2}
    own, found = {"full": summary}, {"full": {config.data.kind: {**summary, "images": 7}}}
    table = Elsewhere(config).format(own, found)
    assert own == {"full": summary}
    assert [line.split("|")[4].strip() for line in table.split("\n")[2:4]] == ["2", "7"]


def test_faults_show_before_training(config, tmp_path):
    def opened():
        return Experiment(config, tmp_path / "run", make_datasets(config.data, seed=0))

    config.eval.elsewhere.pc459.root = "/nowhere"
    run = opened()
    with pytest.raises(ValueError, match=r"pascal_context_459 is expected as /nowhere/\{images"):
        run.elsewhere.open(run)
    config.eval.elsewhere.pc459.tasks = ("panoptics",)
    with pytest.raises(ValueError, match="has no task 'panoptics'; did you mean 'panoptic'"):
        opened()
