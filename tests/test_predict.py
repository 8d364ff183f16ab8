"""The command line that segments images, with a tiny model: files written, mistakes, programs."""

import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from concat_jax import predict
from concat_jax.core.mask_codes import decode_rle
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.score_files import score_panoptic
from concat_jax.inference import programs
from concat_jax.inference.inputs import find_images
from concat_jax.inference.model import Model
from concat_jax.inference.panoptic import ImageSegments
from concat_jax.inference.predictor import PredictConfig
from concat_jax.models.segmentor import make_segmentor
from concat_jax.models.segmentor_output import LinearClassifier
from concat_jax.weights.model_folder import ModelCard, save_model
from tests.coco_maps import panoptic_maps

SEGMENTOR = {
    "backbone": {"kind": "resnet", "stage_sizes": [1, 1, 1, 1], "width": 8},
    "width": 16,
    "num_queries": 12,
    "num_decoder_layers": 2,
    "num_encoder_layers": 1,
    "num_heads": 2,
    "num_points": 2,
    "ffn_width": 16,
    "decoder_ffn_width": 16,
    "num_groups": 4,
}
NAMES = ("cat", "sky", "dog", "road", "sea")
VOCABULARY = Vocabulary(NAMES, (True, False, True, False, False), (True,) * 5, (3, 7, 11, 13, 200))
CARD = ModelCard(SEGMENTOR, VOCABULARY, "panoptic", "tiny.safetensors", knows_things=True)
# One square bucket, and thresholds of panoptic maps that random weights pass.
SIDES = ("--short_side=64", "--long_side=64")
SMALL = (*SIDES, "--mask_threshold=0.3", "--overlap_threshold=0.05")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(tmp_path_factory):
    """Programs are hardly optimised, and compiled once for all the predictors made here."""
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def random_params():
    segmentor = make_segmentor(SEGMENTOR)
    params = jax.jit(segmentor.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    head = LinearClassifier(len(NAMES)).init(jax.random.key(1), jnp.zeros((1, 1, 16)))["params"]
    # Wide enough that queries differ in class, and no query is no-object.
    kernel = 8 * head["class_embed"]["kernel"]
    bias = jnp.zeros(len(NAMES) + 1).at[-1].set(-50.0)
    return {"segmentor": params, "classifier": {"class_embed": {"kernel": kernel, "bias": bias}}}


@pytest.fixture(scope="module")
def model(tmp_path_factory, random_params):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(folder, random_params, CARD)
    return folder


@pytest.fixture(scope="module")
def loose(model):
    """A predictor whose thresholds random weights pass."""
    settings = {"short_side": 64, "long_side": 64, "score_threshold": 0.05}
    settings |= {"mask_threshold": 0.3, "overlap_threshold": 0.05}
    return Model.from_folder(model).predictor(PredictConfig(**settings))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A folder of the images people have; half of the names say what must fail."""
    folder = tmp_path_factory.mktemp("zoo")
    rng = np.random.default_rng(0)
    # Smooth noise: a random network sees more than one region in it.
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    photo = coarse.resize((70, 50), Image.Resampling.BICUBIC)
    photo.save(folder / "rgb.png")
    photo.convert("L").save(folder / "grey.png")
    photo.convert("P").save(folder / "palette.gif")
    photo.convert("CMYK").save(folder / "print.jpg")
    photo.convert("RGBA").save(folder / "alpha.png")
    photo.save(folder / "rgb.bmp")
    photo.resize((1, 1)).save(folder / "pixel.png")
    coarse.resize((3000, 2000)).save(folder / "large.jpg", quality=30)
    grey = np.asarray(photo.convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 8
    photo.save(folder / "turned.jpg", exif=exif)
    (folder / "bad-empty.png").write_bytes(b"")
    (folder / "bad-text.jpg").write_text("hello")
    (folder / "bad-cut.bmp").write_bytes((folder / "rgb.bmp").read_bytes()[:900])
    (folder / "notes.txt").write_text("not listed")
    return folder


SIZES = {
    "alpha": (50, 70),
    "deep": (50, 70),
    "grey": (50, 70),
    "large": (2000, 3000),
    "palette": (50, 70),
    "pixel": (1, 1),
    "print": (50, 70),
    "rgb": (50, 70),
    "rgb-2": (50, 70),
    "turned": (70, 50),
}


def call(*arguments):
    """Exit code of the command line: 0, 1, or the sentence it ended with."""
    try:
        predict.main(["predict", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code
    return 0


def test_a_folder_of_everything(model, zoo, tmp_path, capsys):
    code = call(f"--model={model}", f"--output={tmp_path}", zoo, *SMALL, "--score_threshold=0.05")
    printed = capsys.readouterr().out
    assert code == 1
    for name, reason in (
        ("empty.png", "it is empty"),
        ("text.jpg", "it is in no"),
        ("cut.bmp", ""),
    ):
        found = f"bad-{name} cannot be read as an image: {reason}"
        assert found in printed.split("3 failed:")[1]
    assert f"{len(SIZES)} of 14 inputs" in printed and "1 passed over, 3 failed;" in printed
    # Maps for tiny and small images and tiles of the large one: three of six programs.
    assert "6 programs compiled: padded network 64x64, 5 names, panoptic map" in printed
    assert re.search(r"\[1/13, \d:\d\d left\]", printed)
    annotations = {a.file_name: (a, m) for a, m in panoptic_maps(tmp_path / "panoptic.json")}
    assert set(annotations) == {f"{name}.png" for name in SIZES}
    for name, size in SIZES.items():
        annotation, id_map = annotations[f"{name}.png"]
        assert id_map.shape == size
        assert sorted(annotation.ids) == sorted(set(np.unique(id_map).tolist()) - {0})
        assert set(annotation.category_ids) <= set(VOCABULARY.category_ids)
        with Image.open(tmp_path / f"{name}.overlay.png") as overlay:
            assert max(overlay.size) <= 1600
            ratio = overlay.width * size[0] / (overlay.height * size[1])
            assert ratio == pytest.approx(1, abs=0.01)
    assert any(a.ids for a, _ in annotations.values())
    images = json.loads((tmp_path / "panoptic.json").read_text())["images"]
    assert {i["file_name"] for i in images if i["height"] == 2000} == {"large.jpg"}
    # The same pixels in another file type, or in 16 bit: the same map.
    for one, two in (("rgb", "rgb-2"), ("rgb", "alpha"), ("grey", "deep")):
        maps = (annotations[f"{name}.png"][1] for name in (one, two))
        assert (next(maps) != next(maps)).mean() < 0.02
    # The next run passes over this one's pictures, and says so.
    inputs = find_images([str(tmp_path)])
    # Of each image two, the contact sheet and the json.
    assert not inputs.paths and inputs.num_skipped == 2 * len(SIZES) + 2


def test_tiles_of_any_side_give_the_same_map(loose, zoo, monkeypatch):
    image = Image.open(zoo / "rgb.png")
    whole = loose(image).panoptic
    monkeypatch.setattr(programs, "TILE_SIDES", (32,))
    tiled = loose(np.asarray(image)).panoptic
    assert loose.programs.count("panoptic map 32x32") == 1, "six tiles, one program"
    assert isinstance(whole, ImageSegments) and whole.segments
    np.testing.assert_array_equal(whole.id_map, tiled.id_map)
    assert [s["area"] for s in whole.segments] == [s["area"] for s in tiled.segments]
    areas = np.bincount(whole.id_map.ravel())
    assert {s["id"]: s["area"] for s in whole.segments} == {
        i: area for i, area in enumerate(areas.tolist()) if i and area
    }


def test_nothing_found_is_explained(model, zoo, tmp_path, capsys):
    code = call(
        f"--model={model}", f"--output={tmp_path}", zoo / "rgb.png", *SMALL, "--score_threshold=1"
    )
    printed = capsys.readouterr().out
    assert code == 0
    assert "No segment; of 12 queries 12 under the score threshold" in printed
    assert "lower score_threshold" in printed
    ((annotation, id_map),) = panoptic_maps(tmp_path / "panoptic.json")
    assert annotation.ids == () and not id_map.any()


def test_where_every_input_fails_the_results_of_before_stay(model, zoo, tmp_path, capsys):
    flags = f"--model={model}", f"--output={tmp_path / 'out'}", *SIDES
    assert call(*flags, zoo / "bad-text.jpg") == 1 and not (tmp_path / "out").exists()
    assert call(*flags, zoo / "rgb.png", "--gamma=2", "--objectness_threshold=0.9") == 0
    printed = capsys.readouterr().out
    assert "gamma changes nothing: every name was seen" in printed
    assert "objectness_threshold changes nothing: queries are kept by score" in printed
    (tmp_path / "cameras/one").mkdir(parents=True)
    shutil.copy(zoo / "rgb.png", tmp_path / "cameras/one")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    bad = [zoo / "bad-text.jpg", zoo / "bad-empty.png"], [zoo / "not_there.png"]
    for inputs in (*bad, [tmp_path / "cameras"]):  # of the last, all is passed over
        assert call(*flags, *inputs) == 1
        assert f"nothing is written, {tmp_path / 'out'} is as it was" in capsys.readouterr().out
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_instances(model, zoo, tmp_path, capsys):
    code = call(
        f"--model={model}",
        f"--output={tmp_path}",
        zoo / "rgb.png",
        zoo / "turned.jpg",
        *SIDES,
        "--task=instance",
        "--score_threshold=0.01",
    )
    assert code == 0
    entries = json.loads((tmp_path / "instances.json").read_text())
    assert {e["image_id"] for e in entries} == {1, 2}
    assert {e["category_id"] for e in entries} <= {3, 11}, "a panoptic model's stuff is left out"
    for entry in entries:
        mask = decode_rle(entry["segmentation"])
        assert mask.shape == {1: (50, 70), 2: (70, 50)}[entry["image_id"]]
        assert mask.any()
        assert 0.01 < entry["score"] <= 1
    assert (tmp_path / "rgb.overlay.png").exists()
    assert "instance" in capsys.readouterr().out


def test_semantic_maps_in_batches(model, zoo, tmp_path):
    code = call(
        f"--model={model}",
        f"--output={tmp_path}",
        f"{zoo}/*r*y.png",
        zoo / "rgb.png",
        zoo / "pixel.png",
        *SIDES,
        "--task=semantic",
        "--batch_size=2",
    )
    assert code == 0
    content = json.loads((tmp_path / "semantic.json").read_text())
    assert [c["name"] for c in content["categories"]] == list(NAMES)
    sizes = {"grey": (50, 70), "rgb": (50, 70), "pixel": (1, 1)}
    assert content["pixels"] == "category_ids"
    assert {a["map"] for a in content["images"]} == {f"{n}.png" for n in sizes}
    for image in content["images"]:
        ids = np.asarray(Image.open(tmp_path / "semantic" / image["map"]))
        assert ids.shape == sizes[image["map"].removesuffix(".png")]
        areas = {c["id"]: c["area"] for c in image["classes"]}
        assert areas == {int(i): int((ids == i).sum()) for i in np.unique(ids)}
        assert set(areas) <= set(VOCABULARY.category_ids)


def test_real_images(loose, shared_data, tmp_path):
    files = sorted((shared_data / "coco_panoptic_mini" / "val2017").glob("*.jpg"))[:3]
    assert predict.run(loose, list(map(str, files)), tmp_path) == 0
    annotations = panoptic_maps(tmp_path / "panoptic.json")
    assert [a.image_id for a, _ in annotations] == [int(f.stem) for f in files]
    for (_, id_map), file in zip(annotations, files, strict=True):
        assert id_map.shape == Image.open(file).size[::-1]
        assert (tmp_path / f"{file.stem}.overlay.png").stat().st_size > 10_000


def test_a_data_set_names_and_numbers_its_images(loose, zoo, tmp_path, capsys):
    for camera in ("cam1", "cam2"):
        (tmp_path / camera).mkdir()
        shutil.copy(zoo / "rgb.png", tmp_path / camera / "1.png")
    os.symlink(tmp_path / "cam1" / "1.png", tmp_path / "cam1" / "2.png")
    listed = [
        {"id": number, "file_name": f"{camera}/1.png", "height": 50, "width": 70}
        for number, camera in ((8, "cam1"), (3, "cam2"))
    ]
    (tmp_path / "gt.json").write_text(json.dumps({"images": listed}))
    inputs = [str(tmp_path / camera) for camera in ("cam1", "cam2")]
    assert predict.run(loose, inputs, tmp_path / "out", str(tmp_path / "gt.json")) == 0
    assert json.loads((tmp_path / "out" / "panoptic.json").read_text())["images"] == listed
    assert (tmp_path / "out" / "cam2" / "1.overlay.png").exists()
    printed = capsys.readouterr().out
    assert "2 of 3 inputs" in printed and "1 passed over, 0 failed" in printed
    assert "2.png is the same file as" in printed
    # By their files' names alone the images have other numbers, and are told by name.
    assert predict.run(loose, inputs, tmp_path / "own") == 0
    files = tmp_path / "out" / "panoptic.json", tmp_path / "own" / "panoptic.json"
    summary = score_panoptic(*files)
    assert summary["all"]["pq"] == pytest.approx(100) and len(summary["notes"]) == 1
    # What is read is not written over.
    with pytest.raises(ValueError, match=r"panoptic.json is an input .*; name another"):
        predict.run(loose, inputs, tmp_path / "out", str(files[0]))


def test_without_thing_flags_nothing_merges(random_params):
    params, card = random_params, CARD
    flags = (False,) * 5
    vocabulary = Vocabulary(NAMES, flags, (True,) * 5, VOCABULARY.category_ids)
    ignorant = ModelCard(card.segmentor, vocabulary, "panoptic", "", knows_things=False)
    predictor = Model(params, ignorant).predictor()
    assert all(predictor.vocabulary.is_thing)
    assert "all are treated as things" in predictor.notices[0]
    assert Model(params, card).predictor().notices == ()


def test_a_backbone_alone_is_refused(random_params, tmp_path):
    save_model(
        tmp_path / "backbone",
        {"segmentor": {"backbone": random_params["segmentor"]["backbone"]}},
        ModelCard(SEGMENTOR, source="R-50.pkl"),
    )
    code = call(f"--model={tmp_path / 'backbone'}", f"--output={tmp_path / 'out'}", "a.png")
    assert code.startswith("Error: The weights of R-50.pkl have no class head")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--score_treshold=0.5"], "no flag '--score_treshold'; did you mean '--score_threshold'?"),
        (["--model=m"], "give --model=DIR, --output=DIR and the images"),
        (["--model=none", "--output=o", "a.png"], "There is no folder none"),
        (["--task=panoramic", "--model=m", "--output=o", "a.png"], "did you mean 'panoptic'?"),
        (["--dtype=float16", "--model=m", "--output=o", "a.png"], "did you mean"),
        (["--mask_threshold=2", "--model=m", "--output=o", "a.png"], "mask_threshold is 2.0"),
        (["--short_side=x", "--model=m", "--output=o", "a.png"], "flag --short_side=x"),
        (
            ["--task=semantic", "--keep_rule=score", "--model=m", "--output=o", "a.png"],
            "keep_rule m",
        ),
        (["--short_side=0", "--model=m", "--output=o", "a.png"], "short_side is 0"),
        (["--batch_size=0", "--model=m", "--output=o", "a.png"], "batch_size is 0"),
        (["--model=m", "--output=README.md", "a.png"], "--output=README.md is a file"),
    ],
)
def test_mistakes_end_in_one_sentence(model, arguments, message):
    code = call(*(f"--model={model}" if a == "--model=m" else a for a in arguments))
    assert code.startswith("Error: ") and message in code
    assert "\n" not in code


def test_a_batch_of_two_buckets_is_refused(model):
    config = PredictConfig(short_side=32, long_side=64, batch_size=2)
    predictor = Model.from_folder(model).predictor(config)
    lying = predictor.prepare(np.zeros((30, 60, 3), np.uint8))
    standing = predictor.prepare(np.zeros((60, 30, 3), np.uint8))
    with pytest.raises(ValueError, match="of one padded shape"):
        predictor.predict([lying, standing])


@pytest.mark.slow
def test_fifty_sizes_compile_a_handful_of_programs(model, capsys):
    compiled = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    predictor = Model.from_folder(model).predictor()
    rng = np.random.default_rng(0)
    sizes = {tuple(size) for size in rng.integers(1, 1500, (50, 2)).tolist()}
    assert len(sizes) == 50
    jax.monitoring.register_event_duration_secs_listener(listen)
    for height, width in sizes:
        result = predictor(rng.integers(0, 256, (height, width, 3), np.uint8))
        assert result.panoptic.id_map.shape == (height, width)
    with capsys.disabled():
        print(f"\n50 sizes: {len(compiled)} programs compiled, {predictor.programs}")
    assert len(predictor.programs) <= 11
    # JAX's own for a scalar take no time.
    assert len(compiled) <= len(predictor.programs) + 2
