"""Several hosts that share the work: sums over them, and meetings."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Protocol, Self, TypeVar

import jax
import numpy as np
import safetensors.numpy
from jax.experimental import multihost_utils


class Summable(Protocol):
    """Counts that can be sent to another host and added up there."""

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All that was counted."""

    def restored(self, arrays: Mapping[str, np.ndarray]) -> Self:
        """An accumulator of this one's settings with the counts of `to_arrays` of another."""

    def merge(self, other: Self) -> None:
        """Adds the counts of another."""


Counts = TypeVar("Counts", bound=Summable)


def sum_over_hosts(counts: Counts) -> Counts:
    """The counts of all hosts together; every host must call it, as often as the others.

    They are added in the order of the hosts, so that all return the same to the last bit.
    """
    if jax.process_count() == 1:
        return counts
    # As bytes: on its way through JAX, a float64 would lose half of its digits.
    contents = _all_gather(safetensors.numpy.save(counts.to_arrays()))
    hosts = [counts.restored(safetensors.numpy.load(content)) for content in contents]

    def add(total: Counts, other: Counts) -> Counts:
        total.merge(other)
        return total

    return functools.reduce(add, hosts)


def total_over_hosts(number: int) -> int:
    """The sum of a number below 2**31 over all hosts; every host must call it."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).sum())


def of_first_host(array: np.ndarray) -> np.ndarray:
    """The first host's array, on all hosts; every host must call it with an array of its shape."""
    if jax.process_count() == 1:
        return array
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def gathered(arrays: Any) -> Any:
    """The whole of global arrays, a tree of them, as numpy arrays on every host."""
    return multihost_utils.process_allgather(arrays, tiled=True)


def wait_for_hosts(what: str) -> None:
    """Returns when every host has called it; `what` tells one meeting from another."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _all_gather(content: bytes) -> list[bytes]:
    lengths = multihost_utils.process_allgather(np.int32(len(content)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]
