"""Memory of the host between steps."""

from __future__ import annotations

import ctypes
import sys

# Names of glibc's mallopt (malloc.h): trim threshold, number of mmapped blocks, number of arenas.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Have freed memory stay with the process, for the next step to use.

    A step on a CPU takes gigabytes and gives them back at its end. By default glibc returns them to
    the system, which then clears every page anew for the next step. Elsewhere than on glibc this
    does nothing. It holds for what is allocated after the call.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
