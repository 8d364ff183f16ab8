"""A run whose workdir is a bucket, killed and started again, ends as one on a disk that was not."""

import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from concat_jax.core.files import as_path
from concat_jax.experiment.model import load_workdir
from tests.command_lines import ROOT
from tests.emulated_bucket import NAME, emulated_bucket

pytestmark = pytest.mark.slow


def start(workdir):
    command = [sys.executable, "-m", "concat_jax.main", "--config=configs/demo_zps.py:smoke"]
    options = ["--config.tensorboard=True", f"--workdir={workdir}"]
    return subprocess.Popen([*command, *options], cwd=ROOT)


def test_a_run_that_is_killed_ends_as_if_it_was_not(tmp_path, monkeypatch):
    pytest.importorskip("clu")
    with emulated_bucket() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        workdir = as_path(NAME) / "run"
        with start(workdir) as run:
            while not (workdir / "con/checkpoints/2").exists():  # begun, not all written
                assert run.poll() is None
                time.sleep(0.1)
            run.send_signal(signal.SIGKILL)
        assert not (workdir / "report.json").exists()
        assert start(workdir).wait() == 0
        assert start(tmp_path).wait() == 0
        for stage in ("con", "finetune", "control"):
            ours, theirs = (load_workdir(path, stage)[0] for path in (workdir, tmp_path))
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)
            assert any("tfevents" in path.name for path in (workdir / stage).iterdir())
