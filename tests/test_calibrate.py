"""Which images gamma may be chosen on, and what the command writes."""

import json
import pathlib
import types

import numpy as np
import pytest
from PIL import Image

from concat_jax import calibrate
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.calibration import Sweep
from configs import coco_zps, demo_zps

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def coco(monkeypatch):
    """Ten images, of which training uses the first four; remembers the part that is read."""
    read = []

    def training_part(data, *, seed):
        read.append(data["train_part"])
        return types.SimpleNamespace(
            records=[types.SimpleNamespace(image_id=10 + i) for i in range(10)],
            training_indices=np.arange(4),
            eval_example=lambda index: 10 + index,
        )

    monkeypatch.setattr("data_pipelines.datasets.training_part", training_part)
    return read


def coco_images(part, num_images=0, **data):
    config = coco_zps.get_config("mini").data.to_dict() | data
    return calibrate.held_out_images(config, part, seed=0, num_images=num_images)


def test_the_synthetic_world_is_its_validation_split():
    data = demo_zps.get_config("smoke").data
    assert data.eval_split == "test"
    images = calibrate.held_out_images(data, "", seed=0, num_images=2)
    names = [native["file_name"] for native in images.held_out()]
    assert names == ["validation_000000.png", "validation_000001.png"]
    assert images.rest is None
    with pytest.raises(ValueError, match="--part=val2017 is for data in COCO's layout"):
        calibrate.held_out_images(data, "val2017", seed=0, num_images=2)


def test_of_the_training_part_only_what_training_leaves_out(coco):
    images = coco_images("train2017")
    assert list(images.held_out()) == [14, 15, 16, 17, 18, 19]
    assert coco == ["train2017"] and images.rest is None
    assert list(coco_images("train2017", num_images=3).held_out()) == [14, 16, 19]


def test_another_part_is_taken_whole(coco):
    assert list(coco_images("minival").held_out()) == list(range(10, 20))
    assert coco == ["minival"]


def test_of_the_test_part_one_half_and_the_other_is_scored(coco):
    images = coco_images("val2017:odd", num_images=2)
    assert list(images.held_out()) == [11, 19]
    assert list(images.rest()) == [10, 18]


@pytest.mark.parametrize(
    ("part", "data", "sentence"),
    [
        ("", {}, "give --part=NAME .* or one half of it as --part=val2017:even"),
        ("val2017", {}, "--part=val2017 is the part that the config tests on"),
        ("val2017:evn", {}, "names no half: 'evn'; did you mean 'even'"),
        ("train2017:odd", {}, "half of what is trained on"),
        ("train2017", {"unseen_images": "keep"}, "is trained on whole"),
    ],
)
def test_images_that_are_tested_or_trained_on_are_refused(part, data, sentence, coco):
    with pytest.raises(ValueError, match=sentence):
        coco_images(part, **data)
    assert not coco


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ("val2017:even", "ids of all 3 images of val2017 are even, .* another annotated part"),
        ("val2017:odd", "ids of all 3 images of val2017 are even"),
        ("train2017", "leaves out none of its 3 images; .*--part=val2017:even"),
    ],
)
def test_a_part_that_leaves_no_image_says_why(part, sentence, monkeypatch):
    source = types.SimpleNamespace(
        records=[types.SimpleNamespace(image_id=i) for i in (2, 4, 6)],
        training_indices=np.arange(3),
    )
    monkeypatch.setattr("data_pipelines.datasets.training_part", lambda data, *, seed: source)
    with pytest.raises(ValueError, match=sentence):
        coco_images(part)


class FakeRun:
    """hPQ peaks at gamma 2 on held-out images and at 0 on others."""

    asked = []

    def __init__(self, config, workdir, datasets, *, trains):
        assert not trains
        self.workdir = workdir

    def check_stage(self, name):
        if name != "finetune":
            raise ValueError("cannot be scored")

    def sweep(self, name, examples, gammas):
        self.asked.append((name, examples, gammas))
        best = 2.0 if examples == "held out" else 0.0
        counts = np.zeros((len(gammas), 1, 4, 2), np.float32)
        counts[:, 0, 0] = np.subtract(50.0, np.abs(np.subtract(gammas, best)))[:, None]
        counts[:, 0, 1] = 100.0
        return Sweep(
            Vocabulary(("cat", "lynx"), (True,) * 2, (True, False), (1, 2)), gammas, counts
        )


