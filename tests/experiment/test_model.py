"""A workdir segments pictures by name, without its data; what is exported does the same."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import optax
import pytest
from PIL import Image

from concat_jax import convert, predict
from concat_jax.core.coco_writers import PanopticWriter
from concat_jax.core.files import read_json
from concat_jax.evaluation.evaluate import evaluate
from concat_jax.evaluation.score_files import score_panoptic
from concat_jax.experiment.experiment import Experiment
from concat_jax.experiment.model import LABELS_NAME, open_model
from concat_jax.inference.model import Model
from concat_jax.inference.predictor import PredictConfig
from concat_jax.training.checkpoints import StageCheckpoints
from concat_jax.training.state import TrainState
from concat_jax.weights.model_folder import ModelCard
from configs import demo_zps
from data_pipelines.datasets import make_datasets
from data_pipelines.labels import parse_classes
from tests import tiny

pytestmark = pytest.mark.usefixtures("as_users_compile")

STAGES = {"clip": ("clip",), "con": ("segmentor", "projector"), "finetune": ("projector",)}


def tiny_config():
    config = demo_zps.get_config("smoke")
    config.mesh.devices = 1
    config.data.num_eval_images = 3
    for name in ("clip", "segmentor", "projector", "generator"):
        fields = dict(tiny.MODEL[name])
        for key in ("vocab_size", "context_length", "eot_id"):  # the tokenizer tells them
            fields.pop(key, None)
        with config.unlocked():
            config.model[name] = fields
    config.train.con.copies = {}
    return config


def finish(experiment, name, subtrees):
    """Random parameters as the last checkpoint of a stage."""
    of = experiment.setup.networks
    params = {subtree: tiny.params(subtree, len(name + subtree), of) for subtree in subtrees}
    checkpoints = StageCheckpoints(experiment.workdir, name)
    state = TrainState.create(params, optax.sgd(0.1))
    checkpoints.save(state, experiment.setup.stages[name].steps)
    checkpoints.close()


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    config = tiny_config()
    workdir = tmp_path_factory.mktemp("run") / "demo"
    experiment = Experiment(config, workdir, make_datasets(config.data, seed=0))
    for name, subtrees in STAGES.items():
        finish(experiment, name, subtrees)
    # Whatever left it there: a stage is read at its own last step.
    (workdir / "con" / "checkpoints" / "999999").mkdir()
    return experiment


@pytest.fixture(scope="module")
def folder(experiment, tmp_path_factory):
    """The workdir as its own data would find it gone: nothing may be drawn or read."""
    config = read_json(experiment.workdir / "config.json")
    copy = tmp_path_factory.mktemp("alone") / "demo"
    shutil.copytree(experiment.workdir, copy)
    (copy / "config.json").write_text(json.dumps({**config, "data.kind": "panoptic_folder"}))
    return copy


LOOSE = PredictConfig(
    short_side=64, long_side=64, objectness_threshold=0.0, mask_threshold=0.3, overlap_threshold=0.0
)


def same(one, two):
    np.testing.assert_array_equal(one.id_map, two.id_map)
    assert one.segments == two.segments and one.fates == two.fates


def names(model, count):
    words = [n.split() for n in model.vocabulary.names]
    texts = list(
        dict.fromkeys(f"{a[0]} {b[1]} {c[2]}" for a in words for b in words for c in words)
    )
    texts += [f"{a} {b}" for a in texts for b in texts[:20]]
    return parse_classes(", ".join(texts[:count]), model.vocabulary)[0]


def test_a_workdir_names_by_its_training_without_its_data(folder, experiment):
    model = open_model(folder)
    assert model.vocabulary == experiment.setup.vocabulary
    image = next(experiment.datasets.evaluation())["image"]
    found = model.predictor(LOOSE)(image).panoptic
    assert found.segments
    # Which is what the experiment predicts, see below.
    same(found, open_model(experiment.workdir).predictor(LOOSE)(image).panoptic)


def test_an_exported_folder_gives_the_same_segments_bit_for_bit(folder, tmp_path, capsys):
    image = np.random.default_rng(0).integers(0, 256, (50, 64, 3), np.uint8)
    model = open_model(folder)
    convert.main(["convert", str(folder), str(tmp_path / "mine")])
    assert "text_tower" in capsys.readouterr().out
    exported = open_model(tmp_path / "mine")
    assert not {"clip", "optimizer"} & {path.name for path in (tmp_path / "mine").rglob("*")}
    for classes in (None, names(model, 5)):
        pair = (m.predictor(LOOSE, classes)(image).panoptic for m in (model, exported))
        same(*pair)
    with pytest.raises(SystemExit, match="names classes by text: it is used as it is"):
        convert.main(["convert", str(tmp_path / "mine"), str(tmp_path / "again")])


def test_other_names_compile_nothing_again(folder):
    model = open_model(folder)
    image = np.random.default_rng(0).integers(0, 256, (50, 64, 3), np.uint8)
    compiled = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    for count in (1, 5, 500):
        classes = names(model, count)
        assert len(classes) == count
        labels = {s["label"] for s in model.predictor(LOOSE, classes)(image).panoptic.segments}
        assert labels and max(labels) < count
        compiled.clear()
        other = dataclasses.replace(classes, names=tuple(reversed(classes.names)))
        model.predictor(LOOSE, other)(image)
        assert not compiled, count


def test_objectness_does_not_depend_on_the_number_of_names(folder):
    model = open_model(folder)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    kept = [
        model.predictor(LOOSE, classes)(image).panoptic.best_keep_score
        for classes in (None, names(model, 1), names(model, 500))
    ]
    np.testing.assert_allclose(kept, kept[0], rtol=1e-6)


def test_every_way_to_a_prediction_agrees_on_one_image(experiment, tmp_path):
    """Evaluation, a sweep over gamma, the command line and a score of its files: one number."""
    native = next(experiment.datasets.evaluation())
    settings = {"objectness_threshold": 0.0, "mask_threshold": 0.3, "overlap_threshold": 0.0}
    evaluated = evaluate(experiment.predictor("finetune", **settings), [native], name="one")
    predictor = experiment.predictor("finetune", **settings, gamma=(0.0, 0.5))
    swept = predictor.predict([predictor.prepare(native["image"])])[0].panoptic[0]

    vocabulary = experiment.setup.vocabulary
    Image.fromarray(native["image"]).save(tmp_path / "1.png")
    flags = [f"--{name}={value}" for name, value in settings.items()]
    workdir = f"--model={experiment.workdir}"
    predict.main(["p", workdir, f"--output={tmp_path}/out", *flags, str(tmp_path / "1.png")])
    found = (
        open_model(experiment.workdir)
        .predictor(PredictConfig(short_side=64, long_side=64, **settings))(native["image"])
        .panoptic
    )
    # A sweep is another program, which may round a score the other way.
    np.testing.assert_array_equal(found.id_map, swept.id_map)
    assert found.fates == swept.fates and len(found.segments) == len(swept.segments) > 0
    for one, two in zip(found.segments, swept.segments, strict=True):
        assert one == {**two, "score": pytest.approx(two["score"], rel=1e-6)}
    segments = [
        {"id": row + 1, "label": int(label)}
        for row, label in enumerate(native["segment_labels"])
        if label >= 0
    ]
    with PanopticWriter(tmp_path, vocabulary, name="truth") as writer:
        writer.add(1, "1.png", native["segment_ids"], segments)
    scored = score_panoptic(tmp_path / "truth.json", tmp_path / "out" / "panoptic.json", vocabulary)
    for group in ("all", "seen", "unseen"):
        for key in ("pq", "sq", "rq"):
            assert scored[group][key] == pytest.approx(evaluated[group][key], abs=1e-6, nan_ok=True)


@pytest.mark.parametrize(
    ("stage", "sentence"),
    [
        ("control", "the stages control have not finished; .*--stage, one of con, finetune"),
        ("clip", "has no segmentor with a projector"),
        ("fintune", "did you mean 'finetune'"),
    ],
)
def test_stages_that_cannot_predict_are_named(stage, sentence, folder):
    with pytest.raises(ValueError, match=sentence):
        open_model(folder, stage=stage)


def test_folders_that_are_no_model_are_told_apart(tmp_path):
    with pytest.raises(ValueError, match="There is no folder"):
        open_model(tmp_path / "none")
    with pytest.raises(ValueError, match="holds neither model.json"):
        open_model(tmp_path)
    for nothing in (3, None, b"demo", ""):
        with pytest.raises(ValueError, match="is no model; give a model's folder, or demo"):
            open_model(nothing)
    (tmp_path / "export.json").touch()
    with pytest.raises(ValueError, match="was exported for programs without this package"):
        open_model(tmp_path)
    (tmp_path / "export.json").unlink()
    (tmp_path / "config.json").write_text("")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON: .* remove it: "):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mask2former"}))
    with pytest.raises(ValueError, match="is a folder of Hugging Face's; convert it first"):
        open_model(tmp_path)


def test_a_run_that_evaluates_no_stage_names_by_its_last_one(folder, tmp_path):
    """As the folders of an ablation's seeds: no section of its config.json holds what is empty."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    content = read_json(copy / "config.json")
    kept = {key: v for key, v in content.items() if not key.startswith("eval.stages")}
    assert kept != content
    kept["stages"] = [name for name in content["stages"] if name != "control"]
    (copy / "config.json").write_text(json.dumps(kept))
    assert open_model(copy).card.source.endswith("stage finetune")


def test_damaged_labels_are_named(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for content in ("{}", "{"):
        (copy / LABELS_NAME).write_text(content)
        with pytest.raises(ValueError, match="labels.json is damaged .* delete it"):
            open_model(copy)


def test_a_linear_head_takes_no_other_names():
    vocabulary = tiny.vocabulary()
    head = {"class_embed": {"kernel": np.zeros((32, 7)), "bias": np.zeros(7)}}
    params = {"segmentor": tiny.params("segmentor"), "classifier": head}
    model = Model(params, ModelCard(tiny.MODEL["segmentor"], vocabulary, knows_things=True))
    with pytest.raises(ValueError, match="is linear and names its own 6 classes alone"):
        model.predictor(classes=parse_classes("cat, zebra", vocabulary)[0])
