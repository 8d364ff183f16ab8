"""README and docs: commands, flags, keys, files and links exist; what runs in seconds is run."""

import collections
import importlib
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from concat_jax.benchmarking import cases
from concat_jax.core.coco_writers import PanopticWriter
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.experiment.ablation.rows import SCORED
from concat_jax.models.segmentor import make_segmentor
from concat_jax.models.segmentor_output import LinearClassifier
from concat_jax.weights.hugging_face_folder import save_hf_folder
from concat_jax.weights.model_folder import ModelCard
from data_pipelines.labels import load_label_space
from data_pipelines.synthetic.world import draw_scenes
from tests import pages, tiny
from tests.command_lines import ROOT, commands, flags_in, is_flag, is_known_key, parse
from tests.data_pipelines.coco_world import make_world

# Values of flags that a command checks when it runs.
CHOICES = {
    ("concat_jax.ablation", "rows"): SCORED,
    ("concat_jax.benchmark", "tasks"): cases.TASKS,
}
# Folders whose files are the project's own, so that what a page names of them must be there.
OWN = ("concat_jax/", "configs/", "data_pipelines/", "docs/", "launch/", "notebooks/", "tests/")
OWN += ("requirements",)
# Commands that are run here, with what they read made for them: module -> how many.
RUN = {
    "concat_jax.convert": 1,
    "concat_jax.evaluate": 2,
    "concat_jax.predict": 2,
    "data_pipelines.prepare": 1,
}
# Of gcloud's verbs the flags that are used, as its reference has them.
GCLOUD = {
    "config set project": (),
    "services enable": (),
    "storage buckets create": ("location",),
    "storage rsync": ("recursive",),
    "compute tpus queued-resources create": (
        *("node-id", "zone", "accelerator-type", "runtime-version", "spot"),
    ),
    "compute tpus queued-resources describe": ("zone", "format"),
    "compute tpus queued-resources delete": ("zone", "force"),
    "compute tpus tpu-vm ssh": ("zone", "worker", "command"),
}
# Scripts and how many words of their own stand before flags of concat_jax.main.
LAUNCH = {"bash launch/tpu.sh": 3, "sbatch launch/slurm.sh": 0}
SEGMENTOR = dict(
    backbone=tiny.STRIDE_4 | dict(kind="resnet", norm="frozen_batch"),
    width=32,  # a Hugging Face Mask2Former has 32 groups and 4 points
    num_queries=6,
    num_encoder_layers=1,
    num_decoder_layers=1,
    num_heads=2,
    ffn_width=16,
    decoder_ffn_width=16,
)


def everywhere(pieces):
    return [piece for page in pages.PAGES for piece in pieces(page)]


def fault(words):
    """What is wrong with a command of a page; "" if nothing is."""
    program, *rest = words
    if program == ".":
        return ""
    if program == "pip":
        verb, *options = rest
        if verb != "install":
            return f"pip {verb} is not known here"
        files = [value for flag, value in zip(options, options[1:], strict=False) if flag == "-r"]
        missing = [file for file in files if not (ROOT / file).is_file()]
        return f"there is no {missing[0]}" if missing else ""
    if program == "gcloud":
        text = " ".join(rest)
        verb = next((verb for verb in GCLOUD if text.startswith(verb + " ")), None)
        flags = {word[2:].partition("=")[0] for word in rest if word.startswith("--")}
        unknown = flags - {*GCLOUD.get(verb, ())}
        return f"gcloud {text} is not known here" if verb is None or unknown else ""
    if program == "tensorboard":
        return ""
    if (script := " ".join(words[:2])) in LAUNCH:
        program, rest = "python", ["-m", "concat_jax.main", *words[2 + LAUNCH[script] :]]
    if program not in ("python", "python3") or rest[0] != "-m":
        return f"{program} is not known here"
    module, *rest = rest[1:]
    if module == "venv":
        return ""
    if module == "pytest":
        files = [word for word in rest if word.endswith(".py")]
        missing = [file for file in files if not (ROOT / file).is_file()]
        known = {"-m", "slow", "-s", "-n", "2", *files}
        return "".join(f"no test {file}" for file in missing) or " ".join({*rest} - known)
    if module not in commands():
        return f"there is no command {module}"
    try:
        given = parse(module, rest).flags
    except SystemExit as stop:
        return str(stop)
    for (name, flag), choices in CHOICES.items():
        wrong = {*given[flag].value} - {*choices} if name == module else ()
        if wrong:
            return f"--{flag} takes no {', '.join(wrong)}"
    if "stage" in given and given["stage"].present and "config" in given and given.config:
        return "" if given.stage in given.config.train else f"there is no stage {given.stage}"
    return ""


