"""The command that caches CLIP targets: same numbers as online, resumable, shared by hosts."""

import functools
import json
import pathlib
import threading

import jax
import numpy as np
import optax
import pytest
from PIL import Image

from concat_jax import cache_clip_targets as command
from concat_jax.core.files import FileError
from concat_jax.core.shard_store import ShardStore, StoreError
from concat_jax.experiment import clip_target_cache as filling
from concat_jax.experiment import experiment as run_module
from concat_jax.experiment.class_embeddings import ClassEmbeddings
from concat_jax.experiment.experiment import Experiment
from concat_jax.experiment.parameters import Parameters
from concat_jax.models.clip import make_clip
from concat_jax.stages import con
from concat_jax.stages.clip_targets import CropConfig, clip_targets
from concat_jax.training.checkpoints import StageCheckpoints
from concat_jax.training.optimizer import path_name
from concat_jax.training.sharding import make_mesh
from concat_jax.training.state import TrainState
from configs import coco_zps, demo_zps
from data_pipelines.clip_target_cache import ClipTargetCache, find_targets
from data_pipelines.datasets import make_datasets
from data_pipelines.loader import SegmentationLoader
from data_pipelines.sources.registry import open_source
from data_pipelines.sources.source import ImageRecord

ROOT = pathlib.Path(__file__).resolve().parents[2]
CLIP = make_clip(
    dict(
        embed_dim=16,
        image_size=16,
        patch_size=8,
        image_width=16,
        image_depth=2,
        image_heads=2,
        text_width=16,
        text_depth=1,
        text_heads=2,
        vocab_size=12,
        context_length=4,
    )
)
CROPS = CropConfig()
CATEGORIES = [
    {"id": 10, "name": "sky", "isthing": 0, "split": "seen"},
    {"id": 4, "name": "road", "isthing": 0, "split": "unseen"},
    {"id": 7, "name": "dog", "isthing": 1, "split": "seen"},
]
NUM_IMAGES = 11


def random_params(clip, seed=0):
    """CLIP's parameters with nothing at zero, so that pictures differ in what they give."""
    rng = np.random.default_rng(seed)
    size = clip.image_size
    shapes = jax.eval_shape(
        lambda key: clip.init(
            key, jax.numpy.zeros((1, size, size, 3)), jax.numpy.zeros((1, 1), "int32")
        ),
        jax.random.key(0),
    )

    def fill(path, leaf):
        if path_name(path).endswith("variance"):
            return rng.uniform(0.5, 2.0, leaf.shape).astype(np.float32)
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 25
        offset = 1.0 if path_name(path).endswith("scale") else 0.0
        return (offset + rng.normal(size=leaf.shape) / fan_in**0.5).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes["params"])


PARAMS = random_params(CLIP)
IDENTITY = {"weights": "of the test", **con.target_identity(CLIP, CROPS)}


def make_world(folder):
    """Noise images in COCO's layout, of 1 to 12 segments that are stripes; id 4 holds a road."""
    rng = np.random.default_rng(0)
    for name in ("train2017", "annotations/panoptic_train2017"):
        (folder / name).mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": []}
    for image_id in range(1, 1 + NUM_IMAGES):
        height, width = (30, 40) if image_id % 2 else (44, 36)
        ids = np.zeros((height, width), np.uint8)
        edges = np.linspace(1, width, 1 + (image_id * 5) % 12 + 1).astype(int)
        for row, (left, right) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            ids[row:, left:right] = 3 * row + 2
        picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        file = folder / "train2017" / f"{image_id}.jpg"
        Image.fromarray(picture).save(file, format="PNG")
        rgb = np.stack([ids, 0 * ids, 0 * ids], axis=-1)
        Image.fromarray(rgb).save(folder / "annotations" / "panoptic_train2017" / f"{image_id}.png")
        categories = [10, 7] if image_id != 4 else [10, 4]
        content["images"].append(
            {"id": image_id, "file_name": file.name, "height": height, "width": width}
        )
        content["annotations"].append(
            {
                "image_id": image_id,
                "file_name": f"{image_id}.png",
                "segments_info": [
                    {"id": int(s), "category_id": categories[s % 2], "iscrowd": 0}
                    for s in np.unique(ids[ids > 0])
                ],
            }
        )
    content["categories"] = [{k: c[k] for k in ("id", "name", "isthing")} for c in CATEGORIES]
    (folder / "annotations" / "panoptic_train2017.json").write_text(json.dumps(content))
    split = {"name": "tiny", "description": "", "source": "", "categories": CATEGORIES}
    (folder / "split.json").write_text(json.dumps(split))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def small_canvas(monkeypatch):
    monkeypatch.setattr(filling, "SMALLEST_SIDE", 48)


