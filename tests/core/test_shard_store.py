"""Shards on disk: whole or absent, of their manifest or refused, and read as they were written."""

import errno
import os
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy

from concat_jax.core.files import FileError
from concat_jax.core.shard_store import ShardedRows, ShardStore, StoreError, StoreKind

KIND = StoreKind("squares", ("ids", "rows"), "start again")
MANIFEST = {"format": 1, "model": {"depth": 2, "names": ("a", "b")}, "dtype": "float16"}


def arrays(index, count=3):
    ids = 10 * index + np.arange(count)
    return {"rows": np.outer(ids, np.arange(4)).astype(np.float16), "ids": ids}


@pytest.fixture
def store(tmp_path):
    """A store with shards 0, 1 and 2, of 3, 3 and 2 rows."""
    store = ShardStore(tmp_path / "store", KIND, MANIFEST)
    store.claim()
    for index, count in enumerate((3, 3, 2)):
        store.write(index, arrays(index, count))
    return store


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_shards_are_read_as_they_were_written(store, tmp_path):
    assert files(tmp_path / "store") == [*(store.path(i).name for i in range(3)), "manifest.json"]
    again = ShardStore.found(tmp_path / "store", KIND, {"model": {"depth": 2}})
    assert again.manifest == store.manifest and again.stamp == store.stamp
    for index, count in enumerate((3, 3, 2)):
        shard = again.open(index)
        assert shard.keys() == arrays(0).keys()
        for name, array in arrays(index, count).items():
            assert shard[name].dtype == array.dtype
            np.testing.assert_array_equal(shard[name], array)
    whole = again.load(3)
    np.testing.assert_array_equal(whole["ids"], [0, 1, 2, 10, 11, 12, 20, 21])
    np.testing.assert_array_equal(whole["rows"][:, 1], whole["ids"])


def test_a_shard_is_mapped_and_not_read(store):
    """Else a query bank of COCO's size would have to fit into memory."""
    for array in store.open(0).values():
        assert isinstance(array, np.memmap) and not array.flags.writeable


def test_a_shard_without_rows(store):
    store.write(3, {name: array[:0] for name, array in arrays(0).items()})
    assert [array.shape for array in store.open(3).values()] == [(0,), (0, 4)]
    assert len(store.load(4)["ids"]) == 8


def test_loading_holds_everything_once(tmp_path):
    store = ShardStore(tmp_path, StoreKind("rows", ("rows",), "start again"), {})
    store.claim()
    for index in range(16):
        store.write(index, {"rows": np.full((1 << 16, 2), index, np.float32)})
    tracemalloc.start()
    whole = store.load(16)["rows"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert whole.nbytes <= peak < 1.2 * whole.nbytes
    np.testing.assert_array_equal(whole[:: 1 << 16, 0], np.arange(16))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dtype": "float32"}, "with dtype = 'float16', now it is 'float32'; use another folder"),
        ({"model": {"depth": 3, "names": ["a", "b"]}}, r"with model\.depth = 2, now it is 3;"),
        ({"more": 1}, "with more = None, now it is 1; .*or delete this one and start again"),
    ],
)
def test_a_store_of_something_else_is_refused_and_kept(store, tmp_path, changes, sentence):
    before = (tmp_path / "store" / "manifest.json").read_bytes()
    with pytest.raises(StoreError, match=f"store holds squares made {sentence}"):
        ShardStore(tmp_path / "store", KIND, {**MANIFEST, **changes}).claim()
    with pytest.raises(StoreError, match=sentence):
        ShardStore.found(tmp_path / "store", KIND, changes)
    assert (tmp_path / "store" / "manifest.json").read_bytes() == before


def test_a_field_that_the_new_manifest_lacks_is_a_difference(store, tmp_path):
    fewer = {name: value for name, value in MANIFEST.items() if name != "dtype"}
    with pytest.raises(StoreError, match="with dtype = 'float16', now it is None"):
        ShardStore(tmp_path / "store", KIND, fewer).claim()


def test_the_first_host_writes_the_manifest(tmp_path):
    store = ShardStore(tmp_path / "store", KIND, MANIFEST)
    store.claim(leads=False)
    assert not (tmp_path / "store").exists()
    store.claim()
    store.claim(leads=False)
    assert files(tmp_path / "store") == ["manifest.json"]


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", '"x"', "\xff"])
def test_a_damaged_manifest_is_named(store, tmp_path, content):
    (tmp_path / "store" / "manifest.json").write_bytes(content.encode("latin-1"))
    sentence = r"manifest\.json is damaged .*; delete the folder and start again"
    with pytest.raises(StoreError, match=sentence):
        store.claim()
    with pytest.raises(StoreError, match=sentence):
        ShardStore.found(tmp_path / "store", KIND, {})


