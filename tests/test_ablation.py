"""The ablation's rows, its tables, and that nothing is run twice."""

import json
import shutil
import types

import numpy as np
import pytest

from concat_jax import ablation
from concat_jax.core.config import build
from concat_jax.evaluation.bias_curve import NamedQueries
from concat_jax.evaluation.calibration import Sweep
from concat_jax.experiment import evidence
from concat_jax.experiment.ablation.rows import ROWS, SCORED, stages_before, with_rows
from concat_jax.stages.registry import STAGES
from concat_jax.visualize import plots
from configs import coco_zps, demo_zps
from data_pipelines.synthetic.presets import PRESETS
from tests.command_lines import ROOT

VOCABULARY = PRESETS["texture"].vocabulary
SCENES = 40


def sweep(gammas, seen, unseen):
    """Scenes of which each has `seen` of 4 segments right at γ = 0, and `unseen` at 1 of 2."""
    rng = np.random.default_rng(0)
    is_seen = np.asarray(VOCABULARY.is_seen)
    counts = np.zeros((len(gammas), SCENES, 4, len(VOCABULARY)), np.float32)
    for row, gamma in enumerate(gammas):
        share = np.where(is_seen, seen / (1 + max(gamma, 0)), unseen * min(max(gamma, 0), 1))
        hits = rng.binomial(4, np.broadcast_to(share, (SCENES, len(share))))
        counts[row, :, 1], counts[row, :, 3] = hits, 4 - hits
        counts[row, :, 0] = 0.8 * hits
    labels = np.tile([0, VOCABULARY.unseen[0]], SCENES)
    right = rng.random((2, len(labels))) < 0.7
    names = NamedQueries(labels, rng.normal(size=len(labels)), *right, np.arange(SCENES).repeat(2))
    return Sweep(VOCABULARY, tuple(gammas), counts, names)


def test_rows_change_what_they_name_and_nothing_else():
    base = demo_zps.get_config()
    config = with_rows(base, seed=7)
    assert config.seed == 7 and base.seed == 0 and "projection" not in base.train
    assert config.train.con == base.train.con
    projection = config.train.projection.to_dict()
    assert projection["method"].pop("global_weight") == 0
    assert projection["method"].pop("instance_weight") == 0
    con = config.train.con.to_dict()
    del con["method"]["global_weight"], con["method"]["instance_weight"]
    assert projection == con


def test_a_config_without_the_stage_is_refused():
    config = demo_zps.get_config()
    with config.unlocked():
        del config.train.con
    with pytest.raises(ValueError, match="copies a stage that is not there: 'con'"):
        with_rows(config, seed=0)


def test_stages_before_come_in_order():
    config = with_rows(demo_zps.get_config(), seed=0)
    assert stages_before(config, "con") == ["clip"]
    assert stages_before(config, "no_mmd") == ["clip", "con", "cat_no_mmd"]
    assert stages_before(config, "pading") == ["clip", "projection", "cat_pading"]
    assert stages_before(config, "oracle") == stages_before(config, "fair") == ["clip", "con"]
    assert config.train.cat_no_mmd.method.mmd_weight == 0
    assert config.train.cat.method.get("mmd_weight", 1) == 1
    assert config.train.cat_pading.generator.kind == "primitives"
    assert config.train.cat_kernel.kind == "regression" and config.train.cat_kernel.steps == 0
    assert config.train.oracle.oracle and not config.train.fair.get("oracle", False)


def test_a_row_is_compared_to_one_that_lacks_what_it_adds():
    for row in SCORED:
        assert ROWS[row].base in ("", *SCORED)
    assert ROWS["con"].base == "projection" and ROWS["kernel"].base == "fair"


def test_the_tables():
    """One row beside another, seed by seed: what both lack or share falls out of the difference."""
    gammas = (-1.0, 0.0, 1.0)
    low, high = [sweep(gammas, 0.6, 0.3)] * 2, [sweep(gammas, 0.6, 0.5)] * 2
    found = {
        row: evidence.scores(sweeps, [1.0, 0.0], draws=200)
        for row, sweeps in (("projection", low), ("con", high))
    }
    cell = {"gamma": 1.0, "calibrated": low[0].summary(1.0), "seconds": 60}
    table, differences = ablation.format_ablation(
        {"projection": [cell, cell], "con": [cell, {**cell, "seconds": 80}]}, found
    ).split("\n\n")
    heads = [head.strip() for head in table.splitlines()[0].split("|")[1:-1]]
    assert heads[:4] == ["row", "hPQ", "hPQ at γ", "area, PQ"]
    assert "| 1/1 | 1:10 |" in table
    (line,) = differences.splitlines()[2:]
    assert line.startswith("| stage 1 + CON | stage 1, projection only | +0.0 [+0.0, +0.0] |")
    pair = found["con"]["hpq_at"][0] - found["projection"]["hpq_at"][0]
    assert pair > 3 and f"| {pair:+.1f} [+" in line
    # No seed and no scene is left out of the value.
    mean = np.mean([s.summary(g)["harmonic"]["pq"] for s, g in zip(high, (1.0, 0.0), strict=True)])
    assert found["con"]["hpq_at"][0] == pytest.approx(mean, abs=1e-4)
    assert found["con"]["pq_area"][0] == pytest.approx(high[0].area(), abs=1e-4)


