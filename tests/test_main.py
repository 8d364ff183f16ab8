"""The command line from end to end, on a demo shrunk to seconds."""

import contextlib
import io
import json
import pathlib
import re
import shutil
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import concat_jax.experiment.experiment
import concat_jax.experiment.looks
from concat_jax import main
from concat_jax.core import config as configuration
from concat_jax.experiment import batches, parameters, query_pictures
from concat_jax.experiment.experiment import Experiment
from concat_jax.experiment.setup import make_setup
from concat_jax.experiment.workdir_lock import LOCK_NAME
from concat_jax.training import sharding
from concat_jax.training.checkpoints import CheckpointError, StageCheckpoints
from concat_jax.training.sharding import make_mesh
from configs import demo_zps

STAGES = ("clip", "con", "cat", "finetune", "control")


def tiny_config():
    config = demo_zps.get_config("smoke")
    config.mesh.devices = 1
    config.data.num_eval_images = 3
    config.model.clip.update(image_size=16, image_width=16, image_depth=1, image_heads=2)
    config.model.clip.update(embed_dim=16, text_width=16, text_heads=2)
    # The backbone starts from CLIP's trunk, whose width is its own; the rest is shrunk.
    config.model.segmentor.update(width=32, num_queries=12, num_decoder_layers=1)
    config.model.segmentor.update(ffn_width=32, decoder_ffn_width=32)
    config.model.projector.hidden_width = 16
    config.model.generator.update(hidden_width=16, num_layers=1, noise_width=4)
    config.crops.update(min_side=16.0, max_side=16.0)
    config.loss.num_points = 32
    config.eval.settings.batch_size = 2
    config.eval.num_pictures = 2
    for name in STAGES:
        config.train[name].update(steps=2, batch_size=4, log_every=1)
    for name in ("cat", "finetune", "control"):
        config.train[name].bank_images = 8
    with config.unlocked():
        for name in ("con", "finetune"):
            config.train[name].save_every = 1
        config.train.con.eval_every = 1
        config.eval.look_images = 2
    return config


def run(config, workdir):
    """Report and what was printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        report = main.run(config, str(workdir))
    return report, printed.getvalue()


# More than positions of a 64 x 64 image, and less than the parameters of CLIP or the segmentor.
MOST_CONSTANTS = 60_000


@contextlib.contextmanager
def programs_with_constants():
    """The list of JAX's warnings of programs that hold more than `MOST_CONSTANTS` bytes of them."""
    before = jax.config.jax_captured_constants_warn_bytes
    jax.config.update("jax_captured_constants_warn_bytes", MOST_CONSTANTS)
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    jax.config.update("jax_captured_constants_warn_bytes", before)
    found += [str(w.message) for w in caught if "onstants were captured" in str(w.message)]


@pytest.fixture(scope="module", autouse=True)
def no_optimization():
    """Of what runs once or twice; users' level of it is above that of tests."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (parameters, batches):
            patch.setattr(module, "light_compiler_options", lambda: None)
        yield


@pytest.fixture(scope="module")
def constants():
    """Warnings of programs with constants, of the run of `finished`."""
    return []


@pytest.fixture(scope="module")
def finished(tmp_path_factory, constants):
    """A workdir in which every stage has run once, with its report and what was printed."""
    workdir = tmp_path_factory.mktemp("run") / "demo"
    with programs_with_constants() as found:
        results = run(tiny_config(), workdir)
    constants += found
    return workdir, *results


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of that workdir to spoil."""
    return pathlib.Path(shutil.copytree(finished[0], tmp_path / "copy"))


def contents(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path: path.read_bytes() for path in files if path.name != LOCK_NAME}


def saved_params(workdir, stage, *subtrees):
    networks = make_setup(tiny_config(), make_data()).networks
    key = jax.random.key(0)
    abstract = {name: jax.eval_shape(lambda n=name: networks.init(n, key)) for name in subtrees}
    checkpoints = StageCheckpoints(workdir, stage)
    params = checkpoints.restore_params(abstract, make_mesh(devices=1))
    checkpoints.close()
    return params


def make_data():
    from data_pipelines.datasets import make_datasets

    return make_datasets(tiny_config().data, seed=0)