def test_what_is_not_there_is_said(store, tmp_path):
    with pytest.raises(StoreError, match=r"does not hold squares \(it has no manifest.json\); st"):
        ShardStore.found(tmp_path, KIND, {})
    assert store.missing(range(5)) == [3, 4]
    store.path(1).unlink()
    with pytest.raises(StoreError, match=r"2 of 4 shards .* missing in .* 00001\.saf.*; start ag"):
        store.load(4)
    with pytest.raises(
        StoreError, match="00001.safetensors of squares cannot be read: No such fil"
    ):
        store.open(1)


def test_every_flipped_byte_and_every_cut_is_found(store):
    path, content = store.path(1), store.path(1).read_bytes()
    expected = arrays(1)
    unharmed = 0
    for place in range(len(content)):
        flipped = bytes([content[place] ^ 1])
        for harmed in (content[:place], content[:place] + flipped + content[place + 1 :]):
            path.write_bytes(harmed)
            try:
                found = store.open(1)
            except StoreError as error:
                assert "00001.safetensors" in str(error) and "delete it and start" in str(error)
                continue
            # The name of a checksum may be hit; then what it would have guarded is whole.
            unharmed += 1
            for name, array in expected.items():
                assert found[name].dtype == array.dtype
                np.testing.assert_array_equal(found[name], array)
    assert unharmed < 20


def test_another_stores_shard_or_another_number_is_told(store, tmp_path):
    other = ShardStore(tmp_path / "other", KIND, {**MANIFEST, "dtype": "float32"})
    other.claim()
    other.write(1, arrays(1))
    other.path(1).replace(store.path(1))
    with pytest.raises(StoreError, match=r"00001\..* does not belong to manifest.json beside it"):
        store.open(1)
    store.path(0).replace(store.path(1))
    with pytest.raises(StoreError, match=r"00001\..* \(it is shard 0 under another name\); delete"):
        store.open(1)


def test_a_shard_of_other_arrays_is_told(store):
    store.write(0, {"rows": np.zeros((2, 4), np.float16)})
    with pytest.raises(StoreError, match=r"\(it holds rows float16\[2, 4\]\); delete it"):
        store.open(0)


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_a_shard_that_is_not_finished_is_not_there(store, tmp_path, monkeypatch, fault):
    store.path(1).unlink()

    def stop(descriptor):
        raise fault

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises((KeyboardInterrupt, FileError)) as raised:
        store.write(1, arrays(1))
    if isinstance(fault, OSError):
        assert str(raised.value) == f"{store.path(1)} cannot be written: No space left."
    monkeypatch.undo()
    assert not [name for name in files(tmp_path / "store") if name.startswith("00001")]
    store.write(1, arrays(1))
    assert store.missing(range(3)) == []


def test_what_a_killed_process_left_of_a_shard_is_removed_with_the_next(store, tmp_path):
    left = ["00001.safetensors.0a1b.partial", "00001.safetensors.partial"]
    others = "00002.safetensors.0a1b.partial"
    for name in (*left, others):
        (tmp_path / "store" / name).write_bytes(b"half")
    store.write(1, arrays(1))
    assert [name for name in files(tmp_path / "store") if "partial" in name] == [others]


@pytest.mark.parametrize("stamp", ["manifest", "bank"])
def test_shards_from_before_are_read(store, stamp):
    """Cached targets of the first format had no list of arrays, query banks no checksum either."""
    metadata = {stamp: store.stamp, "index": "0"}
    path = store.path(0)
    path.write_bytes(safetensors.numpy.save(arrays(0), metadata))
    np.testing.assert_array_equal(store.open(0)["rows"], arrays(0)["rows"])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match="00000.safetensors .* is damaged"):
        store.open(0)
    path.write_bytes(safetensors.numpy.save(arrays(0), {**metadata, stamp: "0" * 64}))
    with pytest.raises(StoreError, match="does not belong to"):
        store.open(0)


def test_rows_of_parts_are_those_of_the_whole():
    whole = np.random.default_rng(0).normal(size=(9, 5, 2)).astype(np.float32)
    rows = ShardedRows([whole[:4], whole[4:8], whole[8:]])
    assert len(rows) == 9 and rows.shape == whole.shape and rows.dtype == whole.dtype
    index = np.array([8, 0, 3, 4, 4, 7])
    np.testing.assert_array_equal(rows[index], whole[index])
    images, numbers = np.array([[8, 1], [4, 1]]), np.array([[0, 4], [3, 4]])
    np.testing.assert_array_equal(rows[images, numbers], whole[images, numbers])
    assert rows[np.zeros(0, int)].shape == (0, 5, 2)
    for outside in (-1, 9):
        with pytest.raises(IndexError, match="not among 9"):
            rows[np.array([0, outside])]
