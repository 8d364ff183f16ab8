"""The ablation's rows, its table, and that nothing is run twice."""

import json
import types

import pytest

from concat_jax import ablation
from concat_jax.core.config import build
from concat_jax.experiment.ablation_rows import ROWS, SCORED, stages_before, with_rows
from concat_jax.stages.registry import STAGES
from configs import coco_zps, demo_zps


def summary(unseen, seen, harmonic):
    groups = {"unseen": unseen, "seen": seen, "harmonic": harmonic}
    return {group: {"pq": value, "sq": 50.0, "rq": None} for group, value in groups.items()}


def cell(plain, calibrated, gamma, seconds):
    return {"summary": plain, "calibrated": calibrated, "gamma": gamma, "seconds": seconds}


def test_rows_change_what_they_name_and_nothing_else():
    base = demo_zps.get_config()
    config = with_rows(base, seed=7)
    assert config.seed == 7 and base.seed == 0 and "projection" not in base.train
    assert config.train.con_both == base.train.con
    projection = config.train.projection.to_dict()
    assert projection["method"].pop("global_weight") == 0
    assert projection["method"].pop("instance_weight") == 0
    both = config.train.con_both.to_dict()
    del both["method"]["global_weight"], both["method"]["instance_weight"]
    assert projection == both


def test_a_config_without_the_stage_is_refused():
    config = demo_zps.get_config()
    with config.unlocked():
        del config.train.con
    with pytest.raises(ValueError, match="copies a stage that is not there: 'con'"):
        with_rows(config, seed=0)


def test_stages_before_come_in_order():
    config = with_rows(demo_zps.get_config(), seed=0)
    assert stages_before(config, "con_both") == ["clip"]
    assert stages_before(config, "finetune") == ["clip", "con", "cat"]
    assert stages_before(config, "no_mmd") == ["clip", "con_both", "cat_no_mmd"]
    assert stages_before(config, "control") == ["clip", "con_both"]
    assert config.train.cat_no_mmd.method.mmd_weight == 0
    assert config.train.cat.method.get("mmd_weight", 1) == 1


def test_mean_and_deviation_by_hand():
    assert ablation.spread([1.0, 2.0, 6.0]) == "3.0 ± 2.6"  # squares 4, 1, 9 over 2: 7
    assert ablation.spread([4.0]) == "4.0"
    assert ablation.spread([1.0, None]) == "-"


def test_the_table():
    cells = [
        cell(summary(30.0, 60.0, 40.0), summary(40.0, 50.0, None), 0.1, 60),
        cell(summary(32.0, 60.0, 41.0), summary(44.0, 50.0, 45.0), 0.25, 80),
    ]
    table = ablation.format_ablation({"con_both": cells}).splitlines()
    assert table[0].startswith("| row | PQ unseen | SQ unseen | RQ unseen | PQ seen | SQ seen |")
    assert table[2] == (
        "| stage 1 + CON, both | 31.0 ± 1.4 | 50.0 ± 0.0 | - | 60.0 ± 0.0 | 50.0 ± 0.0 | - "
        "| 40.5 ± 0.7 | 42.0 ± 2.8 | 50.0 ± 0.0 | - | - | 0.1/0.25 | - | - | 1:10 |"
    )


def test_the_share_of_the_gap_that_a_row_closes():
    def row(*scores):
        return [cell({}, summary(0.0, 0.0, score), 0.0, 1) for score in scores]

    cells = {"control": row(50.0, 52.0), "full": row(54.0, 56.0), "oracle": row(58.0, 60.0)}
    assert ablation.closed_gap(cells, "full") == 0.5  # 51, 55, 59
    assert ablation.closed_gap(cells, "oracle") == 1.0
    assert ablation.closed_gap({**cells, "full": row(54.0, None)}, "full") is None
    assert ablation.closed_gap({"full": row(54.0), "control": row(50.0)}, "full") is None
    assert ablation.closed_gap({**cells, "oracle": row(51.0)}, "full") is None


