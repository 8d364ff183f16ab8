"""Exports where nothing of this package is; Mask2Former R50 at its published size, exported."""

import os
import re
import subprocess
import time
import venv

import jax
import numpy as np
import pytest

from concat_jax import export
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.experiment.model import open_model
from concat_jax.exporting.formats import FORMATS
from concat_jax.exporting.program import deviation, make_program
from concat_jax.inference.model import Model
from concat_jax.inference.predictor import PredictConfig
from concat_jax.models.mask2former import DEFAULTS
from concat_jax.models.segmentor import make_segmentor
from concat_jax.models.segmentor_output import LinearClassifier
from concat_jax.weights.model_folder import ModelCard, abstract_params
from data_pipelines.synthetic.world import draw_scenes
from tests import tiny
from tests.test_export import DOC, blocks, needs, of_checkpoint

pytestmark = pytest.mark.slow
LISTS = (
    "red striped balloon, blue dotted balloon; grey wavy ground, mint brick ground",
    "yellow checkered balloon, purple plain balloon, red dotted balloon; peach smooth ground, "
    "grey brick ground, mint speckled ground, mint wavy ground",
)
SIZE = (480, 640)


@pytest.mark.parametrize("format_", FORMATS)
def test_the_lines_of_the_docs_in_a_fresh_environment(tmp_path, monkeypatch, format_):
    """Three scenes and two lists of names, inside and as an input, against the model that ships."""
    needs(format_)
    which, page, code = [*FORMATS].index(format_), DOC.read_text(), blocks()
    install = re.findall(r"\(`pip install (.*?)`\):", page)[which]
    call = re.findall(r"`([^`]*\([^`]*\btext\b[^`]*\))`", page)[which]
    venv.create(tmp_path / "venv", with_pip=True)
    python = [tmp_path / "venv/bin/python"]
    subprocess.run([*python, "-m", "pip", "install", "-q", *install.split()], check=True)
    listed = subprocess.check_output([*python, "-m", "pip", "freeze"], text=True)
    assert not re.search("concat|flax|orbax", listed)
    print(f"\n{format_}, loaded with {listed.split()}")

    monkeypatch.chdir(tmp_path)
    scenes, model = draw_scenes(3), open_model("demo")
    predictors = [model.predictor(PredictConfig(short_side=64, long_side=64), n) for n in LISTS]
    for number, scene in enumerate(scenes):
        np.save(f"image{number}.npy", scene)
    for number, predictor in enumerate(predictors):
        names = len(predictor.vocabulary)
        np.save(f"text{number}.npy", predictor.networks[1].text[:names])

    def run(classes, lines):
        """Lines over each scene and each text, with an export of these classes."""
        arguments = ["demo", "exports/demo", f"--format={format_}", "--size=64x64", "--overwrite"]
        export.main(["export", *arguments, *classes])
        (tmp_path / "run.py").write_text(lines)
        environment = {"PATH": os.environ["PATH"], "TF_CPP_MIN_LOG_LEVEL": "2"}
        subprocess.run([*python, "run.py"], check=True, env=environment, stdout=subprocess.DEVNULL)

    save = 'np.savez("{}.npz", {}**{{k: np.asarray(v) for k, v in outputs.items()}})\n'
    for number, names in enumerate(LISTS):
        lines = "import shutil\n"
        for scene in range(3):
            lines += f'shutil.copy("image{scene}.npy", "image.npy")\n'
            lines += code[format_] + code["panoptic"]
            lines += save.format(f"inside{number}{scene}", "panoptic=panoptic, ")
        run([f"--classes={names}"], lines)
    lines = 'shutil.copy("image0.npy", "image.npy")\n'
    lines = "import shutil\n" + lines + code[format_].rpartition("outputs =")[0]
    for number in range(2):
        for scene in range(3):
            lines += f'image, text = np.load("image{scene}.npy"), np.load("text{number}.npy")\n'
            lines += f"outputs = {call}\n"
            lines += "if isinstance(outputs, list):\n"
            lines += '    outputs = dict(zip(described["outputs"], outputs))\n'
            lines += save.format(f"input{number}{scene}", "")
    run([], lines)

    for number, predictor in enumerate(predictors):
        for kind in ("inside", "input"):
            most, pixels = dict.fromkeys(("mask_logits", "class_probs", "objectness"), 0.0), 0
            for index, scene in enumerate(scenes):
                found = np.load(f"{kind}{number}{index}.npz")
                for name, wanted in of_checkpoint(predictor, scene).items():
                    assert found[name].shape == wanted.shape
                    scale = max(1, np.abs(wanted).max())
                    off = float(np.abs(found[name] - wanted).max() / scale)
                    most[name] = max(most[name], off)
                if kind == "inside":
                    pixels += (found["panoptic"] != predictor(scene).panoptic.id_map).sum()
            print(f"{len(predictor.vocabulary)} names {kind}:", most, "other pixels:", pixels)
            assert max(most.values()) < 1e-4 and pixels <= 3 * 64 * 64 // 1000


@pytest.fixture(scope="module")
def predictor():
    count = 133
    names = tuple(f"class {number}" for number in range(count))
    vocabulary = Vocabulary(names, (True,) * count, (True,) * count, tuple(range(1, count + 1)))
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    queries = jax.ShapeDtypeStruct((1, DEFAULTS["width"]), np.float32)
    shapes = {
        "segmentor": abstract_params(make_segmentor({}), image),
        "classifier": abstract_params(LinearClassifier(count), queries),
    }
    params = tiny.fill(shapes, seed=1)
    return Model(params, ModelCard({}, vocabulary, "panoptic", knows_things=True)).predictor()


@pytest.mark.parametrize("format_", FORMATS)
def test_full_size_artefacts_agree(predictor, tmp_path, format_):
    how = FORMATS[format_]
    for package in how.packages:
        pytest.importorskip(package)
    program = make_program(predictor, SIZE, open_names=False)
    path = tmp_path / how.file
    start = time.monotonic()
    how.write(program, path)
    seconds = time.monotonic() - start
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    print(f"\n{format_}: {megabytes:.1f} MB in {seconds:.1f} s")
    loaded = how.load(path)
    for block in (8, 16, 32):
        off = deviation(program, loaded, block)
        print(f"blocks of {block} pixels: off by", off)
        assert max(off.values()) < 1e-4
