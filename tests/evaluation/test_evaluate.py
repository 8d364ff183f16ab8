"""Evaluation at native size, with networks that answer with a known picture."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from concat_jax.core.mask_codes import encode_rle
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.evaluate import PICTURES, evaluate
from concat_jax.evaluation.worst_best import PQ_PER_CLASS, WORST_BEST
from concat_jax.inference.predictor import PredictConfig, Predictor
from concat_jax.training.sharding import along_batch, inference_mesh, make_mesh
from tests.inference import fakes

VOCABULARY = Vocabulary(("cat", "sky"), (True, False), (True, True), (1, 2))
# Query 0 is a cat, query 1 sky, query 2 nothing.
PROBS = np.array([[0.98, 0.01, 0.01], [0.01, 0.98, 0.01], [0.01, 0.01, 0.98]], np.float32)
SIZES = ((48, 96), (60, 30), (20, 40))


def example(number, height, width):
    """Left half cat, right half sky."""
    ids = np.full((height, width), 2, np.uint8)
    ids[:, : width // 2] = 1
    return fakes.example(number, ids, [0, 1])


def examples(sizes=SIZES):
    return [example(number, *size) for number, size in enumerate(sizes)]


def run(examples, folder=None, *, traced=None, sharding=None, unseen=(), extremes=0, **settings):
    config = PredictConfig(short_side=32, long_side=32, **settings)
    head = fakes.FakeHead(PROBS)
    seen = tuple(name not in unseen for name in VOCABULARY.names)
    vocabulary = dataclasses.replace(VOCABULARY, is_seen=seen)
    predictor = Predictor(fakes.network(traced), head, vocabulary, config, sharding=sharding)
    folders = dict(coco_folder=folder, picture_folder=folder)
    pictures = dict(num_pictures=1, num_extremes=extremes)
    return evaluate(predictor, examples, name="test", **pictures, **folders)


def test_padded_images_are_scored_at_their_own_size(tmp_path):
    traced = []
    summary = run(examples(), tmp_path, traced=traced, batch_size=2)
    assert summary["images"] == 3
    assert summary["all"]["pq"] > 95, "only the border between the halves is blurred"
    for number, size in enumerate(SIZES):
        with Image.open(tmp_path / "panoptic_predictions" / f"{number}.png") as png:
            assert png.size == size[::-1]
            assert set(np.unique(np.asarray(png)[..., 0])) == {1, 2}
    # One program: all shapes are padded into one, and the padding is made known to the network.
    assert traced == [((2, 32, 32, 3), True)]
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {PICTURES, PQ_PER_CLASS}
    with Image.open(tmp_path / PICTURES) as first:
        lone = first.height
    run(examples(), tmp_path, batch_size=2, extremes=1)
    with Image.open(tmp_path / WORST_BEST) as sheet:
        assert sheet.height > lone + 160, "two rows"


@pytest.mark.parametrize(("batch_size", "devices"), [(4, 4), (6, 2), (1, 1)])
def test_a_batch_is_split_over_the_devices_that_divide_it(batch_size, devices):
    mesh = inference_mesh(make_mesh(devices=4), batch_size)
    assert mesh.size == devices
    split = run(examples(), sharding=along_batch(mesh), batch_size=batch_size)
    whole = run(examples(), batch_size=batch_size)
    # As NaN is equal to NaN here.
    np.testing.assert_equal({**split, "images_per_second": 0}, {**whole, "images_per_second": 0})


def test_all_metrics_come_from_one_pass_of_the_networks(tmp_path):
    traced, tasks = [], ("panoptic", "semantic", "instance")
    summary = run(examples([(32, 32)] * 3), tmp_path, traced=traced, tasks=tasks)
    assert traced == [((1, 32, 32, 3), False)], "nothing is padded, so the lighter program"
    assert summary["all"]["pq"] == pytest.approx(100)
    assert summary["semantic"]["all"]["miou"] == pytest.approx(100)
    # The cat is found in all images; the sky is no thing.
    assert summary["instance"]["all"]["ap"] == pytest.approx(100)
    assert (summary["instance"]["all"]["n"], summary["images"]) == (1, 3)
    labels = np.asarray(Image.open(tmp_path / "semantic_predictions" / "1.png"))
    np.testing.assert_array_equal(labels, np.where(np.arange(32) < 16, 1, 2)[None].repeat(32, 0))
    results = json.loads((tmp_path / "instance_predictions.json").read_text())
    assert {entry["category_id"] for entry in results} == {1}
    assert {entry["image_id"] for entry in results} == {0, 1, 2}


def test_tasks_do_without_panoptic_maps_and_skip_padding(tmp_path):
    given = examples([(32, 32)] * 3)
    given[2]["is_padding"] = True
    summary = run(given, tmp_path, tasks=("semantic",))
    assert summary["images"] == 2 and "all" not in summary
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["0.png", "1.png"]


def test_gamma_lowers_seen_classes_in_every_metric(tmp_path):
    """At γ = 10 the cat's query is sky, and a cat with a score of 0.98 / (0.98 + 0.01 e^10)."""
    scores = []
    for gamma in (0.0, 10.0):
        folder, tasks = tmp_path / f"{gamma:g}", ("semantic", "instance")
        summary = run(examples([(32, 32)]), folder, tasks=tasks, gamma=gamma, unseen=("sky",))
        (cat, *_) = json.loads((folder / "instance_predictions.json").read_text())
        scores.append((summary["semantic"]["all"]["miou"], cat["score"]))
    (before, cat_before), (after, cat_after) = scores
    assert before == pytest.approx(100) and after < 60
    assert cat_after / cat_before == pytest.approx(0.99 / (0.98 + 0.01 * np.exp(10)), rel=1e-3)


def test_instances_are_scored_against_their_whole_masks():
    """Half of the cat is hidden in the id map: found whole it is right, and was wrong."""
    given = examples([(32, 32)])
    ids = given[0]["segment_ids"]
    whole = ids == 1
    ids[:20][whole[:20]] = 0  # under an IoU of 0.5 of the cat is left
    painted = run(given, tasks=("instance",))["instance"]["all"]["ap50"]
    given[0]["segment_masks"] = [encode_rle(whole), encode_rle(ids == 2)]
    assert painted == 0
    assert run(given, tasks=("instance",))["instance"]["all"]["ap50"] == pytest.approx(100)


def test_no_image_is_an_error():
    with pytest.raises(ValueError, match="no image to evaluate"):
        run([])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ("panoptics",)}, "did you mean 'panoptic'"),
        ({"tasks": ()}, "give a tuple"),
        ({"tasks": "semantic"}, "give a tuple"),
        ({"keep_rule": "scores"}, "did you mean 'score'"),
        ({"mask_threshold": 2.0}, "mask_threshold is 2.0"),
        ({"gamma": float("nan")}, "gamma is nan and must be a finite number"),
        ({"gamma": "much"}, "gamma is much and must be a finite number"),
        ({"tasks": ("semantic",), "gamma": (0.0, 0.1)}, "for the task panoptic alone"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PredictConfig(**settings)
