"""The command that caches CLIP targets, and the training that reads what it wrote."""

import functools
import json
import pathlib
import threading

import numpy as np
import optax
import pytest

from concat_jax import cache_clip_targets as command
from concat_jax.core.files import FileError
from concat_jax.core.shard_store import ShardStore, StoreError
from concat_jax.experiment import clip_target_cache as filling
from concat_jax.experiment import experiment as run_module
from concat_jax.experiment.class_embeddings import ClassEmbeddings
from concat_jax.experiment.experiment import Experiment
from concat_jax.experiment.parameters import Parameters
from concat_jax.stages import con
from concat_jax.training.checkpoints import StageCheckpoints
from concat_jax.training.state import TrainState
from configs import coco_zps, demo_zps
from data_pipelines.clip_target_cache import ClipTargetCache, find_targets
from data_pipelines.datasets import make_datasets
from tests import tiny
from tests.command_lines import ROOT
from tests.experiment.cached_world import (
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
    state = TrainState.create({"clip": tiny.params("clip", 0, run.setup.networks)}, optax.sgd(0.1))
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
    run.parameters.keep("clip", "clip", tiny.params("clip", 1, run.setup.networks))
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
