"""The cache of CLIP targets: same numbers as online, resumable, shared by hosts."""

import jax
import numpy as np
import pytest

from concat_jax.core.files import FileError
from concat_jax.core.shard_store import StoreError
from concat_jax.experiment import clip_target_cache as filling
from concat_jax.stages import con
from concat_jax.stages.clip_targets import CropConfig, clip_targets
from concat_jax.training.sharding import make_mesh
from data_pipelines.clip_target_cache import ClipTargetCache
from data_pipelines.loader import SegmentationLoader
from data_pipelines.sources.registry import open_source
from data_pipelines.sources.source import ImageRecord
from tests.experiment.cached_world import (
    CLIP,
    CROPS,
    IDENTITY,
    PARAMS,
    fill,
    largest_distance,
    load,
    make_world,
    states,
    targets_of,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def small_canvas(monkeypatch):
    monkeypatch.setattr(filling, "SMALLEST_SIDE", 48)


@pytest.fixture(scope="module")
def filled(world, tmp_path_factory):
    """A cache of the whole world in shards of three images, by one device."""
    folder = tmp_path_factory.mktemp("caches") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "SMALLEST_SIDE", 48)
        report = fill(folder, load(world))
    assert report == filling.FillReport(skipped=0, written=4, bad_images=0)
    return folder


# Which images go together.


def record(number, segments, side=40):
    ids = np.arange(1, segments + 1)
    return ImageRecord(number, "", "", side, 30, ids, ids, ids > 0)


def test_buckets_are_few_and_hold_what_they_must(monkeypatch):
    monkeypatch.setattr(filling, "SMALLEST_SIDE", 640)
    sides = [filling.bucket_of(record(0, 1, n)).side for n in (3, 640, 641, 961, 1281, 2000)]
    assert sides == [640, 640, 960, 1280, 1920, 2560]
    rows = [filling.bucket_of(record(0, n)).num_segments for n in (0, 8, 9, 17, 300)]
    assert rows == [8, 8, 16, 32, 512]