def test_how_pseudo_queries_lie_comes_from_the_last_metrics_of_their_stage(tmp_path):
    (tmp_path / "cat_full").mkdir()
    lines = [dict(spread_ratio=0.1, offset_ratio=2.0), dict(spread_ratio=0.75, offset_ratio=0.5)]
    log = tmp_path / "cat_full" / "metrics.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = ablation.pseudo_statistics(tmp_path, "cat_full")
    assert found == {"spread": 0.75, "offset": 0.5}
    assert ablation.pseudo_statistics(tmp_path, None) == {}
    one = {**cell(summary(1.0, 1.0, 1.0), summary(1.0, 1.0, 1.0), 0.0, 1), "pseudo": found}
    assert "| 0.75 | 0.50 |" in ablation.format_ablation({"full": [one]})


def test_rows_that_take_another_stage_1_or_generator():
    config = with_rows(demo_zps.get_config(), seed=0)
    assert config.train.cat_pading.generator.kind == "primitives"
    assert stages_before(config, "pading") == ["clip", "projection", "cat_pading"]
    assert stages_before(config, "oracle") == ["clip", "con_both"]
    assert config.train.oracle.oracle and not config.train.control.get("oracle", False)


class FakeRun:
    """Trains nothing; remembers what it was asked to do."""

    log = []

    def __init__(self, config, workdir, datasets):
        self.workdir, self.seed, self.datasets = workdir, config.seed, datasets
        self.parameters = types.SimpleNamespace(
            is_finished=lambda name: (workdir / name / "done").exists()
        )

    def train(self, name):
        self.log.append((self.seed, "train", name))
        (self.workdir / name).mkdir(parents=True)
        (self.workdir / name / "done").touch()

    def sweep(self, name, examples, gammas):
        """Validation prefers γ = 0.5; the test part gets unseen PQ 10 a seed, and 30 with γ."""
        if self.log[-1] != (self.seed, "score", name):
            self.log.append((self.seed, "score", name))
        return {
            gamma: summary(30.0 if gamma else 10.0 * self.seed, 50.0, 20.0 - abs(gamma - 0.5))
            for gamma in gammas
        }


def test_finished_cells_are_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "Experiment", FakeRun)
    monkeypatch.setattr(FakeRun, "log", [])
    drawn = []
    monkeypatch.setattr(ablation, "write_picture", lambda run, name: drawn.append(name))
    config = demo_zps.get_config("smoke")
    ablation.ablation(config, ["projection"], 1, tmp_path)
    assert FakeRun.log == [
        (0, "train", "clip"),
        (0, "train", "projection"),
        (0, "score", "projection"),
    ]
    FakeRun.log.clear()
    table = ablation.ablation(config, ["projection", "con_both"], 2, tmp_path)
    assert FakeRun.log == [
        (0, "train", "con_both"),
        (0, "score", "con_both"),
        (1, "train", "clip"),
        (1, "train", "projection"),
        (1, "score", "projection"),
        (1, "train", "con_both"),
        (1, "score", "con_both"),
    ]
    assert "5.0 ± 7.1" in table  # unseen 0 and 10
    assert "30.0 ± 0.0" in table and "0.5/0.5" in table
    assert (tmp_path / "ablation.md").read_text() == table + "\n"
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "ablation.json").read_text())
    assert len(saved["rows"]["projection"]) == 2
    assert drawn == ["projection", "con_both"]  # of the first seed
    FakeRun.log.clear()
    assert ablation.ablation(config, ["projection", "con_both"], 2, tmp_path) == table
    assert FakeRun.log == []


def test_every_row_makes_a_stage_that_can_be_built():
    """Run checks every stage it is to run: what it takes, its optimizer and its method."""
    config = with_rows(demo_zps.get_config("smoke"), seed=0)
    for name, row in ROWS.items():
        order = stages_before(config, name)
        assert set(config.train[name].takes.values()) <= set(order)
        kind = config.train[name].kind
        settings = STAGES[kind].Config
        build(settings, config.train[name].method.to_dict(), name)
        assert bool(row.title) == (name in SCORED)


def test_real_data_has_no_validation_world(tmp_path):
    with pytest.raises(ValueError, match="'coco_panoptic_zps' has no validation part"):
        ablation.ablation(coco_zps.get_config("mini"), ["projection"], 1, tmp_path)


def test_an_unknown_row_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no row 'con_bth'; did you mean 'con_both'"):
        ablation.ablation(demo_zps.get_config(), ["con_bth"], 1, tmp_path)
