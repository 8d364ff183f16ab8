"""The demo's smoke config under Scenic's launcher and under ours: the same numbers."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.command_lines import ROOT
from tests.neighbours.with_scenic import need_scenic

pytestmark = pytest.mark.slow
need_scenic("app")
STAGES = ("clip", "con", "cat", "finetune", "control")


def launch(module, workdir, *flags):
    words = ["--config=configs/demo_zps.py:smoke", f"--workdir={workdir}", *flags]
    command = [sys.executable, "-m", f"concat_jax.{module}", *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def rows(workdir, stage):
    return [json.loads(line) for line in (workdir / stage / "metrics.jsonl").open()]


def test_both_launchers_give_the_same_numbers_and_go_on_with_a_workdir(tmp_path):
    theirs = launch("scenic_main", tmp_path / "theirs")
    assert theirs.returncode == 0, theirs.stderr
    ours = launch("main", tmp_path / "ours")
    assert ours.returncode == 0, ours.stderr
    for stage in STAGES:
        pairs = zip(rows(tmp_path / "theirs", stage), rows(tmp_path / "ours", stage), strict=True)
        losses = [(x["loss"], y["loss"]) for x, y in pairs if "loss" in x]
        assert len(losses) == 2
        np.testing.assert_allclose(*zip(*losses, strict=True), rtol=1e-6)
        assert f"{stage}/loss=" in theirs.stderr, "Scenic's writer is told"
    assert list((tmp_path / "theirs").glob("events.out.*"))
    again = launch("main", tmp_path / "theirs")
    assert "This run is finished" in again.stdout, again.stderr


def test_a_mistake_ends_in_a_sentence(tmp_path):
    stopped = launch("scenic_main", tmp_path / "run", "--config.data.preset=nonsense")
    assert stopped.returncode == 1
    assert stopped.stderr.splitlines()[-1].startswith("Error: There is no preset 'nonsense';")
