"""`python -m concat_jax.evaluate`: tables, report and sentences."""

import json
import re
import shutil
import types

import numpy as np
import pytest
from PIL import Image

from concat_jax import evaluate
from concat_jax.core import cli
from concat_jax.core.coco_writers import PanopticWriter, SemanticWriter
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.semantic_iou import SemanticIoU

VOCABULARY = Vocabulary(("cat", "sky"), (True, False), (True, False), (17, 187))
SPLIT = {
    "name": "two",
    "description": "a test's",
    "source": "none",
    "categories": [
        {"id": 17, "name": "cat", "isthing": 1, "split": "seen"},
        {"id": 187, "name": "sky", "isthing": 0, "split": "unseen"},
    ],
}


@pytest.fixture
def files(tmp_path):
    ids = np.ones((8, 10), int)
    ids[:, 4:] = 2
    segments = [{"id": 1, "label": 0}, {"id": 2, "label": 1}]
    for name, width in (("truth", 4), ("found", 5)):
        with PanopticWriter(tmp_path, VOCABULARY, name=name) as writer:
            writer.add(
                1, "1.jpg", np.where(np.arange(10) < width, 1, 2)[None].repeat(8, 0), segments
            )
    (tmp_path / "two.json").write_text(json.dumps(SPLIT))
    return tmp_path


def run(*arguments):
    """The command in this process, with flags of its own."""
    values = cli.Flags()
    evaluate.define_flags(values)
    values(["evaluate", *arguments])
    return evaluate.evaluate_flags(values)


def of_files(folder, *more):
    files = f"--annotations={folder / 'truth.json'}", f"--predictions={folder / 'found.json'}"
    return ("--task=panoptic", *files, *more)


def test_the_folder_that_predict_wrote_is_as_good_as_the_file_in_it(files, tmp_path):
    """As `predict` calls it, and as evaluation of a stage does."""
    expected = run(*of_files(files))
    for name in ("panoptic", "panoptic_predictions"):
        folder = tmp_path / f"of_{name}"
        shutil.copytree(files / "found", folder / name)
        shutil.copy(files / "found.json", folder / f"{name}.json")
        given = f"--annotations={files / 'truth.json'}", f"--predictions={folder}"
        assert run("--task=panoptic", *given)["all"] == expected["all"]


def test_files_become_tables_and_a_report(files, capsys):
    output = files / "out" / "report.json"
    flag = f"--split={files / 'two.json'}", "--classes", f"--output={output}"
    summary = run(*of_files(files, *flag))
    # The cat: 32 of 40 pixels; the sky: 40 of 48.
    assert summary["seen"]["pq"] == pytest.approx(80)
    assert summary["unseen"]["pq"] == pytest.approx(100 * 40 / 48)
    text = capsys.readouterr().out
    assert "SQ matched" in text and "harmonic  81.6" in text
    assert [line.split()[0] for line in text.splitlines() if " seen " in line or "unseen " in line]
    saved = json.loads(output.read_text())
    assert saved["harmonic"]["pq"] == summary["harmonic"]["pq"]
    assert "| unseen | 1 | 1 (100.0%) |" in text
    assert saved["confusion"]["seen"] == dict(right=1, other_seen=0, other_unseen=0, unmatched=0)


def test_label_maps_of_panoptic_files(files, capsys):
    summary = run(*of_files(files, "--task=semantic"))
    assert summary["semantic"]["all"]["miou"] == pytest.approx(50 * (32 / 40 + 40 / 48))
    text = capsys.readouterr().out
    assert "mIoU" in text and "semantic 1/1" in text and "ETA 0:00" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--task, --annotations and --predictions"),
        (("--stage=finetune",), "--config, --workdir"),
        (("--task=panotic", "--annotations=x"), "did you mean 'panoptic'"),
        (("--task=panoptic", "--annotations=x"), "needs --predictions"),
    ],
)
def test_flags_that_do_not_suffice_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(*arguments)