def test_what_was_not_measured_is_a_dash_in_the_table():
    """As a cell is read from JSON, where no test scene shows an unseen class."""
    found = {"projection": dict.fromkeys(evidence.SCORES, (float("nan"), np.full(9, np.nan)))}
    sides = {"seen": {"pq": 50.0}, "unseen": {"pq": None}}
    cell = {"gamma": 1.0, "calibrated": sides, "seconds": 60}
    table = ablation.format_ablation({"projection": [cell]}, found)
    assert "| stage 1, projection only | - | - | - | - | - | 50.0/- | 1 | 1:00 |" in table


class FakeRun:
    """Trains nothing; remembers what it was asked to do."""

    log, claimed = [], []

    def __init__(self, config, workdir, datasets, trains=True):
        if trains:
            self.claimed.append(workdir.name)
        self.workdir, self.seed, self.config = workdir, config.seed, config
        self.datasets = types.SimpleNamespace(evaluation=lambda: "test", vocabulary=VOCABULARY)
        self.setup = types.SimpleNamespace(config=config)
        self.prefix = "left out: " * ("left_out" in config.data)
        self.parameters = types.SimpleNamespace(
            is_finished=lambda name: (workdir / name / "done").exists()
        )

    def train(self, name):
        self.log.append((self.seed, f"{self.prefix}train", name))
        (self.workdir / name).mkdir(parents=True, exist_ok=True)
        (self.workdir / name / "done").touch()

    def held_out(self):
        return types.SimpleNamespace(evaluation=lambda: "held out")

    def sweep(self, name, examples, gammas):
        scored = (self.seed, f"{self.prefix}score", name)
        if self.log[-1:] != [scored]:
            self.log.append(scored)
        return sweep(gammas, 0.6, 0.3 + 0.1 * self.seed + 0.1 * (name == "refit_600"))


@pytest.fixture
def fake_run(monkeypatch):
    monkeypatch.setattr("concat_jax.experiment.experiment.Experiment", FakeRun)
    monkeypatch.setattr(FakeRun, "log", [])
    monkeypatch.setattr(FakeRun, "claimed", [])
    monkeypatch.setattr(evidence, "DRAWS", 20)
    return FakeRun.log


