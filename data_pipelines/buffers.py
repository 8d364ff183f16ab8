"""Memory of batches, used again when nothing refers to a batch any more.

A new array of this size begins with pages that the system has to clear: of a batch at 1024², that
takes longer than to decode its JPEGs.
"""

from __future__ import annotations

import collections
import math

import numpy as np

# Of TensorFlow's and JAX's arrays on the processor, which share what lies so and copy the rest.
_ALIGNMENT = 64


class Buffers:
    """Lends arrays; holds as much memory as was lent at any one time."""

    def __init__(self):
        self._free: dict[int, list[np.ndarray]] = collections.defaultdict(list)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
        """`np.empty`, whose memory comes back once the array and all views of it are gone."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        free = self._free[size]
        try:
            block = free.pop()
        except IndexError:
            memory = np.empty(size + _ALIGNMENT, np.uint8)
            begin = -memory.ctypes.data % _ALIGNMENT
            block = memory[begin : begin + size]
        return np.asarray(_Loan(block, free)).view(dtype).reshape(shape)


class _Loan:
    # The base of the array that is lent, and so of its views: numpy looks no further than to it.

    def __init__(self, block: np.ndarray, free: list[np.ndarray]):
        self._block, self._free = block, free
        self.__array_interface__ = block.__array_interface__

    def __del__(self) -> None:
        self._free.append(self._block)
