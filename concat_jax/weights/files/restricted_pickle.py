"""Pickles of weights, read without running anything that they name.

A pickle names functions and asks the reader to call them; Python's own unpickler does. Here every
name is looked up in a table of harmless stand-ins of ours, which only record what they are told:
an array is its bytes, type and shape, a tensor is a place in a storage. numpy and torch are not
asked to rebuild anything, and a name that is not in the table ends the reading.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pickle
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

# Types that tensors of weights have: torch's word for a storage, safetensors' name, numpy's type.
_TENSOR_TYPES = (
    ("Double", "F64", "<f8"),
    ("Float", "F32", "<f4"),
    ("Half", "F16", "<f2"),
    ("BFloat16", "BF16", ml_dtypes.bfloat16),
    ("Long", "I64", "<i8"),
    ("Int", "I32", "<i4"),
    ("Short", "I16", "<i2"),
    ("Char", "I8", "i1"),
    ("Byte", "U8", "u1"),
    ("Bool", "BOOL", "?"),
)
_STORAGE_TYPES = {f"{word}Storage": np.dtype(kind) for word, _, kind in _TENSOR_TYPES}
SAFETENSORS_TYPES = {name: np.dtype(kind) for _, name, kind in _TENSOR_TYPES}
# Types that numpy arrays of weights have, by numpy's own short names.
_NUMPY_TYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


class _Sealed:
    """What a pickle may make and never change: a storage of another size would be read past."""

    def __setstate__(self, state: Any) -> None:
        raise ValueError("the pickle sets attributes where weights have none")


@dataclasses.dataclass
class Storage(_Sealed):
    """Numbers that tensors are views of; `read` gives their bytes when somebody wants them."""

    dtype: np.dtype
    size: int
    read: Callable[[], bytes]

    @functools.cached_property
    def numbers(self) -> np.ndarray:
        """[size] array."""
        content = self.read()
        if len(content) != self.size * self.dtype.itemsize:
            raise ValueError("a tensor has other bytes than it says")
        return np.frombuffer(content, self.dtype)


@dataclasses.dataclass(frozen=True)
class Tensor(_Sealed):
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
        numbers = self.storage.numbers[self.offset :]
        steps = tuple(s * numbers.itemsize for s in self.strides)
        return np.array(np.lib.stride_tricks.as_strided(numbers, self.shape, steps))


class _Global(_Sealed):
    """Stands for a global that a pickle calls, or mentions as the type of a storage."""

    __slots__ = ("_call", "dtype")

    def __init__(self, call: Callable[..., Any] | None = None, dtype: np.dtype | None = None):
        self._call, self.dtype = call, dtype

    def __call__(self, *args: Any) -> Any:
        if self._call is None:
            raise ValueError("the pickle calls what weights only mention")
        return self._call(*args)


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
        if name == "O8":  # of a box around one object, see `_Array`
            self.dtype = np.dtype(object)
            return
        if name not in _NUMPY_TYPES:
            raise ValueError(f"an array is of type {name or 'unknown'!r}")
        self.dtype = np.dtype(name).newbyteorder("<")

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise ValueError(f"an array is in byte order {order!r}")
        self.dtype = self.dtype.newbyteorder(">" if order == ">" else "<")


class _Array:
    """A numpy array; `__setstate__` brings its content.

    `numpy.save` puts what is no array in a box, an array of objects without axes: its content is
    then what the box holds.
    """

    __slots__ = ("value",)

    def __init__(self, value: np.ndarray):
        self.value = value

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, is_fortran, content = state
        if shape == () and isinstance(content, list) and len(content) == 1:
            (self.value,) = content
            return
        self.value = _array(content, kind, shape, "F" if is_fortran else "C")


def _array(content: Any, kind: Any, shape: Any, order: Any = "C") -> np.ndarray:
    if isinstance(content, str):  # Python 2 wrote bytes as text
        content = content.encode("latin1")
    is_plain = isinstance(kind, _Type) and not kind.dtype.hasobject
    if not isinstance(content, bytes | bytearray) or not is_plain:
        raise ValueError("an array holds objects")
    return np.frombuffer(content, kind.dtype).reshape(
        _sizes(shape), order="F" if order == "F" else "C"
    )


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or not all(type(v) is int for v in values):
        raise ValueError("a shape is no list of integers")
    return tuple(values)


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


def _first(value: Any, *_: Any) -> Any:
    return value


# What pickles of weights name, and what each calls here.
_CALLS: Mapping[str, Callable[..., Any] | None] = {
    "collections.OrderedDict": _Dict,
    "collections.Counter": _Dict,
    "_codecs.encode": _encode,
    "numpy.ndarray": None,
    "numpy.dtype": _Type,
    "numpy.core.multiarray._reconstruct": lambda *_: _Array(np.empty(0, np.float32)),
    "numpy.core.multiarray.scalar": lambda kind, content: _array(content, kind, (), "C").item(),
    "numpy.core.numeric._frombuffer": lambda *given: _Array(_array(*given)),
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch.device": lambda *_: _Dict(),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _first,
}
# TorchScript's lists of one type, and its notes of what type a container is.
_SCRIPT_CALLS = {
    f"torch.jit._pickle.{name}": _first
    for name in ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")
} | {"torch.jit._pickle.restore_type_tag": _first}


class _Unpickler(pickle.Unpickler):
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
        calls = dict(_CALLS)
        if read_nested is not None:
            # A tensor that was pickled without torch.save carries its storage as a file of its own.
            calls["torch.storage._load_from_bytes"] = read_nested
        if is_script:
            calls |= _SCRIPT_CALLS
        self._globals = {name: _Global(call) for name, call in calls.items()}
        self._globals |= {f"torch.{name}": _Global(dtype=d) for name, d in _STORAGE_TYPES.items()}
        self._is_script = is_script
        self._find_storage = find_storage

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a global; any other is refused by name."""
        # The classes of a TorchScript archive stand in its own code, which nobody looks at.
        if self._is_script and module.split(".")[0] == "__torch__":
            return ScriptModule
        whole = f"{module}.{name}".replace("numpy._core.", "numpy.core.")  # as before numpy 2
        if (found := self._globals.get(whole)) is None:
            raise ValueError(
                f"it names {module}.{name}, which weights have no need of; nothing of it was run"
            )
        return found

    def persistent_load(self, pid: Any) -> Storage:
        """The storage of a tensor, as torch.save refers to it."""
        is_storage = isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"
        if self._find_storage is None or not is_storage:
            raise ValueError("it refers to something outside of it")
        kind, key, size = pid[1], pid[2], pid[4]
        if not isinstance(kind, _Global) or kind.dtype is None:
            raise ValueError("a storage is of an unknown type")
        if not isinstance(key, str) or type(size) is not int or size < 0:
            raise ValueError("a storage has no name or size")
        if len(pid) > 5 and pid[5] is not None:
            raise ValueError("a storage is a part of another, as torch before 0.4 wrote them")
        return self._find_storage(key, kind.dtype, size)


def read_pickle(file: BinaryIO, **options: Any) -> Any:
    """Read one pickle; the file is left behind its last byte.

    Options are `find_storage(key, dtype, size)` for torch's references to storages,
    `read_nested(content)` for a torch file inside the pickle, `is_script` for that of a TorchScript
    archive, which gives `ScriptModule`s. Arrays are what `as_array` takes. Raises ValueError if it
    is broken, no pickle, or names a global that is not in the table; nothing has been run.
    """
    try:
        return _Unpickler(file, **options).load()
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
    array = value.value if isinstance(value, _Array) else None
    return array if isinstance(array, np.ndarray) else None


def in_box(value: Any) -> Any:
    """What the box holds that `numpy.save` made of an object; the value itself if it is none."""
    return value.value if isinstance(value, _Array) and as_array(value) is None else value
