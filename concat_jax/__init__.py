"""Zero-shot panoptic segmentation in JAX."""

import sys


def _say_stopped(kind, *error) -> None:
    if kind is not KeyboardInterrupt:
        return sys.__excepthook__(kind, *error)
    print("\nStopped.", file=sys.stderr)


if sys.argv[:1] == ["-m"]:  # Python imports a command, and `core.cli` is not there yet.
    sys.excepthook = _say_stopped
