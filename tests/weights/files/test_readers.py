"""Files of weights, read without running them and without torch."""

import json
import pickle

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from concat_jax.weights.files.readers import read_weights
from tests.weights.files.torch_saves import FORMATS, save

torch = pytest.importorskip("torch")


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


PREFIXES = ("module.", "_orig_mod.", "model.", "_orig_mod.module.", "model.model.", "state_dict.")
PREFIXES += ("network.", "net.")


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
    # A training class holds its losses beside the model, and so may a model.
    assert names("model.a", "model.b", "criterion.empty_weight", "val_metrics.n") == {"a", "b"}
    assert read_weights(path).other == ("criterion.empty_weight", "val_metrics.n")
    assert names("module.model.a", "module.criterion.w", "loss.w") == {"a"}
    assert names("model.a", "b", "criterion.w") == {"model.a", "b", "criterion.w"}
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
