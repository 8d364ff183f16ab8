"""Trains the stages of a config in order, then evaluates.

python -m concat_jax.main --config=configs/demo_zps.py --workdir=runs/demo
"""

from __future__ import annotations

from concat_jax.core import cli
from concat_jax.experiment.experiment import run


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
