"""Cached CLIP targets: look-up by id, and what a folder must have been made of."""

import dataclasses
import hashlib
import json
import zlib

import numpy as np
import pytest
import safetensors.numpy

from concat_jax.core.shard_store import StoreError
from data_pipelines.clip_target_cache import (
    DTYPE,
    ClipTargetCache,
    dataset_identity,
    find_targets,
    target_store,
)
from data_pipelines.sources.source import ImageRecord

WIDTH = 6
# Image id -> segment ids. Ids are neither dense nor in order, and segment ids repeat across images.
SEGMENTS = {70: [5, 900], 3: [900, 16_777_215, 1], 41: [], 8: [2], 2**40: [5]}
IDENTITY = {
    "weights": "ab" * 32,
    "clip": {"embed_dim": WIDTH, "image_size": 16},
    "crops": {"margin": 0.1, "fill": "mean"},
    "num_images": len(SEGMENTS),
    "dataset": "cd" * 32,
}


def unit(*key):
    vector = np.random.default_rng(key).normal(size=WIDTH)
    return vector / np.linalg.norm(vector)


def make_shard(image_ids):
    pairs = [(i, s) for i in image_ids for s in SEGMENTS[i]]
    return {
        "image_ids": np.array(image_ids),
        "images": np.array([unit(i) for i in image_ids], DTYPE).reshape(-1, WIDTH),
        "segment_image_ids": np.array([i for i, _ in pairs], np.int64),
        "segment_source_ids": np.array([s for _, s in pairs], np.int64),
        "segments": np.array([unit(i, s) for i, s in pairs], DTYPE).reshape(-1, WIDTH),
    }


@pytest.fixture
def store(tmp_path):
    """Three shards of two images, two and one."""
    store = target_store(tmp_path / "cache", IDENTITY, 2)
    assert store.manifest["num_shards"] == 3
    store.claim()
    ids = list(SEGMENTS)
    for index in range(3):
        store.write(index, make_shard(ids[2 * index : 2 * index + 2]))
    return store


@pytest.fixture
def folder(store, tmp_path):
    return tmp_path / "cache"


def test_targets_are_found_by_both_ids(folder):
    cache = ClipTargetCache(folder, IDENTITY)
    images = np.array([8, 70, 41, 2**40, 3])
    segments = np.array([[2, 0, 0], [900, 0, 5], [0, 0, 0], [5, 0, 0], [1, 900, 16_777_215]])
    found = cache.lookup(images, segments)
    whole, parts = found["clip_image_target"], found["clip_segment_targets"]
    assert whole.dtype == parts.dtype == np.float32
    assert whole.shape == (5, WIDTH) and parts.shape == (5, 3, WIDTH)
    for b, image in enumerate(images.tolist()):
        assert 1 - whole[b] @ unit(image) < 1e-6
        for g, segment in enumerate(segments[b].tolist()):
            if segment:
                assert 1 - parts[b, g] @ unit(image, segment) < 1e-6
            else:
                assert not parts[b, g].any()
    np.testing.assert_allclose(np.linalg.norm(whole, axis=-1), 1, rtol=1e-6)


def test_a_batch_keeps_its_fields_and_gains_two(folder):
    batch = {"image_id": np.array([8]), "segment_source_ids": np.array([[2, 0]]), "other": 7}
    added = ClipTargetCache(folder, {}).add_to(batch)
    assert set(added) - set(batch) == {"clip_image_target", "clip_segment_targets"}
    assert added["other"] == 7


def test_half_precision_turns_an_embedding_of_clips_width_by_less_than_a_millionth():
    vectors = np.random.default_rng(0).normal(size=(1000, 512))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    stored = vectors.astype(DTYPE).astype(np.float64)
    stored /= np.linalg.norm(stored, axis=-1, keepdims=True)
    distance = 1 - (vectors * stored).sum(axis=-1)
    print(f"cosine distance by rounding: at most {distance.max():.1e}")
    assert 0 < distance.max() < 1e-6


@pytest.mark.parametrize(
    ("image", "segment", "sentence"),
    [
        (4, 0, "nothing of image 4;"),
        (2**41, 0, f"nothing of image {2**41};"),
        (70, 1, "nothing of segment 1 of image 70;"),  # of image 3
        (41, 5, "nothing of segment 5 of image 41;"),  # an image without segments
        (70, 16_777_216 + 5, "nothing of segment 16777221 of image 70;"),
        (70, -1, "nothing of segment -1 of image 70;"),
    ],
)
def test_what_is_not_there_is_named(folder, image, segment, sentence):
    cache = ClipTargetCache(folder, IDENTITY)
    with pytest.raises(StoreError, match=sentence):
        cache.lookup(np.array([8, image]), np.array([[2, 0], [0, segment]]))


