"""How fast a stage could train: FLOPs of a step, what devices can do, and how long they wait."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax

T = TypeVar("T")

# Dense bfloat16 FLOP/s of a device, by JAX's name of its kind, from the vendors' pages:
# docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e ("peak compute per chip"); NVIDIA's data
# sheets of the A100, and of the H100 and H200 with SXM, where the double is printed, with sparsity.
PEAKS = {
    "TPU v4": 275e12,
    **dict.fromkeys(("TPU v5 lite", "TPU v5e"), 197e12),
    **dict.fromkeys(("TPU v5", "TPU v5p"), 459e12),
    **dict.fromkeys(("TPU v6 lite", "TPU v6e"), 918e12),
    **dict.fromkeys(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"), 312e12),
    **dict.fromkeys(("NVIDIA H100 80GB HBM3", "NVIDIA H200"), 989e12),
}


def seconds_at_peak(
    program: jax.stages.Wrapped, arguments: Sequence[Any], devices: Sequence[jax.Device]
) -> float:
    """What a call would take if the devices did nothing but its FLOPs; 0 where none is known.

    The program is traced, which a call that follows need not do again, and not compiled.
    """
    peak = sum(PEAKS.get(device.device_kind, 0.0) for device in devices)
    return count_flops(program.trace(*arguments).jaxpr.jaxpr) / peak if peak else 0.0


def count_flops(jaxpr: Any) -> float:
    """FLOPs of the matrix products and convolutions of a jaxpr, on all devices together.

    Those in a scan count as often as it runs; XLA's `cost_analysis` counts them once. What is
    recomputed to save memory counts again. Of branches the dearest counts, of a loop of unknown
    length one round.
    """
    return sum(map(_flops_of, jaxpr.eqns))


def _flops_of(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2.0 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        of_output = kernel.size / kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        # A gradient's input is spread out with zeros, which nobody multiplies.
        return 2.0 * equation.outvars[0].aval.size * of_output / math.prod(params["lhs_dilation"])
    inner = [count_flops(jaxpr) for value in params.values() for jaxpr in _jaxprs(value)]
    if name == "cond":
        return max(inner)
    times = {"scan": lambda: params["length"], "shard_map": lambda: params["mesh"].size}
    return sum(inner) * times.get(name, lambda: 1)()


def _jaxprs(value: Any) -> Iterator[Any]:
    for item in value if isinstance(value, tuple | list) else (value,):
        jaxpr = getattr(item, "jaxpr", item)  # of a closed one
        if hasattr(jaxpr, "eqns"):
            yield jaxpr


class Awaited(Iterable[T]):
    """Items, and for how long the devices had nothing to do but to wait for them.

    The host runs ahead of the devices, so that its own waiting says little: what counts is from
    when the result of the last step was there.
    """

    def __init__(self, items: Iterable[T]):
        self._items = iter(items)
        self._seconds, self._given, self._ready = 0.0, 0, (0, 0.0)
        self._results: queue.SimpleQueue = queue.SimpleQueue()
        # A daemon: a step that waits for a host that is gone never ends, and must hold up nobody.
        threading.Thread(target=self._note_when_ready, daemon=True).start()

    def _note_when_ready(self) -> None:
        for number, result in iter(self._results.get, None):
            with contextlib.suppress(Exception):  # whoever reads the result is told
                jax.block_until_ready(result)
            self._ready = number, time.monotonic()

    def __iter__(self) -> Iterator[T]:
        while True:
            asked = time.monotonic()
            try:
                item = next(self._items)
            except StopIteration:
                return
            number, since = self._ready
            if number == self._given:
                self._seconds += max(0.0, time.monotonic() - max(asked, since))
            yield item

    def works_on(self, result: Any) -> None:
        """Tells of the arrays that the devices make of an item."""
        self._given += 1
        self._results.put((self._given, result))

    def take_seconds(self) -> float:
        """Seconds of waiting since this was last asked."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def close(self) -> None:
        """Ends the thread that looks on."""
        self._results.put(None)
