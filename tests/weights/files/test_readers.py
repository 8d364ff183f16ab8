"""Files of weights, read without running them and without torch."""

import contextlib
import gzip
import io
import json
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from concat_jax.weights.files import restricted_pickle
from concat_jax.weights.files.readers import read_weights
from concat_jax.weights.files.torch_files import ZIP_START

torch = pytest.importorskip("torch")
FORMATS = ("zip", "legacy")


def save(content, path, fmt="zip"):
    torch.save(content, path, _use_new_zipfile_serialization=fmt == "zip")
    return path


def tensors():
    """Tensors of every layout that a state dict may hold."""
    torch.manual_seed(0)
    base = torch.randn(6, 4)
    return {
        "plain": base,
        "transposed": base.t(),
        "rows": base[1:3],
        "strided": base[::2, 1::2],
        "same": base,
        "parameter": torch.nn.Parameter(torch.randn(3, 2)),
        "half": torch.randn(5).half(),
        "bfloat16": torch.randn(2, 3).bfloat16(),
        "double": torch.randn(2).double(),
        "long": torch.arange(4),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }


def check_equal(arrays, wanted):
    assert set(arrays) == set(wanted)
    for name, tensor in wanted.items():
        array, tensor = arrays[name], tensor.detach()
        assert array.shape == tuple(tensor.shape), name
        if tensor.dtype == torch.bfloat16:
            assert array.dtype == ml_dtypes.bfloat16
            array, tensor = array.astype(np.float32), tensor.float()
        assert array.dtype == tensor.numpy().dtype, name
        np.testing.assert_array_equal(array, tensor.numpy(), err_msg=name)


@pytest.mark.parametrize("fmt", FORMATS)
def test_torch_files(tmp_path, fmt):
    wanted = tensors()
    file = read_weights(save(wanted, tmp_path / "a.pth", fmt))
    check_equal(file.arrays, wanted)
    assert file.other == ()


@pytest.mark.parametrize("fmt", FORMATS)
def test_module_state_dict(tmp_path, fmt):
    """An OrderedDict with `_metadata`, of modules with buffers."""
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3))
    wanted = module.state_dict()
    check_equal(read_weights(save(wanted, tmp_path / "a.pth", fmt)).arrays, wanted)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("entry", ["model", "state_dict"])
def test_training_checkpoint(tmp_path, fmt, entry):
    module = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    content = {
        entry: module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": schedule.state_dict(),  # with a Counter in it
        "iteration": 7,
        "best": np.float64(0.5),
    }
    file = read_weights(save(content, tmp_path / "a.pth", fmt))
    check_equal(file.arrays, module.state_dict())
    assert file.other == ("optimizer", "scheduler", "iteration", "best")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_detectron2_pickle(tmp_path, protocol):
    rng = np.random.default_rng(0)
    wanted = {
        "a": rng.normal(size=(3, 4)).astype(np.float32),
        "fortran": np.asfortranarray(rng.normal(size=(3, 4))),
        "big": rng.normal(size=3).astype(">f4"),
        "half": rng.normal(size=3).astype(np.float16),
        "count": np.array(5),
    }
    path = tmp_path / "model_final.pkl"
    with path.open("wb") as file:
        pickle.dump({"model": wanted, "__author__": "third_party"}, file, protocol)
    file = read_weights(path)
    assert file.other == ("__author__",)
    assert set(file.arrays) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(file.arrays[name], array, err_msg=name)
        assert file.arrays[name].shape == array.shape


def test_pickle_of_python_2(tmp_path):
    """Strings and numbers as bytes: what the oldest files of the model zoo hold."""
    content = (
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
        b"\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89U\x08\x00\x00\x80?\x00\x00\x00\xc0tbs."
    )
    path = tmp_path / "R-50.pkl"
    path.write_bytes(content)
    np.testing.assert_array_equal(read_weights(path).arrays["w"], [1.0, -2.0])


def test_tensors_pickled_without_torch_save(tmp_path):
    """As Mask2Former's convert-pretrained-swin-model-to-d2.py writes them."""
    wanted = {
        "a": torch.randn(3, 2),
        "b": torch.nn.Parameter(torch.randn(2)),
        "c": tensors()["half"],
    }
    path = tmp_path / "swin.pkl"
    with path.open("wb") as file:
        pickle.dump({"model": wanted, "matching_heuristics": True}, file)
    check_equal(read_weights(path).arrays, wanted)


