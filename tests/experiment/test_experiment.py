"""What a run needs before it starts, what it evaluates, and how hosts share the query bank."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from flax import traverse_util

from concat_jax.core.files import FileError
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.experiment.experiment import Experiment
from concat_jax.experiment.setup import make_setup
from concat_jax.models.generators import PrimitiveGenerator, QueryGenerator
from concat_jax.stages.queries import QueryBank
from concat_jax.weights.model_folder import ModelCard, parameter_shapes, save_model
from configs import demo_zps
from data_pipelines.datasets import make_datasets
from tests import tiny

VOCABULARY = Vocabulary(("cat", "sky"), (True, False), (True, False), (1, 2))


def make_run(config, workdir):
    """The config's run on data that is not there."""
    return Experiment(config, workdir, tiny.no_data(VOCABULARY))


def finish(workdir, config, *stages):
    for name in stages:
        (workdir / name / "checkpoints" / str(config.train[name].steps)).mkdir(parents=True)


@pytest.fixture(autouse=True)
def folders_stand_for_checkpoints(monkeypatch):
    monkeypatch.setattr(
        "concat_jax.experiment.parameters.is_saved",
        lambda workdir, name, step: (workdir / name / "checkpoints" / str(step)).is_dir(),
    )


def test_a_model_key_that_no_checkpoint_can_tell_is_held_fast(tmp_path):
    make_run(demo_zps.get_config("smoke"), tmp_path)
    assert not list(tmp_path.glob("*.partial"))
    config = demo_zps.get_config("smoke")
    finish(tmp_path, config, "clip")
    config.model.clip.text_heads = 2
    with pytest.raises(ValueError, match=r"config\.model\.clip\.text_heads = 4, now it is 2"):
        make_run(config, tmp_path)


@pytest.mark.parametrize(
    ("stage", "sentence"),
    [
        ("finetune", "Stage 'finetune' has not finished in"),
        ("finetun", "--stage names no stage of config.train: 'finetun'; did you mean 'finetune'"),
        ("clip", "--stage names stage 'clip', which has no segmentor"),
    ],
)
def test_a_stage_that_cannot_be_scored_is_refused(stage, sentence, tmp_path):
    finish(tmp_path, demo_zps.get_config("smoke"), "clip", "con")
    run = make_run(demo_zps.get_config("smoke"), tmp_path)
    run.check_stage("con")
    with pytest.raises(ValueError, match=sentence):
        run.check_stage(stage)


def test_no_gamma_is_tried_where_all_classes_are_seen():
    vocabulary = Vocabulary(("cat", "sky"), (True, False), (True, True), (1, 2))
    setup = types.SimpleNamespace(vocabulary=vocabulary, eval_vocabulary=vocabulary)
    with pytest.raises(ValueError, match="unseen ones, and all 2 classes of the data are seen"):
        Experiment.sweep(types.SimpleNamespace(setup=setup), "con", (), (0.0,))


def make_segmentor(folder, *names, unseen=()):
    """A tiny segmentor that knows the names, as `python -m concat_jax.convert` leaves it."""
    is_seen = tuple(name not in unseen for name in names)
    vocabulary = Vocabulary(names, (True,) * len(names), is_seen, tuple(range(len(names))))
    config = {"backbone": dict(kind="resnet", stage_sizes=(1, 1, 1, 1), width=8, block="basic")}
    shapes = parameter_shapes(config, len(names))
    flat = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    params = traverse_util.unflatten_dict(flat, sep="/")
    save_model(folder, params, ModelCard(config, vocabulary, "", "tiny", False))


