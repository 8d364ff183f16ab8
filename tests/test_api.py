"""The package as a library: load a model, segment by names, read and write what was found."""

import doctest
import gc
import json
import pathlib
import resource
import shutil
import threading
import time
import warnings

import jax
import numpy as np
import pytest
from PIL import Image

import concat_jax
from concat_jax import predict
from concat_jax.core.mask_codes import ids_to_rgb
from concat_jax.evaluation.evaluate import evaluate
from concat_jax.experiment.model import SHIPPED
from data_pipelines.synthetic.world import SyntheticWorld, draw_scenes

THINGS, STUFF = ["red plain balloon", "blue balloon"], ["grey smooth ground", "mint ground"]


@pytest.fixture(scope="module")
def model():
    return concat_jax.load("demo")


@pytest.fixture(scope="module")
def scenes():
    return draw_scenes(3)


@pytest.fixture(scope="module")
def result(model, scenes):
    return model(scenes[0])


def same(one, two):
    np.testing.assert_array_equal(one.panoptic, two.panoptic)
    assert one.segments == two.segments and one.segments


def test_what_the_package_says_of_itself():
    found = doctest.testmod(concat_jax)
    assert found.attempted > 3 and not found.failed


def test_the_demo_names_what_is_drawn(model):
    """The whole test part gives 57.9; twenty scenes of it can be that far from it."""
    world = SyntheticWorld(split="test", classes="all", num_eval_images=20)
    assert model.vocabulary == world.vocabulary
    summary = evaluate(model.predictor(), world.eval_examples(), name="scenes")
    assert summary["all"]["pq"] > 50 and summary["unseen"]["pq"] > 40
    np.testing.assert_array_equal(draw_scenes(2)[1], world.example(1)["image"])


def test_segments_say_what_the_map_holds(model, result):
    assert {s.id for s in result.segments} == set(np.unique(result.panoptic)) - {0}
    areas = [segment.area for segment in result.segments]
    assert areas == sorted(areas, reverse=True)
    for segment in result.segments:
        mask = segment.mask
        assert mask.dtype == bool and mask.sum() == segment.area
        np.testing.assert_array_equal(mask, result.panoptic == segment.id)
        x, y, width, height = segment.box
        inside = np.zeros_like(mask)
        inside[y : y + height, x : x + width] = True
        assert not (mask & ~inside).any() and mask[y].any() and mask[:, x + width - 1].any()
        k = model.vocabulary.names.index(segment.name)
        assert segment.is_thing == model.vocabulary.is_thing[k]
        assert segment.is_seen == model.vocabulary.is_seen[k]
        assert 0 < segment.score <= 1
    assert f"{len(result.segments)} segments: " in repr(result) and "64x64" in repr(result)


def test_ways_to_give_an_image(model, scenes, result, tmp_path):
    Image.fromarray(scenes[0]).save(tmp_path / "a.png")
    for image in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        Image.fromarray(scenes[0]),
        jax.numpy.asarray(scenes[0]),
    ):
        same(model(image), result)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(scenes[0][:40]).save(tmp_path / "turned.png", exif=exif)
    turned = model(tmp_path / "turned.png")
    assert turned.panoptic.shape == turned.image.shape[:2] == (64, 40)


def test_a_list_gives_a_list_in_its_order_whatever_the_batches(model, scenes):
    images = [scenes[0], scenes[1][:40], scenes[2], Image.fromarray(scenes[1])]
    results = model(images, batch_size=2)
    assert [r.panoptic.shape for r in results] == [(64, 64), (40, 64), (64, 64), (64, 64)]
    for image, found in zip(images, results, strict=True):
        np.testing.assert_array_equal(found.image, np.asarray(image))
        # A batch of another size is another program, and rounds otherwise.
        assert (found.panoptic != model(image).panoptic).mean() < 0.01
    assert model([]) == [] and len(model((scenes[0],))) == 1


