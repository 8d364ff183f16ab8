"""`python -m concat_jax.benchmark`: what every task measures, tiny, and what its tables say."""

import dataclasses
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from concat_jax import benchmark as command
from concat_jax.benchmarking import alignment, harness, matching, programs, query_stages, two_stage
from concat_jax.benchmarking.cases import Case, image_files
from concat_jax.benchmarking.harness import Measurement, Work, in_turns
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.weights.model_folder import ModelCard, parameter_shapes, save_model
from tests import tiny

SEGMENTOR, CLIP = tiny.MODEL["segmentor"], tiny.MODEL["clip"]
VOCABULARY = Vocabulary(("cat", "sky", "tree"), (True, False, True), (True, False, True), (1, 2, 3))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a tiny model."""
    folder = tmp_path_factory.mktemp("model")
    shapes = parameter_shapes(SEGMENTOR, len(VOCABULARY))
    flat = {tuple(name.split("/")): np.empty(shape) for name, shape in shapes.items()}
    params = tiny.fill(traverse_util.unflatten_dict(flat), 0)
    save_model(folder, params, ModelCard(SEGMENTOR, VOCABULARY, "panoptic", "tiny", True))
    return str(folder)


@pytest.fixture
def case(model):
    return Case("", 64, 64, segments=3, clip=CLIP, model=model, num_images=2, num_masks=(6,))


def test_alignment(case, monkeypatch):
    names = ["without alignment", "cached targets", "online targets"]
    assert list(alignment.VARIANTS) == names
    variants = {name: alignment.VARIANTS[name] for name in (names[0], names[2])}
    monkeypatch.setattr(alignment, "VARIANTS", variants)
    random = lambda networks, name: tiny.params(name, of=networks)  # noqa: E731
    monkeypatch.setattr(alignment, "random_params", random)

    def count(function, *arguments):
        return None, {"flops": function.lower(*arguments).cost_analysis()["flops"]}

    # Compiled and run, a step of the stage is in test_scaling.
    monkeypatch.setattr(programs, "compile_program", count)
    works = alignment.works(dataclasses.replace(case, task="alignment", batch=2))
    without, online = works.values()
    # Two images, and three crops each, through the tower: 16 wide, 5 tokens, MLP of 4 x 16.
    encoding = 2 * (1 + 3) * 2 * 5 * (4 * 16 * 16 + 2 * 16 * 64)
    assert online.flops - without.flops > encoding


def test_two_stage(case, tmp_path):
    rng = np.random.default_rng(0)
    files = [str(tmp_path / f"{number}.png") for number in range(2)]
    for file, shape in zip(files, [(50, 70, 3), (70, 50, 3)], strict=True):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(file)
    works = two_stage.works(dataclasses.replace(case, task="two_stage", files=files))
    assert list(works) == ["ours", "CLIP on 6 masks an image"]
    ours, theirs = (work.flops for work in works.values())
    encoding = 2 * 5 * (4 * 16 * 16 + 2 * 16 * 64)  # a crop
    assert theirs - ours > 2 * 6 * encoding, "two images of six masks"
    outputs = works["ours"].call()
    assert np.shape(outputs["kept"]) == np.shape(outputs["proposals"]) == (2,)
    assert max(outputs["kept"]) <= 6 >= max(outputs["proposals"])
    with pytest.raises(ValueError, match="predicts 6 masks an image and CLIP is to see 7"):
        two_stage.works(dataclasses.replace(case, task="two_stage", num_masks=(3, 7)))


def test_query_stages(case):
    works = query_stages.works(dataclasses.replace(case, task="query_stages"))
    assert list(works) == ["CAT", "union finetune"]
    for work in works.values():
        outputs = work.call()
        assert work.flops > 0 and np.isfinite(outputs["loss"])
        assert outputs["bank_shape"].tolist() == [2048, 6, 32]


def test_matching(monkeypatch):
    monkeypatch.setattr(matching, "SIDE", 6)
    monkeypatch.setattr(matching, "MATCHERS", ("hungarian", "scenic.greedy"))
    monkeypatch.setitem(sys.modules, "scenic", None)
    works = matching.works(Case("matching"))
    assert list(works) == ["hungarian"]  # an untrained guess costs 5 a segment
    assert 0 < works["hungarian"].call()["cost"] < 3 * 6
    results = in_turns(works, 2)
    assert "Not to be had here: scenic.greedy." in matching.table(Case("matching"), results)


def test_the_command_measures_in_processes_of_their_own(model, tmp_path, capsys):
    flags = ["--tasks=postprocess,panoptic_quality", f"--model={model}", "--sizes=64"]
    flags += ["--reference=", "--repeats=2", "--two_stage_images=2", f"--output={tmp_path}"]
    command.main(["benchmark", *flags])
    content = json.loads((tmp_path / "benchmark.json").read_text())
    ours, pairs = (case["results"] for case in content["cases"])
    assert len(ours["ours"]["seconds"]) == 2 and ours["ours"]["outputs"]["segments"]
    assert list(pairs) == ["official algorithm", "ours", "PNG decoding"]
    text = (tmp_path / "benchmark.md").read_text()
    assert "Model: tiny. processor" in text and "| postprocess 64x64, batch 1, float32 |" in text
    assert text in capsys.readouterr().out


def test_a_failure_is_told_and_the_others_are_measured(capsys):
    given = types.SimpleNamespace(repeats=1, same_allocator=False)
    case = Case("panoptic_quality", 48, 64, num_images=2, source="absent.json")
    results = command.measure_case(case, ["ours"], given, Path("."))
    assert "absent.json" in results["ours"]
    assert "failed: " in capsys.readouterr().out


def measured(seconds, flops=0.0, **outputs):
    return Measurement(tuple(seconds), 0.0, 7.0, flops, 2_500_000_000, outputs)


def test_an_epoch_and_the_bank_of_coco_follow_from_a_step():
    results = {
        "CAT": measured([0.1, 0.2, 0.3], 4e12, bank_shape=[2048, 100, 256]),
        "union finetune": measured([0.64], 1e9),
    }
    text = query_stages.table(Case("query_stages"), results)
    # 2807 steps of 16 images at 0.2 s, 701.75 steps of 64 at 0.64 s.
    assert "| CAT | 16 | 200.0 (100.0 to 300.0) | 4000 | 9.4 |" in text
    assert "| union finetune | 64 | 640.0 (640.0 to 640.0) | 1.000 | 7.5 |" in text
    assert "is 2.3 GB in float16 and 4.6 GB in float32" in text


def test_variants_of_known_figures():
    results = {
        "ours": measured([10.0, 20.0, 30.0], 4e12, proposals=[90, 100], kept=[3, 6]),
        "CLIP": measured([40.0] * 3, 10e12),
    }
    text = two_stage.table(Case("two_stage", num_images=20, num_masks=(10,)), results)
    assert (
        "| CLIP | 40.000 (40.000 to 40.000) | 2.000 (1.333 to 4.000) | 10000 | 2.50 | 2.50 | 7 |"
        in text
    )
    assert "| ours | 20.000 (10.000 to 30.000) | 1.000 | 4000 | 1.00 | 2.50 | 7 |" in text
    assert "95.0 have a mask with a pixel; our post-processing keeps 4.5 (3 to 6)" in text
    # 20 s more for 200 masks; 2,000 of them on top of our 20 s.
    assert "CLIP: 100 ms a mask beyond ours, so all 100 queries would be 11.0 times ours" in text


def test_ours_and_the_reference_of_known_figures():
    logits = {"class_logits": np.array([1.0, -4.0]), "mask_logits": np.array([2.0])}
    near = {"class_logits": np.array([1.0, -4.004]), "mask_logits": np.array([2.0])}
    cases = [
        (
            "forward",
            {"ours": measured([1.0], 5e9, **logits), "torch": measured([1.5, 2.5], **near)},
        ),
        ("train", {"ours": measured([3.0], loss=np.array(1.5)), "torch": "out of memory"}),
    ]
    text = harness.table_of_compared(cases)
    assert "| forward | ours | 1.000 (1.000 to 1.000) | 1.00 | 2.50 | 5.000 | 7 |" in text
    assert "| forward | torch | 2.000 (1.500 to 2.500) | 2.00 | 2.50 | not counted | 7 |" in text
    assert "| train | torch | failed |" in text
    assert "forward: largest relative difference: class_logits 1.0e-03, mask_logits 0.0e+00" in text


def test_turns_alternate_and_the_first_round_is_not_timed():
    calls = []

    def work(name):
        return Work(lambda: calls.append(name) or {"number": np.array(len(calls))}, flops=3.0)

    results = in_turns({name: work(name) for name in "abc"}, repeats=3)
    assert "".join(calls) == "cba" + "abc" + "cba" + "abc"
    assert [len(result.seconds) for result in results.values()] == [3, 3, 3]
    assert results["b"].outputs["number"] == 11 and results["b"].flops == 3.0


def test_memory_of_one_that_is_alone_is_what_it_took():
    (result,) = in_turns({"one": Work(lambda: {"array": np.ones(30_000_000)})}, 1).values()
    if sys.platform == "linux":
        assert 2.4e8 <= result.memory_bytes < 6e8


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--tasks=two_stage", "--batch=3"], "20 images do not fill batches of 3"),
        (["--tasks=two_stage", "--two_stage_masks=ten"], "is not like 10 or 10,100"),
        (["--tasks=train", "--segments=256"], r"in the range \[1, 255\]"),
        (["--tasks=alignment", "--clip={"], "--clip is not valid JSON"),
        (["--tasks=two_stage", "--clip={}", "--images=absent"], "absent stands for 0 images"),
        (["--tasks="], "--tasks names no task; give any of forward"),
        (["--output=README.md"], "--output=README.md is a file; name a folder"),
        (["--tasks=panoptic_quality", "--images=no.json"], "Nothing could be measured.*no.json"),
        (["--tasks=alignments"], "did you mean 'alignment'"),
        (["--tasks=input_pipeline"], "needs --images=COCO"),
        (["--sizes=12"], "Size '12' is not like 512"),
        (["--segmentor=eomt_bas"], "did you mean 'eomt_base'"),
        (["--reference=tensorflow"], "--reference is unknown"),
    ],
)
def test_mistakes_end_in_a_sentence(flags, sentence):
    with pytest.raises(SystemExit, match=sentence):
        command.main(["benchmark", *flags])


def test_images_of_a_folder_or_a_glob(tmp_path):
    for name in ("b.jpg", "a.jpg", ".thumb.jpg", "a.overlay.png", "notes.txt", "x[1].jpg"):
        (tmp_path / name).touch()
    wanted = [str(tmp_path / name) for name in ("a.jpg", "b.jpg", "x[1].jpg")]
    assert image_files(str(tmp_path), 3) == image_files(f"{tmp_path}/*", 3) == wanted
    assert image_files(wanted[2], 1) == wanted[2:]
    with pytest.raises(ValueError, match="stands for 3 images where 4 are wanted"):
        image_files(str(tmp_path), 4)


def test_tasks_that_need_no_class_head_take_any_model(monkeypatch):
    demo = str(Path(programs.__file__).parents[1] / "weights" / "demo")
    monkeypatch.setattr(command, "in_own_process", lambda call, *arguments: call(*arguments))
    monkeypatch.setattr(command, "measure_case", lambda *arguments: {"ours": "not measured here"})
    flags = [f"--model={demo}", f"--clip={json.dumps(CLIP)}"]
    for task, sentence in (("two_stage", "no linear class head"), ("alignment", "not measured")):
        with pytest.raises(SystemExit, match=sentence):
            command.main(["benchmark", f"--tasks={task}", *flags])


def test_a_model_without_a_linear_class_head_is_refused(tmp_path):
    demo = str(Path(programs.__file__).parents[1] / "weights" / "demo")
    with pytest.raises(ValueError, match=f"--model={demo} has no linear class head"):
        programs.prepare_models(demo, "", tmp_path, needs_head=True, with_reference=True)
    programs.prepare_models(demo, "", tmp_path, needs_head=False, with_reference=False)
    assert (tmp_path / "ours" / "model.json").is_file()
