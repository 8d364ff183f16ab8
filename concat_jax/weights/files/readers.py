"""Files of weights as name -> array: safetensors, pickles, and what `torch.save` writes.

Nothing in a file is run (see `restricted_pickle.py`) and torch is not imported.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from concat_jax.weights.files.restricted_pickle import Tensor, as_array, read_pickle
from concat_jax.weights.files.torch_files import (
    LEGACY_START,
    ZIP_START,
    read_storage,
    read_torch_legacy,
    read_torch_zip,
)

# Where training frameworks keep the weights in a checkpoint: Detectron2, and most others.
WEIGHT_ENTRIES = ("model", "state_dict")
# What safetensors calls the types that weights have.
_SAFETENSORS_TYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
# Of a safetensors header in bytes: the format's own limit.
MAX_HEADER = 100_000_000
INDEX_SUFFIX = ".index.json"


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """What a file of weights holds.

    Attributes:
        arrays: name -> array, in the file's own types.
        other: names of what lies beside the weights in a training checkpoint, such as "optimizer",
            and was not read.
    """

    arrays: Mapping[str, np.ndarray]
    other: tuple[str, ...] = ()


def read_weights(path: str | os.PathLike[str]) -> WeightsFile:
    """Read a file of weights; its format is told by its first bytes, not by its name.

    Args:
        path: a safetensors file, a pickle of arrays (Detectron2 `.pkl`), a `.pth`, `.pt` or `.bin`
            of `torch.save`; or the `.index.json` of weights that are split over several files.

    Raises:
        ValueError: the file is missing, empty, cut off, of another format, holds no weights, or is
            a pickle that names something weights have no need of; the sentence names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    if path.name.endswith(INDEX_SUFFIX):
        return _read_parts(path)
    try:
        with path.open("rb") as file:
            start = file.read(64)
            file.seek(0)
            if not start:
                raise ValueError("it is empty")
            if start.startswith(ZIP_START):
                return _pick_weights(read_torch_zip(file))
            if start.startswith(LEGACY_START):
                return _pick_weights(read_torch_legacy(file))
            if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER:
                return WeightsFile(_read_safetensors(file))
            if start.startswith(b"\x80") or path.suffix == ".pkl":
                return _pick_weights(read_pickle(file, read_nested=read_storage))
            raise ValueError(
                "it begins like none of safetensors, a pickle and a file of torch.save"
            )
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as weights: {error}.") from error


def _read_safetensors(file: BinaryIO) -> dict[str, np.ndarray]:
    # Not by the package's numpy reader, which knows no bfloat16.
    length = int.from_bytes(file.read(8), "little")
    try:
        header = json.loads(file.read(length).decode("utf-8"))
    except ValueError as error:
        raise ValueError("its safetensors header is cut off or broken") from error
    content = memoryview(file.read())  # whose slices are no copies
    arrays = {}
    header.pop("__metadata__", None)
    for name, entry in header.items():
        try:
            dtype = _SAFETENSORS_TYPES[entry["dtype"]]
            first, last = entry["data_offsets"]
            shape = tuple(int(n) for n in entry["shape"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{name} is of a type or shape that weights do not have ({entry})"
            ) from error
        if not 0 <= first <= last <= len(content):
            raise ValueError(f"it is cut off before the end of {name}")
        if last - first != dtype.itemsize * int(np.prod(shape, dtype=np.int64)):
            raise ValueError(f"{name} has other bytes than its shape {list(shape)} says")
        numbers = np.frombuffer(content[first:last], dtype) if last > first else np.empty(0, dtype)
        arrays[name] = numbers.reshape(shape)
    if not arrays:
        raise ValueError("it holds no arrays")
    return arrays


def _read_parts(path: Path) -> WeightsFile:
    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of weights files.") from error
    arrays: dict[str, np.ndarray] = {}
    for name in sorted(names):
        if Path(name).name != name:
            raise ValueError(f"{path} names {name}, which is not a file beside it.")
        arrays |= read_weights(path.parent / name).arrays
    return WeightsFile(arrays)


def _pick_weights(content: Any) -> WeightsFile:
    """The weights in what a pickle held, and the names of the rest."""
    other: tuple[str, ...] = ()
    if isinstance(content, dict):
        for entry in WEIGHT_ENTRIES:
            if isinstance(content.get(entry), dict):
                other = tuple(str(key) for key in content if key != entry)
                content = content[entry]
                break
    if isinstance(content, Tensor) or not isinstance(content, dict) or not content:
        raise ValueError("it holds no weights by name (a state_dict)")
    arrays: dict[str, np.ndarray] = {}
    for name, value in content.items():
        array = as_array(value)
        if array is None and not isinstance(value, int | float):
            raise ValueError(
                f"it holds no weights by name: {str(name)!r} is neither an array nor under "
                f"{' or '.join(map(repr, WEIGHT_ENTRIES))}"
            )
        if array is not None and isinstance(name, str):
            arrays[name] = array
    if not arrays:
        raise ValueError("it holds no weights by name (a state_dict)")
    return WeightsFile(arrays, other)
