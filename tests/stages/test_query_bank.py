"""The query bank: the same batch whenever asked, and never another run's queries."""

import numpy as np
import pytest

from concat_jax.stages.query_bank import QueryBank, fill_bank

IDENTITY = {"stage": "con", "steps": 10, "images": 6}


def bank(count=20, *, batch_size=8, seed=0):
    rows = np.arange(count)
    queries = np.broadcast_to(rows[:, None, None], (count, 3, 4)).astype(np.float32)
    labels = np.broadcast_to(rows[:, None] - 1, (count, 3)).astype(np.int16)
    return QueryBank(queries, labels, batch_size=batch_size, seed=seed)


def test_a_batch_depends_on_seed_and_step_only():
    first, second = bank(), bank()
    for step in (3, 0, 3):  # asked out of order and again
        np.testing.assert_array_equal(first.batch(step)["queries"], second.batch(step)["queries"])
    batch = first.batch(3)
    assert not np.array_equal(batch["queries"], first.batch(4)["queries"])
    assert not np.array_equal(batch["queries"], bank(seed=1).batch(3)["queries"])


def test_a_batch_holds_different_rows_with_their_own_labels():
    batch = bank().batch(0)
    assert batch["queries"].shape == (8, 3, 4) and batch["queries"].dtype == np.float32
    assert batch["query_labels"].shape == (8, 3) and batch["query_labels"].dtype == np.int32
    rows = batch["queries"][:, 0, 0]
    assert len(set(rows)) == 8
    np.testing.assert_array_equal(batch["query_labels"][:, 0], rows - 1)  # -1 stays -1
    seen = {row for step in range(30) for row in bank().batch(step)["queries"][:, 0, 0]}
    assert seen == set(range(20))


def test_a_bank_smaller_than_a_batch_is_refused():
    assert bank(8, batch_size=8).batch(0)["queries"].shape == (8, 3, 4)
    with pytest.raises(ValueError, match="holds 7 images, fewer than the batch size 8"):
        bank(7, batch_size=8)


class Extractor:
    """Counts how often it is asked; a batch of step s holds queries s and labels s - 1."""

    def __init__(self):
        self.calls = 0

    def __call__(self, batch):
        self.calls += 1
        step = batch["step"]
        return np.full((2, 3, 4), step, np.float32), np.full((2, 3), step - 1, np.int32)


def fill(path, extract, identity=IDENTITY, num_batches=3):
    return fill_bank(path, identity, extract, lambda step: {"step": step}, num_batches)


def test_the_file_is_read_back_and_not_extracted_again(tmp_path):
    path, extract = tmp_path / "bank.npz", Extractor()
    queries, labels = fill(path, extract)
    assert queries.shape == (6, 3, 4) and queries.dtype == np.float32
    assert labels.shape == (6, 3) and labels.dtype == np.int16
    np.testing.assert_array_equal(queries[:, 0, 0], [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(labels[:, 0], [-1, -1, 0, 0, 1, 1])
    assert extract.calls == 3
    again_queries, again_labels = fill(path, extract, dict(reversed(IDENTITY.items())))
    assert extract.calls == 3
    np.testing.assert_array_equal(again_queries, queries)
    np.testing.assert_array_equal(again_labels, labels)
    assert again_labels.dtype == np.int16
    assert [p.name for p in tmp_path.iterdir()] == ["bank.npz"]


def test_a_bank_of_another_run_is_refused_and_kept(tmp_path):
    path = tmp_path / "bank.npz"
    fill(path, Extractor())
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"bank\.npz was made from .*10.*not from .*11.*delete"):
        fill(path, Extractor(), {**IDENTITY, "steps": 11})
    assert path.read_bytes() == before


def test_a_broken_extraction_leaves_no_bank(tmp_path):
    def broken(batch):
        if batch["step"] == 2:
            raise KeyboardInterrupt
        return Extractor()(batch)

    path = tmp_path / "bank.npz"
    with pytest.raises(KeyboardInterrupt):
        fill(path, broken)
    assert not path.exists()
    assert len(fill(path, Extractor())[0]) == 6