def load(root, **options):
    source = open_source("coco_panoptic_zps", root, "train2017", root / "split.json")
    defaults = dict(seed=0, image_size=48, max_segments=16, num_threads=2)
    return SegmentationLoader(source, **(defaults | {"unseen_images": "keep"} | options))


def fill(folder, data, devices=1, params=PARAMS, **options):
    options = {"images_per_shard": 3, "pictures_per_device": 16, **options}
    mesh = make_mesh(devices=devices)
    return filling.fill_cache(folder, data, CLIP, params, CROPS, IDENTITY, mesh=mesh, **options)


def targets_of(folder, data, identity=IDENTITY):
    """Everything in a cache, by (image id, segment id); 0 for the image itself."""
    cache, found = ClipTargetCache(folder, identity), {}
    for index in data.training_indices:
        record = data.records[index]
        one = cache.lookup(np.array([record.image_id]), record.source_ids[None])
        found[record.image_id, 0] = one["clip_image_target"][0]
        for segment, target in zip(record.source_ids, one["clip_segment_targets"][0], strict=True):
            found[record.image_id, int(segment)] = target
    return found


def largest_distance(left, right):
    assert left.keys() == right.keys()
    return max(1 - float(left[key] @ right[key]) for key in left)


@pytest.fixture(scope="module")
def filled(world, tmp_path_factory):
    """A cache of the whole world in shards of three images, by one device."""
    folder = tmp_path_factory.mktemp("caches") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "SMALLEST_SIDE", 48)
        report = fill(folder, load(world))
    assert report == filling.FillReport(skipped=0, written=4, bad_images=0)
    return folder


def states(folder):
    """What changes if a file is written again."""
    return {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.glob("*.safetensors")}


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


# The command and the training run that reads what it wrote.


def mini_config(root, folder, **data):
    config = coco_zps.get_config("mini")
    config.data.update(root=str(root), clip_targets=str(folder), num_threads=2, **data)
    config.tensorboard = False
    return config


def finish_clip(config, workdir):
    """A workdir whose CLIP stage is finished, with random parameters."""
    config = config.copy_and_resolve_references()
    config.data.clip_targets = ""
    run = Experiment(config, workdir, make_datasets(config.data, seed=0))
    state = TrainState.create({"clip": random_params(run.setup.networks.clip)}, optax.sgd(0.1))
    checkpoints = StageCheckpoints(workdir, "clip")
    checkpoints.save(state, config.train.clip.steps)
    checkpoints.close()
    return workdir


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """Config, workdir with a finished CLIP, and a cache that the command filled from them."""
    folder = tmp_path_factory.mktemp("run")
    config = mini_config(
        world,
        folder / "targets",
        split_file=str(world / "split.json"),
        eval_part="train2017",
        unseen_images="keep",
    )
    finish_clip(config, folder / "workdir")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "SMALLEST_SIDE", 48)
        report = filling.cache(
            config, str(folder / "workdir"), images_per_shard=4, pictures_per_device=16
        )
    assert report.written == 3
    assert not (folder / "workdir" / "con").exists()
    return config, folder / "workdir"


