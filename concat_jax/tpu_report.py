"""Does a training step fit a TPU? The real compiler answers, without a TPU.

python -m concat_jax.tpu_report --config=configs/coco_zps.py --topology=v5e:4x4

Compiles the step of any stage (--stage) as the training loop runs it, with its optimizer, its
sharding and its state donated, from shapes alone, so no data and no weights are needed. Needs the
`libtpu` package of the installed JAX (`pip install "jax[tpu]"`) on Linux x86-64, and minutes of
compile time.
"""

from __future__ import annotations

import jax

from concat_jax.benchmarking.compile_report import format_report, make_report
from concat_jax.core import cli


def define_flags(flags: cli.Flags) -> None:
    flags.string("topology", "v5e:4x4", "Chips, as v5e:16x16 or v4:2x2x1.")
    flags.string("stage", "con", "Stage of the config.")


@cli.command(__doc__, define_flags, with_config=True, computes=False)
def main(given: cli.Flags) -> None:
    # The chips are described, never opened; everything that runs, runs here.
    jax.config.update("jax_platforms", "cpu")
    print(format_report(make_report(cli.config_of(given), given.stage, given.topology)))


if __name__ == "__main__":
    main()