def test_names_as_a_list_by_kind_and_as_text(model, scenes):
    by_kind = model(scenes[0], {"things": THINGS, "stuff": STUFF})
    text = ", ".join(THINGS) + "; " + ", ".join(STUFF)
    same(by_kind, model(scenes[0], classes=text))
    assert {s.name for s in by_kind.segments} <= {*THINGS, *STUFF}
    # Of a list what the model knows as stuff is stuff.
    names = model(scenes[0], [*THINGS, *STUFF]).vocabulary
    assert names.is_thing == (True, True, False, True)
    assert names.is_seen == (True, False, True, False)


def test_settings_are_those_of_predict(model, scenes, result):
    nothing = model(scenes[0], objectness_threshold=1.0)
    assert nothing.segments == () and not nothing.panoptic.any()
    assert "lower objectness_threshold" in nothing.explain()
    assert repr(nothing).endswith("64x64: 0 segments>")
    assert nothing.overlay().size == (320, 320) and result.overlay().width == 320
    unseen = model(scenes[0], gamma=1e3)
    assert not any(segment.is_seen for segment in unseen.segments) and unseen.segments


def test_what_is_saved_is_what_predict_writes(scenes, tmp_path):
    model = concat_jax.load("demo")  # with no room for other names, which rounds otherwise
    for number, scene in enumerate(scenes, start=1):
        Image.fromarray(scene).save(tmp_path / f"{number}.png")
    files = sorted(tmp_path.glob("*.png"))
    results = model(files)
    results.save(tmp_path / "api")
    with pytest.raises(ValueError, match="no result to save; segment at least one image"):
        model([]).save(tmp_path / "nothing")
    predict.main(["p", "--model=demo", f"--output={tmp_path / 'cli'}", *map(str, files)])
    names = sorted(p.relative_to(tmp_path / "cli") for p in (tmp_path / "cli").rglob("*.*"))
    assert len(names) == 8 and pathlib.Path("contact_sheet.overlay.png") in names
    for name in names:
        assert (tmp_path / "api" / name).read_bytes() == (tmp_path / "cli" / name).read_bytes()

    results[1].save(tmp_path / "one")
    content = json.loads((tmp_path / "one" / "panoptic.json").read_text())
    assert results[1].to_coco() == content and content["images"][0]["id"] == 2
    png = Image.open(tmp_path / "one" / "panoptic" / "2.png")
    np.testing.assert_array_equal(png, ids_to_rgb(results[1].panoptic))
    shown = Image.open(tmp_path / "one" / "2.overlay.png").convert("RGB")
    assert shown.tobytes() == results[1].overlay().convert("RGB").tobytes()
    assert results[1]._repr_png_()[:4] == b"\x89PNG"
    # A part of a list is one, and what is read is not written over.
    results[:1].save(tmp_path / "first")
    assert len(results[:1] + results[1:]) == len(results)
    (tmp_path / "panoptic").mkdir()
    copy = tmp_path / "panoptic" / "1.png"
    Image.fromarray(scenes[0]).save(copy)
    with pytest.raises(ValueError, match=r"panoptic/1.png is an input and would be written over"):
        model(copy).save(tmp_path)
    with pytest.raises(ValueError, match="Results of different names cannot be saved together"):
        (results + model(files[:1], classes="balloon")).save(tmp_path / "both")
    # What was in memory has no name, and no two files have the same.
    model(scenes[:2]).save(tmp_path / "memory")
    assert {p.name for p in (tmp_path / "memory" / "panoptic").iterdir()} == {
        "image.png",
        "image-2.png",
    }


def test_two_hundred_images_of_fifty_sizes_by_three_lists_of_names(scenes):
    model, compiled, held = concat_jax.load("demo"), [], []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    rng = np.random.default_rng(0)
    sizes = rng.integers(8, 320, (50, 2))
    names = [None, [*THINGS, *STUFF], {"things": ["red balloon"], "stuff": STUFF}]
    for number in range(200):
        height, width = sizes[number % 50]
        image = np.asarray(Image.fromarray(scenes[number % 3]).resize((width, height)))
        assert model(image, names[number % 3]).panoptic.shape == (height, width)
        held.append(int(pathlib.Path("/proc/self/statm").read_text().split()[1]))
    jax.monitoring.unregister_event_duration_listener(listen)
    # The network, and with padding; two sides of maps; the names of the model, and up to 32; the
    # text tower; what holds a segment; and two of JAX's own that take no time.
    assert len(compiled) <= 10, model.predictor().programs
    assert held[-1] - held[99] < 32 * 2**20 / resource.getpagesize()


