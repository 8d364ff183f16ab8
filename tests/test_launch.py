"""The scripts of launch/ with stand-ins for Cloud and SLURM: what they ask for, how they end."""

import os
import re
import subprocess

import pytest

from tests.command_lines import ROOT

# Answers as a queued resource does whose first VMs are taken away amid the training.
GCLOUD = r"""#!/usr/bin/env bash
echo "$*" >> calls
state=$(cat state)
case "$*" in
  *"storage cp -"*) cat > code.tar.gz ;;
  *"describe"*)
    [ "$state" = ABSENT ] && { echo "NOT_FOUND" >&2; exit 1; }
    echo "$state"
    case $state in
      WAITING_FOR_RESOURCES) echo ACTIVE > state ;;
      SUSPENDING) echo SUSPENDED > state ;;
    esac
    ;;
  *"queued-resources create"*) echo WAITING_FOR_RESOURCES > state ;;
  *"queued-resources delete"*) echo ABSENT > state ;;
  *"concat_jax.main"*)
    echo >> trainings
    case $(wc -l < trainings) in $FAILS) echo "${AFTER:-ACTIVE}" > state; exit 1 ;; esac
    ;;
esac
"""
# Notes what it is given, and ends with the next of its exit codes.
PYTHON = r"""#!/usr/bin/env bash
cd ..
printf '<%s>' "$@" >> given
echo >> given
code=$(head -n 1 codes)
sed -i 1d codes
exit "$code"
"""


def program(folder, name, text):
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def launch(folder, script, *arguments, **environment):
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(ROOT / "launch" / script), *arguments],
        cwd=folder,
        env=os.environ | {"PATH": path, "PAUSE": "0"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def cloud(tmp_path):
    program(tmp_path, "gcloud", GCLOUD)
    program(tmp_path, "git", "#!/bin/sh\necho code\n")
    (tmp_path / "state").write_text("ABSENT")
    return tmp_path


def asked(folder):
    """The verbs in order, without the questions how things stand."""
    verbs = r"storage (cp)|resources (create)|resources (delete)|tpu-vm (ssh)|(concat_jax.main)"
    return ["".join(found) for found in re.findall(verbs, (folder / "calls").read_text())]


FLAGS = ("coco", "us-west4-a", "gs://bucket", "--config=configs/coco_zps.py")
FLAGS += ("--config.seed=1", "--config.stages=('clip', 'con')", '--config.note="$HOME"')


@pytest.mark.parametrize("number", range(4))
def test_nothing_is_asked_for_where_a_word_is_missing(cloud, number):
    done = launch(cloud, "tpu.sh", *FLAGS[:number])
    assert done.returncode == 1 and "give NAME ZONE gs://BUCKET --config=" in done.stderr
    assert not (cloud / "calls").exists()


def test_a_tpu_that_is_taken_away_is_asked_for_again(cloud):
    done = launch(cloud, "tpu.sh", *FLAGS, FAILS="1", AFTER="SUSPENDING")
    assert done.returncode == 0, done.stderr
    one = ["create", "ssh", "ssh", "concat_jax.main", "delete"]
    assert asked(cloud) == ["cp", *one, *one]
    calls = (cloud / "calls").read_text()
    assert "create coco --zone=us-west4-a --node-id=coco --accelerator-type=v5litepod-16" in calls
    assert (cloud / "code.tar.gz").read_text() == "code\n"


def test_a_training_that_fails_leaves_the_tpu(cloud):
    (cloud / "state").write_text("ACTIVE")
    done = launch(cloud, "tpu.sh", *FLAGS, FAILS="1")
    assert done.returncode == 1
    assert asked(cloud) == ["cp", "ssh", "ssh", "concat_jax.main", "ssh"]
    assert "gcloud compute tpus queued-resources delete coco --zone=us-west4-a" in done.stderr


@pytest.mark.parametrize(("codes", "code"), [("75 75 0", 0), ("75 1", 1)])
def test_what_a_worker_is_told(cloud, codes, code):
    """The command of the workers itself, with a stand-in for Python that ends with these codes."""
    (cloud / "state").write_text("ACTIVE")
    launch(cloud, "tpu.sh", *FLAGS, FAILS="0")
    text = (cloud / "calls").read_text()
    command = re.search(r"--command=(\n  cd concat_jax\n  export .*?)(?=\ncompute|\Z)", text, re.S)[
        1
    ]
    home = cloud / "home"
    (home / "concat_jax").mkdir(parents=True)
    (home / "venv").mkdir()
    (home / "codes").write_text(codes.replace(" ", "\n"))
    program(home / "venv", "python", PYTHON)
    done = subprocess.run(["bash", "-c", command], cwd=home, timeout=60)
    assert done.returncode == code
    given = (home / "given").read_text().splitlines()
    words = ("-m", "concat_jax.main", "--distributed", "--workdir=gs://bucket/runs/coco")
    assert given == ["".join(f"<{w}>" for w in words + FLAGS[3:])] * len(codes.split())


def test_no_job_starts_without_its_environment(tmp_path):
    program(tmp_path, "srun", "#!/bin/sh\necho > srun\n")
    done = launch(tmp_path, "slurm.sh", "--config=a")
    assert done.returncode == 1 and ".venv/bin/activate" in done.stderr
    assert not (tmp_path / "srun").exists()


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (1, False)])
def test_a_job_that_is_preempted_goes_to_the_queue_again(tmp_path, code, requeued):
    program(tmp_path, "srun", f'#!/bin/sh\necho "$*" > srun\nexit {code}\n')
    program(tmp_path, "scontrol", '#!/bin/sh\necho "$*" > scontrol\n')
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text("")
    done = launch(tmp_path, "slurm.sh", "--config=a b", SLURM_JOB_ID="7")
    assert done.returncode == code
    assert (tmp_path / "srun").read_text() == (
        "python -m concat_jax.main --distributed --config=a b\n"
    )
    assert (tmp_path / "scontrol").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
