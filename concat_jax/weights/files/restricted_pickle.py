"""Pickles of weights, read without running anything that they name.

A pickle names functions and asks the reader to call them; Python's own unpickler does. Here every
name is looked up in a table of harmless stand-ins of ours, which only record what they are told:
an array is its bytes, type and shape, a tensor is a place in a storage. numpy and torch are not
asked to rebuild anything, and a name that is not in the table ends the reading.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np


class UnsafePickleError(ValueError):
    """A pickle that names something weights have no need of."""


# Types of torch storages, by the names that pickles call them.
TORCH_DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "DoubleStorage": np.dtype("<f8"),
        "FloatStorage": np.dtype("<f4"),
        "HalfStorage": np.dtype("<f2"),
        "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
        "LongStorage": np.dtype("<i8"),
        "IntStorage": np.dtype("<i4"),
        "ShortStorage": np.dtype("<i2"),
        "CharStorage": np.dtype("i1"),
        "ByteStorage": np.dtype("u1"),
        "BoolStorage": np.dtype("?"),
    }
)
# Types that numpy arrays of weights have, by numpy's own short names.
_NUMPY_TYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


@dataclasses.dataclass
class Storage:
    """Numbers that tensors are views of; `read` gives their bytes when somebody wants them."""

    dtype: np.dtype
    size: int
    read: Callable[[], bytes]
    _numbers: np.ndarray | None = None

    def numbers(self) -> np.ndarray:
        """[size] array."""
        if self._numbers is None:
            content = self.read()
            if len(content) != self.size * self.dtype.itemsize:
                raise ValueError("a tensor has other bytes than it says")
            self._numbers = np.frombuffer(content, self.dtype)
        return self._numbers


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A strided view of a storage, not yet read."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def numpy(self) -> np.ndarray:
        """A contiguous copy; ValueError where the view shows more than its storage holds."""
        count = math.prod(self.shape)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        negative = min((self.offset, *self.shape, *self.strides)) < 0
        if negative or count > self.storage.size or (count and last >= self.storage.size):
            raise ValueError("a tensor reaches beyond its storage")
        if not count:
            return np.empty(self.shape, self.storage.dtype)
        numbers = self.storage.numbers()[self.offset :]
        steps = tuple(s * numbers.itemsize for s in self.strides)
        return np.array(np.lib.stride_tricks.as_strided(numbers, self.shape, steps))


class _Sealed:
    """A stand-in that a pickle can neither change nor make new ones of."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise ValueError("the pickle sets attributes where weights have none")


class _Function(_Sealed):
    """Stands for a global that a pickle calls."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]):
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


class _Marker(_Sealed):
    """Stands for a global that a pickle only mentions: a class, a type of storage."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name


class _Inert(_Sealed):
    """Something that weights do not need, such as a device."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Forget it."""


class _Dict(dict):
    """A dictionary whose attributes (a module's `_metadata`) are dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Forget it."""


class ScriptModule:
    """A module of a TorchScript archive, of whatever class: its attributes by name, and no code."""

    __slots__ = ("attributes",)

    def __new__(cls) -> ScriptModule:
        module = super().__new__(cls)
        module.attributes = {}
        return module

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise ValueError("a module's attributes have no names")
        self.attributes = state


class _Type:
    """A numpy type, from its short name; `__setstate__` brings the byte order."""

    __slots__ = ("dtype",)

    def __init__(self, name: str, *_: Any):
        name = name.lstrip("<>|=") if isinstance(name, str) else ""
        if name not in _NUMPY_TYPES:
            raise ValueError(f"an array is of type {name or 'unknown'!r}")
        self.dtype = np.dtype(name).newbyteorder("<")

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise ValueError(f"an array is in byte order {order!r}")
        self.dtype = self.dtype.newbyteorder(">" if order == ">" else "<")


class _Array:
    """A numpy array; `__setstate__` brings its content."""

    __slots__ = ("value",)

    def __init__(self, *_: Any):
        self.value = np.empty(0, np.float32)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, is_fortran, content = state
        self.value = _array(content, kind, shape, "F" if is_fortran else "C")


