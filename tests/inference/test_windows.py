"""EoMT's two ways to see a picture beside transformers', with a segmentor of one line."""

import types

import numpy as np
import pytest
from PIL import Image

from concat_jax.core.vocabulary import Vocabulary
from concat_jax.inference.images import Windows
from concat_jax.inference.model import segment_all
from concat_jax.inference.predictor import PredictConfig, Predictor
from tests.inference.fakes import FakeHead, network

CLASSES = Vocabulary(
    names=("a", "b", "c", "d"),
    is_thing=(False,) * 4,
    is_seen=(True,) * 4,
    category_ids=(1, 2, 3, 4),
)
SIDE = 32
# One window, two and three of them, lying and standing; the last ones are made smaller and larger.
SIZES = [(32, 32), (32, 50), (70, 32), (40, 111), (100, 31)]
WINDOWED = PredictConfig(
    tasks=("semantic",), short_side=SIDE, long_side=SIDE, windows=True, batch_size=2
)


def pictures(sizes=SIZES):
    rng = np.random.default_rng(0)
    for height, width in sizes:
        small = rng.integers(0, 256, (5, 6, 3)).astype(np.uint8)
        yield np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def probabilities() -> np.ndarray:
    raw = np.random.default_rng(1).normal(0, 1, (3, 5)).astype(np.float32)
    return np.exp(raw) / np.exp(raw).sum(axis=-1, keepdims=True)


def theirs(image: np.ndarray, probs: np.ndarray, **fields):
    """transformers' processor, and the masks and names of `fakes` for what it makes of an image."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    processor = transformers.EomtImageProcessorPil(**fields)
    given = processor(image, return_tensors="pt")
    masks = torch.einsum(
        "qd,bdhw->bqhw", 2 * torch.eye(3) - 1, 8 * given.pixel_values[..., ::2, ::2]
    )
    outputs = types.SimpleNamespace(
        masks_queries_logits=masks,
        class_queries_logits=torch.from_numpy(np.log(probs)).expand(len(masks), -1, -1),
        patch_offsets=given.patch_offsets,
    )
    return processor, outputs


def test_semantic_maps_through_windows_are_transformers():
    probs = probabilities()
    predictor = Predictor(network(), FakeHead(probs), CLASSES, WINDOWED)
    images = list(pictures())
    found = dict(predictor.stream((n, predictor.prepare(i)) for n, i in enumerate(images)))
    assert len(found) == len(images)
    for number, image in enumerate(images):
        size = {"shortest_edge": SIDE, "longest_edge": None}
        processor, outputs = theirs(image, probs, size=size, do_split_image=True)
        (one,) = processor.post_process_semantic_segmentation(
            outputs, [image.shape[:2]], return_segmentation_scores=True
        )
        scores, classes = one.segmentation_scores.numpy(), found[number].semantic
        assert classes.shape == image.shape[:2]
        chosen = np.take_along_axis(scores, classes[None].astype(int), 0)[0]
        np.testing.assert_allclose(chosen, scores.max(axis=0), rtol=1e-4)
        assert len(np.unique(classes)) > 1


@pytest.mark.parametrize("size", [(32, 32), (32, 22), (20, 32)])
def test_panoptic_maps_of_the_padded_square_are_transformers(size):
    """Up to the last pixel before the padding, which here looks at the picture alone."""
    probs, (image, *_) = probabilities(), pictures([size])
    config = PredictConfig(
        short_side=SIDE, long_side=SIDE, keep_rule="score", score_threshold=0.1, batch_size=1
    )
    predictor = Predictor(network(), FakeHead(probs), CLASSES, config)
    prepared = predictor.prepare(image)
    assert prepared.image.shape == (SIDE, SIDE, 3)
    (ours,) = predictor.predict([prepared])
    square = {"shortest_edge": SIDE, "longest_edge": SIDE}
    processor, outputs = theirs(image, probs, size=square, do_pad=True)
    (found,) = processor.post_process_panoptic_segmentation(
        outputs, [size], threshold=0.1, stuff_classes=[0, 1, 2, 3]
    )
    names = {-1: -1} | {one["id"]: one["label_id"] for one in found["segments_info"]}
    expected = np.vectorize(names.get)(found["segmentation"].numpy())
    labels = {0: -1} | ours.panoptic.labels_by_id()
    named = np.vectorize(labels.get)(ours.panoptic.id_map)
    inner = tuple(slice(side if side == SIDE else side - 1) for side in size)
    np.testing.assert_array_equal(named[inner], expected[inner])
    assert len(np.unique(named)) > 2


def test_a_strip_that_would_fill_the_memory_fails_and_the_others_are_segmented():
    strip, picture = np.zeros((1, 65, 3), np.uint8), next(pictures())
    predictor, failed = Predictor(network(), FakeHead(probabilities()), CLASSES, WINDOWED), []
    found = segment_all(predictor, [strip, picture], lambda _, error: failed.append(str(error)))
    assert [index for index, _, _ in found] == [1]
    assert failed == [
        "A picture of 1x65 pixels is more than 64 times as long as wide, too long for windows; cut "
        "it into pieces."
    ]


def test_windows_of_images_of_a_batch_lie_where_each_ends():
    windows = Windows(32)
    starts = windows.starts(np.array([50, 64, 33]), 2)
    np.testing.assert_array_equal(starts, [[0, 0, 0], [18, 32, 1]])
    weights = windows.weights(starts)
    assert weights[0, 0].tolist() == [1.0] * 18 + [0.5] * 14
    assert weights[1, 1].tolist() == [1.0] * 32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"short_side": 50}, "short_side is 50, but windows have sides divisible by 32"),
        ({"tasks": ("panoptic",)}, "Windows are for the task semantic alone"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PredictConfig(**{"tasks": ("semantic",), "short_side": 64, "windows": True, **fields})