def test_safetensors(tmp_path):
    safetensors_torch = pytest.importorskip("safetensors.torch")
    wanted = {k: v.detach().contiguous().clone() for k, v in tensors().items()}
    path = tmp_path / "model.safetensors"
    safetensors_torch.save_file(wanted, path, metadata={"format": "pt"})
    check_equal(read_weights(path).arrays, wanted)


def test_weights_in_parts(tmp_path):
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    for name, key in (("one.safetensors", "a"), ("two.safetensors", "b")):
        safetensors_numpy.save_file({key: np.full(2, ord(key), np.float32)}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    arrays = read_weights(index).arrays
    assert arrays["a"][0] == ord("a") and arrays["b"][1] == ord("b")
    index.write_text(json.dumps({"weight_map": {"a": "../one.safetensors"}}))
    with pytest.raises(ValueError, match="not a file beside it"):
        read_weights(index)


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
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    content = {"model": {"w": torch.randn(300), "v": torch.randn(5)}, "iteration": 3}
    safetensors_numpy.save_file(
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


PREFIXES = ("module.", "_orig_mod.", "model.", "_orig_mod.module.", "model.model.", "state_dict.")


def named(prefix):
    return {f"{prefix}layer.{name}": np.full(2, i, np.float32) for i, name in enumerate("ab")}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("fmt", ["zip", "legacy", "pickle", "safetensors", "index"])
def test_what_stands_before_every_name_is_taken_off_in_every_format(tmp_path, prefix, fmt):
    path, arrays = tmp_path / "a.bin", named(prefix)
    if fmt in FORMATS:
        save({"state_dict": {k: torch.from_numpy(v) for k, v in arrays.items()}}, path, fmt)
    elif fmt == "pickle":
        path.write_bytes(pickle.dumps({"model": arrays}))
    else:
        safetensors.numpy.save_file(arrays, path)
    if fmt == "index":
        path = tmp_path / "a.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": dict.fromkeys(arrays, "a.bin")}))
    file = read_weights(path)
    assert set(file.arrays) == {"layer.a", "layer.b"} and file.arrays["layer.b"][0] == 1
    (note,) = file.notes
    assert "taken off the names" in note and all(
        repr(f"{p}.") in note for p in prefix.split(".")[:-1]
    )


def test_wrappers_of_parts_and_what_is_no_prefix(tmp_path):
    path = tmp_path / "a.safetensors"

    def names(*keys):
        safetensors.numpy.save_file({k: np.zeros(1, np.float32) for k in keys}, path)
        return set(read_weights(path).arrays)

    # Compiled, checkpointed and sharded parts of a model.
    assert names("a._orig_mod.w", "b.w") == {"a.w", "b.w"}
    assert names("_fsdp_wrapped_module.a._checkpoint_wrapped_module.w", "b") == {"a.w", "b"}
    # Names of a model that has a part called so.
    assert names("model.a", "head.b") == {"model.a", "head.b"}
    assert names("modules.a", "modules.b") == {"modules.a", "modules.b"}
    assert names("n_averaged", "module.a") == {"a"}  # AveragedModel
    with pytest.raises(ValueError, match="two of its names differ in a prefix only"):
        names("_orig_mod.a", "a")


@pytest.mark.parametrize(
    "nest",
    [
        lambda w: {"state_dict": {"model": w, "step": 3}, "epoch": 2},
        lambda w: {"model": {"state_dict": w}},
        lambda w: {"model_state_dict": w},
        lambda w: {"module": w},
        lambda w: {"model": {"module": {"state_dict": w}}},
    ],
)
def test_checkpoints_in_checkpoints(tmp_path, nest):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(nest({"w": np.ones(2)})))
    assert set(read_weights(path).arrays) == {"w"}


def test_a_checkpoint_that_holds_itself(tmp_path):
    content = {}
    content["model"] = content
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="no weights by name"):
        read_weights(tmp_path / "a.pkl")


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
def test_damage_and_other_things(tmp_path, content, message):
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_weights(path)
    assert str(error.value).startswith(f"{path} cannot be read as weights: ")


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
    "content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "{", "\xff"]
)
def test_an_index_that_is_none(tmp_path, content):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content.encode("latin1"))
    with pytest.raises(ValueError, match=str(path)):
        read_weights(path)