@pytest.fixture
def fake_run(monkeypatch):
    monkeypatch.setattr("concat_jax.experiment.experiment.Experiment", FakeRun)
    monkeypatch.setattr(FakeRun, "asked", [])
    monkeypatch.setattr("data_pipelines.datasets.make_datasets", lambda *args, **kwargs: None)
    images = calibrate.HeldOut("some images", lambda: "held out", lambda: "other half")
    monkeypatch.setattr(calibrate, "held_out_images", lambda *args, **kwargs: images)
    return images


def test_the_report(fake_run, tmp_path, capsys):
    (tmp_path / "finetune").mkdir()
    config = demo_zps.get_config("smoke")
    assert calibrate.calibrate_stage(config, tmp_path, "finetune", [4, 2]) == 2
    assert FakeRun.asked == [
        ("finetune", "held out", (0.0, 2.0, 4.0)),
        ("finetune", "other half", (0.0, 2.0, 4.0)),
    ]
    text = (tmp_path / "finetune" / "calibration.md").read_text()
    assert "| **2** | **50.0** |" in text and "| 4 | 48.0 |" in text
    assert "Area under unseen against seen PQ" in text
    assert "--config.eval.settings.gamma=2" in text and "last gamma" not in text
    assert text.strip() in capsys.readouterr().out
    saved = json.loads((tmp_path / "finetune" / "calibration.json").read_text())
    assert saved["gamma"] == 2 and saved["images"] == "some images"
    assert [row["gamma"] for row in saved["held_out"]] == [0.0, 2.0, 4.0]
    assert saved["other_half"][1]["summary"]["harmonic"]["pq"] == pytest.approx(48)
    with Image.open(tmp_path / "finetune" / "calibration.png") as picture:
        assert min(picture.size) > 300


def test_no_gamma_is_shown_twice(fake_run, monkeypatch, tmp_path):
    images = fake_run._replace(held_out=fake_run.rest)  # where no bias is best
    monkeypatch.setattr(calibrate, "held_out_images", lambda *args, **kwargs: images)
    (tmp_path / "finetune").mkdir()
    assert calibrate.calibrate_stage(demo_zps.get_config("smoke"), tmp_path, "finetune", [2]) == 0
    text = (tmp_path / "finetune" / "calibration.md").read_text()
    assert text.count("| **0** |") == 2  # of either half one


def test_the_end_of_the_list_is_pointed_out(fake_run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(calibrate, "held_out_images", lambda *args, **kwargs: images)
    images = fake_run._replace(rest=None)
    (tmp_path / "finetune").mkdir()
    calibrate.calibrate_stage(demo_zps.get_config("smoke"), tmp_path, "finetune", [1])
    assert FakeRun.asked == [("finetune", "held out", (0.0, 1.0))], "the test part is not scored"
    assert "1 is the last gamma tried" in capsys.readouterr().out


def test_what_was_found_is_printed_where_it_cannot_be_written(fake_run, tmp_path, capsys):
    (tmp_path / "finetune").touch()
    with pytest.raises(ValueError, match="calibration.md cannot be written: its folder is a file"):
        calibrate.calibrate_stage(demo_zps.get_config("smoke"), tmp_path, "finetune", [4, 2])
    assert "--config.eval.settings.gamma=2" in capsys.readouterr().out


def test_a_stage_that_cannot_be_scored_is_refused(fake_run, tmp_path):
    with pytest.raises(ValueError, match="cannot be scored"):
        calibrate.calibrate_stage(demo_zps.get_config("smoke"), tmp_path, "con", [0.0])


def test_the_command_ends_in_one_sentence(monkeypatch, tmp_path):
    for name in ("enable_compilation_cache", "keep_freed_memory"):
        monkeypatch.setattr(f"concat_jax.core.runtime.{name}", lambda: None)
    given = [f"--config={ROOT}/configs/demo_zps.py:smoke", f"--workdir={tmp_path}/run"]
    for flag, sentence in (
        ("--gammas=0,much", "--gammas holds 'much'; give numbers"),
        ("--gammas=0,nan", "must be a number, got nan"),
        ("--gammas=0,inf", "must be a number, got inf"),
        ("--gammas=0", "Stage 'finetune' has not finished in"),
    ):
        with pytest.raises(SystemExit, match=f"Error: .*{sentence}") as error:
            calibrate.main(["calibrate", *given, flag])
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
