"""Text head and CLIP name the masks of one stage, in a table."""

from concat_jax.benchmarking import naming
from concat_jax.evaluation import query_names
from concat_jax.experiment.experiment import Experiment
from data_pipelines.datasets import make_datasets
from tests.experiment.test_model import STAGES, finish, tiny_config


def test_every_way_is_a_row_and_all_name_the_same_queries(tmp_path, monkeypatch):
    for field, few in (("GAMMAS", (0.0,)), ("POWERS", ((0.4, 0.8),)), ("VOID_WEIGHTS", (1.0,))):
        monkeypatch.setattr(naming, field, few)
    monkeypatch.setattr(query_names, "LEAST_IOU", 0.0)  # random masks hold little
    config = tiny_config()
    run = Experiment(config, tmp_path / "run", make_datasets(config.data, seed=0))
    for name, subtrees in STAGES.items():
        finish(run, name, subtrees)
    found = {}

    def sweep(predictor, examples, name):
        found.setdefault(name, []).append(naming_sweep(predictor, examples, name=name))
        return found[name][-1]

    naming_sweep = naming.sweep
    monkeypatch.setattr(naming, "sweep", sweep)
    rows = naming.compare(run, "con").split("\n")
    assert len(rows) == 2 + len(found) == 2 + 2 + len(naming.POWERS) + len(naming.VOID_WEIGHTS)
    (_, text), *others = found.values()
    assert len(text.names.labels)
    for _, other in others:
        assert other.names.labels.tolist() == text.names.labels.tolist()
    # No-object alone is another: the names are the text head's.
    voided = found["text head, no-object times 1 - 1 max p of CLIP"][1]
    assert (voided.names.unseen_right == text.names.unseen_right).all()