def test_a_segmentor_that_knows_an_unseen_class_starts_no_zero_shot_run(tmp_path, monkeypatch):
    """The stage trains seen classes alone, and would have learnt the others before."""
    config = demo_zps.get_config("smoke")
    config.stages = ("clip", "con")
    folder = tmp_path / "model"
    make_segmentor(folder, "cat", "Sky")
    with config.unlocked():
        config.train.con.takes.segmentor = "init"
        config.init = dict(segmentor=str(folder))
    with pytest.raises(ValueError, match="1 classes that this run calls unseen .Sky.*zero-shot"):
        make_run(config, tmp_path / "run")
    with config.unlocked():
        config.init.allow_unseen_weights = True
    make_run(config, tmp_path / "run")
    make_segmentor(tmp_path / "seen", "cat", "dog")
    with config.unlocked():
        config.init = dict(segmentor=str(tmp_path / "seen"))
    make_run(config, tmp_path / "other")
    # As of a run with the same split, which never showed it.
    make_segmentor(tmp_path / "mine", "cat", "Sky", unseen=("Sky",))
    with config.unlocked():
        config.init = dict(segmentor=str(tmp_path / "mine"))
    make_run(config, tmp_path / "third")


def test_a_batch_that_the_devices_cannot_share_is_refused_before_the_first_stage(tmp_path):
    config = demo_zps.get_config("smoke")
    config.train.cat.batch_size = 12
    sentence = "batch of 12 cannot be split over 8 devices; set --config.train.cat.batch_size=16"
    with pytest.raises(ValueError, match=sentence):
        make_run(config, tmp_path)


def test_both_keep_rules_are_scored_and_named(tmp_path, monkeypatch):
    evaluated = []

    def evaluate(self, name, rule):
        evaluated.append((name, rule))
        return {"keep_rule": rule}

    monkeypatch.setattr(Experiment, "evaluate", evaluate)
    monkeypatch.setattr("concat_jax.experiment.experiment.report.format_comparison", str)
    monkeypatch.setattr("concat_jax.experiment.experiment.report.format_table", str)
    config = demo_zps.get_config("smoke")
    with config.unlocked():
        config.eval.keep_rules, config.eval.bias_split = ("objectness", "score"), ""
    finish(tmp_path, config, "clip", "con")
    config.stages = ("clip", "con")
    make_run(config, tmp_path).run()
    assert evaluated == [("con", "objectness"), ("con", "score")]
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["results"] == {
        f"stage 1 (CON), rule {rule}": {"keep_rule": rule} for rule in ("objectness", "score")
    }
    make_run(config, tmp_path).run()
    assert len(evaluated) == 2, "a finished run is not evaluated again"


def test_what_the_configs_own_rule_gives_lies_in_the_stages_folder(tmp_path, monkeypatch):
    folders = []
    monkeypatch.setattr(Experiment, "predictor", lambda self, name, keep_rule: None)
    monkeypatch.setattr(
        "concat_jax.experiment.experiment.looks.score",
        lambda *args, coco_folder, **kwargs: folders.append(coco_folder) or {},
    )
    config = demo_zps.get_config("smoke")
    config.eval.write_coco = True
    for own, rules in (("", ("objectness", "score", "")), ("score", ("score", "objectness"))):
        with config.unlocked():
            config.eval.settings.keep_rule = own
        run = make_run(config, tmp_path)
        run.datasets = dataclasses.replace(run.datasets, evaluation=lambda *hosts: ())
        used = [run.evaluate("con", rule)["keep_rule"] for rule in rules]
        assert used == [rule or "objectness" for rule in rules]
    con = tmp_path / "con"
    assert folders == [con, con / "rule_score", con, con, con / "rule_objectness"]


def test_only_finished_stages_are_evaluated_and_a_report_of_fewer_is_stale(tmp_path, monkeypatch):
    evaluated = []
    monkeypatch.setattr(Experiment, "evaluate", lambda self, name, rule: evaluated.append(name))
    monkeypatch.setattr(
        "concat_jax.experiment.experiment.report.format_comparison", lambda results: str(results)
    )
    monkeypatch.setattr("concat_jax.experiment.experiment.report.format_table", str)
    config = demo_zps.get_config("smoke")
    config.eval.bias_split = ""
    finish(tmp_path, config, "clip", "con")
    config.stages = ("clip", "con")
    make_run(config, tmp_path).run()
    make_run(config, tmp_path).run()
    assert evaluated == ["con"]  # the second time the report stands
    # The other stages finished, and the process died before it wrote their report.
    config = demo_zps.get_config("smoke")
    config.eval.bias_split = ""
    finish(tmp_path, config, "cat", "finetune", "control")
    make_run(config, tmp_path).run()
    assert evaluated == ["con", "con", "control", "finetune"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["results"]) == list(config.eval.stages.values())