@pytest.mark.parametrize(("per_shard", "devices"), [(256, 1), (256, 8), (7, 1), (1, 4)])
def test_a_plan_holds_every_image_once_and_shards_finish_in_turn(per_shard, devices):
    rng = np.random.default_rng(0)
    records = [record(i, int(n)) for i, n in enumerate(rng.gamma(2, 6, 1000))]
    shards = list(range(0, -(-1000 // per_shard), 2))  # as the first of two hosts
    plan = filling.plan_batches(records, shards, per_shard, 128 * devices, devices)
    wanted = [i for i in range(1000) if i // per_shard % 2 == 0]
    assert sorted(p for batch in plan for p in batch.positions) == wanted
    rows = 0
    last = {}
    for number, batch in enumerate(plan):
        size = filling.batch_rows(batch.bucket, pictures=128 * devices, multiple=devices)
        assert len(batch.positions) <= size and size % devices == 0
        assert size * batch.bucket.num_segments <= 128 * devices
        assert {filling.bucket_of(records[p]) for p in batch.positions} == {batch.bucket}
        rows += size
        last |= {p // per_shard: number for p in batch.positions}
    assert len(wanted) / rows > 0.6
    # A shard is whole long before the end: at most so many are open at once.
    open_shards = (
        1
        + 4
        * filling.batch_rows(filling.Bucket(48, 8), pictures=128 * devices, multiple=devices)
        // per_shard
    )
    for number, shard in enumerate(shards[:-open_shards]):
        later = shards[number + open_shards]
        first = next(
            n for n, b in enumerate(plan) if any(p // per_shard == later for p in b.positions)
        )
        assert last[shard] <= first + 3 * open_shards


# What is computed.


def test_cached_targets_are_those_of_the_padded_image(world, filled):
    data, online = load(world), {}
    function = jax.jit(
        lambda images, ids, sizes: clip_targets(
            CLIP, PARAMS, images, ids, 16, CROPS, image_size=sizes
        )
    )
    for example in data.eval_examples():
        height, width = example["image_size"]
        image, ids = np.full((1, 48, 48, 3), 128, np.uint8), np.zeros((1, 48, 48), np.uint8)
        image[0, :height, :width], ids[0, :height, :width] = (
            example["image"],
            example["segment_ids"],
        )
        whole, parts = jax.device_get(function(image, ids, example["image_size"][None]))
        online[int(example["image_id"]), 0] = whole[0]
        for segment, target in zip(example["segment_source_ids"], parts[0], strict=True):
            if segment:
                online[int(example["image_id"]), int(segment)] = target
    cached = targets_of(filled, data)
    assert largest_distance(cached, online) < 1e-6
    # Different segments are told apart by far more than that.
    numbers = np.stack(list(cached.values()))
    between = 1 - numbers @ numbers.T
    assert np.quantile(between[~np.eye(len(numbers), dtype=bool)], 0.01) > 1e-4


def test_eight_devices_give_what_one_gives(world, filled, tmp_path):
    data = load(world)
    fill(tmp_path, data, devices=8)
    assert largest_distance(targets_of(tmp_path, data), targets_of(filled, data)) < 1e-6


def test_two_hosts_fill_disjoint_shards_that_are_whole_together(world, filled, tmp_path):
    data = load(world)
    fill(tmp_path, data, process_index=0, process_count=2)
    first = states(tmp_path)
    assert set(first) == {"00000.safetensors", "00002.safetensors"}
    with pytest.raises(StoreError, match="2 of 4 shards .* missing"):
        ClipTargetCache(tmp_path, IDENTITY)
    report = fill(tmp_path, data, process_index=1, process_count=2)
    assert report == filling.FillReport(skipped=0, written=2, bad_images=0)
    assert first.items() < states(tmp_path).items()
    assert largest_distance(targets_of(tmp_path, data), targets_of(filled, data)) < 1e-6


def test_what_is_finished_is_not_touched_again(world, tmp_path, capsys):
    data = load(world)
    fill(tmp_path, data)
    (tmp_path / "00002.safetensors").unlink()
    stale = tmp_path / "00002.safetensors.partial"
    stale.write_bytes(b"half")
    before = states(tmp_path)
    capsys.readouterr()
    assert fill(tmp_path, data) == filling.FillReport(skipped=3, written=1, bad_images=0)
    assert "3 of 4 shards of this host are finished and skipped, 1 to do" in capsys.readouterr().out
    assert before.items() < states(tmp_path).items() and not stale.exists()
    # A complete cache needs no CLIP any more.
    assert fill(tmp_path, data, params=None) == filling.FillReport(4, 0, 0)


def test_a_folder_of_something_else_is_refused(world, filled):
    data, mesh, before = load(world), make_mesh(devices=1), states(filled)
    for identity, field in (
        ({**IDENTITY, "weights": "others"}, "weights"),
        ({**IDENTITY, **con.target_identity(CLIP, CropConfig(margin=0.3))}, "crops.margin"),
    ):
        with pytest.raises(StoreError, match=f"made with {field} = .*, now it is"):
            filling.fill_cache(filled, data, CLIP, PARAMS, CROPS, identity, mesh=mesh)
    with pytest.raises(StoreError, match="with num_images = 11, now it is 10"):
        fill(filled, load(world, unseen_images="drop"))
    with pytest.raises(StoreError, match="with images_per_shard = 3, now it is 4"):
        fill(filled, data, images_per_shard=4)
    assert states(filled) == before


def test_an_unreadable_image_stops_the_command_or_is_left_out(tmp_path):
    root = make_world(tmp_path / "world")
    (root / "train2017" / "5.jpg").write_bytes(b"no picture")
    with pytest.raises(FileError, match="5.jpg"):
        fill(tmp_path / "cache", load(root))
    report = fill(tmp_path / "cache", load(root), skip_bad=True)
    assert report.bad_images == 1
    cache = ClipTargetCache(tmp_path / "cache", IDENTITY)
    cache.lookup(np.array([6]), np.zeros((1, 1)))
    with pytest.raises(StoreError, match="nothing of image 5"):
        cache.lookup(np.array([5]), np.zeros((1, 1)))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(process_index=2, process_count=2), "process_index is 2 .* 0 to process_count - 1"),
        (dict(pictures_per_device=0), "pictures_per_device is 0"),
        (dict(images_per_shard=0), "images_per_shard is 0"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_written(
    world, tmp_path, options, sentence
):
    with pytest.raises(ValueError, match=sentence):
        fill(tmp_path / "cache", load(world), **options)
    assert not (tmp_path / "cache").exists()


# Real images.


@pytest.fixture(scope="module")
def mini(shared_data):
    return shared_data / "coco_panoptic_mini"


def test_online_and_cached_targets_agree_on_real_images(mini, tmp_path, monkeypatch):
    """Online as training does it without augmentation, of the images whose size it keeps."""
    monkeypatch.setattr(filling, "SMALLEST_SIDE", 640)
    options = dict(unseen_images="keep", image_size=640, max_segments=48, num_threads=4)
    source = open_source("coco_panoptic_zps", mini, "train2017")
    source.records = source.records[:32]
    data = SegmentationLoader(source, seed=0, augment="none", **options)
    fill(tmp_path, data, images_per_shard=64, pictures_per_device=64)
    cache = ClipTargetCache(tmp_path, IDENTITY)
    online = jax.jit(
        lambda images, ids, sizes: clip_targets(
            CLIP, PARAMS, images, ids, 48, CROPS, image_size=sizes
        )
    )
    kept = {r.image_id for r in data.records if max(r.height, r.width) == 640}
    distances, numbers = [], []
    for step in range(4):
        batch = data.batch(step, 8)
        cached = cache.lookup(batch["image_id"], batch["segment_source_ids"])
        whole, parts = online(batch["image"], batch["segment_ids"], batch["image_size"])
        rows = np.isin(batch["image_id"], list(kept))
        distances.extend(1 - (whole * cached["clip_image_target"]).sum(axis=-1)[rows])
        valid = (batch["segment_labels"] >= 0) & rows[:, None]
        distances.extend(1 - (parts * cached["clip_segment_targets"]).sum(axis=-1)[valid])
        numbers.append(cached["clip_segment_targets"][valid])
    numbers = np.concatenate(numbers)
    between = np.median(1 - numbers @ numbers.T)
    print(
        f"{len(distances)} targets of real images: cosine distance at most {max(distances):.1e}, "
        f"between different segments {between:.1e}"
    )
    assert len(numbers) > 150 and between > 1e-2
    assert max(distances) < 1e-3