def test_the_worst_and_the_best_images_are_drawn(tmp_path, capsys):
    """Four images of a sky and a cat, of which the prediction sees ever more."""
    ids, segments = np.ones((8, 10), int), [{"id": 1, "label": 0}, {"id": 2, "label": 1}]
    ids[:, 4:] = 2
    for name, widths in (("truth", (4, 4, 4, 4)), ("found", (9, 4, 2, 3))):
        with PanopticWriter(tmp_path, VOCABULARY, name=name) as writer:
            for number, width in enumerate(widths):
                found = np.where(np.arange(10) < width, 1, 2)[None].repeat(8, 0)
                writer.add(number, f"{number}.png", found, segments)
    (tmp_path / "photographs").mkdir()
    colours = [(250, 0, 40 * number) for number in range(4)]
    for number in (0, 1, 2):
        picture = Image.new("RGB", (10, 8), colours[number])
        picture.save(tmp_path / "photographs" / f"{number}.png")
    folder = f"--images={tmp_path / 'photographs'}"
    drawn = of_files(tmp_path, f"--output={tmp_path / 'out' / 'report.json'}", "--pictures=1")
    run(*drawn, folder)
    text = capsys.readouterr().out
    assert "worst_best.png" in text and "pq_per_class.png" in text
    sheet = np.asarray(Image.open(tmp_path / "out" / "worst_best.png"))
    tops = [np.flatnonzero((sheet == colour).all(-1).any(1)) for colour in colours]
    assert len(tops[0]) and tops[1].min() > tops[0].max(), "from the worst to the best"
    assert not len(tops[2]), "what lies between is left out"
    run(*drawn)
    sheet = np.asarray(Image.open(tmp_path / "out" / "worst_best.png"))
    assert not any((sheet == colour).all(-1).any() for colour in colours)
    run(*drawn, folder, "--pictures=2")
    grey = "Drawn on grey: "
    assert re.findall(f"{grey}.*", capsys.readouterr().out) == [
        f"{grey}{tmp_path / 'photographs' / '3.png'} cannot be read as an image: it does not exist."
    ]
    Image.new("RGB", (10, 9)).save(tmp_path / "photographs" / "3.png")
    run(*drawn, folder, "--pictures=2")
    assert (
        f"{grey}3.png is 9x10 (height x width) and its annotation 8x10;" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--pictures=1",), "give --output"),
        (("--images=.",), "--images=. is for --pictures"),
        (("--pictures=1", "--output=worst_best.png"), "worst_best.png is no name of a json"),
        (("--output=.",), "--output=. is no name of a json"),
        (("--output=no/folder/",), "--output=no/folder/ is no name of a json"),
        (
            (f"--output={__file__}/report.json",),
            r"test_evaluate_command.py is a file; name a folder",
        ),
        (("--images=no", "--pictures=1", "--output=report.json"), "--images=no is no folder"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(files, flags, message):
    with pytest.raises(ValueError, match=message):
        run(*of_files(files, *flags))


def test_the_report_is_not_written_over_what_is_read(files):
    for path in (files / "truth.json", files / "found.json"):
        with pytest.raises(ValueError, match="is an input and would be written over"):
            run(*of_files(files, f"--output={path}"))
    # As well where a folder was named that holds it.
    (files / "found.json").rename(files / "panoptic.json")
    (files / "found").rename(files / "panoptic")
    given = f"--annotations={files / 'truth.json'}", f"--predictions={files}"
    with pytest.raises(ValueError, match="panoptic.json is an input"):
        run("--task=panoptic", *given, f"--output={files / 'panoptic.json'}")


def test_values_to_ignore_are_numbers(files):
    maps = f"--annotations={files / 'found'}", f"--split={files / 'two.json'}"
    with pytest.raises(ValueError, match="is not like --ignore=0,255"):
        run(*of_files(files, "--task=semantic", *maps, "--ignore=0,void"))


@pytest.mark.parametrize(
    ("task", "flag"),
    [
        ("panoptic", "--protocol=zsi"),
        ("panoptic", "--ignore=7"),
        ("panoptic", "--prediction_values=indices"),
        ("semantic", "--annotation_values=ids"),  # of a panoptic json
        ("semantic", "--protocol=coco"),
        ("instance", "--png_folder=x"),
        ("semantic", "--pictures=2"),
        ("instance", "--images=x"),
    ],
)
def test_flags_that_would_change_nothing_are_refused(files, task, flag):
    name = flag.partition("=")[0]
    with pytest.raises(
        ValueError, match=f"{name} means nothing to --task={task} of .* leave it out"
    ):
        run(*of_files(files, f"--task={task}", flag))


def test_a_folder_of_another_task_is_scored_or_named(files):
    """As `predict` wrote it: panoptic maps say the class of every pixel, other results do not."""
    (files / "found").rename(files / "panoptic")
    (files / "found.json").rename(files / "panoptic.json")
    folder, split = f"--predictions={files}", f"--split={files / 'two.json'}"
    given = ("--task=semantic", f"--annotations={files / 'truth.json'}", folder)
    assert run(*given)["semantic"]["all"]["miou"] == pytest.approx(50 * (32 / 40 + 40 / 48))
    assert run("--task=panoptic", f"--annotations={files}", folder, split)["all"]["pq"] == 100
    with pytest.raises(ValueError, match="holds what --task=panoptic makes; score that"):
        run("--task=instance", *given[1:])
    with pytest.raises(ValueError, match="truth is a folder without panoptic.json"):
        run("--task=panoptic", f"--annotations={files / 'truth'}", folder)


def test_label_maps_with_a_manifest_name_their_classes(files):
    """As `predict` wrote them on both sides, no split says anything new; the manifest is kept."""
    for side, width in (("one", 4), ("two", 5)):
        with SemanticWriter(files / side / "semantic", VOCABULARY) as writer:
            writer.add(1, "1.jpg", (np.arange(10) >= width)[None].repeat(8, 0).astype(int))
    given = f"--annotations={files / 'one'}", f"--predictions={files / 'two'}"
    summary = run("--task=semantic", *given)["semantic"]
    assert summary["all"]["miou"] == pytest.approx(50 * (32 / 40 + 40 / 48))
    for side in ("one", "two"):
        manifest = files / side / "semantic.json"
        with pytest.raises(ValueError, match="semantic.json is an input and would be written over"):
            run("--task=semantic", *given, f"--output={manifest}")
        manifest.unlink()
    with pytest.raises(ValueError, match="No json beside .*one/semantic names its classes; give"):
        run("--task=semantic", *given)


def test_flags_of_files_and_of_a_config_do_not_mix(files, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["evaluate", *of_files(files), "--workdir=somewhere"])
    assert stop.value.code == (
        "Error: --task is for predictions in files and --config for a trained stage; give one or "
        "the other."
    )


@pytest.mark.parametrize("flags", [(), ("--split={}/two.json",)])
@pytest.mark.parametrize("task", ["panoptic", "semantic"])
def test_predictions_by_other_classes_say_whose_they_are_not(files, task, flags):
    content = json.loads((files / "found.json").read_text())
    content["categories"][1]["name"] = "fog"
    (files / "found.json").write_text(json.dumps(content))
    flags = (flag.format(files) for flag in flags)
    message = "found.json calls .* 'fog', the label space 'sky'; predict by its classes"
    with pytest.raises(ValueError, match=message):
        run(*of_files(files, f"--task={task}", *flags))


class FakeRun:
    """A run of which the finetune alone can be scored."""

    def __init__(self, config, workdir, datasets, *, trains):
        assert not trains
        self.setup = types.SimpleNamespace(predict=types.SimpleNamespace(tasks=("semantic",)))
        self.elsewhere = types.SimpleNamespace(score=lambda run, stage: {})

    def check_stage(self, name):
        if name != "finetune":
            raise ValueError("cannot be scored")

    def evaluate(self, name, *, num_extremes):
        assert not num_extremes
        counts = SemanticIoU(2)
        counts.update(np.array([0, 0, 1]), np.array([0, 0, 0]))
        return {"semantic": counts.summarize(VOCABULARY), "images": 1}


@pytest.fixture
def stage_of(monkeypatch, tmp_path):
    config = types.SimpleNamespace(data={}, seed=0, train={"con": {}, "finetune": {}})
    monkeypatch.setattr("concat_jax.experiment.experiment.Experiment", FakeRun)
    monkeypatch.setattr(cli, "config_and_workdir", lambda given: (config, tmp_path))
    monkeypatch.setattr(cli, "join_hosts", lambda given: None)
    monkeypatch.setattr("data_pipelines.datasets.make_datasets", lambda *_, **__: None)

    def score(*arguments):
        values = cli.Flags()
        evaluate.define_flags(values)
        values.string("workdir", None, "")
        values(["evaluate", f"--workdir={tmp_path}", *arguments])
        return evaluate.evaluate_flags(values)

    return score


def test_a_stage_is_scored_by_the_config_s_metrics(stage_of, capsys):
    assert stage_of()["semantic"]["seen"]["miou"] == pytest.approx(200 / 3)
    assert "mIoU" in capsys.readouterr().out


def test_the_report_of_a_stage_replaces_no_file_of_the_run(stage_of, tmp_path):
    for name in ("config.json", "report.json", "con/origin.json"):
        with pytest.raises(ValueError, match=f"{name} is a place of the run's own files; name ano"):
            stage_of(f"--output={tmp_path / name}")
        assert not (tmp_path / name).exists()
    for _ in range(2):
        stage_of(f"--output={tmp_path / 'mine.json'}")
        assert json.loads((tmp_path / "mine.json").read_text())["images"] == 1


def test_pictures_of_a_stage_without_panoptic_maps_are_refused(stage_of):
    with pytest.raises(ValueError, match="--pictures are of panoptic maps"):
        stage_of("--pictures=2")


def test_namers_are_of_a_stage():
    with pytest.raises(ValueError, match="--namers is for a trained stage"):
        run("--task=panoptic", "--namers")


@pytest.mark.parametrize("flag", ["--pictures=2", "--classes", "--output=report.json"])
def test_namers_score_nothing_that_could_be_written(stage_of, flag):
    with pytest.raises(ValueError, match=f"{flag.partition('=')[0]} means nothing to --namers"):
        stage_of("--namers", flag)


def test_a_stage_that_cannot_be_scored_is_refused(stage_of):
    with pytest.raises(ValueError, match="cannot be scored"):
        stage_of("--stage=con")
