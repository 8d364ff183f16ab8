"""The demo's stages on two processes of four devices, and on meshes that split their parameters.

    python -m pytest -m slow -s tests/slow/test_mesh.py

Eight devices of a CPU stand for those of a pod. A process of 8, two of 4, and whatever goes on
with what the two left must come to the same losses, from every source of data.
"""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from concat_jax import main
from concat_jax.core.coco_writers import PanopticWriter
from concat_jax.training import loop, sharding
from configs import coco_zps, demo_zps
from data_pipelines.prepare import prepare
from data_pipelines.synthetic.world import SyntheticWorld

pytestmark = pytest.mark.slow

STAGES = ("clip", "con", "cat", "finetune", "control")
IMAGES = dict(image_size=64, max_segments=10)
# Of each stage, until the first checkpoint of CON, and until the first run ends: after more steps
# a rounding can flip a bit of an attention mask, and curves part at 1e-3.
STEPS, SAVED, STOPPED = 4, 2, 3
HOST = """
import sys
import jax

jax.config.update("jax_num_cpu_devices", 4)
from types import SimpleNamespace
from concat_jax.core.cli import join_hosts
from concat_jax.training.loop import MetricWriter
from tests.slow.test_mesh import STEPS, STOPPED, run

join_hosts(SimpleNamespace(distributed=True))
assert jax.process_count() == 2 and jax.device_count() == 8
scalars, rows = MetricWriter.scalars, []

def then_stop(self, step, values):
    scalars(self, step, values)
    rows.append(step)
    if sys.argv[1] == "stop" and len(rows) == STEPS + STOPPED:
        raise KeyboardInterrupt

MetricWriter.scalars = then_stop
try:
    run(*sys.argv[2:])
except KeyboardInterrupt as stop:
    print(stop)
"""


def get_config(kind):
    """The demo's smoke run without its evaluation."""
    config = demo_zps.get_config("smoke")
    config.eval.stages, config.eval.bias_split = {}, ""
    for stage in config.train.values():
        stage.log_every = 1
    if kind != "synthetic":
        config.data = coco_zps.recipe().data
        kind = {"folder": "panoptic_folder"}.get(kind, kind)
        config.data.update(kind=kind, split_file="", num_threads=2, **IMAGES)
        config.data.update(train_part="train", eval_part="val", eval_size=64)
    return config


def make_folder(root):
    """Scenes of the world in COCO's layout: 40 to train on, and some that show unseen classes."""
    for part, number in (("train", 40), ("val", 2)):
        world = SyntheticWorld(**IMAGES)
        scenes = [world.example(index) for index in range(number)]
        every = SyntheticWorld(**IMAGES, classes="all", split="test")
        scenes += [every.example(index) for index in range(number // 4)]
        (root / part).mkdir(parents=True)
        with PanopticWriter(
            root / "annotations", world.vocabulary, name=f"panoptic_{part}"
        ) as file:
            for number, scene in enumerate(scenes, start=1):
                name = f"{number:012}.jpg"
                Image.fromarray(scene["image"]).save(root / part / name, quality=95)
                segments = [
                    {"id": row + 1, "label": int(label)}
                    for row, label in enumerate(scene["segment_labels"])
                    if label >= 0
                ]
                file.add(number, name, scene["segment_ids"].astype(np.int32), segments)
    names = world.vocabulary
    categories = [
        {
            "id": names.category_ids[k],
            "name": names.names[k],
            "isthing": int(names.is_thing[k]),
            "split": "seen" if names.is_seen[k] else "unseen",
        }
        for k in range(len(names))
    ]
    split = {"name": "world", "description": "", "source": "", "categories": categories}
    (root / "split.json").write_text(json.dumps(split))


def run(workdir, kind, root="", **mesh):
    """Trains all stages on all devices of this process, of which pytest's has eight."""
    config = get_config(kind)
    config.mesh.update(mesh)
    config.data.update({"root": str(root)} if root else {})
    main.run(config, pathlib.Path(workdir))


def losses(workdir):
    """(stage, step) -> loss."""
    lines = [
        (stage, json.loads(line))
        for stage in STAGES
        for line in (workdir / stage / "metrics.jsonl").read_text().splitlines()
    ]
    return {(stage, row["step"]): row["loss"] for stage, row in lines}


def assert_same_losses(workdir, expected):
    found = losses(workdir)
    assert list(found) == list(expected)
    off = {step: abs(found[step] / loss - 1) for step, loss in expected.items()}
    worst = max(off, key=off.get)
    print(
        f"{workdir.name}: losses of {len(off)} steps agree to {off[worst]:.1e} (worst in {worst})"
    )
    assert off[worst] < 1e-5, off


@pytest.fixture(scope="module")
def one_of(tmp_path_factory):
    """A function: kind of data -> its root, and the losses of one process of eight devices."""

    @functools.cache
    def run_one(kind):
        folder = tmp_path_factory.mktemp(kind)
        if kind == "tfds":  # whose batches are the folder's
            root, expected = run_one("folder")
            prepare("panoptic_folder", root, out=folder)
            return folder, expected
        root = folder / "data" if kind != "synthetic" else ""
        if root:
            make_folder(root)
        run(folder / "one", kind, root)
        return root, losses(folder / "one")

    return run_one


@pytest.mark.parametrize("kind", ["synthetic", "folder", "tfds"])
def test_two_hosts_of_four_devices_train_as_one_of_eight(kind, one_of, run_hosts, tmp_path):
    if kind == "tfds":
        pytest.importorskip("tensorflow_datasets", reason="pip install -r requirements-data.txt")
    root, expected = one_of(kind)
    assert list(expected) == [(stage, step) for stage in STAGES for step in range(1, STEPS + 1)]
    two = tmp_path / "two"
    assert get_config(kind).train.con.save_every == SAVED
    printed = run_hosts("-c", HOST, "stop", str(two), kind, str(root))
    assert all(f"step {SAVED} is saved" in text for text in printed)
    for devices in (8, 4):
        resumed = shutil.copytree(two, tmp_path / f"one_of_{devices}")
        run(resumed, kind, root, devices=devices)
        assert_same_losses(resumed, expected)
    run_hosts("-c", HOST, "go on", str(two), kind, str(root))
    assert_same_losses(two, expected)


@pytest.mark.parametrize("fsdp", [8, 4])
def test_parameters_and_optimizer_are_split(fsdp, one_of, tmp_path, monkeypatch):
    make, bytes_of = loop.jit_train_step, []

    def counted(*arguments, **options):
        step, first = make(*arguments, **options), len(bytes_of)

        def counting(*inputs):
            state, metrics = step(*inputs)
            leaves = jax.tree.leaves(state)
            here = [
                sum(leaf.addressable_shards[i].data.nbytes for leaf in leaves) for i in range(8)
            ]
            bytes_of[first:] = [(sum(leaf.nbytes for leaf in leaves), *here)]
            return state, metrics

        return counting

    monkeypatch.setattr(loop, "jit_train_step", counted)
    monkeypatch.setattr(sharding, "MIN_SPLIT", 256)  # small networks, of small arrays
    run(tmp_path / "split", "synthetic", fsdp=fsdp)
    assert_same_losses(tmp_path / "split", one_of("synthetic")[1])
    for stage, (whole, *here) in zip(STAGES, bytes_of, strict=True):
        print(f"{stage}: {whole / 1e6:.2f} MB, of which a device holds {here[0] / whole:.3f}")
        assert max(here) == min(here) < 1.2 * whole / fsdp
