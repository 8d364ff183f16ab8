"""Files of weights as name -> array: safetensors, pickles, and what torch, numpy and flax write.

Nothing in a file is run (see `restricted_pickle.py`) and torch is not imported.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Mapping
from typing import Any, BinaryIO

import numpy as np
import safetensors
from etils.epath import Path
from flax import serialization, traverse_util

from concat_jax.core.files import as_path, on_disk, read_json
from concat_jax.weights.files.restricted_pickle import (
    SAFETENSORS_TYPES,
    as_array,
    in_box,
    read_pickle,
)
from concat_jax.weights.files.torch_files import (
    LEGACY_START,
    ZIP_START,
    read_storage,
    read_torch_legacy,
    read_torch_zip,
    script_arrays,
)
from concat_jax.weights.report import name_keys

# Where training frameworks keep the weights in a checkpoint, one in another at times.
WEIGHT_ENTRIES = ("model", "state_dict", "model_state_dict", "module")
# What may stand before each name: the attribute in which a wrapper or a training class holds the
# model. The second are torch's own wrappers of parts, which no layer is called.
PREFIXES = ("module.", "model.", "state_dict.", "network.", "net.")
# What a training class holds beside the model, without the prefix.
_BESIDE = re.compile(r"(criterion|loss\w*|\w*metrics?)\.")
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Where flax's train states keep them, before optax and since.
FLAX_ENTRIES = (("optimizer", "target"), ("params",))
INDEX_SUFFIX = ".index.json"
# A map, of few or many keys, that begins with a short text.
_MSGPACK = re.compile(rb"([\x81-\x8f]|\xde..)[\xa1-\xbf]", re.DOTALL)
# Of a safetensors header in bytes: the format's own limit.
_MAX_HEADER = 100_000_000
# How files begin that people have in the place of weights.
_OTHER_FILES = {
    b"\x1f\x8b": "it is compressed with gzip; unpack it first",
    b"version https://git-lfs": "it is Git LFS's pointer to the file; get it by `git lfs pull`",
    b"<": "it is a web page; download the file itself",
}


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """What a file of weights holds.

    Attributes:
      arrays: name -> array, in the file's own types.
      other: names of what lies beside the weights in a training checkpoint, such as "optimizer",
        and was not read.
      prefixes: what stood before each name and was taken off, the first one first.
    """

    arrays: Mapping[str, np.ndarray]
    other: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    is_script: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about what was left out of the file."""
        other = f"Beside the weights the file holds {name_keys(self.other)}; ignored."
        prefixes = f"{' and '.join(map(repr, self.prefixes))} was taken off the names of the file."
        return (other,) * bool(self.other) + (prefixes,) * bool(self.prefixes)


def read_weights(path: str | os.PathLike[str]) -> WeightsFile:
    """Read a file of weights; its format is told by its first bytes, not by its name.

    It is a safetensors file, a pickle of arrays (Detectron2 `.pkl`), a `.pth`, `.pt` or `.bin` of
    `torch.save` or `torch.jit.save`, a dictionary of `numpy.save`, a checkpoint of
    `flax.training.checkpoints`; or the `.index.json` of weights in several files. Raises
    ValueError if the file is missing, empty, cut off, of another format, holds no weights, or is a
    pickle that names something weights have no need of; the sentence names the file.
    """
    path = as_path(path)
    content = _read_parts(path) if path.name.endswith(INDEX_SUFFIX) else _read_file(path)
    arrays, beside = dict(content.arrays), ()
    if any(name.startswith("module.") for name in arrays) and "n_averaged" in arrays:
        beside = ("n_averaged",)  # the counter of torch.optim.swa_utils.AveragedModel
        del arrays["n_averaged"]
    prefixes: list[str] = []
    names = {name: name for name in arrays}
    if wrappers := sorted({found for name in names for found in _WRAPPERS.findall(name)}):
        prefixes += [f"{wrapper}." for wrapper in wrappers]
        names = {name: _WRAPPERS.sub("", name) for name in names}
    while True:
        inner = {name: short for name, short in names.items() if not _BESIDE.match(short)}
        if not (prefix := _shared_prefix(inner.values())):
            break
        prefixes.append(prefix)
        beside += tuple(sorted(names.keys() - inner.keys()))
        names = {name: short.removeprefix(prefix) for name, short in inner.items()}
    if len(set(names.values())) < len(names):
        raise ValueError(
            f"{path} cannot be read as weights: two of its names differ in a prefix only."
        )
    return dataclasses.replace(
        content,
        arrays={short: arrays[name] for name, short in names.items()},
        other=content.other + beside,
        prefixes=tuple(prefixes),
    )