def _array(content: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
    if isinstance(content, str):  # Python 2 wrote bytes as text
        content = content.encode("latin1")
    if not isinstance(content, bytes | bytearray) or not isinstance(kind, _Type):
        raise ValueError("an array holds objects")
    return np.frombuffer(content, kind.dtype).reshape(
        _sizes(shape), order="F" if order == "F" else "C"
    )


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or not all(type(v) is int for v in values):
        raise ValueError("a shape is no list of integers")
    return tuple(values)


def _frombuffer(content: Any, kind: Any, shape: Any, order: Any = "C") -> _Array:
    array = _Array()
    array.value = _array(content, kind, shape, order)
    return array


def _scalar(kind: Any, content: Any) -> float | int:
    return _array(content, kind, (), "C").item()


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
        raise ValueError(f"bytes are encoded as {encoding!r}")
    return text.encode("latin1")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor has no storage")
    shape, strides, (offset,) = _sizes(shape), _sizes(strides), _sizes((offset,))
    if len(shape) != len(strides):
        raise ValueError("a tensor has more sizes than strides, or fewer")
    return Tensor(storage, offset, shape, strides)


def _as_it_is(value: Any, *_: Any) -> Any:
    return value


def _globals(
    read_nested: Callable[[bytes], Any] | None, is_script: bool
) -> dict[tuple[str, str], Any]:
    table: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): _Function(lambda *items: _Dict(*items)),
        ("collections", "Counter"): _Function(lambda *items: _Dict(*items)),
        ("_codecs", "encode"): _Function(_encode),
        ("numpy", "ndarray"): _Marker("ndarray"),
        ("numpy", "dtype"): _Function(_Type),
        ("torch", "Size"): _Function(lambda sizes=(): tuple(sizes)),
        ("torch", "device"): _Function(lambda *_: _Inert()),
        ("torch._utils", "_rebuild_tensor"): _Function(_tensor),
        ("torch._utils", "_rebuild_tensor_v2"): _Function(_tensor),
        ("torch._utils", "_rebuild_parameter"): _Function(_as_it_is),
    }
    for core in ("numpy.core", "numpy._core"):
        table[f"{core}.multiarray", "_reconstruct"] = _Function(_Array)
        table[f"{core}.multiarray", "scalar"] = _Function(_scalar)
        table[f"{core}.numeric", "_frombuffer"] = _Function(_frombuffer)
    for name in TORCH_DTYPES:
        table["torch", name] = _Marker(name)
    if read_nested is not None:
        # A tensor that was pickled without torch.save carries its storage as a file of its own.
        table["torch.storage", "_load_from_bytes"] = _Function(read_nested)
    if is_script:
        # TorchScript's lists of one type, and its notes of what type a container is.
        for kind in ("int", "double", "bool", "tensor"):
            table["torch.jit._pickle", f"build_{kind}list"] = _Function(_as_it_is)
        table["torch.jit._pickle", "restore_type_tag"] = _Function(_as_it_is)
    return table


class RestrictedUnpickler(pickle.Unpickler):
    """Reads one pickle; see `read_pickle`."""

    def __init__(
        self,
        file: BinaryIO,
        *,
        find_storage: Callable[[str, Any, int], Storage] | None = None,
        read_nested: Callable[[bytes], Any] | None = None,
        is_script: bool = False,
    ):
        # Detectron2's oldest files were written by Python 2, whose strings are bytes.
        super().__init__(file, encoding="latin1")
        self._globals = _globals(read_nested, is_script)
        self._is_script = is_script
        self._find_storage = find_storage

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a global; any other is refused by name."""
        # The classes of a TorchScript archive stand in its own code, which nobody looks at.
        if self._is_script and module.split(".")[0] == "__torch__":
            return ScriptModule
        try:
            return self._globals[module, name]
        except KeyError:
            raise UnsafePickleError(
                f"it names {module}.{name}, which weights have no need of; nothing of it was run"
            ) from None

    def persistent_load(self, pid: Any) -> Storage:
        """The storage of a tensor, as torch.save refers to it."""
        is_storage = isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"
        if self._find_storage is None or not is_storage:
            raise ValueError("it refers to something outside of it")
        kind, key, size = pid[1], pid[2], pid[4]
        if not isinstance(kind, _Marker) or kind.name not in TORCH_DTYPES:
            raise ValueError("a storage is of an unknown type")
        if not isinstance(key, str) or type(size) is not int or size < 0:
            raise ValueError("a storage has no name or size")
        view = pid[5] if len(pid) > 5 else None
        if view is not None:
            raise ValueError("a storage is a part of another, as torch before 0.4 wrote them")
        return self._find_storage(key, TORCH_DTYPES[kind.name], size)


def read_pickle(file: BinaryIO, **options: Any) -> Any:
    """Read one pickle; the file is left behind its last byte.

    Options are `find_storage(key, dtype, size)` for torch's references to storages,
    `read_nested(content)` for a torch file inside the pickle, `is_script` for that of a TorchScript
    archive, which gives `ScriptModule`s. Arrays are what `as_array` takes.

    Raises:
      UnsafePickleError: it names a global that is not in the table; nothing has been run.
      ValueError: it is broken, or no pickle.
    """
    try:
        return RestrictedUnpickler(file, **options).load()
    except ValueError:
        raise
    except MemoryError as error:
        raise ValueError("it asks for more memory than there is") from error
    except Exception as error:  # of a damaged pickle nearly any
        raise ValueError(f"it is broken or cut off ({' '.join(str(error).split())})") from error


def as_array(value: Any) -> np.ndarray | None:
    """The array that an entry of a pickle is, None if it is something else."""
    if isinstance(value, Tensor):
        return value.numpy()
    if isinstance(value, _Array):
        return value.value
    return None