@pytest.fixture(scope="module", autouse=True)
def at_the_root():
    """Pages name files from the repository on."""
    before = os.getcwd()
    os.chdir(ROOT)
    yield
    os.chdir(before)


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("python -m concat_jax.predict --model=m --output=o a.png", ""),
        ("python -m concat_jax.predict --modle=m", "--modle"),
        ("python -m concat_jax.main --config=configs/coco_zps.py:mini --config.data.root=x", ""),
        ("python -m concat_jax.main --config=configs/coco_zps.py --config.data.rot=x", "'rot'"),
        ("python -m concat_jax.main --config=configs/coco.py", "coco_zps.py"),
        ("python -m concat_jax.main more --config=configs/demo_zps.py", "more"),
        ("python -m concat_jax.main --config=configs/demo_zps.py:full", "full"),
        ("python -m concat_jax.ablation --config=configs/demo_zps.py --rows=conn", "conn"),
        ("python -m concat_jax.evaluate --config=configs/demo_zps.py --stage=cta", "cta"),
        ("python -m concat_jax.train", "no command"),
        ("pip install -r requirements-gpu.txt", "requirements-gpu.txt"),
        ("python -m pytest -m slow tests/slow/test_none.py", "test_none"),
        ("conda create", "conda"),
        ("gcloud compute tpus queued-resources create a --spott", "--spott"),
        ("bash launch/tpu.sh a b gs://c --config=configs/coco.py", "coco_zps.py"),
        ("sbatch launch/slurm.sh --config=configs/coco_zps.py --config.seeed=1", "seeed"),
    ],
)
def test_faults_are_found(command, wrong):
    found = fault(command.split())
    assert wrong in found and bool(wrong) == bool(found)


def test_commands_are_those_that_there_are():
    found = everywhere(pages.command_lines)
    assert len(found) > 40 and len({words[2] for _, words in found if len(words) > 2}) > 10
    wrong = [f"{place}: {why}" for place, words in found if (why := fault(words))]
    assert not wrong, "\n".join(wrong)


def test_blocks_are_of_languages_that_are_checked():
    assert {language for page in pages.PAGES for language in pages.languages(page)} <= {
        "bash",
        "json",
        "python",
    }


def test_flags_in_the_text_exist():
    wrong = []
    for place, text in everywhere(pages.spans):
        if "python -m" in text:
            continue
        for flag in flags_in(re.sub(r"--config\.\S+", "", text)):
            if not any(is_flag(flag, module) for module in commands()):
                wrong.append(f"{place}: no command has the flag {flag}")
    assert not wrong, "\n".join(wrong)


def test_config_keys_in_the_text_exist():
    found = [
        (place, key)
        for place, text in everywhere(pages.spans)
        for key in re.findall(r"(?<![\w./])(?:--)?config\.([a-z_][\w.]*\w)", text)
        if key not in ("json", "py")
    ]
    assert len(found) > 15
    wrong = [f"{place}: config.{key}" for place, key in found if not is_known_key(key)]
    assert not wrong, "\n".join(wrong)


def test_files_in_the_text_are_there():
    found = [
        (place, word)
        for place, text in everywhere(pages.spans)
        for word in re.findall(r"[\w./*{}-]+", text)
        if word.startswith(OWN) and "*" not in word
    ]
    assert len(found) > 20
    wrong = [f"{place}: {file}" for place, file in found if not (ROOT / file).exists()]
    assert not wrong, "\n".join(wrong)


