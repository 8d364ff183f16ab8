"""The command line: read a config, run its stages in order, evaluate.

python -m concat_jax.main --config=configs/demo_zps.py --workdir=runs/demo
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from concat_jax.command_line import check_no_arguments, one_sentence, parse_absl_flags
from concat_jax.compilation_cache import enable_compilation_cache
from concat_jax.host_memory import keep_freed_memory
from concat_jax.run import Run
from concat_jax.training.loop import NonFiniteLossError, Preempted

_CONFIG = config_flags.DEFINE_config_file("config", None, "File in configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; made if absent.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Several hosts. TPU pods, SLURM, Open MPI and Kubernetes are recognised; elsewhere set "
    "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID on every host.",
)


def run(config, workdir: str) -> dict:
    """Run a config in a workdir; returns the report. Errors are raised, as for any function."""
    from data_pipelines.datasets import make_datasets

    datasets = make_datasets(
        config.data,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return Run(config, Path(workdir), datasets).run()


def main(argv: list[str]) -> None:
    """Entry point."""

    def command() -> None:
        config, workdir = config_and_workdir()
        join_hosts()
        run(config, workdir)

    run_command(argv, command)


def run_command(argv: list[str], command: Callable[[], object]) -> None:
    """What the commands of a config share: set-up, and one sentence and exit code 1 for a mistake.

    Args:
      argv: what is left of the command line, its name alone.
      command: the work; it reads the flags itself, since a config that cannot be found raises then.
    """
    check_no_arguments(argv, "--workdir=DIR")
    logging.set_verbosity(logging.WARNING)  # Orbax narrates every save at INFO
    enable_compilation_cache()
    keep_freed_memory()
    with one_sentence(NonFiniteLossError, Preempted):
        command()


def config_and_workdir() -> tuple[ml_collections.ConfigDict, str]:
    """The flags --config and --workdir.

    Raises:
      ValueError: if one is not given, or the workdir is in a bucket.
    """
    config, workdir = _CONFIG.value, _WORKDIR.value
    if config is None or not workdir:
        raise ValueError("give --config=configs/demo_zps.py (or another file) and --workdir=DIR.")
    if "://" in workdir:
        raise ValueError(
            f"--workdir={workdir} is not a local path; give a folder of this machine, or one where "
            "the bucket is mounted."
        )
    return config, workdir


def join_hosts() -> None:
    """Meet the other hosts, if the flag --distributed says that there are some.

    Raises:
      ValueError: if JAX can tell neither from the cluster nor from the environment who they are.
    """
    if not _DISTRIBUTED.value:
        return
    given = {name: os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")}
    try:
        # JAX reads the coordinator's address itself, but not these two.
        num_processes, process_id = (value and int(value) for value in given.values())
        jax.distributed.initialize(num_processes=num_processes, process_id=process_id)
    except ValueError as error:
        raise ValueError(
            f"--distributed does not find the other hosts ({str(error).rstrip('.')}): set "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID on every host."
        ) from error


def parse_flags(argv: list[str]) -> list[str]:
    """Parse flags; a typo in one, or in a config key, ends in one sentence naming the nearest."""
    try:
        return parse_absl_flags(flags.FLAGS, argv)
    except (KeyError, AttributeError) as error:
        key = re.findall(r"\w+", str(error))[0]
        nearest = re.search(r'Did you mean "(\w+)"', str(error))
        hint = (
            f"; did you mean {nearest[1]!r}?" if nearest else "; see the config file for its keys."
        )
        sys.exit(f"Error: the config has no key {key!r}{hint}")
    except (flags.Error, ValueError, OSError) as error:
        # ml_collections quotes the whole traceback of a config file; its last line says it all.
        sentence = re.split(r"\w+Error: ", str(error))[-1]
        sys.exit(f"Error: {' '.join(sentence.split())}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
