"""The pages' commands on the demo's workdir, after the demo's own command in smoke size."""

import importlib
import re

import pytest
from PIL import Image

from concat_jax.core.files import as_path
from data_pipelines.synthetic.world import draw_scenes
from tests import pages
from tests.command_lines import ROOT
from tests.emulated_bucket import NAME, emulated_bucket

pytestmark = pytest.mark.slow

CONFIG = "--config=configs/demo_zps.py"


def commands_on_the_workdir():
    """The words of each command on runs/demo, as small as the config has it, without doubles."""
    found = {}
    for page in pages.PAGES:
        for _, words in pages.command_lines(page):
            if {"runs/demo", "--workdir=runs/demo", "--model=runs/demo"} & {*words}:
                smoke = [f"{CONFIG}:smoke" if word == CONFIG else word for word in words[2:]]
                found[tuple(smoke)] = None
    return list(found)


@pytest.fixture(params=["on a disk", "in a bucket"])
def root(request, monkeypatch):
    """Where the folders of the pages lie: "" or a bucket."""
    if request.param == "on a disk":
        yield ""
        return
    with emulated_bucket() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield f"{NAME}/"


def test_commands_on_the_demo(root, tmp_path, monkeypatch, capsys):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    Image.fromarray(draw_scenes(1)[0]).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    commands = commands_on_the_workdir()
    trains = [words for words in commands if words[0] == "concat_jax.main"]
    # Exports with and without --float16, and one with more scenes of evaluation.
    assert {words[0].removeprefix("concat_jax.") for words in commands} == {
        *("main", "predict", "convert", "evaluate", "calibrate", "query_space")
    }
    for words in sorted(commands, key=lambda words: words not in trains[:1]):
        if words in trains[1:]:
            continue  # the same run with another number of scenes
        placed = [
            re.sub(r"^(--\w+=|)(?=(runs|models)/|out$)", rf"\1{root}", word) for word in words
        ]
        importlib.import_module(words[0]).main(placed)
    made = ("report.json", "finetune/calibration.png", "con/query_space.png")
    assert all(as_path(f"{root}runs/demo/{name}").is_file() for name in made)
    assert as_path(f"{root}out/panoptic.json").is_file() and as_path(f"{root}models/mine").is_dir()
    assert "Best hPQ at gamma" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} <= {"configs", "photo.png"} or not root
