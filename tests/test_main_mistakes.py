"""Mistakes on the command line of training end in one sentence, and leave nothing behind."""

import os
import subprocess
import sys

import pytest

from tests.command_lines import ROOT

COMMANDS = {
    "unknown flag": (
        ["--confg=configs/demo_zps.py", "--workdir=run"],
        ["no flag '--confg'; did you mean '--config'"],
    ),
    "unknown key": (
        ["--config=configs/demo_zps.py:smoke", "--workdir=run", "--config.train.con.step=3"],
        ["step", "steps"],
    ),
    "unknown argument": (
        ["--config=configs/demo_zps.py:smoek", "--workdir=run"],
        ["'smoek'", "'smoke'"],
    ),
    "unknown file": (["--config=configs/demo.py", "--workdir=run"], ["configs/demo.py"]),
    "no data": (
        ["--config=configs/coco_zps.py:mini", "--workdir=run", "--config.data.root=/no/such/coco"],
        ["/no/such/coco"],
    ),
}


@pytest.mark.parametrize("mistake", COMMANDS)
def test_a_mistake_ends_in_one_sentence(mistake, tmp_path):
    arguments, names = COMMANDS[mistake]
    result = subprocess.run(
        [sys.executable, "-m", "concat_jax.main", *arguments],
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        cwd=make_cwd(tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("Error: "), result.stderr
    assert all(name in lines[0] for name in names), lines[0]
    assert not (tmp_path / "cwd" / "run").exists()


def make_cwd(tmp_path):
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    (cwd / "configs").symlink_to(ROOT / "configs")
    return cwd
