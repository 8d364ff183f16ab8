"""The files of cached CLIP targets: look-up by id, and every way a folder can be the wrong one."""

import dataclasses
import json
import tracemalloc
from concurrent import futures

import numpy as np
import pytest

from data_pipelines import clip_target_cache as storage
from data_pipelines.clip_target_cache import ClipTargetCache, ClipTargetError, Shard
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
    return Shard(
        image_ids=np.array(image_ids),
        images=np.array([unit(i) for i in image_ids]).reshape(-1, WIDTH),
        segment_image_ids=np.array([i for i, _ in pairs], np.int64),
        segment_source_ids=np.array([s for _, s in pairs], np.int64),
        segments=np.array([unit(i, s) for i, s in pairs]).reshape(-1, WIDTH),
    )


@pytest.fixture
def folder(tmp_path):
    """Three shards of two images, two and one."""
    manifest = storage.make_manifest(IDENTITY, 2)
    assert manifest["num_shards"] == 3
    storage.claim_folder(tmp_path / "cache", manifest)
    ids = list(SEGMENTS)
    for index in range(3):
        shard = make_shard(ids[2 * index : 2 * index + 2])
        storage.write_shard(tmp_path / "cache", index, shard, manifest)
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
    stored = vectors.astype(storage.DTYPE).astype(np.float64)
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
    with pytest.raises(ClipTargetError, match=sentence):
        cache.lookup(np.array([8, image]), np.array([[2, 0], [0, segment]]))


def test_a_data_set_without_a_segment(tmp_path):
    manifest = storage.make_manifest({**IDENTITY, "num_images": 1}, 4)
    storage.claim_folder(tmp_path, manifest)
    storage.write_shard(tmp_path, 0, make_shard([41]), manifest)
    cache = ClipTargetCache(tmp_path, {})
    assert not cache.lookup(np.array([41]), np.zeros((1, 2)))["clip_segment_targets"].any()
    with pytest.raises(ClipTargetError, match="nothing of segment 7 of image 41"):
        cache.lookup(np.array([41]), np.array([[0, 7]]))


def changed(path, value):
    """IDENTITY with the field at a dotted path changed."""
    identity = json.loads(json.dumps(IDENTITY))
    *parents, last = path.split(".")
    node = identity
    for parent in parents:
        node = node[parent]
    node[last] = value
    return identity


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights", "00"),
        ("dataset", "00"),
        ("num_images", 6),
        ("crops.margin", 0.2),
        ("crops.fill", "none"),
        ("clip.image_size", 32),
    ],
)
def test_a_cache_of_something_else_is_refused_with_both_values(folder, field, value):
    old = dict(storage._flat(IDENTITY))[field]
    with pytest.raises(ClipTargetError) as raised:
        ClipTargetCache(folder, changed(field, value))
    assert f"with {field} = {old!r}, now it is {value!r}" in str(raised.value)
    # The command says the same before it computes anything, and leaves the manifest as it was.
    before = (folder / storage.MANIFEST).read_bytes()
    with pytest.raises(ClipTargetError, match=f"with {field} = "):
        storage.claim_folder(folder, storage.make_manifest(changed(field, value), 2))
    assert (folder / storage.MANIFEST).read_bytes() == before


def test_other_shards_and_another_format_are_refused(folder, monkeypatch):
    with pytest.raises(ClipTargetError, match="images_per_shard = 2, now it is 3"):
        storage.claim_folder(folder, storage.make_manifest(IDENTITY, 3))
    monkeypatch.setattr(storage, "FORMAT", 2)
    with pytest.raises(ClipTargetError, match="format = 1, now it is 2"):
        ClipTargetCache(folder, {})


def test_an_incomplete_cache_says_how_much_is_missing(folder):
    storage.shard_path(folder, 0).unlink()
    storage.shard_path(folder, 2).unlink()
    sentence = r"2 of 3 shards .* missing in .*, the first is 00000\.safetensors; run `python -m"
    with pytest.raises(ClipTargetError, match=sentence):
        ClipTargetCache(folder, IDENTITY)


def test_a_folder_without_a_manifest_or_with_a_broken_one(folder):
    (folder / storage.MANIFEST).write_text("{")
    with pytest.raises(ClipTargetError, match=r"manifest\.json is damaged"):
        ClipTargetCache(folder, IDENTITY)
    (folder / storage.MANIFEST).unlink()
    with pytest.raises(ClipTargetError, match="holds no cached CLIP targets.*cache_clip_targets"):
        ClipTargetCache(folder, IDENTITY)


def cut_header(content):
    return content[:20]


