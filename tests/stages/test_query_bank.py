"""Batches of the query bank: the same whenever asked, and a memory of every class."""

import numpy as np
import pytest

from concat_jax.core.shard_store import ShardedRows
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.stages.queries import QueryBank, missing_classes


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


# Class 0: 9 queries, class 2: 2, classes 1 and 3: none. A query is ten times its class, plus a part
# that is its own.
MEMORY_LABELS = np.full((6, 3), -1, np.int16)
MEMORY_LABELS[:4, :2] = 0
MEMORY_LABELS[4, :] = [2, -1, 0]
MEMORY_LABELS[5, :] = [-1, 2, -1]
MEMORY_QUERIES = (10.0 * MEMORY_LABELS + np.arange(18).reshape(6, 3) / 100)[..., None]
MEMORY_QUERIES = MEMORY_QUERIES.astype(np.float32)


def memory_bank(size=4, **options):
    options = {"batch_size": 2, "seed": 0, "num_classes": 4, **options}
    return QueryBank(MEMORY_QUERIES, MEMORY_LABELS, memory_per_class=size, **options)


def test_a_memory_holds_queries_of_every_class_that_has_one():
    batch = memory_bank().batch(3)
    memory, valid = batch["memory_queries"], batch["memory_valid"]
    assert memory.shape == (4, 4, 1) and memory.dtype == np.float32
    assert valid.dtype == bool
    np.testing.assert_array_equal(valid, np.array([1, 0, 1, 0], bool)[:, None].repeat(4, 1))
    assert not memory[[1, 3]].any()
    own = {k: set(MEMORY_QUERIES[MEMORY_LABELS == k][:, 0]) for k in (0, 2)}
    # Nine to draw four from, without replacement; two, with it.
    assert len(set(memory[0, :, 0])) == 4 and set(memory[0, :, 0]) <= own[0]
    assert set(memory[2, :, 0]) <= own[2]
    drawn = {k: set() for k in own}
    for step in range(40):
        for k in own:
            drawn[k] |= set(memory_bank().batch(step)["memory_queries"][k, :, 0])
    assert drawn == own


def test_a_memory_depends_on_seed_and_step_only_and_leaves_the_batch_as_it_was():
    for step in (5, 1, 5):
        first, second = memory_bank().batch(step), memory_bank().batch(step)
        np.testing.assert_array_equal(first["memory_queries"], second["memory_queries"])
        plain = QueryBank(MEMORY_QUERIES, MEMORY_LABELS, batch_size=2, seed=0).batch(step)
        assert set(plain) == {"queries", "query_labels"}
        for name, value in plain.items():
            np.testing.assert_array_equal(first[name], value)
    drawn = [memory_bank(seed=s).batch(t)["memory_queries"] for s, t in ((0, 1), (0, 2), (1, 1))]
    assert not np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])


def test_hosts_share_a_memory_in_rows_that_devices_can_split():
    whole = memory_bank(num_classes=5, batch_size=4).batch(2)
    assert whole["memory_queries"].shape == (8, 4, 1)
    assert not whole["memory_valid"][5:].any()
    hosts = [
        memory_bank(num_classes=5, batch_size=4, process_index=i, process_count=2).batch(2)
        for i in range(2)
    ]
    for name, value in whole.items():
        np.testing.assert_array_equal(np.concatenate([host[name] for host in hosts]), value)
        assert len(hosts[0][name]) == len(value) // 2


def test_rows_in_shards_of_half_precision_give_the_same_batches():
    halves = MEMORY_QUERIES.astype(np.float16)
    shards = ShardedRows([halves[:1], halves[1:5], halves[5:]])
    options = dict(batch_size=2, seed=0, num_classes=4, memory_per_class=4)
    for step in range(5):
        ours = QueryBank(shards, MEMORY_LABELS, **options).batch(step)
        theirs = QueryBank(halves.astype(np.float32), MEMORY_LABELS, **options).batch(step)
        assert set(ours) == set(theirs) and len(ours) == 4
        for name, value in theirs.items():
            assert ours[name].dtype == value.dtype
            np.testing.assert_array_equal(ours[name], value)


def test_missing_classes_are_named_and_only_a_bank_without_any_is_refused():
    names = tuple("abcdefghijklmno")
    vocabulary = Vocabulary(names, (True,) * 15, (True,) * 14 + (False,), tuple(range(15)))
    labels = np.array([[0, -1], [3, 1]], np.int16)
    sentence = missing_classes(labels, vocabulary)
    assert "2 images hold no real query of 11 of 14 seen classes" in sentence
    assert "(c, e, f, g, h, i, j, k, l, m, …)" in sentence
    assert missing_classes(np.arange(14).reshape(7, 2), vocabulary) == ""
    for nothing in (np.full((2, 2), -1), np.array([[14, -1], [-1, -1]])):  # 14 is unseen
        with pytest.raises(ValueError, match="2 images hold no segment of a seen class"):
            missing_classes(nothing, vocabulary)