def test_a_generator_is_of_the_stage_it_first_came_from():
    config = demo_zps.get_config("smoke")
    with config.unlocked():
        config.train.cat.generator = dict(kind="primitives")
        config.train.later = dict(config.train.cat.to_dict(), generator={})
        config.train.later.takes["generator"] = "cat"
        config.train.finetune.takes["generator"] = "later"
    setup = make_setup(config, make_datasets(config.data, seed=0))
    assert isinstance(setup.networks.generator, QueryGenerator)
    for name in ("cat", "later", "finetune"):
        assert isinstance(setup.networks_of(name).generator, PrimitiveGenerator)


def test_a_fault_of_the_evaluation_is_found_before_the_first_stage(tmp_path, monkeypatch):
    def damaged():
        raise FileError("b.png is damaged.")
        yield

    trained = []
    monkeypatch.setattr(Experiment, "train", lambda self, name: trained.append(name))
    run = make_run(demo_zps.get_config("smoke"), tmp_path)
    run.datasets = dataclasses.replace(run.datasets, identity=lambda: "", evaluation=damaged)
    with pytest.raises(FileError, match="b.png is damaged. .* data_pipelines.prepare checks all"):
        run.run()
    assert not trained
    finish(tmp_path, demo_zps.get_config("smoke"), "clip")  # later it is not read again
    run.run()
    assert set(trained) == {"con", "cat", "control", "finetune"}


def test_hosts_that_cannot_share_a_batch():
    queries = np.arange(20, dtype=np.float32)[:, None, None]
    labels = np.arange(20, dtype=np.int16)[:, None]
    with pytest.raises(ValueError, match="batch of 8 images' queries cannot be shared by 3 hosts"):
        QueryBank(queries, labels, batch_size=8, seed=3, process_count=3)
    with pytest.raises(ValueError, match="batch of 8 cannot be shared by 3 hosts"):
        make_datasets(demo_zps.get_config("smoke").data, seed=0, process_count=3).train(8)


def segmentor_from_init(folder):
    config = demo_zps.get_config("smoke")
    with config.unlocked():
        config.init = {"segmentor": folder}
        config.train.con.takes.segmentor = "init"
    config.train.con.copies = {}
    return config


def test_segmentor_starts_from_a_folder_or_says_that_it_does_not(tmp_path, capsys):
    run = make_run(segmentor_from_init(""), tmp_path / "fresh")
    capsys.readouterr()
    fresh = run.parameters.get("segmentor", "init")
    printed = capsys.readouterr().out
    assert "random numbers" in printed and printed.count("\n") == 1
    backbone = jax.tree.map(lambda x: np.asarray(x) + 1, fresh["backbone"])
    config = run.setup.config.model.segmentor.to_dict()
    card = ModelCard({"backbone": config["backbone"], "num_groups": config["num_groups"]})
    save_model(tmp_path / "r50", {"segmentor": {"backbone": backbone}}, card)

    run = make_run(segmentor_from_init(str(tmp_path / "r50")), tmp_path / "started")
    started = run.parameters.get("segmentor", "init")
    assert "newly initialised" in capsys.readouterr().out
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, started["backbone"], backbone)))
    rest = [{k: v for k, v in tree.items() if k != "backbone"} for tree in (started, fresh)]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, *rest)))


def test_a_folder_without_a_model_is_refused_before_the_first_stage(tmp_path):
    with pytest.raises(ValueError, match="absent holds no model.json"):
        make_run(segmentor_from_init(str(tmp_path / "absent")), tmp_path / "run")
    config = demo_zps.get_config("smoke")
    config.train.cat.takes.projector = "init"
    with pytest.raises(ValueError, match="config.init cannot hold 'projector'"):
        make_run(config, tmp_path / "run")
