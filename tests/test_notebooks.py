"""The notebooks run from top to bottom, as far as a test can wait."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from concat_jax.benchmarking import scaling
from concat_jax.benchmarking.harness import Work
from tests.command_lines import ROOT

NOTEBOOKS = ROOT / "notebooks"


def read(name):
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def run(name, **parameters):
    """Runs the cells in order, `parameters` set behind the cell that is tagged so; their names."""
    names, given = {}, dict(parameters)
    for number, cell in enumerate(read(name)):
        if cell["cell_type"] != "code":
            continue
        exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert given.keys() <= names.keys()
            names |= given
            given = {}
    assert not given, "no cell is tagged 'parameters'"
    return names


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("it installs something"))
    return tmp_path


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_nothing_is_left_of_a_run(path):
    cells = read(path.stem)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def test_evaluate(folder, capsys):
    found = run("evaluate", NUM_IMAGES=25)
    assert {segment.name for segment in found["result"].segments} <= {
        name.strip() for part in found["NAMES"].split(";") for name in part.split(",")
    }
    assert found["found"].best() == found["gamma"]
    for summary in found["scores"].values():
        # 25 scenes of a test part that gives 60.1 and 51.3 on 300.
        assert summary["images"] == 25 and summary["all"]["pq"] > 45
    assert len(found["points"]) == len(found["labels"]) > 50
    for picture in ("bias.png", "queries.png"):
        assert Image.open(folder / picture).width > 500
    assert "gamma 0" in capsys.readouterr().out


def test_scaling(folder, capsys, monkeypatch):
    """With a stand-in for the step, which has a test of its own: 13 programs take minutes."""

    def step(config):
        pixels = config.train.con.batch_size * config.data.image_size**2
        return Work(lambda: {"loss": np.zeros(())}, flops=pixels, traffic_bytes=1.0)

    monkeypatch.setattr(scaling, "_step", step)
    found = run("scaling", REPEATS=2)
    assert list(found["results"])[:4] == ["batch 2", "batch 4", "batch 8", "batch 16"]
    text = capsys.readouterr().out
    assert re.search(r"\| batch \| 2, 4, 8, 16 \| .* \| 1.00 ± 0.00 \| 0.00 ± 0.00 \|", text)
    assert re.search(r"\| side \| 64, 128, 192, 256 \| .* \| 2.00 ± 0.00 \|", text)


@pytest.mark.slow
def test_train_tpu(folder, capsys):
    found = run("train_tpu", SIZE="smoke", WORKDIR=str(folder / "run"))
    assert set(found["report"]["stages"]) == {"clip", "con", "cat", "finetune", "control"}
    assert (folder / "run/cat/query_space.png").is_file() and (folder / "demo_model").is_dir()
