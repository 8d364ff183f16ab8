"""`python -m concat_jax.benchmark`: tasks whose variants take turns, tiny, and their report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from concat_jax.benchmarking.measure import Turn, measure_in_turns
from concat_jax.benchmarking.report import to_markdown
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.weights.model_folder import ModelCard, parameter_shapes, save_model

ROOT = Path(__file__).resolve().parents[2]
# Compiling is what these tests cost.
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
SEGMENTOR = dict(
    backbone=dict(kind="resnet", stage_sizes=(1, 1, 1, 1), width=8, block="basic", norm="group"),
    width=32,
    num_queries=6,
    num_encoder_layers=1,
    num_decoder_layers=1,
    num_heads=4,
    num_points=2,
    ffn_width=32,
    decoder_ffn_width=32,
    num_groups=8,
)
CLIP = dict(
    embed_dim=16,
    image_size=32,
    patch_size=8,
    image_width=32,
    image_depth=1,
    image_heads=2,
    text_width=8,
    text_depth=1,
    text_heads=1,
    vocab_size=12,
    context_length=5,
)
VOCABULARY = Vocabulary(("cat", "sky", "tree"), (True, False, True), (True, False, True), (1, 2, 3))


def benchmark(*flags):
    return subprocess.run(
        [sys.executable, "-m", "concat_jax.benchmark", *flags],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FAST_COMPILE},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    rng = np.random.default_rng(0)
    flat = {
        tuple(name.split("/")): rng.normal(name.endswith("scale"), 0.1, shape).astype(np.float32)
        for name, shape in parameter_shapes(SEGMENTOR, len(VOCABULARY)).items()
    }
    params = traverse_util.unflatten_dict(flat)
    save_model(folder / "model", params, ModelCard(SEGMENTOR, VOCABULARY, "panoptic", "tiny", True))
    (folder / "images").mkdir()
    for number, shape in enumerate([(50, 70, 3), (70, 50, 3), (90, 64, 3)]):
        picture = Image.fromarray(rng.integers(0, 256, shape, np.uint8))
        picture.save(folder / "images" / f"{number}.png")
    result = benchmark(
        "--tasks=alignment,two_stage,query_stages",
        f"--model={folder / 'model'}",
        f"--clip={json.dumps(CLIP)}",
        f"--images={folder / 'images'}",
        f"--output={folder / 'output'}",
        "--train_sizes=64",
        "--two_stage_sizes=64",
        "--segments=3",
        "--two_stage_images=2",
        "--two_stage_masks=6",
        "--repeats=2",
    )
    assert result.returncode == 0, result.stderr
    content = json.loads((folder / "output" / "benchmark.json").read_text())
    assert (folder / "output" / "benchmark.md").read_text() == to_markdown(content)
    return content


def test_alignment(report):
    results = report["cases"][0]["results"]
    assert list(results) == ["without alignment", "cached targets", "online targets"]
    for result in results.values():
        assert len(result["seconds"]) == 2 and min(result["seconds"]) > 0
    without, cached, online = (result["flops"] for result in results.values())
    # Two images, and three crops each, through the tower: 32 wide, 17 tokens, MLP of 4 x 32.
    encoding = 2 * (1 + 3) * 2 * 17 * (4 * 32 * 32 + 2 * 32 * 128)
    assert 0 < without < cached
    assert online - cached > encoding > 2 * (cached - without)
    losses = [report["cases"][0]["outputs"][name]["loss"] for name in results]
    assert np.isfinite(losses).all()


def test_two_stage(report):
    case = report["cases"][1]
    assert list(case["results"]) == ["ours", "CLIP on 6 masks an image"]
    ours, theirs = (result["flops"] for result in case["results"].values())
    encoding = 2 * 17 * (4 * 32 * 32 + 2 * 32 * 128)  # a crop
    assert theirs - ours > 2 * 6 * encoding, "two images of six masks"
    outputs = case["outputs"]["ours"]
    assert np.shape(outputs["kept"]) == np.shape(outputs["proposals"]) == (2,)
    assert 0 < min(outputs["proposals"]) and max(outputs["proposals"]) <= 6
    assert case["case"]["pictures"].endswith("images")


def test_query_stages(report):
    case = report["cases"][2]
    assert list(case["results"]) == ["CAT", "union finetune"]
    for name, result in case["results"].items():
        assert len(result["seconds"]) == 2 and min(result["seconds"]) > 0 and result["flops"] > 0
        assert np.isfinite(case["outputs"][name]["loss"])
        assert case["outputs"][name]["bank_shape"] == [2048, 6, 32]


def result(seconds, flops):
    return {
        "median": float(np.median(seconds)),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "seconds": seconds,
        "flops": flops,
        "peak_bytes": 2_500_000_000,
        "compile": 7.0,
    }


def test_an_epoch_and_the_bank_of_coco_follow_from_a_step():
    case = {
        "name": "query_stages",
        "case": {"task": "query_stages"},
        "results": {"CAT": result([0.1, 0.2, 0.3], 4e12), "union finetune": result([0.64], 1e9)},
        "outputs": {"CAT": {"bank_shape": [2048, 100, 256]}},
    }
    text = to_markdown({"model": "m", "machine": {}, "repeats": 3, "cases": [case]})
    # 2807 steps of 16 images at 0.2 s, 701.75 steps of 64 at 0.64 s.
    assert "| CAT | 16 | 200.0 (100.0 to 300.0) | 4000 | 9.4 |" in text
    assert "| union finetune | 64 | 640.0 (640.0 to 640.0) | 1.000 | 7.5 |" in text
    assert "is 2.3 GB in float16 and 4.6 GB in float32" in text


def test_report_of_known_figures():
    case = {
        "name": "two_stage",
        "case": {"task": "two_stage", "num_images": 20, "num_masks": [10]},
        "results": {"ours": result([10.0, 20.0, 30.0], 4e12), "CLIP": result([40.0] * 3, 10e12)},
        "outputs": {"ours": {"proposals": [90, 100], "kept": [3, 6]}},
    }
    text = to_markdown({"model": "m", "machine": {}, "repeats": 3, "cases": [case]})
    assert (
        "| CLIP | 40.000 (40.000 to 40.000) | 2.000 (1.333 to 4.000) | 10000 | 2.50 | 2.50 | 7 |"
        in text
    )
    assert "| ours | 20.000 (10.000 to 30.000) | 1.000 | 4000 | 1.00 | 2.50 | 7 |" in text
    assert "95.0 have a mask with a pixel; our post-processing keeps 4.5 (3 to 6)" in text
    # 20 s more for 200 masks; 2,000 of them on top of our 20 s.
    assert "CLIP: 100 ms a mask beyond ours, so all 100 queries would be 11.0 times ours" in text


def test_turns_alternate_and_the_first_round_is_not_timed():
    calls = []

    def turn(name):
        return Turn(lambda: calls.append(name) or {"number": np.array(len(calls))}, flops=3.0)

    results = measure_in_turns({name: turn(name) for name in "abc"}, repeats=3)
    assert "".join(calls) == "cba" + "abc" + "cba" + "abc"
    assert [len(result.seconds) for result in results.values()] == [3, 3, 3]
    assert results["b"].outputs["number"] == 11 and results["b"].flops == 3.0


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--tasks=two_stage", "--batch=3"], "20 images do not fill batches of 3"),
        (["--tasks=two_stage", "--two_stage_masks=ten"], "is not like 10 or 10,100"),
        (["--tasks=alignment", "--clip={"], "--clip is not valid JSON"),
        (["--tasks=two_stage", "--clip={}", "--images=absent"], "absent does not exist"),
        (["--tasks=alignments"], "did you mean 'alignment'"),
    ],
)
def test_mistakes_end_in_a_sentence(flags, sentence):
    result = benchmark(*flags)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: ") and sentence in result.stderr
    assert result.stderr.count("\n") == 1