def cut_data(content):
    return content[:-1]


def flip_a_bit(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def empty(content):
    return b""


@pytest.mark.parametrize("harm", [cut_header, cut_data, flip_a_bit, empty])
def test_a_damaged_shard_is_named_with_the_remedy(folder, harm):
    path = storage.shard_path(folder, 1)
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(ClipTargetError, match="00001.safetensors .* is damaged .*; delete it and"):
        ClipTargetCache(folder, IDENTITY)


def test_a_shard_of_another_cache_or_under_another_name_is_told(folder):
    other = storage.make_manifest(changed("weights", "00"), 2)
    storage.write_shard(folder, 1, make_shard([41, 8]), other)
    with pytest.raises(ClipTargetError, match="00001.safetensors .* another cache"):
        ClipTargetCache(folder, IDENTITY)
    storage.shard_path(folder, 0).replace(storage.shard_path(folder, 1))
    storage.write_shard(folder, 0, make_shard([70, 3]), storage.make_manifest(IDENTITY, 2))
    with pytest.raises(ClipTargetError, match="00001.safetensors .* another cache"):
        ClipTargetCache(folder, IDENTITY)


def test_nothing_half_written_is_ever_in_place(folder, monkeypatch):
    """Killed while it writes, a shard is absent; what it left is removed the next time."""
    manifest = storage.make_manifest(IDENTITY, 2)
    storage.shard_path(folder, 1).unlink()

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        storage.write_shard(folder, 1, make_shard([41, 8]), manifest)
    monkeypatch.undo()
    assert not storage.shard_path(folder, 1).exists()
    assert len(list(folder.glob("*.partial"))) == 1
    assert storage.remove_partials(folder, [0, 2]) == 0  # those of others stay
    assert storage.remove_partials(folder, [1]) == 1
    assert not list(folder.glob("*.partial"))


def test_reading_holds_the_embeddings_once(tmp_path):
    images, width, per_shard = 4096, 128, 256
    identity = {**IDENTITY, "clip": {"embed_dim": width}, "num_images": images}
    manifest = storage.make_manifest(identity, per_shard)
    storage.claim_folder(tmp_path, manifest)
    rows = np.random.default_rng(0).normal(size=(per_shard, width))
    for index in range(manifest["num_shards"]):
        ids = np.arange(per_shard) + index * per_shard
        storage.write_shard(tmp_path, index, Shard(ids, rows, ids, 1 + ids, rows), manifest)
    size = 2 * images * width * 2
    tracemalloc.start()
    cache = ClipTargetCache(tmp_path, {})
    held, peak = tracemalloc.get_traced_memory()

    def look(start):
        return cache.lookup(np.arange(start, start + 8), 1 + np.arange(start, start + 8)[:, None])

    with futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(look, range(0, images, 8)))
    tracemalloc.stop()
    assert size <= held < 1.3 * size and peak < 1.6 * size
    np.testing.assert_array_equal(found[0]["clip_image_target"], found[32]["clip_image_target"])


def record(image_id, labels):
    ids = 10 * np.arange(1, len(labels) + 1)
    return ImageRecord(
        image_id, f"{image_id}.jpg", "", 30, 40, ids, np.array(labels), np.zeros(len(labels), bool)
    )


def test_the_data_sets_fingerprint():
    """Categories count, not the numbers that a split gives them; every change of a record shows."""
    records = [record(1, [0, 1]), record(2, [1])]
    plain = storage.dataset_identity(records, [7, 9])
    assert plain["num_images"] == 2
    renumbered = [record(1, [1, 0]), record(2, [0])]
    assert storage.dataset_identity(renumbered, [9, 7]) == plain
    others = [
        storage.dataset_identity(records, [7, 8]),
        storage.dataset_identity(records[::-1], [7, 9]),
        storage.dataset_identity(records[:1], [7, 9]),
    ]
    for change in (
        dict(image_id=3),
        dict(file_name="x.jpg"),
        dict(height=31),
        dict(source_ids=np.array([10, 21])),
    ):
        edited = [dataclasses.replace(records[0], **change), records[1]]
        others.append(storage.dataset_identity(edited, [7, 9]))
    assert len({other["dataset"] for other in others} | {plain["dataset"]}) == len(others) + 1


def test_nothing_to_embed():
    with pytest.raises(ClipTargetError, match="no image to train on"):
        storage.make_manifest({**IDENTITY, "num_images": 0}, 2)
    with pytest.raises(ValueError, match="images_per_shard is 0"):
        storage.make_manifest(IDENTITY, 0)
