"""A run whose newest checkpoint is damaged names it, goes on from the one before, deletes nothing.

    python -m pytest -m slow -s tests/slow/test_damage_at_work.py

prints what the command says of each damage. All end with the parameters of an unbroken run.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.training.test_checkpoints import DAMAGES

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[2]
SETTINGS = (
    "--config=configs/demo_zps.py:smoke",
    "--config.stages=('clip',)",
    "--config.train.clip.steps=8",
    "--config.train.clip.save_every=2",
    "--config.eval.stages={}",
    "--config.eval.bias_split=",
)


def train(workdir):
    """What the command prints until its end."""
    run = subprocess.run(
        [sys.executable, "-m", "concat_jax.main", *SETTINGS, f"--workdir={workdir}"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def parameters(workdir):
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(workdir / "clip/checkpoints/8/params")


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The workdir of a run of eight steps."""
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    train(workdir)
    return workdir


@pytest.mark.parametrize("name", DAMAGES)
def test_the_command_goes_on_from_the_checkpoint_before(unbroken, tmp_path, name):
    workdir = shutil.copytree(unbroken, tmp_path / "w")
    spoil, where = DAMAGES[name]
    spoil(workdir / "clip/checkpoints/8")
    damaged = contents(workdir / "clip/checkpoints/8")
    printed = train(workdir)
    said = [line for line in printed.splitlines() if "damaged" in line]
    print(f"\n{name}: {said}")
    assert said and where in said[0] and "resumes at step 6" in printed
    jax.tree.map(np.testing.assert_array_equal, parameters(workdir), parameters(unbroken))
    folders = [path for path in workdir.rglob("*") if path.is_dir()]
    assert not damaged or any(contents(path) == damaged for path in folders)
