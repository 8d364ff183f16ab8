"""Exported artefacts against the model they are of, and the lines of docs/export.md on them."""

import dataclasses
import json
import pathlib
import re

import jax
import numpy as np
import pytest
from PIL import Image

from concat_jax import export
from concat_jax.experiment.model import open_model
from concat_jax.exporting import formats
from concat_jax.exporting.formats import FORMATS, Format
from concat_jax.exporting.program import make_program
from concat_jax.inference.predictor import PredictConfig
from concat_jax.inference.programs import run_segmentor
from concat_jax.inference.text_tower import text_params
from concat_jax.models.networks import make_networks
from concat_jax.text.tokenizer import WordTokenizer
from concat_jax.weights.model_folder import ModelCard, TextCard, save_model
from tests import tiny

DOC = pathlib.Path(__file__).resolve().parents[1] / "docs" / "export.md"
NAMES = ("red cat; sea", "blue dog, cat, grass; sky, red sea")
SIZE = (64, 96)
WORDS = sorted({word for name in tiny.vocabulary().names for word in name.split()})
TOKENIZER = WordTokenizer(WORDS, 5)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """A model that reads names."""
    fields = tiny.model(clip=dict(vocab_size=TOKENIZER.vocab_size, eot_id=TOKENIZER.eot_id))
    networks = make_networks(fields)
    names = ("embed_dim", "vocab_size", "context_length", "text_width", "text_depth", "text_heads")
    text = TextCard(
        projector=fields["projector"],
        clip={name: getattr(networks.clip, name) for name in (*names, "eot_id")},
        tokenizer={},
        templates=("{}",),
        clean_names=True,
        synonyms="mean",
    )
    tower = tiny.params("clip", of=networks)
    params = {
        "segmentor": tiny.params("segmentor", of=networks),
        "projector": tiny.params("projector", of=networks),
        "text_tower": text_params(tower),
        "training_text": tiny.text(),
    }
    card = ModelCard(
        fields["segmentor"],
        tiny.vocabulary(),
        "panoptic",
        "tiny",
        knows_things=True,
        text=text,
        short_side=SIZE[0],
        long_side=SIZE[1],
    )
    folder = tmp_path_factory.mktemp("text") / "model"
    save_model(folder, params, card, tokenizer=TOKENIZER)
    return folder


@pytest.fixture(scope="module")
def linear_folder(tmp_path_factory):
    """A model with a linear head, at the stride of published ones, that is sure of its queries."""
    fields = tiny.model(segmentor=dict(backbone=tiny.STRIDE_4, num_queries=12))["segmentor"]
    segmentor = tiny.params("segmentor", of=make_networks(tiny.model(segmentor=fields)))
    classes = dataclasses.replace(tiny.vocabulary(), is_seen=(True,) * 6)
    rng = np.random.default_rng(3)
    kernel, bias = 3 * rng.normal(size=(32, 7)), np.array([0.0] * 6 + [-30])
    head = {"class_embed": {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}}
    card = ModelCard(fields, classes, "panoptic", "m2f", knows_things=True)
    folder = tmp_path_factory.mktemp("linear") / "model"
    save_model(folder, {"segmentor": segmentor, "classifier": head}, card)
    return folder


def pictures():
    """Three smooth images: a random network sees more than one region in them."""
    rng = np.random.default_rng(5)
    height, width = SIZE
    for _ in range(3):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
        yield np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def of_checkpoint(predictor, image):
    """Outputs by the programs of `predict`, without the columns that fill names up."""
    size, names = np.array([image.shape[:2]], np.int32), len(predictor.vocabulary)
    segmentor, head = predictor.networks
    logits, queries = run_segmentor(
        segmentor, image[None], size, is_padded=False, canvas=image.shape[:2]
    )
    scores = jax.jit(lambda head, queries: head(queries))(head, queries)
    probs = np.asarray(scores.class_probs)
    probs = np.concatenate([probs[..., :names], probs[..., -1:]], axis=-1)
    return {"mask_logits": logits, "class_probs": probs, "objectness": scores.objectness}


