"""The training step goes through the real TPU compiler, which needs no TPU."""

import importlib.util
import re
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason='the TPU compiler is not installed (pip install "jax[tpu]")',
    ),
]
MINI = (
    "--config=configs/coco_zps.py:mini",
    "--topology=v5e:4x4",
    "--config.train.con.batch_size=16",
    "--config.data.image_size=64",
)


def run_report(*flags):
    """The command in a process of its own: libtpu is opened once and stays."""
    command = [sys.executable, "-m", "concat_jax.tpu_report", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=3600)


def test_the_step_compiles_for_sixteen_chips():
    done = run_report(*MINI)
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    assert "16 chips, 16 images of 64 x 64 a step, 1 a chip" in done.stdout
    assert re.search(r"in all +[\d.]+ MB of 16\.00 GB", done.stdout)
    assert re.search(r"all-reduce +\d+ +[\d.]+ MB", done.stdout)
    for kind in ("all-gather", "all-to-all", "collective-permute", "in a loop"):
        assert kind not in done.stdout


def test_gradients_of_split_parameters_are_reduced_to_parts():
    done = run_report(*MINI, "--config.mesh.fsdp=4")
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    assert re.search(r"all-gather +\d+ +[\d.]+ MB\n +\d+ x, .*/sharding_constraint", done.stdout)
    assert re.search(r"reduce-scatter +\d+ +[\d.]+ kB\n.*transpose\(jvp", done.stdout)
    assert "all-to-all" not in done.stdout and "in a loop" not in done.stdout


@pytest.mark.parametrize("stage", ["clip", "cat", "finetune"])
def test_the_other_stages_compile(stage):
    """CAT once held a scatter that the compiler dies of."""
    flags = ["--config=configs/coco_zps.py:mini", f"--stage={stage}"]
    done = run_report(*flags, f"--config.train.{stage}.batch_size=16")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "16 chips, 16 images" in done.stdout


def test_the_full_step_is_of_bounded_size():
    """Layers in loops: written out, the program alone took hundreds of megabytes of every chip."""
    done = run_report("--config=configs/coco_zps.py", "--topology=v5e-16")
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    program = re.search(r"program +([\d.]+) MB", done.stdout)
    assert program and float(program[1]) < 250
    # Gradients, and what is summed over the batch for the losses: no position of a pixel.
    gradients, reduced = (
        float(re.search(rf"{what} +(?:\d+ +)?([\d.]+) MB", done.stdout)[1])
        for what in ("Gradients to sum over the chips:", "all-reduce")
    )
    assert reduced < gradients
    for kind in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert kind not in done.stdout


def test_the_predictions_compile():
    done = run_report("--config=configs/coco_zps.py:mini", "--step=eval", "--topology=v5e-8")
    assert done.returncode == 0, done.stderr[-2000:]
    for program in ("Network of con", "Names of con", "Panoptic map of con"):
        assert f"{program}, topology v5e:2x4: 4 chips, 4 images" in done.stdout
    assert done.stdout.count("  none") == 2  # the map's loop ends on all chips together
    for kind in ("all-gather", "all-to-all", "collective-permute", "in a loop"):
        assert kind not in done.stdout


def test_an_unknown_topology_is_refused_in_one_sentence():
    done = run_report("--config=configs/coco_zps.py:mini", "--topology=v5e:3x17")
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("Error: libtpu knows no topology 'v5e:3x17'")
    )
