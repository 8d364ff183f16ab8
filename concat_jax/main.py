"""Trains the stages of a config in order, then evaluates.

python -m concat_jax.main --config=configs/demo_zps.py --workdir=runs/demo
"""

from __future__ import annotations

import jax
import ml_collections
from etils.epath import Path

from concat_jax.core import cli
from concat_jax.core.files import as_path
from concat_jax.experiment.experiment import Experiment


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> dict:
    """Run a config in a workdir; returns the report. Errors are raised, as for any function."""
    from data_pipelines.datasets import make_datasets

    datasets = make_datasets(
        config.data,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return Experiment(config, as_path(workdir), datasets).run()


@cli.command(
    __doc__,
    with_config=True,
    interrupted="Stopped; what is saved stays, and the same command goes on from there.",
)
def main(given: cli.Flags) -> None:
    config, workdir = cli.config_and_workdir(given)
    cli.join_hosts(given)
    run(config, workdir)


if __name__ == "__main__":
    main()
