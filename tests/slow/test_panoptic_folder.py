"""A user's own folder of three classes trains and is evaluated by the command line alone."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).resolve().parents[2]
# As people write them; a tokenizer of words has to read them all.
NAMES = ["lawn (mown)", "ball/globe", "children's gnome, dwarf"]
CATEGORIES = [
    {"id": 3, "name": NAMES[0], "isthing": 0, "split": "seen"},
    {"id": 5, "name": NAMES[1], "isthing": 1, "split": "seen"},
    {"id": 8, "name": NAMES[2], "isthing": 1, "split": "unseen"},
]
# The smallest networks of the mini run, two steps a stage.
FLAGS = """
    --config.tensorboard=False --config.mesh.devices=1
    --config.data.kind=panoptic_folder --config.data.split_file=
    --config.data.train_part=spring --config.data.eval_part=autumn
    --config.data.image_size=32 --config.data.eval_size=32 --config.data.max_segments=4
    --config.data.num_threads=1
    --config.model.clip.image_size=16 --config.model.clip.image_width=16
    --config.model.clip.embed_dim=16 --config.model.clip.text_width=16
    --config.model.clip.image_depth=1 --config.model.clip.image_heads=2
    --config.model.clip.text_heads=2
    --config.model.segmentor.width=32 --config.model.segmentor.num_queries=8
    --config.model.segmentor.num_decoder_layers=1 --config.model.segmentor.ffn_width=32
    --config.model.segmentor.decoder_ffn_width=32
    --config.model.projector.hidden_width=16 --config.model.generator.hidden_width=16
    --config.loss.num_points=16
    --config.train.clip.steps=2 --config.train.con.steps=2 --config.train.cat.steps=2
    --config.train.finetune.steps=2 --config.train.con.save_every=0
    --config.train.clip.batch_size=2 --config.train.con.batch_size=2
    --config.train.cat.batch_size=2 --config.train.finetune.batch_size=2
    --config.train.cat.bank_images=4 --config.train.finetune.bank_images=4
    --config.eval.settings.batch_size=1 --config.eval.num_pictures=1
""".split()


def make_garden(root):
    """Four images to train on, one of which shows a gnome, and two to test on."""
    rng = np.random.default_rng(0)
    split = {"name": "garden", "description": "", "source": "", "categories": CATEGORIES}
    (root / "annotations").mkdir(parents=True)
    (root / "split.json").write_text(json.dumps(split))
    for part, count in (("spring", 4), ("autumn", 2)):
        content = {
            "images": [],
            "annotations": [],
            "categories": [{k: c[k] for k in ("id", "name", "isthing")} for c in CATEGORIES],
        }
        pngs = root / "annotations" / f"panoptic_{part}"
        pngs.mkdir()
        for camera in (0, 1):
            (root / part / f"cam{camera}").mkdir(parents=True)
        for i in range(1, count + 1):
            thing = 8 if i == 2 else 5
            ids = np.full((24, 32), 1, np.uint8)
            ids[6:18, 4 * i : 4 * i + 12] = 2
            pixels = rng.integers(0, 60, (24, 32, 3)) + 60 * ids[..., None]
            # The same name comes in both folders.
            name = f"cam{i % 2}/{(i + 1) // 2}.jpg"
            Image.fromarray(pixels.astype(np.uint8)).save(root / part / name)
            Image.fromarray(np.stack([ids, 0 * ids, 0 * ids], -1)).save(pngs / f"{i}.png")
            content["images"].append({"id": i, "file_name": name, "height": 24, "width": 32})
            content["annotations"].append(
                {
                    "image_id": i,
                    "file_name": f"{i}.png",
                    "segments_info": [{"id": 1, "category_id": 3}, {"id": 2, "category_id": thing}],
                }
            )
        (root / "annotations" / f"panoptic_{part}.json").write_text(json.dumps(content))
    return root


def command(workdir, cache, *flags):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    arguments = ["--config=configs/coco_zps.py:mini", f"--workdir={workdir}", *FLAGS, *flags]
    return subprocess.run(
        [sys.executable, "-m", "concat_jax.main", *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Garden, workdir, compilation cache and what the command printed."""
    folder = tmp_path_factory.mktemp("folder")
    garden, workdir = make_garden(folder / "garden"), folder / "run"
    done = command(workdir, folder / "xla", f"--config.data.root={garden}")
    assert done.returncode == 0, done.stdout + done.stderr
    return garden, workdir, folder / "xla", done.stdout


def test_it_trains_and_every_class_is_scored(trained):
    _, workdir, _, printed = trained
    report = json.loads((workdir / "report.json").read_text())
    assert set(report["stages"]) == {"clip", "con", "cat", "finetune"}
    assert report["table"] in printed and len(report["results"]) == 2
    for summary in report["results"].values():
        assert summary["images"] == 2
        assert [row["name"] for row in summary["per_class"]] == NAMES
    for stage in report["stages"]:
        rows = [json.loads(line) for line in (workdir / stage / "metrics.jsonl").open()]
        assert np.isfinite([row["loss"] for row in rows if "loss" in row]).all()
    predictions = json.loads((workdir / "con" / "panoptic_predictions.json").read_text())
    assert {a["image_id"] for a in predictions["annotations"]} == {1, 2}
    names = {a["file_name"] for a in predictions["annotations"]}
    assert names == {"cam0/1.png", "cam1/1.png"}


def test_its_checkpoints_are_scored_on_another_data_set(trained):
    """Open-vocabulary evaluation: other names, another folder, nothing trained."""
    garden, workdir, cache, _ = trained
    split = json.loads((garden / "split.json").read_text())
    # New names of old words, since the tokenizer of the mini run knows no other.
    names = dict(zip(NAMES, ("gnome lawn", "lawn ball", "ball gnome"), strict=True))
    for path in (garden / "annotations").glob("*.json"):
        content = json.loads(path.read_text())
        for category in content["categories"]:
            category["name"] = names[category["name"]]
        (garden.parent / "other" / "annotations").mkdir(parents=True, exist_ok=True)
        (garden.parent / "other" / "annotations" / path.name).write_text(json.dumps(content))
    other = garden.parent / "other"
    for category in split["categories"]:
        category["name"] = names[category["name"]]
    (other / "split.json").write_text(json.dumps(split))
    for name in ("spring", "autumn"):
        (other / name).symlink_to(garden / name)
        (other / "annotations" / f"panoptic_{name}").symlink_to(
            garden / "annotations" / f"panoptic_{name}"
        )
    flags = (
        f"--config.data.root={garden}",
        "--config.data.eval_kind=panoptic_folder",
        f"--config.data.eval_root={other}",
    )
    done = command(workdir, cache, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "already finished" in done.stdout
    report = json.loads((workdir / "report.json").read_text())
    assert report["stages"] == {}
    for summary in report["results"].values():
        assert [row["name"] for row in summary["per_class"]] == list(names.values())
