"""The bank on disk: whole shards or none, extracted once, and never another run's queries."""

import hashlib
import json

import numpy as np
import pytest
import safetensors.numpy

from concat_jax.core.config import build
from concat_jax.core.files import FileError
from concat_jax.core.shard_store import ShardStore, StoreError
from concat_jax.experiment import batches
from concat_jax.experiment.batches import BankConfig, fill_bank

IDENTITY = {"stage": "con", "steps": 10, "images": 10}
BATCH, QUERIES, WIDTH = 2, 3, 4


class Extractor:
    """Image b of step s has queries s + b / 10 and labels s - 1; notes which steps it is given."""

    def __init__(self, kill_at=None, value=None):
        self.steps, self._kill_at, self._value = [], kill_at, value

    def __call__(self, batch):
        step = batch["step"]
        if step == self._kill_at:
            raise KeyboardInterrupt
        self.steps.append(step)
        images = (step + np.arange(BATCH) / 10)[:, None, None]
        queries = np.broadcast_to(images, (BATCH, QUERIES, WIDTH)).astype(np.float32)
        if self._value is not None:
            queries[0, 0, 0] = self._value
        return {"queries": queries, "query_labels": np.full((BATCH, QUERIES), step - 1, np.int32)}


def fill(folder, extract, *, identity=IDENTITY, num_batches=5, host=(0, 1), **config):
    """A bank of five steps in shards of two: 4, 4 and 2 images."""
    return fill_bank(
        folder,
        identity,
        extract,
        lambda steps: ({"step": step} for step in steps),
        num_batches=num_batches,
        batch_size=BATCH,
        config=BankConfig(**{"images_per_shard": 4, **config}),
        process_index=host[0],
        process_count=host[1],
    )


def expected(num_batches=5):
    values = [step + b / 10 for step in range(num_batches) for b in range(BATCH)]
    return np.array(values, np.float32)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


SHARDS = ["00000.safetensors", "00001.safetensors", "00002.safetensors"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_bank_is_read_back_from_disk_and_not_extracted_again(tmp_path, dtype):
    extract = Extractor()
    queries, labels, _ = fill(tmp_path / "bank", extract, dtype=dtype)
    rows = np.arange(10)
    assert queries.shape == (10, QUERIES, WIDTH) and queries.dtype == dtype
    assert labels.shape == (10, QUERIES) and labels.dtype == np.int16
    np.testing.assert_array_equal(queries[rows][:, 0, 0], expected().astype(dtype))
    np.testing.assert_array_equal(labels[:, 0], rows // 2 - 1)
    assert extract.steps == [0, 1, 2, 3, 4]
    assert names(tmp_path / "bank") == [*SHARDS, "bank.json"]
    again, again_labels, _ = fill(
        tmp_path / "bank", extract, identity=dict(reversed(IDENTITY.items())), dtype=dtype
    )
    assert len(extract.steps) == 5
    np.testing.assert_array_equal(again[rows], queries[rows])
    np.testing.assert_array_equal(again_labels, labels)


def test_the_queries_of_a_bank_are_mapped_and_not_read(tmp_path):
    """Else a bank of COCO's size would have to fit into memory."""
    queries, *_ = fill(tmp_path, Extractor())
    assert [len(part) for part in queries._parts] == [4, 4, 2]
    for part in queries._parts:
        assert isinstance(part, np.memmap) and not part.flags.writeable


def test_an_interrupted_extraction_goes_on_with_the_shards_that_are_missing(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt, match="^Stopped; what is finished of the query bank is"):
        fill(tmp_path, Extractor(kill_at=3))
    assert names(tmp_path) == [SHARDS[0], "bank.json"]
    first = (tmp_path / SHARDS[0]).stat().st_mtime_ns
    extract = Extractor()
    capsys.readouterr()
    queries, *_ = fill(tmp_path, extract)
    printed = capsys.readouterr().out
    assert "1 of 3 shards are finished, 2 to extract." in printed and " 10/10 " in printed
    assert extract.steps == [2, 3, 4]
    assert (tmp_path / SHARDS[0]).stat().st_mtime_ns == first
    np.testing.assert_array_equal(queries[np.arange(10)][:, 0, 0], expected())
    # A gap in the middle is filled alone.
    (tmp_path / SHARDS[1]).unlink()
    extract = Extractor()
    np.testing.assert_array_equal(fill(tmp_path, extract)[0][np.arange(10)][:, 0, 0], expected())
    assert extract.steps == [2, 3]


def test_a_full_disk_leaves_the_finished_shards(tmp_path, monkeypatch):
    write = ShardStore.write

    def full(store, index, arrays):
        if index:
            raise FileError("The disk is full.")
        write(store, index, arrays)

    monkeypatch.setattr(ShardStore, "write", full)
    with pytest.raises(FileError, match="^The disk is full.$"):
        fill(tmp_path, Extractor())
    assert names(tmp_path) == [SHARDS[0], "bank.json"]


def test_hosts_write_their_own_shards_and_read_all(tmp_path, monkeypatch):
    # One host after the other in one process: what is missing is what both saw at the start.
    agreed = np.ones(3, bool)
    monkeypatch.setattr(batches, "of_first_host", lambda missing: agreed)
    calls = []
    for host, own in ((1, [SHARDS[1]]), (0, SHARDS)):
        extract = Extractor()
        if host:  # it reads before the other has written
            with pytest.raises(StoreError, match="cannot be read: No such file"):
                fill(tmp_path, extract, host=(host, 2))
        else:
            queries, *_ = fill(tmp_path, extract, host=(host, 2))
        calls.append(extract.steps)
        assert [name for name in names(tmp_path) if name in SHARDS] == own
    assert calls == [[0, 1, 2, 3, 4]] * 2  # extraction is one program of both
    np.testing.assert_array_equal(queries[np.arange(10)][:, 0, 0], expected())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(identity={**IDENTITY, "steps": 11}), "with steps = 10, now it is 11; use ano"),
        (dict(dtype="float16"), "with dtype = 'float32', now it is 'float16'; use ano"),
    ],
)
def test_a_bank_of_another_run_is_refused_and_kept(tmp_path, changes, sentence):
    fill(tmp_path, Extractor())
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    with pytest.raises(ValueError, match=sentence):
        fill(tmp_path, Extractor(), **changes)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_a_bank_keeps_the_shards_that_it_was_begun_with(tmp_path):
    fill(tmp_path, Extractor())
    (tmp_path / SHARDS[1]).unlink()
    extract = Extractor()
    queries, *_ = fill(tmp_path, extract, images_per_shard=8)
    assert extract.steps == [2, 3] and names(tmp_path) == [*SHARDS, "bank.json"]
    np.testing.assert_array_equal(queries[np.arange(10)][:, 0, 0], expected())