def _shared_prefix(names: Collection[str]) -> str:
    shared = os.path.commonprefix([*names])
    return next((prefix for prefix in PREFIXES if shared.startswith(prefix)), "")


def _read_file(path: Path) -> WeightsFile:
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        with on_disk(path) as local, local.open("rb") as file:
            return _read(file, path.suffix)
    except Exception as error:  # whatever a damaged file makes the decoders raise
        reason = " ".join(str(error).split()).rstrip(".")
        if not isinstance(error, ValueError | OSError):
            reason = f"it is damaged ({reason or type(error).__name__})"
        raise ValueError(f"{path} cannot be read as weights: {reason}.") from error


def _read(file: BinaryIO, suffix: str) -> WeightsFile:
    start = file.read(64)
    file.seek(0)
    if not start:
        raise ValueError("it is empty")
    if start.startswith(ZIP_START):
        content, is_script = read_torch_zip(file)
        if is_script:
            return WeightsFile(script_arrays(content), is_script=True)
        return _pick_weights(content)
    if start.startswith(LEGACY_START):
        return _pick_weights(read_torch_legacy(file))
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _MAX_HEADER:
        return WeightsFile(_read_safetensors(file.read()))
    for beginning, what in _OTHER_FILES.items():
        if start.startswith(beginning):
            raise ValueError(what)
    if start.startswith(b"\x80") or suffix == ".pkl":
        return _pick_weights(read_pickle(file, read_nested=read_storage))
    if start.startswith(b"\x93NUMPY"):
        return _read_numpy(file)
    if _MSGPACK.match(start):
        return _read_flax(file.read())
    raise ValueError(
        "it begins like none of safetensors, a pickle, a flax checkpoint and a file of torch.save"
    )


def _read_numpy(file: BinaryIO) -> WeightsFile:
    """A dictionary in the box that `numpy.save` makes of it."""
    version = np.lib.format.read_magic(file)
    read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
    shape, _, dtype = read_header(file)
    if shape or not dtype.hasobject:
        raise ValueError("it holds one array and no names")
    return _pick_weights(in_box(read_pickle(file)))


def _read_flax(content: bytes) -> WeightsFile:
    """The parameters of a checkpoint in msgpack, names joined by "/"; nothing in it is run."""
    try:
        state = serialization.msgpack_restore(content)
    except ValueError as error:
        raise ValueError(f"it is cut off or no checkpoint of flax ({error})") from error
    for path in FLAX_ENTRIES:
        params: Any = state
        for key in path:
            params = params.get(key) if isinstance(params, dict) else None
        if isinstance(params, dict):
            break
    else:
        raise ValueError("it is a checkpoint of flax that holds no params")
    flat = traverse_util.flatten_dict(params, sep="/")
    arrays = {k: np.asarray(v) for k, v in flat.items() if isinstance(v, np.ndarray | np.generic)}
    return WeightsFile(arrays, tuple(key for key in state if key != path[0]))


def _read_safetensors(content: bytes) -> dict[str, np.ndarray]:
    # Not by the package's numpy reader, which refuses some types of torch's.
    try:
        entries = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise ValueError(f"it is cut off or no safetensors file ({error})") from error
    arrays = {}
    for name, entry in entries:
        if (kind := entry["dtype"]) not in SAFETENSORS_TYPES:
            raise ValueError(f"{name} is of type {kind}, which weights do not have")
        arrays[name] = np.frombuffer(entry["data"], SAFETENSORS_TYPES[kind]).reshape(entry["shape"])
    if not arrays:
        raise ValueError("it holds no arrays")
    return arrays


def _read_parts(path: Path) -> WeightsFile:
    content = read_json(path)
    places = content.get("weight_map") if isinstance(content, dict) else None
    names = [*places.values()] if isinstance(places, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} is no index of weights files.")
    arrays: dict[str, np.ndarray] = {}
    for name in sorted({*names}):
        if os.path.basename(name) != name:
            raise ValueError(f"{path} names {name}, which is not a file beside it.")
        arrays |= _read_file(path.parent / name).arrays
    return WeightsFile(arrays)


def _pick_weights(content: Any) -> WeightsFile:
    """The weights in what a pickle held, and the names of the rest."""
    other: tuple[str, ...] = ()
    for _ in WEIGHT_ENTRIES:  # a file may hold itself: there is no deeper nesting than this
        nested = content if isinstance(content, dict) else {}
        entry = next((e for e in WEIGHT_ENTRIES if isinstance(nested.get(e), dict)), None)
        if entry is None:
            break
        other += tuple(str(key) for key in content if key != entry)
        content = content[entry]
    arrays: dict[str, np.ndarray] = {}
    for name, value in content.items() if isinstance(content, dict) else ():
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
