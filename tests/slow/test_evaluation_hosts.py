"""Two processes, as hosts of a cluster: they share an evaluation out, and run the demo's stages."""

import json
import pathlib

import numpy as np
import pytest

from tests.evaluation.test_evaluate import example, run

pytestmark = pytest.mark.slow

TASKS = ("panoptic", "semantic", "instance")

EVALUATION = """
import json, sys
import jax
from types import SimpleNamespace
from concat_jax.core.cli import join_hosts
from tests.slow.test_evaluation_hosts import evaluate_share

join_hosts(SimpleNamespace(distributed=True))
assert jax.process_count() == 2
print("summary", json.dumps(evaluate_share(sys.argv[1], jax.process_index(), 2)))
"""


def evaluate_share(folder, process_index, process_count):
    """Every process_count-th of five images, of different sizes, some found with an error."""
    sizes = [(48, 96), (60, 30), (32, 32)]
    examples = [example(k, *sizes[k % 3]) for k in range(5)]
    for k, columns in ((1, 5), (2, 3), (3, 14)):  # which look like sky
        examples[k]["image"][:, :columns] = (0, 255, 0)
    share = examples[process_index::process_count]
    return run(share, pathlib.Path(folder), batch_size=2, tasks=TASKS)


def test_two_hosts_score_as_one(run_hosts, tmp_path):
    printed = run_hosts("-c", EVALUATION, str(tmp_path / "two"))
    lines = [line for text in printed for line in text.splitlines() if line.startswith("summary ")]
    first, second = (json.loads(line.removeprefix("summary ")) for line in lines)
    expected = evaluate_share(tmp_path / "one", 0, 1)
    assert first["images"] == second["images"] == expected["images"] == 5
    assert 30 < expected["all"]["pq"] < 90 and 30 < expected["instance"]["all"]["ap"] < 90
    for group in ("all", "seen", "things"):
        assert first[group] == second[group]
        assert first[group] == pytest.approx(expected[group], rel=1e-12, nan_ok=True)
    for metric in ("semantic", "instance"):
        assert first[metric]["all"] == second[metric]["all"]
        assert first[metric]["all"] == pytest.approx(
            expected[metric]["all"], rel=1e-12, nan_ok=True
        )
    one, two = (
        json.loads((tmp_path / name / "panoptic_predictions.json").read_text())["annotations"]
        for name in ("one", "two")
    )
    assert [entry["image_id"] for entry in two] == [0, 2, 4, 1, 3]
    assert sorted(two, key=lambda entry: entry["image_id"]) == one
    files = [sorted(p.name for p in (tmp_path / n).rglob("*.*")) for n in ("one", "two")]
    assert files[0] == files[1] and len(files[0]) == 16


def test_two_hosts_run_every_stage(run_hosts, tmp_path):
    flags = ["--config=configs/demo_zps.py:smoke", f"--workdir={tmp_path}", "--distributed"]
    flags += ["--config.train.con.eval_every=2", "--config.train.cat.eval_every=4"]
    printed = run_hosts("-m", "concat_jax.main", *flags)
    tables = [text[text.index("\nrun ") : text.index("\nDone in")] for text in printed]
    assert tables[0] == tables[1]
    report = json.loads((tmp_path / "report.json").read_text())
    assert [result["images"] for result in report["results"].values()] == [8, 8, 8]
    assert all(text.count("con, step ") == 4 for text in printed)
    assert (tmp_path / "con/query_space.png").is_file()
    losses = [
        json.loads(line)["loss"]
        for stage in ("clip", "con", "cat", "finetune", "control")
        for line in (tmp_path / stage / "metrics.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    assert len(losses) >= 5 and np.isfinite(losses).all()
