"""Two processes, as hosts of a cluster: they share an evaluation out, and run the demo's stages."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.evaluation.test_evaluate import example, run

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[2]
METRICS = ("panoptic", "semantic", "instance")

EVALUATION = """
import json, os, sys
import jax
from concat_jax.main import join_hosts
from tests.slow.test_evaluation_hosts import evaluate_share
from absl import flags

flags.FLAGS(["test", "--distributed"])
join_hosts()
assert jax.process_count() == 2
print("summary", json.dumps(evaluate_share(sys.argv[1], jax.process_index(), 2)))
"""


def evaluate_share(folder, process_index, process_count):
    """Every process_count-th of five images, of different sizes, some found with an error."""
    sizes = [((48, 96), (16, 32)), ((60, 30), (32, 16)), ((32, 32), (32, 32))]
    examples = [example(k, *sizes[k % 3][0], 32, sizes[k % 3][1]) for k in range(5)]
    for k, columns in ((1, 5), (2, 3), (3, 14)):  # which look like sky
        examples[k][1]["image"][:, :columns] = (0, 255, 0)
    share = examples[process_index::process_count]
    summary, _ = run(share, pathlib.Path(folder), 2, metrics=METRICS)
    return summary


def run_hosts(*arguments):
    """What two processes print, each told where it finds the other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    hosts = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ
            | {
                "JAX_PLATFORMS": "cpu",
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,  # where Python finds the packages
        )
        for index in range(2)
    ]
    try:
        printed = [host.communicate(timeout=900)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(printed)
    return printed


def test_two_hosts_score_as_one(tmp_path):
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
    assert files[0] == files[1] and len(files[0]) == 12


def test_two_hosts_run_every_stage(tmp_path):
    flags = ["--config=configs/demo_zps.py:smoke", f"--workdir={tmp_path}", "--distributed"]
    printed = run_hosts("-m", "concat_jax.main", *flags)
    tables = [text[text.index("\nrun ") : text.index("\nDone in")] for text in printed]
    assert tables[0] == tables[1]
    report = json.loads((tmp_path / "report.json").read_text())
    assert [result["images"] for result in report["results"].values()] == [8, 8, 8]
    losses = [
        json.loads(line)["loss"]
        for stage in ("clip", "con", "cat", "finetune", "control")
        for line in (tmp_path / stage / "metrics.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    assert len(losses) >= 5 and np.isfinite(losses).all()