def test_links_lead_somewhere():
    wrong = []
    for page in pages.PAGES:
        for place, target in pages.links(page):
            if target.startswith("https://"):
                continue
            file, _, anchor = target.partition("#")
            path = (ROOT / page).parent / file if file else ROOT / page
            if not path.exists() or (
                anchor and anchor not in pages.anchors(str(path.resolve().relative_to(ROOT)))
            ):
                wrong.append(f"{place}: {target}")
    assert len(everywhere(pages.links)) > 30
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", pages.PAGES)
def test_every_page_is_linked_from_the_readme(page):
    assert page == "README.md" or page in {target for _, target in pages.links("README.md")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the commands of the pages read, by the names that they give it."""
    here = tmp_path_factory.mktemp("pages")
    scenes = [Image.fromarray(scene) for scene in draw_scenes(3)]
    for name in ("folder", "more", "coco/annotations", "coco/val2017"):
        (here / name).mkdir(parents=True)
    for name in ("photo.png", "photo.jpg", "folder/a.jpg", "more/b.png"):
        scenes[len(name) % 3].save(here / name)

    Image.new("RGB", (8, 8)).save(here / "coco/val2017/1.jpg")
    split = load_label_space("coco_panoptic_119_14")
    ids = np.arange(64).reshape(8, 8) // 32 + 1
    segments = [{"id": 1, "label": 0, "score": 0.9}, {"id": 2, "label": 100, "score": 0.8}]
    for name in ("coco/annotations/panoptic_val2017", "panoptic_predictions"):
        place, _, file = name.rpartition("/")
        with PanopticWriter(here / place, split, name=file) as writer:
            writer.add(1, "1.jpg", ids, segments)

    make_world(here / "DIR", part="train")
    for old in list((here / "DIR").glob("**/*train")) + list((here / "DIR").glob("**/*train.json")):
        copy = shutil.copytree if old.is_dir() else shutil.copy
        copy(old, old.with_name(old.name.replace("train", "val")))

    segmentor = make_segmentor(SEGMENTOR)
    shapes = jax.eval_shape(segmentor.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    names = Vocabulary(("cat", "sky"), (True, False), (True, True), (1, 2))
    head = LinearClassifier(2)
    of_head = jax.eval_shape(head.init, jax.random.key(0), jnp.zeros((1, 1, 32)))
    params = {"segmentor": shapes["params"], "classifier": of_head["params"]}
    card = ModelCard(SEGMENTOR, names, "panoptic", knows_things=True, short_side=64, long_side=64)
    save_hf_folder(here / "SOURCE", tiny.fill(params, 1), card)
    return here


# Of docs/export.md `test_export` runs them, each where an artefact of its format lies; that of
# docs/scenic.md is what `test_scenic_project` does, where Scenic is.
ELSEWHERE = ("docs/export.md", "docs/scenic.md")
PROGRAMS = [p for p in pages.PAGES if pages.blocks(p, "python") and p not in ELSEWHERE]


@pytest.mark.parametrize("page", PROGRAMS)
def test_programs_run(page, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    names = {}
    for place, text in pages.blocks(page, "python"):
        exec(compile(text, place, "exec"), names)
    assert names


def runs(words):
    """Whether what a command reads is in the folder."""
    text = " ".join(words)
    return words[1:2] == ["-m"] and any(
        there in text
        for there in (
            "predict --model=demo",
            "convert SOURCE",
            "predict --model=models/m2f",
            "evaluate --task=panoptic --split",
            "prepare panoptic_folder",
        )
    )


def test_commands_run(folder, monkeypatch, capsys):
    found = {}
    for _, words in everywhere(pages.command_lines):
        if runs(words):
            found.setdefault(tuple(words), None)
    assert collections.Counter(words[2] for words in found) == RUN
    # A model is made before it is used.
    order = ["data_pipelines.prepare", "concat_jax.convert", "concat_jax.predict"]
    monkeypatch.chdir(folder)
    for words in sorted(found, key=lambda words: (words[2] not in order[:2], words)):
        importlib.import_module(words[2]).main(list(words[2:]))
    assert (folder / "out" / "panoptic.json").is_file()
    assert (folder / "scores" / "worst_best.png").is_file()
    assert "100.0" in capsys.readouterr().out