def make_run(config, workdir):
    return Experiment(config, workdir, make_datasets(config.data, seed=config.seed))


def changed(config, **fields):
    """A copy with fields of its sections changed: section=dict(field=value)."""
    config = config.copy_and_resolve_references()
    for section, values in fields.items():
        config[section].update(values)
    return config


def test_training_reads_the_cache_and_its_step_holds_no_clip(trained, monkeypatch):
    config, workdir = trained
    seen = {}

    def train_stage(name, stage, *, frozen, batches, **rest):
        seen.update(stage=stage, frozen=frozen, batch=next(batches(0, 1)))
        return {}

    monkeypatch.setattr(run_module, "train_stage", train_stage)
    monkeypatch.setattr(Parameters, "fresh", lambda self, subtree, name: {})
    run = make_run(config, workdir)
    run.train("con")
    assert seen["stage"].reads == ("text",) and set(seen["frozen"]) == {"text"}
    assert set(con.TARGET_FIELDS) < set(seen["stage"].batch_fields) <= set(seen["batch"])
    batch = seen["batch"]
    expected = ClipTargetCache(config.data.clip_targets, {}).lookup(
        batch["image_id"], batch["segment_source_ids"]
    )
    padded = batch["segment_labels"] < 0
    assert padded.any() and not padded.all()
    for field in con.TARGET_FIELDS:
        np.testing.assert_array_equal(batch[field], expected[field])
    norms = np.linalg.norm(batch["clip_segment_targets"], axis=-1)
    np.testing.assert_allclose(norms, ~padded, atol=1e-5)
    # Without the folder the same config runs CLIP, in the same workdir.
    online = make_run(changed(config, data=dict(clip_targets="")), workdir)
    assert online.setup.make_stage("con").reads == ("text", "clip")
    assert "clip_image_target" not in next(online.datasets.train(4)([0]))


def nothing_may_compile(monkeypatch):
    def fail(*arguments, **keywords):
        raise AssertionError("reached what compiles")

    monkeypatch.setattr(run_module, "train_stage", fail)
    monkeypatch.setattr(Parameters, "fresh", fail)
    monkeypatch.setattr(ClassEmbeddings, "get", fail)


def test_training_refuses_other_crops_and_other_data_at_once(trained, world, tmp_path):
    config, workdir = trained
    # In a workdir of its own: the first would refuse the config itself.
    finish = functools.partial(finish_clip, workdir=tmp_path / "other")
    other = changed(config, crops=dict(margin=0.25))
    finish(other)
    with pytest.raises(StoreError, match=r"crops\.margin = 0\.1, now it is 0\.25"):
        make_run(other, tmp_path / "other")
    other = changed(config, data=dict(unseen_images="drop"))
    with pytest.raises(StoreError, match="num_images = 11, now it is 10"):
        make_run(other, finish_clip(other, tmp_path / "dropped"))
    root = make_world(tmp_path / "world")
    path = root / "annotations" / "panoptic_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][2]["segments_info"][0]["category_id"] = 7
    path.write_text(json.dumps(content))
    other = changed(config, data=dict(root=str(root), split_file=str(root / "split.json")))
    with pytest.raises(StoreError, match="dataset = '.*', now it is"):
        make_run(other, finish_clip(other, tmp_path / "edited"))


def test_training_refuses_other_weights_before_it_compiles(trained, tmp_path, monkeypatch):
    config, workdir = trained
    run = make_run(config, workdir)
    nothing_may_compile(monkeypatch)
    run.parameters.keep("clip", "clip", random_params(run.setup.networks.clip, seed=1))
    with pytest.raises(StoreError, match="made with weights = '.*', now it is"):
        run.train("con")


