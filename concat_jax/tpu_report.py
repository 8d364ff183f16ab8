"""Does a training step fit a TPU? The real compiler answers, without a TPU.

python -m concat_jax.tpu_report --config=configs/coco_zps.py --topology=v5e-16

Compiles the step of any stage (--stage) as the training loop runs it, with its optimizer, its
sharding and its state donated, or with --step=eval what predicts after it, from shapes alone, so no
data and no weights are needed. Needs the
`libtpu` package of the installed JAX (`pip install "jax[tpu]"`) on Linux x86-64, and minutes of
compile time.
"""

from __future__ import annotations

import jax

from concat_jax.benchmarking.compile_report import STEPS, format_report, make_reports
from concat_jax.core import cli


def define_flags(flags: cli.Flags) -> None:
    flags.string("topology", "v5e-16", "Chips, as v5e-256, v4-32 or v5p:2x2x2.")
    flags.string("stage", "con", "Stage of the config.")
    flags.choice("step", "train", tuple(STEPS), "Of the stage.")


@cli.command(__doc__, define_flags, with_config=True, computes=False)
def main(given: cli.Flags) -> None:
    # The chips are described, never opened; everything that runs, runs here.
    jax.config.update("jax_platforms", "cpu")
    reports = make_reports(cli.config_of(given), given.stage, given.step, given.topology)
    print("\n\n".join(map(format_report, reports)))


if __name__ == "__main__":
    main()
