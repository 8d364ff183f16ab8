"""Pictures of the query space after each stage: where real and pseudo queries lie.

    python -m concat_jax.query_space --config=configs/demo_zps.py --workdir=runs/demo

draws `query_space.png` into the folder of every finished stage from CON on. Real queries are those
of evaluation images, of unseen classes too: to be looked at, nothing learns from them.
"""

from __future__ import annotations

from concat_jax.core import cli
from concat_jax.experiment.experiment import open_experiment
from concat_jax.experiment.query_pictures import has_queries, write_picture


@cli.command(__doc__, with_config=True)
def main(given: cli.Flags) -> None:
    config, workdir = cli.config_and_workdir(given)
    run = open_experiment(config, workdir, trains=False)
    drawn = [
        name
        for name in config.stages
        if has_queries(run, name) and run.parameters.is_finished(name)
    ]
    if not drawn:
        raise ValueError(
            f"No stage of {workdir} from CON on has finished; train it with `python -m "
            "concat_jax.main` first."
        )
    for name in drawn:
        print(write_picture(run, name))


if __name__ == "__main__":
    main()