def test_all_stages_run_and_are_reported(finished):
    workdir, report, printed = finished
    config = tiny_config()
    saved = json.loads((workdir / "report.json").read_text())
    titles = list(config.eval.stages.values())
    assert list(report["results"]) == list(saved["results"]) == titles
    assert set(saved["stages"]) == set(STAGES)
    assert all(times["seconds"] > 0 for times in saved["stages"].values())
    assert saved["seconds"] >= sum(times["seconds"] for times in saved["stages"].values())
    for title, summary in saved["results"].items():
        assert summary["images"] == 3
        assert {"all", "things", "stuff", "seen", "unseen", "harmonic"} <= set(summary)
        assert set(summary["harmonic"]) >= {"pq", "sq", "rq"}
        assert {row["name"] for row in summary["per_class"]} == set(make_data().vocabulary.names)
        assert title in saved["table"]
    assert saved["table"] in printed
    assert "NaN" not in (workdir / "report.json").read_text()


def test_parameters_are_arguments_and_no_constants_of_a_program(finished, constants):
    assert constants == []
    for stage, subtree in (("clip", "clip"), ("con", "segmentor")):
        params = saved_params(finished[0], stage, subtree)
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) > 2 * MOST_CONSTANTS
        with programs_with_constants() as found:
            jax.jit(lambda p=params: jax.tree.map(jnp.sum, p)).lower()
        assert len(found) == 1


def test_a_mesh_that_splits_parameters_evaluates_alike(finished, copied, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SPLIT", 256)
    (copied / "report.json").unlink()
    config = tiny_config()
    config.mesh.update(devices=8, fsdp=4)
    config.eval.stages = {name: config.eval.stages[name] for name in ("con", "finetune")}
    config.eval.bias_split = ""
    report, _ = run(config, copied)
    assert not report["stages"]  # all are finished
    assert len(report["results"]) == 2
    for title, summary in report["results"].items():
        for group in ("all", "seen", "unseen"):
            assert summary[group] == pytest.approx(
                finished[1]["results"][title][group], nan_ok=True
            )


def test_each_stage_says_what_it_takes_trains_and_leaves(finished):
    printed = finished[2]
    blocks = dict(re.findall(r"Stage (\w+) starts\n((?:  .*\n)+)", printed))
    assert tuple(blocks) == STAGES
    trained = {
        name: set(re.findall(r"^  trained (\w+)", block, re.M)) for name, block in blocks.items()
    }
    taken = {
        name: set(re.findall(r"^  taken   (\w+)", block, re.M)) for name, block in blocks.items()
    }
    assert trained == {
        "clip": {"clip"},
        "con": {"segmentor", "projector"},
        "cat": {"generator"},
        "finetune": {"projector"},
        "control": {"projector"},
    }
    assert taken == {
        "clip": set(),
        "con": {"clip", "text"},
        "cat": {"segmentor", "projector", "text"},
        "finetune": {"segmentor", "generator", "text"},
        "control": {"text"},
    }
    assert "segmentor/backbone" in printed and "start from clip/" in printed
    assert len(re.findall(r"2/2 .*/s  data wait \d+%  ETA 0:00", printed)) == len(STAGES)


def test_the_files_of_a_run(finished):
    workdir, _, _ = finished
    written = json.loads((workdir / "config.json").read_text())
    assert written == json.loads(json.dumps(configuration.flat(tiny_config())))
    for name in STAGES:
        rows = [json.loads(line) for line in (workdir / name / "metrics.jsonl").open()]
        losses = [row["loss"] for row in rows if "loss" in row]
        looks = [row["step"] for row in rows if "look/hpq" in row]
        assert looks == ([1, 2] if name == "con" else [])
        assert len(losses) == 2 and np.isfinite(losses).all()
        assert (workdir / name / "checkpoints" / "2").is_dir()
    for name in tiny_config().eval.stages:
        with Image.open(workdir / name / "pictures.png") as picture:
            assert picture.width > 3 * 64 and picture.height > 2 * 64
            assert len(picture.getcolors(picture.width * picture.height)) > 50


def test_looks_at_a_stage_in_training(finished):
    """Every look runs the programs of the first; what it draws is of that moment."""
    workdir, _, printed = finished
    assert printed.count("con, step 1: pq_seen") == printed.count("con, step 2: pq_seen") == 1
    assert query_pictures._extract._cache_size() == 1
    with Image.open(workdir / "con" / "query_space.png") as picture:
        assert picture.width > 500


def test_the_finetune_moves_the_projector_and_nothing_else(finished):
    workdir = finished[0]
    first = saved_params(workdir, "con", "projector")["projector"]
    second = saved_params(workdir, "finetune", "projector")["projector"]
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), first, second)
    assert all(jax.tree.leaves(moved))
    with pytest.raises(CheckpointError, match="is missing"):
        saved_params(workdir, "finetune", "segmentor")