def test_seeds_share_the_world_and_finished_cells_are_not_run_again(fake_run, tmp_path, capsys):
    config = demo_zps.get_config("smoke")
    ablation.ablation(config, ["projection"], [0], 5, tmp_path)
    assert config.data.world_seed == 5
    assert fake_run == [
        (5, "train", "clip"),
        (0, "train", "projection"),
        (0, "score", "projection"),
    ]
    fake_run.clear()
    table = ablation.ablation(config, ["projection", "con"], [0, 1], 5, tmp_path)
    assert fake_run == [
        (0, "train", "con"),
        (0, "score", "con"),
        (1, "train", "projection"),
        (1, "score", "projection"),
        (1, "train", "con"),
        (1, "score", "con"),
    ]
    folder = tmp_path / "world_5"
    assert (folder / "seed_1" / "clip").resolve() == folder / "clip"
    assert (folder / "ablation.md").read_text() == table + "\n"
    assert (folder / "ablation.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((folder / "ablation.json").read_text())
    assert len(saved["rows"]["projection"]) == 2 and saved["world"] == 5
    fake_run.clear()
    assert "After 1 of 2 seeds" in capsys.readouterr().out
    assert ablation.ablation(config, ["projection", "con"], [0, 1], 5, tmp_path) == table
    assert fake_run == []
    assert capsys.readouterr().out == f"\nAfter 2 of 2 seeds, percent:\n{table}\n"
    # Unless they were scored by other settings, or what was scored is gone.
    config.data.num_eval_images += 1
    ablation.ablation(config, ["projection"], [0], 5, tmp_path)
    assert fake_run == [(0, "score", "projection")]
    fake_run.clear()
    (folder / "seed_0" / "projection" / "done").unlink()
    ablation.ablation(config, ["projection"], [0], 5, tmp_path)
    assert fake_run == [(0, "train", "projection"), (0, "score", "projection")]


def test_processes_share_the_seeds_of_a_world(fake_run, tmp_path):
    """Once what all share is trained, nobody's process keeps the others from theirs."""
    config = demo_zps.get_config("smoke")
    ablation.ablation(config, ["projection"], [0], 5, tmp_path)
    assert FakeRun.claimed == ["world_5", "seed_0"]
    fake_run.clear()
    FakeRun.claimed.clear()
    table = ablation.ablation(config, ["projection"], range(3, 5), 5, tmp_path)
    assert FakeRun.claimed == ["seed_3", "seed_4"]
    assert [seed for seed, what, _ in fake_run if what == "train"] == [3, 4]
    saved = json.loads((tmp_path / "world_5" / "ablation.json").read_text())
    assert saved["seeds"] == [3, 4] and "1/1" in table
    assert not (tmp_path / "world_5" / "seed_1").exists()


def cut(file):
    file.write_bytes(file.read_bytes()[:-30])


@pytest.mark.parametrize(
    "name, damage",
    [
        ("cell.json", cut),
        ("cell.json", lambda file: file.write_text("[]")),
        ("cell.json", lambda file: file.write_text('{"gamma": 0}')),
        ("sweep.npz", cut),
        ("sweep.npz", lambda file: file.write_bytes(b"")),
        ("sweep.npz", lambda file: np.savez(file, counts=np.zeros(3))),
    ],
)
def test_what_is_damaged_is_scored_anew(fake_run, tmp_path, capsys, name, damage):
    config = demo_zps.get_config("smoke")
    ablation.ablation(config, ["projection"], [0], 0, tmp_path)
    file = tmp_path / "world_0" / "seed_0" / "projection" / name
    before = json.loads(file.with_name("cell.json").read_text())
    damage(file)
    fake_run.clear()
    capsys.readouterr()
    ablation.ablation(config, ["projection"], [0], 0, tmp_path)
    after = json.loads(file.with_name("cell.json").read_text())
    assert after | {"seconds": 0} == before | {"seconds": 0}
    assert fake_run == [(0, "score", "projection")]
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith(str(file)) and said.endswith(". It is made anew.")


def test_a_kill_between_a_sweep_and_its_cell_leaves_no_mixture(fake_run, tmp_path, monkeypatch):
    config = demo_zps.get_config("smoke")
    ablation.ablation(config, ["projection"], [0], 0, tmp_path)

    def killed(path, content):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("concat_jax.experiment.ablation.runs.write_json", killed)
        config.data.num_eval_images += 1
        with pytest.raises(KeyboardInterrupt):
            ablation.ablation(config, ["projection"], [0], 0, tmp_path)
    fake_run.clear()
    config.data.num_eval_images -= 1
    ablation.ablation(config, ["projection"], [0], 0, tmp_path)
    assert fake_run == [(0, "score", "projection")]


def test_an_inductive_row_is_chosen_where_seen_classes_play_the_unseen_ones(fake_run, tmp_path):
    config = demo_zps.get_config("smoke")
    with config.unlocked():
        config.stages = ("trunk", *config.stages)
        config.train.trunk = dict(config.train.clip.to_dict(), captions="seen")
    table = ablation.ablation(config, ["refit"], [0], 0, tmp_path)
    assert "left_out" not in config.data
    assert [what[1:] for what in fake_run] == [
        ("train", "trunk"),
        ("train", "clip"),
        *(("left out: train", stage) for stage in ("trunk", "con")),
        *(
            (f"left out: {what}", f"refit_{steps}")
            for steps in (300, 600, 1200)
            for what in ("train", "score")
        ),
        ("train", "con"),
        ("train", "refit_600"),
        ("score", "refit_600"),
    ]
    # The best of them where classes were left out, at the γ that was best there.
    seed = tmp_path / "world_0" / "seed_0"
    cell = json.loads((seed / "refit" / "cell.json").read_text())
    assert cell["stage"] == "refit_600" and cell["gamma"] == 1.0
    assert "| 1 (refit_600) |" in table
    assert evidence.load_sweep(seed / "refit" / "sweep.npz", VOCABULARY)[1] == 1.0
    left_out = tmp_path / "world_0" / "left_out"
    assert (left_out / "seed_0" / "clip").resolve() == tmp_path / "world_0" / "clip"
    assert not (left_out / "trunk").is_symlink()
    # A cell of when the row was a stage itself; and one of a stage that was deleted since.
    write_cell = (seed / "refit" / "cell.json").write_text
    for damage in (
        lambda: write_cell(json.dumps({k: v for k, v in cell.items() if k != "stage"})),
        lambda: shutil.rmtree(seed / "refit_600"),
    ):
        damage()
        fake_run.clear()
        ablation.ablation(config, ["refit"], [0], 0, tmp_path)
        assert fake_run[-1] == (0, "score", "refit_600")


@pytest.mark.parametrize("row, stage", [("full", "finetune"), ("refit", "control")])
def test_a_mistake_in_the_last_stage_shows_before_the_first_is_trained(tmp_path, row, stage):
    config = demo_zps.get_config("smoke")
    config.train[stage].method.deviation = -1.0
    with pytest.raises(ValueError, match="method.deviation is -1.0 and must be at least 0"):
        ablation.ablation(config, [row], [0], 0, tmp_path)
    assert not any(tmp_path.iterdir())


def test_what_a_run_saw_as_it_learnt_is_read_once_a_step(tmp_path):
    """A killed run repeats steps, a crash halves a row, and other losses have no accuracy."""
    lines = {
        "seed_0/con": [{"step": 50, "accuracy": 0.1}, {"step": 100, "accuracy": 0.2}],
        "seed_1/con": [
            {"step": 0, "accuracy": 0.0},
            *({"step": 50, "accuracy": a} for a in (0.3, 0.4)),
        ],
        "seed_0/fair": [{"step": 50, "accuracy_real": 0.5}],
    }
    for stage, rows in lines.items():
        (tmp_path / stage).mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 150, "accur'
        (tmp_path / stage / "metrics.jsonl").write_text(text)
    found = ablation.learning(tmp_path, ["con", "fair", "kernel"], range(3))
    curves = [curve.tolist() for curve in found.pop(ROWS["con"].title)]
    assert curves == [[[50, 100], [0.1, 0.2]], [[0, 50], [0, 0.4]]] and not found
    axes = plots.learning_curves({"con": [([50, 100], np.array([0.1, 0.2]))] * 2}).axes[0]
    assert [line.get_ydata().tolist() for line in axes.lines] == [[10, 20]] * 2
    assert len(axes.get_legend().get_texts()) == 1


def test_every_row_makes_a_stage_that_can_be_built():
    """Run checks every stage it is to run: what it takes, its optimizer and its method."""
    config = with_rows(demo_zps.get_config("smoke"), seed=0)
    for name, row in ROWS.items():
        if row.chosen_among:
            assert row.title and set(row.chosen_among) <= set(ROWS)
            continue
        order = stages_before(config, name)
        assert set(config.train[name].takes.values()) <= set(order)
        kind = config.train[name].kind
        settings = STAGES[kind].Config
        build(settings, config.train[name].method.to_dict(), name)
        assert bool(row.title) == (name in SCORED)


def test_real_data_has_no_validation_world(tmp_path):
    with pytest.raises(ValueError, match="'coco_panoptic_zps' has no validation part"):
        ablation.ablation(coco_zps.get_config("mini"), ["projection"], [0], 0, tmp_path)
    line = f"--config={ROOT}/configs/coco_zps.py:mini --preset=texture --workdir={tmp_path}"
    with pytest.raises(SystemExit, match="'coco_panoptic_zps' has no validation part"):
        ablation.main(["ablation", *line.split()])


@pytest.mark.parametrize("split", ["", "test"])
def test_gamma_is_not_chosen_on_what_is_scored(tmp_path, split):
    config = demo_zps.get_config()
    config.eval.bias_split = split
    with pytest.raises(ValueError, match="other scenes than are scored, and config.eval.bias_s"):
        ablation.ablation(config, ["projection"], [0], 0, tmp_path)


def test_seeds_beyond_the_room_for_their_scenes_are_refused(tmp_path):
    line = f"--config={ROOT}/configs/demo_zps.py:smoke --workdir={tmp_path}/a"
    with pytest.raises(SystemExit, match=r"first_seed=.* in the range \[0, 1000\]"):
        ablation.main(["ablation", *line.split(), "--first_seed=100000000"])
    assert not (tmp_path / "a").exists()


def test_an_unknown_row_and_none_at_all_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no row to run; give some, as --rows=projection,con"):
        ablation.ablation(demo_zps.get_config(), [], [0], 0, tmp_path)
    with pytest.raises(ValueError, match="no row 'projectio'; did you mean 'projection'"):
        ablation.ablation(demo_zps.get_config(), ["projectio"], [0], 0, tmp_path)
