"""A disk that is full at any moment ends a run in a sentence; with room again it goes on.

The disk is a file system in memory, which only the superuser may mount.
"""

import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from concat_jax.training.checkpoints import is_saved
from concat_jax.training.metrics import MetricWriter

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = {"clip": 4, "con": 4, "cat": 4, "finetune": 4, "control": 4}


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    mount = ("mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder))
    if shutil.which("mount") is None or subprocess.run(mount, stderr=subprocess.PIPE).returncode:
        pytest.skip("no file system can be mounted here, which takes the superuser of Linux")
    yield folder
    subprocess.run(("umount", "--lazy", str(folder)), check=True)


@pytest.fixture(autouse=True)
def empty(disk):
    yield
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    ended = train(workdir)
    assert ended.returncode == 0, ended.stderr
    return workdir


def train(workdir, *settings):
    """The demo's stages, each for a few steps, with everything that an evaluation can write."""
    command = (sys.executable, "-m", "concat_jax.main", "--config=configs/demo_zps.py:smoke")
    settings = (f"--workdir={workdir}", "--config.eval.write_coco=True", *settings)
    return subprocess.run((*command, *settings), cwd=ROOT, capture_output=True, text=True)


def fill(disk, free):
    """Leaves so many bytes."""
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 4096):
                pass
        except OSError:
            pass
        file.truncate(max(file.tell() - free, 0))


def saved(workdir):
    steps = [path for path in workdir.glob("*/checkpoints/*") if path.name.isdecimal()]
    return {path for path in steps if is_saved(workdir, path.parts[-3], int(path.name))}


# What is not there yet when the disk gets full, and the bytes that are left then.
STAGES = tuple(STEPS)
MOMENTS = {
    "before anything": (("*",), 0),
    "in the first save": (("*",), 200_000),
    "in a second save": (STAGES[1:], 9_000_000),
    "in the query bank": ((*STAGES[2:], "con/query*"), 60_000),
    "in a small stage": (STAGES[3:], 8192),
    "in predictions": (("report.json", "*/*.png", "*/panoptic*", "*/sweep.npz"), 16384),
    "in a picture": (("report.json", "*/*.png", "*/panoptic*", "*/sweep.npz"), 100_000),
    "in a sweep": (("report.json", "*/sweep.npz"), 4096),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_ends_in_a_sentence_and_goes_on_with_room(unbroken, disk, moment):
    gone, free = MOMENTS[moment]
    workdir = disk / "run"
    shutil.copytree(unbroken, workdir)
    for path in [path for pattern in (*gone, "report.json") for path in workdir.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    before = saved(workdir)
    fill(disk, free)
    ended = train(workdir)
    print(f"\n{moment}: {ended.stderr.strip()}")
    assert ended.returncode == 1, ended.stdout
    said = ended.stderr.strip().splitlines()
    assert said[-1].startswith("Error: ") and "No space left on device" in said[-1]
    assert str(workdir) in said[-1] and "Traceback" not in ended.stderr
    assert before <= saved(workdir) and not list(workdir.rglob("*.partial"))
    (disk / "filler").unlink()
    ended = train(workdir)
    assert ended.returncode == 0 and "damaged" not in ended.stdout, ended.stdout + ended.stderr
    with ocp.PyTreeCheckpointer() as reader:
        for name, steps in STEPS.items():
            path = pathlib.Path(name, "checkpoints", str(steps), "params")
            trees = (reader.restore(folder / path) for folder in (workdir, unbroken))
            jax.tree.map(np.testing.assert_array_equal, *trees)


def test_texts_that_cannot_be_cached_are_a_warning(unbroken, disk):
    fill(disk, 0)
    ended = train(unbroken, f"--config.text.cache={disk / 'texts'}", "--config.eval.num_pictures=1")
    assert ended.returncode == 0 and "Text embeddings are not cached." in ended.stderr
    # A folder takes no room; a file in it would be cut off.
    assert [path.name for path in disk.rglob("*") if path.is_file()] == ["filler"]


def test_tensorboard_is_one_sentence(disk):
    pytest.importorskip("clu.metric_writers")
    fill(disk, 0)
    expected = f"TensorBoard's files in {disk} cannot be written: No space left on device."
    with pytest.raises(ValueError, match=expected):
        MetricWriter(disk, tensorboard=True)