def call(*arguments):
    """What the command ends with: 0, or the sentence of a mistake."""
    try:
        export.main(["export", *map(str, arguments)])
    except SystemExit as stop:
        return str(stop.code)
    return 0


def needs(format_):
    for package in FORMATS[format_].packages:
        pytest.importorskip(package)


def check_outputs(predictor, image, found):
    for name, wanted in of_checkpoint(predictor, image).items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-4, err_msg=name)


def check_agrees(predictor, loaded, given=()):
    for image in pictures():
        check_outputs(predictor, image, loaded(image[None], *given))


@pytest.mark.parametrize("format_", FORMATS)
def test_artefacts_agree_with_the_checkpoint(text_folder, tmp_path, format_):
    """One list of names inside, the other as an input."""
    needs(format_)
    model, how = open_model(text_folder), FORMATS[format_]

    def exported(predictor, name, **options):
        program = make_program(predictor, SIZE, **options)
        how.write(program, tmp_path / name)
        return how.load(tmp_path / name)

    few, more = (model.predictor(classes=names) for names in NAMES)
    check_agrees(few, exported(few, "few", open_names=False))
    text = np.asarray(more.networks[1].text)[: len(more.vocabulary)]
    check_agrees(more, exported(model.predictor(), "any", open_names=True), [text])


def blocks():
    """The Python of docs/export.md, by what it imports."""
    found = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    kinds = {
        "jax": "from jax",
        "savedmodel": "import tensorflow",
        "onnx": "import onnxruntime",
        "panoptic": "def enlarge",
        "text": "import concat_jax",
    }
    assert len(found) == len(kinds)
    return {name: next(text for text in found if sign in text) for name, sign in kinds.items()}