def test_started_again_it_says_finished_and_trains_nothing(finished, monkeypatch):
    workdir, report, _ = finished

    def refuse(*args, **kwargs):
        raise AssertionError("a finished run must not train or evaluate")

    monkeypatch.setattr(concat_jax.experiment.experiment, "train_stage", refuse)
    monkeypatch.setattr(concat_jax.experiment.looks, "evaluate", refuse)
    before = contents(workdir)
    again, printed = run(tiny_config(), workdir)
    assert contents(workdir) == before
    assert "finished" in printed and report["table"] in printed
    assert again["table"] == report["table"]


def test_other_evaluation_settings_evaluate_again(copied, monkeypatch):
    """What was trained stands; the numbers must be those of the settings asked for."""
    monkeypatch.setattr(
        concat_jax.experiment.experiment, "train_stage", None
    )  # it must not be called
    config = tiny_config()
    config.eval.stages = dict(finetune="only this")
    with config.unlocked():
        config.eval.settings.objectness_threshold = 0.0
    report, _ = run(config, copied)
    assert list(report["results"]) == ["only this"]
    assert "only this" in json.loads((copied / "report.json").read_text())["table"]


def test_a_killed_run_goes_on_from_its_last_checkpoints(copied, finished):
    workdir = finished[0]
    for name in ("con", "finetune"):
        shutil.rmtree(copied / name / "checkpoints" / "2")
    config = tiny_config()
    config.eval.stages = {}  # the very parameters are those that were scored
    _, printed = run(config, copied)
    assert "Stage con resumes at step 1" in printed
    assert "Stage finetune resumes at step 1" in printed
    for name in ("clip", "cat", "control"):
        assert f"Stage {name}: already finished" in printed
    for name, subtree in (("con", "segmentor"), ("con", "projector"), ("finetune", "projector")):
        jax.tree.map(
            np.testing.assert_array_equal,
            saved_params(copied, name, subtree),
            saved_params(workdir, name, subtree),
        )


def test_a_stage_trained_anew_leaves_no_mixture(copied, monkeypatch):
    monkeypatch.setattr(concat_jax.experiment.experiment, "train_stage", None)
    shutil.rmtree(copied / "con")
    before = contents(copied)
    with pytest.raises(
        ValueError, match="cat, control, finetune learnt from an earlier .* stage con;"
    ):
        run(tiny_config(), copied)
    assert contents(copied) == before


def test_a_split_that_there_is_not_is_refused_before_anything_is_written(tmp_path):
    config = tiny_config()
    config.eval.bias_split = "validaton"
    with pytest.raises(ValueError, match="no split 'validaton'; did you mean 'validation'"):
        run(config, tmp_path / "fresh")
    config.eval.bias_split = config.data.eval_split
    with pytest.raises(ValueError, match="both 'test'; set config.eval.bias_split to another"):
        run(config, tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()
    config.data.kind = "coco_panoptic_zps"
    setup = types.SimpleNamespace(config=config)
    with pytest.raises(ValueError, match="set config.eval.bias_split to ''"):
        Experiment.held_out(types.SimpleNamespace(setup=setup))


def test_stages_out_of_order_are_refused_before_anything_is_written(tmp_path):
    config = tiny_config()
    config.stages = ("con", "clip")
    expected = "Stage 'con' takes 'clip' from stage 'clip', which has not finished .* put 'clip'"
    with pytest.raises(CheckpointError, match=expected):
        run(config, tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()


def test_a_later_stage_alone_takes_what_finished_stages_gave(copied):
    shutil.rmtree(copied / "control")
    config = tiny_config()
    config.stages = ("control",)
    config.eval.stages = dict(control="control")
    _, printed = run(config, copied)
    assert re.findall(r"Stage (\w+)", printed) == ["control"]


@pytest.mark.parametrize("unfinished", [True, False])
def test_a_checkpoint_of_another_architecture_names_what_differs(copied, unfinished):
    if unfinished:
        shutil.rmtree(copied / "finetune")
    before = contents(copied)
    config = tiny_config()
    config.model.segmentor.width = 48
    with pytest.raises(CheckpointError) as error:
        run(config, copied)
    expected = r"of another architecture: \S+/\w+ is \[.*?32\], the config wants \[.*?48\]"
    assert re.search(expected, str(error.value))
    assert contents(copied) == before


def test_another_training_config_names_the_key(copied):
    before = contents(copied)
    config = tiny_config()
    config.train.cat.optimizer.learning_rate = 0.5
    with pytest.raises(ValueError, match=r"config\.train\.cat\.optimizer\.learning_rate = 0\.001"):
        run(config, copied)
    config = tiny_config()
    config.data.preset = "shape"
    with pytest.raises(ValueError, match=r"config\.data\.preset = 'texture', now it is 'shape'"):
        run(config, copied)
    assert contents(copied) == before
