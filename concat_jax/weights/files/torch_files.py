"""Files of torch, read without torch: zip archives, the older format without zip, TorchScript.

Storages are read only when somebody asks for a tensor of theirs, so the optimizer state of a
training checkpoint, usually two thirds of it, is passed over. Of a TorchScript archive, in which
OpenAI published CLIP, the pickle is read, the tree of modules with their tensors; its program is
neither run nor looked at.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from concat_jax.weights.files.restricted_pickle import ScriptModule, Storage, as_array, read_pickle

# First pickle of the format without zip, from torch/serialization.py.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
# How a pickle of protocol 2 with that number in it begins: enough to tell the file by.
LEGACY_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
ZIP_START = b"PK\x03\x04"
# Of the attributes of all modules, counted once a path: far more than any network has, and few
# enough that modules which share modules which share modules come to an end.
MAX_ATTRIBUTES = 200_000
MAX_DEPTH = 100
_BIG_ENDIAN = "it was written in big-endian byte order; save it on another machine"


def read_torch_zip(file: BinaryIO) -> tuple[Any, bool]:
    """Content of a zip archive that torch wrote, and whether it is a TorchScript program.

    `file` stays open as long as tensors are read. A ValueError says that the archive is cut off, of
    another byte order, or none of torch's.
    """
    try:
        archive = zipfile.ZipFile(file)
    except Exception as error:  # zipfile documents none of its own
        raise ValueError(f"it is cut off or no zip archive ({error})") from error
    entries = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("it is a zip archive without one data.pkl, which torch.save writes")
    folder = pickles[0].removesuffix("data.pkl")
    storages: dict[str, Storage] = {}

    def read(name: str) -> bytes:
        name = folder + name
        if name not in entries:
            raise ValueError(f"it lacks the entry {name}")
        # torch never compresses numbers; what does could grow without limit.
        if entries[name].compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its entry {name} is compressed, which torch.save does not do")
        try:
            return archive.read(name)
        except Exception as error:  # zipfile documents none of its own
            raise ValueError(f"its entry {name} is damaged ({error})") from error

    def find_storage(key: str, dtype: np.dtype, size: int) -> Storage:
        return storages.setdefault(key, Storage(dtype, size, lambda: read(f"data/{key}")))

    if f"{folder}byteorder" in entries and read("byteorder").strip() != b"little":
        raise ValueError(_BIG_ENDIAN)
    is_script = f"{folder}constants.pkl" in entries
    pickled = io.BytesIO(read("data.pkl"))
    return read_pickle(pickled, find_storage=find_storage, is_script=is_script), is_script


def script_arrays(root: Any) -> dict[str, np.ndarray]:
    """Tensors of a TorchScript archive's content, by the names of the module's `state_dict()`.

    Tensors that are no parameters (buffers, plain attributes) are among them, since the archive
    does not tell them apart.
    """
    if not isinstance(root, ScriptModule):
        raise ValueError("it holds no module")
    arrays: dict[str, np.ndarray] = {}
    for count, (name, value) in enumerate(_attributes(root)):
        if count >= MAX_ATTRIBUTES:
            raise ValueError(f"its modules have over {MAX_ATTRIBUTES:,} attributes")
        if (array := as_array(value)) is not None:
            arrays[name] = array
    if not arrays:
        raise ValueError("its modules hold no tensors")
    return arrays


def _attributes(
    module: ScriptModule, prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, Any]]:
    """The attributes of a module and of all modules in it, by name."""
    if depth > MAX_DEPTH:
        raise ValueError("its modules nest too deep, or hold themselves")
    for name, value in module.attributes.items():
        yield prefix + name, value
        if isinstance(value, ScriptModule):
            yield from _attributes(value, f"{prefix}{name}.", depth + 1)


def read_torch_legacy(file: BinaryIO) -> Any:
    """Content of a file of `torch.save` without zip, which stays open as long as tensors are read.

    Four pickles (magic number, protocol, the machine, the content) and a fifth with the order of
    the storages, whose numbers follow.
    """
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    if read_pickle(file) != LEGACY_MAGIC or read_pickle(file) != LEGACY_PROTOCOL:
        raise ValueError("it is no file of torch.save")
    machine = read_pickle(file)
    if isinstance(machine, dict) and machine.get("little_endian") is False:
        raise ValueError(_BIG_ENDIAN)
    storages: dict[str, Storage] = {}
    places: dict[str, int] = {}

    def find_storage(key: str, dtype: np.dtype, size: int) -> Storage:
        def read() -> bytes:
            if key not in places:
                raise ValueError("it lacks a storage that a tensor refers to")
            file.seek(places[key])
            return file.read(size * dtype.itemsize)

        return storages.setdefault(key, Storage(dtype, size, read))

    content = read_pickle(file, find_storage=find_storage)
    keys = read_pickle(file)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("it does not say where its storages are")
    place = file.tell()
    for key in keys:
        file.seek(place)
        length = file.read(8)
        if len(length) < 8 or key not in storages:
            raise ValueError("it is cut off in its storages")
        size = int.from_bytes(length, "little", signed=True)
        if size != storages[key].size:
            raise ValueError("a storage has another size than its tensors say")
        places[key] = place + 8
        place += 8 + size * storages[key].dtype.itemsize
        if place > end:
            raise ValueError("it is cut off in its storages")
    return content


def read_storage(content: bytes) -> Any:
    """The storage that a tensor carries when it was pickled without `torch.save`."""
    file = io.BytesIO(content)
    return read_torch_zip(file)[0] if content.startswith(ZIP_START) else read_torch_legacy(file)