def test_training_refuses_an_incomplete_or_damaged_cache(trained, tmp_path, monkeypatch):
    config, workdir = trained
    path = find_targets(config.data.clip_targets, {}).path(1)
    content = path.read_bytes()
    try:
        path.unlink()
        with pytest.raises(StoreError, match="1 of 3 shards .*missing.*again"):
            make_run(config, workdir)
        path.write_bytes(content[:-3])
        with pytest.raises(StoreError, match="00001.safetensors .*damaged.*delete it"):
            make_run(config, workdir)
    finally:
        path.write_bytes(content)


def test_cached_targets_need_a_folder_and_a_finished_clip(trained, tmp_path):
    config, _ = trained
    other = changed(config, data=dict(clip_targets=""))
    with other.unlocked():
        other.train.con.method.targets = "cached"
    finish_clip(config, tmp_path / "workdir")
    with pytest.raises(ValueError, match="'con' .* none are configured: set config.data.clip_tar"):
        make_run(other, tmp_path / "other")
    with pytest.raises(ValueError, match="stage 'clip', which has not finished in .*fresh"):
        make_run(config, tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()


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


def test_what_the_command_refuses(world, trained, tmp_path):
    config, workdir = trained
    with pytest.raises(ValueError, match="set config.data.clip_targets"):
        filling.cache(changed(config, data=dict(clip_targets="")), str(workdir))
    with pytest.raises(ValueError, match="trained by its stage 'clip'; give --workdir=DIR"):
        filling.cache(config)
    with pytest.raises(ValueError, match="'clip', which gives CLIP, has not finished in"):
        filling.cache(config, str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(ValueError, match="'synthetic'.*nothing to cache"):
        filling.cache(demo_zps.get_config("smoke"), str(workdir))


def test_an_interrupted_command_goes_on_where_it_stood(trained, tmp_path, monkeypatch, capsys):
    config, workdir = trained
    flags = [
        f"--config={ROOT / 'configs' / 'coco_zps.py'}:mini",
        f"--workdir={workdir}",
        f"--config.data.clip_targets={tmp_path}",
        "--config.tensorboard=False",
        "--images_per_shard=4",
        "--pictures_per_device=16",
    ]
    for name in ("root", "split_file", "eval_part", "unseen_images", "num_threads"):
        flags.append(f"--config.data.{name}={config.data[name]}")
    write, written = ShardStore.write, []

    def interrupt(store, index, arrays):
        if written:
            raise KeyboardInterrupt
        written.append(index)
        write(store, index, arrays)

    monkeypatch.setattr(ShardStore, "write", interrupt)
    with pytest.raises(SystemExit) as stopped:
        command.main(["cache_clip_targets", *flags])
    assert stopped.value.code == 130
    assert "finished shards are kept, and the same command goes on" in capsys.readouterr().err
    threads = [thread.name for thread in threading.enumerate()]
    assert not [name for name in threads if name.startswith(("prefetch", "cache_clip"))]
    before = states(tmp_path)
    assert len(before) == 1

    def full(store, index, arrays):
        raise FileError("The disk is full.")

    monkeypatch.setattr(ShardStore, "write", full)
    with pytest.raises(SystemExit, match="^Error: The disk is full.$"):
        command.main(["cache_clip_targets", *flags])
    monkeypatch.undo()
    monkeypatch.setattr(filling, "SMALLEST_SIDE", 48)
    command.main(["cache_clip_targets", *flags])
    printed = capsys.readouterr().out
    assert "1 of 3 shards of this host are finished and skipped, 2 to do" in printed
    assert "2 shards written, 1 skipped" in printed
    after = states(tmp_path)
    assert len(after) == 3 and before.items() <= after.items()
    assert sorted(p.name for p in tmp_path.iterdir()) == [*sorted(after), "manifest.json"]
    data = load(pathlib.Path(config.data.root))
    folders = (tmp_path, config.data.clip_targets)
    assert largest_distance(*(targets_of(folder, data, {}) for folder in folders)) < 1e-6


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
