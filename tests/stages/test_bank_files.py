"""The bank on disk: whole shards or none, extracted once, and never another run's queries."""

import os

import numpy as np
import pytest
import safetensors.numpy

from concat_jax.stages import bank_files
from concat_jax.stages.bank_files import BankConfig, ShardedRows, bank_bytes, fill_bank

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
        return queries, np.full((BATCH, QUERIES), step - 1, np.int32)


def fill(folder, extract, *, identity=IDENTITY, num_batches=5, host=(0, 1), told=None, **config):
    """A bank of five steps in shards of two: 4, 4 and 2 images."""
    said = [] if told is None else told

    def progress(done, total):
        said.append((done, total))
        return said.append

    return fill_bank(
        folder,
        identity,
        extract,
        lambda steps: ({"step": step} for step in steps),
        num_batches=num_batches,
        batch_size=BATCH,
        config=BankConfig(**{"images_per_shard": 4, **config}),
        progress=progress,
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
    queries, labels = fill(tmp_path / "bank", extract, dtype=dtype)
    rows = np.arange(10)
    assert queries.shape == (10, QUERIES, WIDTH) and queries.dtype == dtype
    assert labels.shape == (10, QUERIES) and labels.dtype == np.int16
    np.testing.assert_array_equal(queries[rows][:, 0, 0], expected().astype(dtype))
    np.testing.assert_array_equal(labels[:, 0], rows // 2 - 1)
    assert extract.steps == [0, 1, 2, 3, 4]
    assert names(tmp_path / "bank") == [*SHARDS, "bank.json"]
    # As many bytes as is said, but for the headers.
    sizes = [(tmp_path / "bank" / name).stat().st_size for name in SHARDS]
    assert 0 < sum(sizes) - bank_bytes(10, QUERIES, WIDTH, dtype) < 3 * 400

    again, again_labels = fill(
        tmp_path / "bank", extract, identity=dict(reversed(IDENTITY.items())), dtype=dtype
    )
    assert len(extract.steps) == 5
    np.testing.assert_array_equal(again[rows], queries[rows])
    np.testing.assert_array_equal(again_labels, labels)


def test_coco_takes_two_gigabytes():
    size = bank_bytes(44_912, 100, 256, "float16")
    assert size == 44_912 * 100 * 256 * 2 + 44_912 * 100 * 2
    assert bank_bytes(44_912, 100, 256, "float32") > 1.99 * size


def test_the_queries_of_a_bank_are_mapped_and_not_read(tmp_path, monkeypatch):
    """Else a bank of COCO's size would have to fit into memory."""
    mapped = []

    class Memmap(np.memmap):
        def __array_finalize__(self, source):
            super().__array_finalize__(source)
            if source is None:
                mapped.append(self)

    monkeypatch.setattr(bank_files.np, "memmap", Memmap)
    queries, _ = fill(tmp_path, Extractor())
    assert [len(part) for part in mapped] == [4, 4, 2]
    assert all(a is b for a, b in zip(queries._parts, mapped, strict=True))
    assert not mapped[0].flags.writeable


def test_a_killed_extraction_goes_on_with_the_shards_that_are_missing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, Extractor(kill_at=3))
    assert names(tmp_path) == [SHARDS[0], "bank.json"]
    first = (tmp_path / SHARDS[0]).stat().st_mtime_ns
    extract, told = Extractor(), []
    queries, _ = fill(tmp_path, extract, told=told)
    assert extract.steps == [2, 3, 4]
    assert (tmp_path / SHARDS[0]).stat().st_mtime_ns == first
    np.testing.assert_array_equal(queries[np.arange(10)][:, 0, 0], expected())
    assert told == [(4, 10), 8, 10]  # images that are done when it starts, and after each shard
    # A gap in the middle is filled alone.
    (tmp_path / SHARDS[1]).unlink()
    extract = Extractor()
    np.testing.assert_array_equal(fill(tmp_path, extract)[0][np.arange(10)][:, 0, 0], expected())
    assert extract.steps == [2, 3]


def interrupt(*args):
    raise KeyboardInterrupt


def test_a_kill_while_writing_leaves_no_half_shard_under_its_name(tmp_path, monkeypatch):
    fill(tmp_path, Extractor(), num_batches=5)
    (tmp_path / SHARDS[1]).unlink()
    monkeypatch.setattr(bank_files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, Extractor())
    assert not (tmp_path / SHARDS[1]).exists()
    monkeypatch.undo()
    fill(tmp_path, Extractor())
    assert names(tmp_path) == [*SHARDS, "bank.json"]


def test_hosts_write_their_own_shards_and_read_all(tmp_path, monkeypatch):
    # One host after the other in one process: what is missing is what both saw at the start.
    monkeypatch.setattr(bank_files, "open_bank", lambda *args: (None, None))
    agreed = np.ones(3, bool)
    monkeypatch.setattr(bank_files.multihost_utils, "broadcast_one_to_all", lambda x: agreed)
    calls = []
    for host, own in ((0, [SHARDS[0], SHARDS[2]]), (1, SHARDS)):
        extract = Extractor()
        fill(tmp_path, extract, host=(host, 2))
        calls.append(extract.steps)
        assert names(tmp_path) == [*own, "bank.json"]
    assert calls == [[0, 1, 2, 3, 4]] * 2  # extraction is one program of both
    monkeypatch.undo()
    alone = Extractor()
    queries, _ = fill(tmp_path, alone)
    assert alone.steps == []
    np.testing.assert_array_equal(queries[np.arange(10)][:, 0, 0], expected())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(identity={**IDENTITY, "steps": 11}), "was made from steps 10, not from 11; delete"),
        (dict(dtype="float16"), "was made from dtype 'float32', not from 'float16'; delete"),
        (dict(images_per_shard=8), "was made from images_per_shard 4, not from 8; delete"),
    ],
)
def test_a_bank_of_another_run_is_refused_and_kept(tmp_path, changes, sentence):
    fill(tmp_path, Extractor())
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    with pytest.raises(ValueError, match=sentence):
        fill(tmp_path, Extractor(), **changes)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def shorten(path):
    os.truncate(path, path.stat().st_size - 1)


def exchange(path):
    path.write_bytes(path.with_name(SHARDS[0]).read_bytes())


def lose_a_query(path):
    arrays = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
    arrays["queries"] = arrays["queries"][1:]
    safetensors.numpy.save_file(arrays, path, metadata)


@pytest.mark.parametrize("damage", [shorten, exchange, lose_a_query])
def test_a_damaged_shard_is_named(tmp_path, damage):
    fill(tmp_path, Extractor())
    damage(tmp_path / SHARDS[1])
    with pytest.raises(ValueError, match=r"shard .*00001\.safetensors .* cannot be read \(.*delet"):
        fill(tmp_path, Extractor())


@pytest.mark.parametrize("content", ["", "{", "[1]", "3"])
def test_a_damaged_manifest_is_named(tmp_path, content):
    fill(tmp_path, Extractor())
    (tmp_path / "bank.json").write_text(content)
    with pytest.raises(ValueError, match=r"bank\.json is damaged .*delete the folder"):
        fill(tmp_path, Extractor())


def test_a_bank_of_no_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is to hold no image; set bank_images"):
        fill(tmp_path, Extractor(), num_batches=0)


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
        BankConfig(images_per_shard=0)


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
