"""Hostile, damaged and other files are refused in a sentence, and nothing of them is run."""

import contextlib
import gzip
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from concat_jax.weights.files import restricted_pickle
from concat_jax.weights.files.readers import read_weights
from concat_jax.weights.files.torch_files import ZIP_START
from tests.weights.files.torch_saves import FORMATS, save

torch = pytest.importorskip("torch")


class Malicious:
    """Pickles to a call of a function that would leave a trace."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def attacks(trace):
    """Name of the global -> something whose unpickling would make `trace`."""
    code = f"open({str(trace)!r}, 'w').close()"
    return {
        f"{os.system.__module__}.system": Malicious(os.system, f"touch {trace}"),
        "builtins.eval": Malicious(eval, code),
        "builtins.exec": Malicious(exec, code),
        f"{open.__module__}.open": Malicious(open, str(trace), "w"),
        "builtins.getattr": Malicious(getattr, "text", "upper"),
        "torch.jit": Malicious(torch.jit.load, str(trace)),
        "torch.nn.modules.linear.Linear": torch.nn.Linear(1, 1),
    }


@pytest.mark.parametrize("name", attacks("x"))
@pytest.mark.parametrize("how", ["pickle", *FORMATS])
def test_other_globals_are_refused_by_name_and_not_run(tmp_path, how, name):
    trace = tmp_path / "trace"
    content = {"model": {"w": np.ones(2)}, "extra": attacks(trace)[name]}
    path = tmp_path / "model.pkl"
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        save(content, path, how)
    spelt = name.replace("builtins", "(builtins|__builtin__)")  # Python 2's in protocol 2
    with pytest.raises(ValueError, match=f"it names {spelt}.*nothing of it was run") as error:
        read_weights(path)
    assert str(path) in str(error.value)
    assert not trace.exists()


def test_a_nested_torch_file_is_no_way_in(tmp_path):
    """The storage of a pickled tensor is a torch file, and read by the same rules."""
    trace = tmp_path / "trace"
    inner = io.BytesIO()
    torch.save(Malicious(os.system, f"touch {trace}"), inner)
    outer = Malicious(torch.storage._load_from_bytes, inner.getvalue())
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"model": {"w": outer}}))
    with pytest.raises(ValueError, match="it names posix.system"):
        read_weights(path)
    assert not trace.exists()
    # Nor does it nest a second time.
    inner = io.BytesIO()
    torch.save(outer, inner)
    nested = Malicious(torch.storage._load_from_bytes, inner.getvalue())
    path.write_bytes(pickle.dumps({"model": {"w": nested}}))
    with pytest.raises(ValueError, match="it names torch.storage._load_from_bytes"):
        read_weights(path)


def test_stand_ins_cannot_be_changed_by_a_pickle():
    """BUILD on a global would set attributes of it, for every later reader as well."""
    for name in (
        "cnumpy\ndtype\n",
        "ctorch._utils\n_rebuild_tensor_v2\n",
        "ctorch\nFloatStorage\n",
    ):
        attack = b"\x80\x02" + name.encode() + b"}U\x05_callU\x01xsb."
        with pytest.raises(ValueError, match="sets attributes"):
            restricted_pickle.read_pickle(io.BytesIO(attack))
    # A storage that says it is larger than it is would be read past its end.
    reference = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x04tQ"
    attack = b"\x80\x02" + reference + b"}U\x04sizeK\x63sb."
    with pytest.raises(ValueError, match="sets attributes"):
        restricted_pickle.read_pickle(
            io.BytesIO(attack),
            find_storage=lambda key, dtype, size: restricted_pickle.Storage(dtype, size, bytes),
        )
    with pytest.raises(ValueError):  # NEWOBJ: a new one of a stand-in
        restricted_pickle.read_pickle(io.BytesIO(b"\x80\x02cnumpy\nndarray\n)\x81."))


def test_arrays_of_objects_are_refused(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"w": np.array([{}], object)}))
    with pytest.raises(ValueError, match="an array holds objects"):
        read_weights(path)


def test_tensor_beyond_its_storage(tmp_path):
    file = io.BytesIO()
    torch.save({"w": torch.ones(4)}, file)
    content = zipfile.ZipFile(file).read("archive/data.pkl")
    assert content.count(b"K\x04\x85") == 1  # the shape (4,)
    forged = content.replace(b"K\x04\x85", b"K\x05\x85")
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", forged)
        archive.writestr("archive/data/0", np.ones(4, np.float32).tobytes())
    with pytest.raises(ValueError, match="reaches beyond its storage"):
        read_weights(path)


def test_compressed_entries_are_refused(tmp_path):
    save({"w": torch.zeros(1000)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match="is compressed"):
        read_weights(tmp_path / "b.pth")


def whole_files(folder):
    """One good file of each format."""
    content = {"model": {"w": torch.randn(300), "v": torch.randn(5)}, "iteration": 3}
    safetensors.numpy.save_file(
        {"w": np.ones(300, np.float32), "v": np.ones(5, np.float32)}, folder / "a.safetensors"
    )
    with (folder / "a.pkl").open("wb") as file:
        pickle.dump({"w": np.ones(300), "v": np.ones(5)}, file)
    return [
        save(content, folder / "zip.pth", "zip"),
        save(content, folder / "legacy.pth", "legacy"),
        folder / "a.safetensors",
        folder / "a.pkl",
    ]


@pytest.mark.parametrize("index", range(4))
def test_a_file_cut_off_anywhere_is_refused_in_a_sentence(tmp_path, index):
    path = whole_files(tmp_path)[index]
    content = path.read_bytes()
    assert set(read_weights(path).arrays) == {"w", "v"}
    cut = tmp_path / f"cut{path.suffix}"
    ends = {1, 2, 9, 20, 60, 100, 200, *range(300, len(content), 97), len(content) - 1}
    for end in sorted(ends):
        cut.write_bytes(content[:end])
        with pytest.raises(ValueError, match=f"^{cut} cannot be read as weights: ") as error:
            read_weights(cut)
        assert "\n" not in str(error.value), end


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.pth", b"", "it is empty"),
        ("a.pth", b"\x89PNG\r\n\x1a\n" + bytes(50), "begins like none of"),
        ("a.txt", b"Hello, this is a text file that holds no weights.", "begins like none of"),
        ("a.pkl", b"Hello, this is a text file.", "broken or cut off"),
        ("a.pkl", pickle.dumps([1, 2]), "no weights by name"),
        ("a.pkl", pickle.dumps({"names": ["a"], "w": np.ones(2)}), "'names' is neither"),
        ("a.pkl", pickle.dumps({}), "no weights by name"),
        ("a.safetensors", (2).to_bytes(8, "little") + b"{}", "holds no arrays"),
    ],
)
def test_what_is_no_file_of_weights(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_weights(path)
    assert str(path) in str(error.value)


def test_other_zip_archives(tmp_path):
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")
    with pytest.raises(ValueError, match="without one data.pkl"):
        read_weights(path)
    with zipfile.ZipFile(path, "w") as archive:  # as torch.jit.save lays it out
        archive.writestr("net/data.pkl", pickle.dumps({}))
        archive.writestr("net/constants.pkl", pickle.dumps(()))
    with pytest.raises(ValueError, match="it holds no module"):
        read_weights(path)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="There is no file"):
        read_weights(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    "content, message",
    [
        (gzip.compress(b"weights", mtime=0), "compressed with gzip; unpack it first"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS's pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "a web page; download the file"),
        ((9).to_bytes(8, "little") + b"{not json", "cut off or no safetensors"),
        ((2**40).to_bytes(8, "little") + b"{}", "begins like none of"),
        (ZIP_START + bytes(40), "cut off or no zip"),
        (pickle.dumps({"w": np.ones(2)})[:-9] + b"\x94R.", "broken or cut off"),
    ],
)
@pytest.mark.parametrize("name", ["model.bin", "model.pkl"])
def test_damage_and_other_things(tmp_path, name, content, message):
    if name == "model.pkl" and "begins like" in message:
        message = "broken or cut off"  # what is called a pickle is read as one
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_weights(path)
    assert str(error.value).startswith(f"{path} cannot be read as weights: ")


def test_the_length_of_a_header_is_no_sign_of_a_web_page(tmp_path):
    """Of safetensors the file begins with it, here with 60, which is "<"."""
    path = tmp_path / "model.safetensors"
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(60)
    path.write_bytes(len(header).to_bytes(8, "little") + header + np.float32(3).tobytes())
    assert path.read_bytes()[:1] == b"<" and read_weights(path).arrays["w"] == [3]


@pytest.mark.parametrize("place", range(0, 400, 7))
def test_a_flipped_byte_is_read_or_refused(tmp_path, place):
    """No exception of the decoders' own gets out, wherever the damage is."""
    for path in whole_files(tmp_path):
        content = bytearray(path.read_bytes())
        content[place % len(content)] ^= 0x55
        path.write_bytes(content)
        with contextlib.suppress(ValueError):
            read_weights(path)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        "{",
        "\xff",
    ],
)
def test_an_index_that_is_none(tmp_path, content):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content.encode("latin1"))
    with pytest.raises(ValueError, match=str(path)):
        read_weights(path)
