"""Several hosts that share the work: what each has, brought together, and meetings."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def total_over_hosts(number: int) -> int:
    """The sum of a number below 2**31 over all hosts; every host must call it."""
    return int(multihost_utils.process_allgather(np.int32(number)).sum())


def of_first_host(array: np.ndarray) -> np.ndarray:
    """The first host's array, on all hosts; every host must call it with an array of its shape."""
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def gathered(arrays: Any) -> Any:
    """The whole of global arrays, a tree of them, as numpy arrays on every host."""
    return multihost_utils.process_allgather(arrays, tiled=True)


def gathered_bytes(content: bytes) -> list[bytes]:
    """What each host has, host by host; every host must call it."""
    lengths = multihost_utils.process_allgather(np.int32(len(content)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


def wait_for_hosts(what: str) -> None:
    """Returns when every host has called it; `what` tells one meeting from another."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
