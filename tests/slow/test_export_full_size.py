"""Mask2Former R50 at its published size, exported: agreement, sizes of files and seconds."""

import time

import jax
import numpy as np
import pytest

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.exporting.formats import FORMATS
from concat_jax.exporting.program import make_program
from concat_jax.inference.model import Model
from concat_jax.models.segmentor import DEFAULTS, LinearClassifier, make_segmentor
from concat_jax.weights.model_folder import ModelCard, abstract_params
from tests import tiny

pytestmark = pytest.mark.slow
SIZE = (480, 640)


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
    print(f"{format_}: {megabytes:.1f} MB in {seconds:.1f} s")
    coarse = np.random.default_rng(0).integers(0, 256, (1, 15, 20, 3), np.uint8)
    image = coarse.repeat(32, axis=1).repeat(32, axis=2)
    wanted = jax.jit(program.call)(program.params, image)
    found = how.load(path)(image)
    for name in program.outputs:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-4, err_msg=name)