@pytest.mark.parametrize(
    ("format_", "kind"),
    [("jax", "linear"), ("savedmodel", "text"), ("onnx", "linear")],
)
def test_the_lines_of_the_docs_make_the_panoptic_map(
    request, tmp_path, monkeypatch, capsys, format_, kind
):
    needs(format_)
    folder = request.getfixturevalue(f"{kind}_folder")
    names = [f"--classes={NAMES[1]}"] if kind == "text" else []
    code = call(folder, tmp_path / "exports/demo", f"--format={format_}", "--size=64x96", *names)
    assert code == 0
    assert "off by at most" in capsys.readouterr().out
    model = open_model(folder)
    config = PredictConfig(short_side=64, long_side=96)
    predictor = model.predictor(config, NAMES[1] if names else None)
    code = blocks()
    assert len(code[format_].splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    found = 0
    for image in pictures():
        np.save("image.npy", image)
        scope = {}
        exec(code[format_] + code["panoptic"], scope)
        check_outputs(predictor, image, scope["outputs"])
        wanted = predictor(image).panoptic
        assert np.mean(scope["panoptic"] == wanted.id_map) > 0.999
        assert {*np.unique(scope["panoptic"])} - {0} == {s["id"] for s in wanted.segments}
        printed = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
        labels = {int(number): name for number, name in reversed(printed)}
        for segment in wanted.segments:
            assert labels[segment["id"]] == predictor.vocabulary.names[segment["label"]]
        found += len(wanted.segments)
    assert found > 3


def test_names_as_an_input_come_with_those_of_training(text_folder, tmp_path, monkeypatch):
    out = tmp_path / "exports/demo"
    assert call(text_folder, out, "--format=jax", "--size=64x64") == 0
    described = json.loads((out / "export.json").read_text())
    assert described["names"] == list(tiny.vocabulary().names)
    assert described["inputs"]["text"]["shape"] == ["K", 16]
    assert described["outputs"]["class_probs"]["shape"] == [1, 6, "K+1"]
    assert described["keep_rule"] == "objectness" and described["keep_threshold"] == 0.5
    np.testing.assert_array_equal(np.load(out / "text.npy"), tiny.text())
    code = blocks()["text"].replace("demo", str(text_folder))
    code = code.replace("red striped balloon", "red cat").replace("grey wavy ground", "blue sea")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    text = np.load("text.npy")
    model = jax.export.deserialize(bytearray((out / "model.jax").read_bytes()))
    outputs = model.call(np.zeros((1, 64, 64, 3), np.uint8), text)
    assert outputs["class_probs"].shape == (1, 6, 3)
    assert model.platforms == ("cpu", "cuda", "tpu")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--format=onx",), "There is no format 'onx'; did you mean 'onnx'?"),
        ((), "give --format, one of jax, savedmodel, onnx."),
        (
            ("--format=jax", "--size=70x64"),
            "--size=70x64: both sides must be multiples of 32 of at most 4096; give --size=64x64.",
        ),
        (("--format=jax", "--size=0x99999"), "give --size=32x4096."),
        (("--format=jax", "--size=64"), "--size=64 is no HEIGHTxWIDTH"),
        (("--format=jax", "--stage=con"), "The stage 'con' is of a workdir"),
        (("--format=jax", "--classes=cat, dog"), "The head of m2f is linear and names its own 6"),
    ],
)
def test_mistakes_end_with_one_sentence(linear_folder, tmp_path, arguments, sentence):
    assert sentence in call(linear_folder, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_only_an_export_is_replaced(linear_folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "is there already" in call(linear_folder, tmp_path, "--format=jax")
    refused = call(linear_folder, tmp_path, "--format=jax", "--overwrite")
    assert "holds no model" in refused and (tmp_path / "notes.txt").exists()
    refused = call(linear_folder, linear_folder, "--format=jax", "--overwrite")
    assert "which would be lost" in refused and (linear_folder / "model.json").exists()


def test_the_demo_is_exported_over_an_export_of_its_name(tmp_path, monkeypatch):
    def reached(*args, **options):
        raise ValueError("opened")

    monkeypatch.setattr(export, "open_model", reached)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "export.json").write_text("{}")
    (tmp_path / "demo" / "model.jax").touch()
    assert "opened" in call("demo", "demo", "--format=jax", "--overwrite")
    assert "which would be lost" in call("./demo", "demo", "--format=jax", "--overwrite")


def test_a_missing_package_names_its_requirements(linear_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    sentence = call(linear_folder, tmp_path / "out", "--format=onnx")
    assert "needs jax2onnx and onnx and onnxruntime, which is optional" in sentence
    assert "pip install -r requirements-export.txt" in sentence


@pytest.mark.parametrize("value", [-1, np.nan])
def test_an_artefact_of_another_function_is_not_kept(linear_folder, tmp_path, monkeypatch, value):
    made = {}

    def write(program, path):
        call = jax.jit(program.call)
        made["call"] = lambda image: {**call(program.params, image), "mask_logits": value}

    wrong = Format("model.wrong", (), write, load=lambda path: made["call"])
    monkeypatch.setattr(export, "FORMATS", {"wrong": wrong})
    sentence = call(linear_folder, tmp_path / "out", "--format=wrong", "--size=64x64")
    assert "another function (its outputs are off by " in sentence
    assert not list(tmp_path.iterdir())


def test_what_a_converter_stumbles_over_is_a_sentence(linear_folder, tmp_path, monkeypatch):
    def write(program, path):
        raise NotImplementedError("no\nplugin")

    broken = FORMATS["jax"]._replace(write=write)
    monkeypatch.setattr(export, "FORMATS", {"jax": broken})
    sentence = call(linear_folder, tmp_path / "out", "--format=jax", "--size=64x64")
    assert "jax cannot hold this model (NotImplementedError: no plugin); use another" in sentence
    assert not list(tmp_path.iterdir())
