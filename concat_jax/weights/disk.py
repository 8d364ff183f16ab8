"""What a disk refuses while a model is written, as one sentence."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging


@contextlib.contextmanager
def one_reason(destination: str | os.PathLike[str], params: Mapping[str, Any]) -> Iterator[None]:
    """Turns whatever Orbax, safetensors and their threads tell about a full disk into a sentence.

    The size of `params` is compared with the room before anything is written.

    Raises:
      OSError: there is no room, or a file cannot be written.
    """
    size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(params))
    folder = Path(os.path.realpath(destination)).parent
    disk = shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.is_dir()))
    if disk.total and disk.free < size:
        raise OSError(
            f"{destination} cannot be written: it takes {size / 1e6:,.1f} MB and the disk has "
            f"{disk.free / 1e6:,.1f} MB left; make room or name another folder."
        )
    shown, level = sys.excepthook, logging.get_verbosity()

    def passed_over(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        # TensorStore's threads report the writes that were given up to a loop that is gone.
        if str(error) != "Event loop is closed":
            shown(kind, error, trace)

    sys.excepthook = passed_over
    logging.set_verbosity(logging.FATAL)  # Orbax logs what it raises
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        reasons = (os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS))
        reason = next((reason for reason in reasons if reason in text), "")
        if not reason and isinstance(error, ValueError | OSError):
            raise
        time.sleep(0.5)  # for those threads to end
        raise OSError(
            f"{destination} cannot be written: {reason or text[:200]}; nothing of it was kept."
        ) from error
    finally:
        sys.excepthook = shown
        logging.set_verbosity(level)
