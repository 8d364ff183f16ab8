"""Runs that are killed and terminated at random moments end as an unbroken one, to the bit.

    python -m pytest -m slow -s tests/slow/test_kills.py

prints where each was hit and what the next start went on from. The command is started some 70
times.
"""

import dataclasses
import itertools
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from concat_jax.core.stopping import PREEMPTED

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[2]
ROUNDS, ROUNDS_OF_TWO = 20, 4
STAGES = {"clip": 8, "con": 8, "cat": 8, "finetune": 8}
# Two looks, and three saves before the last of every stage.
SETTINGS = (
    "--config=configs/demo_zps.py:smoke",
    f"--config.stages={tuple(STAGES)!r}",
    *(f"--config.train.{name}.steps={steps}" for name, steps in STAGES.items()),
    *(f"--config.train.{name}.save_every=2" for name in STAGES),
    "--config.train.con.eval_every=4",
    "--config.eval.look_images=8",
    "--config.eval.stages={'finetune': 'full'}",
    "--config.eval.bias_split=",
)
SAVING = "*/checkpoints/*.orbax-checkpoint-tmp*"


class Run:
    """One start of the command, on one host or as two of one cluster."""

    def __init__(self, workdir, logs, hosts=1):
        logs.mkdir(exist_ok=True)
        self.workdir = workdir
        self.logs = [logs / f"{time.monotonic_ns()}_{host}.txt" for host in range(hosts)]
        command = [sys.executable, "-u", "-m", "concat_jax.main", *SETTINGS]
        command.append(f"--workdir={workdir}")
        given = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        if hosts > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                given["JAX_COORDINATOR_ADDRESS"] = f"localhost:{free.getsockname()[1]}"
            given |= {"JAX_NUM_PROCESSES": str(hosts), "JAX_NUM_CPU_DEVICES": "2"}
            command.append("--distributed")
        self.hosts = []
        for index, log in enumerate(self.logs):
            with log.open("w") as file:
                environment = os.environ | given | {"JAX_PROCESS_ID": str(index)}
                self.hosts.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for host in self.hosts:
            host.kill()
            host.wait()

    def printed(self, host=0):
        return self.logs[host].read_text()

    def ends(self, timeout=900):
        """Exit codes of the hosts; fails with what they printed if they do not end."""
        try:
            return [host.wait(timeout) for host in self.hosts]
        except subprocess.TimeoutExpired:
            pytest.fail("\n".join(map(self.printed, range(len(self.hosts)))))

    def goes_on(self):
        """Whether all hosts do, and are not at the end."""
        return all(host.poll() is None for host in self.hosts) and "Done in" not in self.printed()

    def reaches(self, moment):
        """Waits until a moment; False where the run ends before, or several hosts have not met."""
        while len(self.hosts) > 1 and "Stage" not in self.printed():
            if not self.goes_on():
                return False
            time.sleep(0.02)
        began, seen = time.monotonic(), set()
        while self.goes_on():
            if moment.save:
                seen |= {path.name for path in self.workdir.glob(SAVING)}
            if len(seen) == moment.save and time.monotonic() - began >= moment.seconds:
                time.sleep(moment.later)
                return self.goes_on()
            time.sleep(0.001 if moment.save else 0.02)
        return False


@dataclasses.dataclass(frozen=True)
class Moment:
    """Seconds after the start, or within the n-th save that is seen."""

    seconds: float = 0.0
    save: int = 0
    later: float = 0.0

    @classmethod
    def drawn(cls, draw, seconds, saves):
        if draw.random() < 0.5:
            return cls(draw.uniform(0.0, seconds))
        return cls(0.0, draw.randint(1, saves), draw.uniform(0.0, 0.05))

    def __str__(self):
        if self.save:
            return f"save {self.save:2} + {1000 * self.later:2.0f} ms"
        return f"{self.seconds:13.1f} s"


def last_line(text):
    lines = [line for line in text.splitlines() if line.strip()]
    return " ".join(lines[-1].split())[:44] if lines else "(nothing printed)"


