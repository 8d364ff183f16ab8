"""Evaluation at native size, with networks that answer with a known picture."""

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from concat_jax.core.coco import read_panoptic
from concat_jax.core.vocabulary import Vocabulary
from concat_jax.evaluation.evaluate import EvalConfig, Sizes, evaluate, make_predict, output_bucket
from concat_jax.models.segmentor import SegmentorOutput
from concat_jax.training.sharding import along_batch, inference_mesh, make_mesh

VOCABULARY = Vocabulary(("cat", "sky"), (True, False), (True, True), (1, 2))
STRIDE = 2


def fake_networks(calls):
    """Query 0 is where the image is red, query 1 where it is green; padding is anything."""

    def segment(variables, images, image_size):
        calls.append((images.shape, image_size is None))
        features = images[:, ::STRIDE, ::STRIDE, :2] * 8.0
        embeddings = jnp.broadcast_to(jnp.array([[1.0, -1.0], [-1.0, 1.0]]), (len(images), 1, 2, 2))
        return SegmentorOutput(embeddings, embeddings, features)

    def classify(variables, queries, text, method):
        return jnp.broadcast_to(jnp.array([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]]), (len(queries), 2, 3))

    backbone = types.SimpleNamespace(stride=STRIDE)
    return types.SimpleNamespace(
        segmentor=types.SimpleNamespace(apply=segment, backbone=backbone),
        projector=types.SimpleNamespace(apply=classify),
    )


def example(number, height, width, boxed_size, valid):
    """Left half cat, right half sky, at native size and fitted into a padded square."""
    ids = np.full((height, width), 2, np.uint8)
    ids[:, : width // 2] = 1
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]], np.uint8)
    native = {
        "image": colours[ids],
        "segment_ids": ids,
        "segment_labels": np.array([0, 1]),
        "segment_is_crowd": np.zeros(2, bool),
        "image_id": number,
        "file_name": f"{number}.png",
    }
    # The padding would be sky, if anything read it.
    image = np.tile(colours[2], (boxed_size, boxed_size, 1))
    image[: valid[0], : valid[1]] = colours[2]
    image[: valid[0], : valid[1] // 2] = colours[1]
    return native, {"image": image, "image_size": np.array(valid, np.int32)}


def run(examples, tmp_path, batch_size, *, sharding=None, **settings):
    calls = []
    config = EvalConfig(batch_size=batch_size, num_pictures=1, **settings)
    predict = make_predict(fake_networks(calls), VOCABULARY, config, sharding)
    params = {"segmentor": {}, "projector": {}}
    summary = evaluate(
        lambda images, sizes: predict(params, None, images, sizes),
        examples,
        VOCABULARY,
        config,
        name="test",
        coco_folder=tmp_path,
    )
    return summary, calls


def test_padded_images_are_scored_at_their_own_size(tmp_path):
    sizes = [((48, 96), (16, 32)), ((60, 30), (32, 16)), ((20, 40), (16, 32))]
    examples = [example(k, *native, 32, valid) for k, (native, valid) in enumerate(sizes)]
    summary, calls = run(examples, tmp_path, batch_size=2)
    assert summary["images"] == 3
    assert summary["all"]["pq"] > 95, "only the border between the halves is blurred"
    for annotation, (native, _) in zip(
        read_panoptic(tmp_path / "panoptic_predictions.json"), sizes, strict=True
    ):
        assert annotation.id_map.shape == native
        assert set(np.unique(annotation.id_map)) == {1, 2}
    # Two programs, of the buckets 64x128 and 32x64; the padding is made known to the network.
    assert calls == [((2, 32, 32, 3), False)] * 2


@pytest.mark.parametrize(("batch_size", "devices"), [(4, 4), (6, 2), (1, 1)])
def test_a_batch_is_split_over_the_devices_that_divide_it(batch_size, devices, tmp_path):
    sharding = along_batch(inference_mesh(make_mesh(devices=4), batch_size))
    predict = make_predict(fake_networks([]), VOCABULARY, EvalConfig(), sharding)
    sizes = Sizes(*[np.full((batch_size, 2), 32, np.int32)] * 2)
    images = np.zeros((batch_size, 32, 32, 3), np.uint8)
    output = predict({"segmentor": {}, "projector": {}}, None, images, sizes)
    placed = output.panoptic.segment_ids.sharding
    assert len(placed.device_set) == devices
    assert placed.shard_shape((batch_size, 32, 32)) == (batch_size // devices, 32, 32)

    shapes = [((48, 96), (16, 32)), ((60, 30), (32, 16)), ((20, 40), (16, 32))]
    examples = [example(k, *native, 32, valid) for k, (native, valid) in enumerate(shapes)]
    split, _ = run(examples, tmp_path, batch_size, sharding=sharding)
    whole, _ = run(examples, tmp_path, batch_size)
    # As NaN is equal to NaN here.
    np.testing.assert_equal({**split, "images_per_second": 0}, {**whole, "images_per_second": 0})


def test_unpadded_images_take_the_program_without_padding(tmp_path):
    examples = [example(k, 32, 32, 32, (32, 32)) for k in range(3)]
    summary, calls = run(examples, tmp_path, batch_size=1)
    assert summary["all"]["pq"] == pytest.approx(100)
    assert calls == [((1, 32, 32, 3), True)]


def test_buckets_double_until_the_image_fits():
    assert output_bucket((64, 64), (64, 64)) == (64, 64)
    assert output_bucket((64, 64), (10, 65)) == (64, 128)
    assert output_bucket((800, 600), (3300, 1201)) == (6400, 2400)


def test_maps_take_the_native_size():
    predict = make_predict(fake_networks([]), VOCABULARY, EvalConfig())
    sizes = Sizes(np.array([[32, 32]], np.int32), np.array([[40, 20]], np.int32))
    output = predict({"segmentor": {}, "projector": {}}, None, np.zeros((1, 32, 32, 3)), sizes)
    assert output.panoptic.segment_ids.shape == (1, 64, 32)
    assert output.semantic is output.instance is None


def test_all_metrics_come_from_one_pass_of_the_networks(tmp_path):
    examples = [example(k, 32, 32, 32, (32, 32)) for k in range(3)]
    metrics = ("panoptic", "semantic", "instance")
    summary, calls = run(examples, tmp_path, batch_size=1, metrics=metrics)
    assert calls == [((1, 32, 32, 3), True)]
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


def test_metrics_do_without_panoptic_maps_and_skip_padding(tmp_path):
    examples = [example(k, 32, 32, 32, (32, 32)) for k in range(3)]
    examples[2][0]["is_padding"] = True
    summary, _ = run(examples, tmp_path, batch_size=1, metrics=("semantic",))
    assert summary["images"] == 2 and "all" not in summary
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["0.png", "1.png"]


def test_gamma_lowers_seen_classes_in_every_metric(tmp_path):
    """Both classes are seen: with all probability gone, neither metric finds what it found."""
    examples = [example(0, 32, 32, 32, (32, 32))]
    metrics = ("semantic", "instance")
    summary, _ = run(examples, tmp_path, batch_size=1, metrics=metrics, gamma=1.0)
    assert summary["instance"]["all"]["ap"] == 0.0
    assert summary["semantic"]["all"]["miou"] < 60


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (("panoptics",), "did you mean 'panoptic'"),
        ((), "give a tuple"),
        ("semantic", "give a tuple"),
    ],
)
def test_wrong_metrics_are_refused(metrics, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig(metrics=metrics)
