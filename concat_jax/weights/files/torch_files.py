"""Files of torch, read without torch: zip archives, the older format without zip, TorchScript.

Storages are read only when somebody asks for a tensor of theirs, so the optimizer state of a
training checkpoint, usually two thirds of it, is passed over. Of a TorchScript archive, in which
OpenAI published CLIP, the pickle is read, the tree of modules with their tensors; its program is
neither run nor looked at.
"""

from __future__ import annotations

import io
import struct
import zipfile
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


class TorchZip:
    """The entries of a zip archive that torch wrote; `file` stays open as long as tensors are read.

    `is_script` tells a TorchScript program from what `torch.save` writes. A ValueError says that
    the archive is cut off, of another byte order, or none of torch's.
    """

    def __init__(self, file: BinaryIO):
        try:
            self._archive = zipfile.ZipFile(file)
        except Exception as error:  # zipfile documents none of its own
            raise ValueError(f"it is cut off or no zip archive ({error})") from error
        self._entries = {info.filename: info for info in self._archive.infolist()}
        self._storages: dict[str, Storage] = {}
        pickles = [n for n in self._entries if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it is a zip archive without one data.pkl, which torch.save writes")
        self._folder = pickles[0].removesuffix("data.pkl")
        self.is_script = f"{self._folder}constants.pkl" in self._entries
        order = f"{self._folder}byteorder"
        if order in self._entries and self._read(order).strip() != b"little":
            raise ValueError("it was written in big-endian byte order; save it on another machine")

    def content(self) -> Any:
        """What `read_pickle` makes of its pickle."""
        return read_pickle(
            io.BytesIO(self._read(f"{self._folder}data.pkl")),
            find_storage=self._find_storage,
            is_script=self.is_script,
        )

    def _read(self, name: str) -> bytes:
        if name not in self._entries:
            raise ValueError(f"it lacks the entry {name}")
        # torch never compresses numbers; what does could grow without limit.
        if self._entries[name].compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its entry {name} is compressed, which torch.save does not do")
        try:
            return self._archive.read(name)
        except Exception as error:  # zipfile documents none of its own
            raise ValueError(f"its entry {name} is damaged ({error})") from error

    def _find_storage(self, key: str, dtype: np.dtype, size: int) -> Storage:
        if key not in self._storages:
            entry = f"{self._folder}data/{key}"
            self._storages[key] = Storage(dtype, size, lambda: self._read(entry))
        return self._storages[key]


def script_arrays(root: Any) -> dict[str, np.ndarray]:
    """Tensors of a TorchScript archive's content, by the names of the module's `state_dict()`.

    Tensors that are no parameters (buffers, plain attributes) are among them, since the archive
    does not tell them apart.
    """
    arrays: dict[str, np.ndarray] = {}
    count = 0

    def visit(module: ScriptModule, prefix: str, above: tuple[int, ...]) -> None:
        nonlocal count
        if id(module) in above:
            raise ValueError(f"its module {prefix[:-1]} holds itself")
        for name, value in module.attributes.items():
            count += 1
            if count > MAX_ATTRIBUTES:
                raise ValueError(f"its modules have over {MAX_ATTRIBUTES:,} attributes")
            if isinstance(value, ScriptModule):
                visit(value, f"{prefix}{name}.", (*above, id(module)))
            elif (array := as_array(value)) is not None:
                arrays[prefix + name] = array

    if not isinstance(root, ScriptModule):
        raise ValueError("it holds no module")
    try:
        visit(root, "", ())
    except RecursionError as error:
        raise ValueError("its modules nest too deep") from error
    if not arrays:
        raise ValueError("its modules hold no tensors")
    return arrays


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
        raise ValueError("it was written in big-endian byte order; save it on another machine")
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
        (size,) = struct.unpack("<q", length)
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
    return TorchZip(file).content() if content.startswith(ZIP_START) else read_torch_legacy(file)