@pytest.mark.parametrize(
    ("images", "options", "sentence"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), {}, r"Image 1 has the shape \(2, 8, 8, 3\)"),
        (np.zeros((8, 8, 3), np.float32), {}, "Image 1 is an array of float32; give uint8"),
        ([np.zeros((8, 8), np.uint8), 3], {}, "Image 2 is of type int; give a path"),
        ("none.jpg", {}, "none.jpg cannot be read as an image: it does not exist"),
        (None, {"classes": ["a zebra"]}, "does not know 'zebra'"),
        (None, {"classes": ["red balloon"] * 2}, "more than once"),
        (None, {"classes": {"thing": ["red"]}}, "did you mean 'things'"),
        (
            None,
            {"mask_treshold": 0.4},
            "no argument 'mask_treshold'; did you mean 'mask_threshold'",
        ),
        (None, {"clases": ["cat"]}, "A call has no argument 'clases'; did you mean 'classes'"),
        (None, {"instance_threshold": 0.9}, "A call has no argument 'instance_threshold'"),
        ("x" * 300 + ".png", {}, "x.png cannot be read as an image: .* too long"),
        (None, {"mask_threshold": "low"}, "mask_threshold is 'low' and must be a number"),
        (None, {"mask_threshold": 2}, "mask_threshold is 2 and must lie in 0..1"),
        (None, {"tasks": ("instance",)}, "for other tasks.* use Model.predictor"),
        (None, {"gamma": (0.0, 1.0)}, "several values of gamma, use Model.predictor"),
    ],
)
def test_mistakes_are_one_sentence(model, scenes, images, options, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        model(scenes[0] if images is None else images, **options)
    assert "\n" not in str(error.value)


def test_a_picture_that_cannot_be_read_leaves_no_thread(model):
    """Of what waited, whoever collects garbage later would close the rest, whatever it holds."""
    gc.disable()
    try:
        for _ in range(3):
            with pytest.raises(ValueError, match="it does not exist"):
                model(["none.jpg"] * 4)
        deadline = time.monotonic() + 30
        while any(t.name.startswith("prefetch") for t in threading.enumerate()):
            assert time.monotonic() < deadline, threading.enumerate()
            time.sleep(0.001)
    finally:
        gc.enable()


def test_a_result_keeps_its_image_and_its_place(scenes, tmp_path, monkeypatch):
    """Whatever the caller does with the array, and where it goes, before it saves."""
    model = concat_jax.load("demo")
    frame = scenes[0].copy()
    result = model(frame)
    frame[:] = 0
    np.testing.assert_array_equal(result.image, scenes[0])
    (tmp_path / "panoptic").mkdir()
    Image.fromarray(scenes[0]).save(tmp_path / "panoptic/photo.png")
    monkeypatch.chdir(tmp_path / "panoptic")
    result = model("photo.png")
    monkeypatch.chdir("/")
    with pytest.raises(ValueError, match=r"panoptic/photo.png is an input and would be written"):
        result.save(tmp_path)


def test_what_cannot_be_done_as_asked_is_a_warning(model, scenes):
    with pytest.warns(UserWarning, match="gamma changes nothing: no name was seen"):
        model(scenes[0], ["blue balloon"], gamma=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(scenes[0], gamma=1.0)


def test_a_model_called_demo_in_the_folder_at_hand_is_not_passed_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert concat_jax.load("demo").card.source == "demo, stage finetune"  # no model, no matter
    shutil.copytree(SHIPPED, tmp_path / "demo", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="give ./demo for the folder's, or .*demo for the other"):
        concat_jax.load("demo")
    card = (tmp_path / "demo" / "model.json").read_text()
    (tmp_path / "demo" / "model.json").write_text(card.replace("stage finetune", "mine"))
    for path in ("./demo", tmp_path / "demo"):
        assert concat_jax.load(path).card.source == "demo, mine"
    assert concat_jax.load(str(SHIPPED)).card.source == "demo, stage finetune"