def as_before(folder):
    """Rewrites a bank's shards as they were before they had checksums."""
    manifest = json.loads((folder / "bank.json").read_text())
    stamp = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    for index, name in enumerate(SHARDS):
        arrays = safetensors.numpy.load_file(folder / name)
        metadata = {"bank": stamp, "index": str(index)}
        (folder / name).write_bytes(safetensors.numpy.save(arrays, metadata))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_bank_of_before_is_read_and_filled_up(tmp_path, dtype):
    fill(tmp_path, Extractor(), dtype=dtype)
    as_before(tmp_path)
    (tmp_path / SHARDS[2]).unlink()
    extract = Extractor()
    queries, labels, _ = fill(tmp_path, extract, dtype=dtype)
    assert extract.steps == [4]
    np.testing.assert_array_equal(queries[np.arange(10)][:, 0, 0], expected().astype(dtype))
    np.testing.assert_array_equal(labels[:, 0], np.arange(10) // 2 - 1)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def exchange(path):
    path.write_bytes(path.with_name(SHARDS[0]).read_bytes())


def lose_a_query_as_before(path):
    as_before(path.parent)
    arrays = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
    arrays["queries"] = arrays["queries"][1:]
    safetensors.numpy.save_file(arrays, path, metadata)


@pytest.mark.parametrize("damage", [shorten, flip_a_bit, exchange, lose_a_query_as_before])
def test_a_damaged_shard_is_named(tmp_path, damage):
    fill(tmp_path, Extractor())
    damage(tmp_path / SHARDS[1])
    sentence = r"shard .*00001\.safetensors of the query bank is damaged \(.*delete it and start"
    with pytest.raises(StoreError, match=sentence):
        fill(tmp_path, Extractor())


def test_a_damaged_manifest_is_named(tmp_path):
    fill(tmp_path, Extractor())
    (tmp_path / "bank.json").write_text("{")
    with pytest.raises(StoreError, match=r"bank\.json is damaged .*delete the folder"):
        fill(tmp_path, Extractor())


@pytest.mark.parametrize(
    ("value", "dtype", "sentence"),
    [
        (np.nan, "float32", "are not finite for batch 0"),
        (np.inf, "float16", "are not finite for batch 0"),
        (7e4, "float16", "holds 70000, too large for float16; set config.bank.dtype"),
    ],
)
def test_a_query_that_cannot_be_stored_is_refused(tmp_path, value, dtype, sentence):
    with pytest.raises(ValueError, match=sentence):
        fill(tmp_path, Extractor(value=value), dtype=dtype)
    assert names(tmp_path) == ["bank.json"]


def test_settings_are_checked():
    with pytest.raises(ValueError, match="config.bank.dtype is 'bfloat16'; did you mean 'float"):
        BankConfig(dtype="bfloat16")
    with pytest.raises(ValueError, match="config.bank.images_per_shard is 0 and must be"):
        build(BankConfig, {"images_per_shard": 0}, "config.bank")