def test_a_data_set_without_a_segment(tmp_path):
    store = target_store(tmp_path, {**IDENTITY, "num_images": 1}, 4)
    store.claim()
    store.write(0, make_shard([41]))
    cache = ClipTargetCache(tmp_path, {})
    assert not cache.lookup(np.array([41]), np.zeros((1, 2)))["clip_segment_targets"].any()
    with pytest.raises(StoreError, match="nothing of segment 7 of image 41"):
        cache.lookup(np.array([41]), np.array([[0, 7]]))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"weights": "00"}, f"with weights = '{'ab' * 32}', now it is '00'"),
        ({"num_images": 6}, "with num_images = 5, now it is 6"),
        ({"crops": {"margin": 0.2, "fill": "mean"}}, r"with crops\.margin = 0\.1, now it is 0\.2"),
        ({"clip": {"image_size": 32}}, r"with clip\.image_size = 16, now it is 32"),
    ],
)
def test_a_cache_of_something_else_is_refused_with_both_values(folder, change, sentence):
    for look in (ClipTargetCache, find_targets):
        with pytest.raises(StoreError, match=f"holds cached CLIP targets made {sentence}; use ano"):
            look(folder, {**IDENTITY, **change})
    # The command says the same before it computes anything.
    with pytest.raises(StoreError, match=sentence.partition(",")[0]):
        target_store(folder, {**IDENTITY, **change}, 2).claim()


def test_other_shards_are_refused_and_missing_ones_counted(folder, store):
    with pytest.raises(StoreError, match="images_per_shard = 2, now it is 3"):
        target_store(folder, IDENTITY, 3).claim()
    store.path(0).unlink()
    store.path(2).unlink()
    sentence = r"2 of 3 shards .* missing in .*, the first is 00000\.safetensors; run `python -m"
    with pytest.raises(StoreError, match=sentence):
        ClipTargetCache(folder, IDENTITY)


@pytest.mark.parametrize("number", [None, "3", 0, {}])
def test_a_manifest_without_a_number_of_shards_is_damaged(folder, number):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "num_shards": number}))
    with pytest.raises(StoreError, match=r"manifest\.json is damaged \(num_shards is .*delete the"):
        ClipTargetCache(folder, {})


def test_a_cache_of_before_is_read(folder, store):
    """As it was written before shards said what arrays they hold: sums of sorted arrays alone."""
    for index in range(3):
        arrays, crc = dict(store.open(index)), 0
        for name in sorted(arrays):
            crc = zlib.crc32(arrays[name].tobytes(), crc)
        content = json.dumps(store.manifest, sort_keys=True).encode()
        metadata = {
            "manifest": hashlib.sha256(content).hexdigest(),
            "index": str(index),
            "crc32": f"{crc:08x}",
        }
        store.path(index).write_bytes(safetensors.numpy.save(arrays, metadata))
    found = ClipTargetCache(folder, IDENTITY).lookup(np.array([3]), np.array([[900]]))
    assert 1 - found["clip_segment_targets"][0, 0] @ unit(3, 900) < 1e-6


def record(image_id, labels):
    ids = 10 * np.arange(1, len(labels) + 1)
    return ImageRecord(
        image_id, f"{image_id}.jpg", "", 30, 40, ids, np.array(labels), np.zeros(len(labels), bool)
    )


def test_the_data_sets_fingerprint():
    """Categories count, not the numbers that a split gives them; every change of a record shows."""
    records = [record(1, [0, 1]), record(2, [1])]
    plain = dataset_identity(records, [7, 9])
    assert plain["num_images"] == 2
    renumbered = [record(1, [1, 0]), record(2, [0])]
    assert dataset_identity(renumbered, [9, 7]) == plain
    others = [
        dataset_identity(records, [7, 8]),
        dataset_identity(records[::-1], [7, 9]),
        dataset_identity(records[:1], [7, 9]),
    ]
    for change in (
        dict(image_id=3),
        dict(file_name="x.jpg"),
        dict(height=31),
        dict(source_ids=np.array([10, 21])),
    ):
        edited = [dataclasses.replace(records[0], **change), records[1]]
        others.append(dataset_identity(edited, [7, 9]))
    assert len({other["dataset"] for other in others} | {plain["dataset"]}) == len(others) + 1


def test_nothing_to_embed(tmp_path):
    with pytest.raises(ValueError, match="no image to train on"):
        target_store(tmp_path, {**IDENTITY, "num_images": 0}, 2)
    with pytest.raises(ValueError, match="images_per_shard is 0"):
        target_store(tmp_path, IDENTITY, 0)
