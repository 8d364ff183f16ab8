"""The stages of a config under Scenic's launcher: its flags, work units and metric writers.

    python -m concat_jax.scenic_main --config=configs/demo_zps.py --workdir=runs/demo

Loop, checkpoints and report are those of `python -m concat_jax.main`, and a workdir that one began
the other goes on with. See docs/scenic.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from absl import app, flags

from concat_jax.core import cli
from concat_jax.experiment.experiment import run
from concat_jax.neighbours.scenic import scenic_module

INTERRUPTED = "Stopped; what is saved stays, and the same command goes on from there."


def train(*, rng: Any, config: Any, workdir: str, writer: Any) -> None:
    """What Scenic's launcher calls; the randomness is config.seed's, as with our own command."""
    from clu import platform

    del config.rng_seed

    def mirror(stage: str):
        def tell(step: int, values: Mapping[str, float]) -> None:
            writer.write_scalars(step, {f"{stage}/{name}": v for name, v in values.items()})
            platform.work_unit().set_notes(f"{stage}: step {step}")

        return tell

    with cli.ending_well(INTERRUPTED, preemptible=True):
        run(config, workdir, mirror)
        writer.close()


def main() -> None:
    with cli.one_sentence():
        launcher = scenic_module("app")
    app.call_after_init(_name_the_seed)
    launcher.run(train)


def _name_the_seed() -> None:
    """Scenic's launcher asks a config for `rng_seed`, before it calls `train`."""
    config = flags.FLAGS.config
    config.rng_seed = config.seed


if __name__ == "__main__":
    main()