def resumed(text):
    found = re.findall(r"Stage (\w+) (?:starts|resumes at step (\d+))", text)
    return " ".join(f"{name} {step or 0}" for name, step in found[:1]) or "no stage"


def results(workdir):
    """The last state of every stage."""
    states = {}
    with ocp.PyTreeCheckpointer() as reader:
        for name, steps in STAGES.items():
            for item in ("params", "optimizer"):
                path = workdir / name / "checkpoints" / str(steps) / item
                # Here are other devices than several hosts had.
                leaves = reader.metadata(path).item_metadata.tree
                as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), leaves)
                states[name, item] = reader.restore(path, restore_args=as_numpy)
    return states


def check_same(workdir, unbroken):
    jax.tree.map(np.testing.assert_array_equal, results(workdir), unbroken)
    assert (workdir / "report.json").exists()
    assert not list(workdir.glob(SAVING)) and not list(workdir.rglob("*.partial"))


def finish(workdir, logs, hosts=1):
    """Starts the command and awaits its end; what it printed, and how long it took."""
    began = time.monotonic()
    with Run(workdir, logs, hosts) as run:
        assert set(run.ends()) == {0}, run.printed()
        return run.printed(), time.monotonic() - began


def rounds(tmp_path, hosts, count, hit):
    """Until each signal has hit as many runs as `count`, every one of which then goes to its end.

    `hit` takes a run, the signal and the generator of random numbers, and checks how it ends.
    """
    logs = tmp_path / "logs"
    finish(tmp_path / "unbroken", logs, hosts)  # whose programs are kept for the others
    unbroken = results(tmp_path / "unbroken")
    _, seconds = finish(tmp_path / "again", logs, hosts)
    check_same(tmp_path / "again", unbroken)
    print(f"\nunbroken: {seconds:.0f} s; twice the same to the bit")
    draw, hits = random.Random(0), dict.fromkeys((signal.SIGKILL, signal.SIGTERM), 0)
    for number in itertools.count(1):
        workdir, line = tmp_path / f"round_{number}", f"round {number:2}: "
        for sent in hits:
            moment = Moment.drawn(draw, seconds, saves=len(STAGES))
            with Run(workdir, logs, hosts) as run:
                if run.reaches(moment):
                    took = hit(run, sent, draw)
                    hits[sent] += 1
                else:
                    assert set(run.ends()) == {0}, run.printed()
                    continue
                line += f"{resumed(run.printed())}; {sent.name} at {moment}, {took:.1f} s, after "
                print(line + f'"{last_line(run.printed())}"', flush=True)
                line = " " * 10
        printed, _ = finish(workdir, logs, hosts)
        print(f"{line}{resumed(printed)}; to the end", flush=True)
        assert "damaged" not in printed
        check_same(workdir, unbroken)
        shutil.rmtree(workdir)
        if min(hits.values()) >= count:
            return


def test_one_host(tmp_path):
    def hit(run, sent, draw):
        began = time.monotonic()
        run.hosts[0].send_signal(sent)
        (code,) = run.ends(timeout=30)
        # Before the command begins, while modules are imported, SIGTERM ends Python by itself.
        begun = bool(run.printed())
        assert code == (PREEMPTED if begun and sent == signal.SIGTERM else -sent), run.printed()
        return time.monotonic() - began

    rounds(tmp_path, 1, ROUNDS, hit)


def test_one_of_two_hosts(tmp_path):
    def hit(run, sent, draw):
        struck = draw.randrange(2)
        began = time.monotonic()
        run.hosts[struck].send_signal(sent)
        codes = run.ends(timeout=60)
        other = run.printed(1 - struck)
        if sent == signal.SIGTERM:
            assert codes == [PREEMPTED] * 2, other
        else:
            # JAX itself ends a host that waits for nobody when the other is silent for long.
            assert codes[struck] == -sent and codes[1 - struck] != 0, other
            print(f"  the other host: {last_line(other)!r}")
        return time.monotonic() - began

    rounds(tmp_path, 2, ROUNDS_OF_TWO, hit)
