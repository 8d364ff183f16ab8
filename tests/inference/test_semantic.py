"""Semantic maps against the reference's formula in torch."""

import jax
import numpy as np
import pytest

from concat_jax.inference.semantic import semantic_inference


def reference(mask_logits, probs, size):
    """`semantic_inference` of Mask2Former on resized logits, by hand in torch: [K, H, W]."""
    torch = pytest.importorskip("torch")
    masks = torch.nn.functional.interpolate(
        torch.tensor(mask_logits)[None], size=size, mode="bilinear", align_corners=False
    )[0].sigmoid()
    return torch.einsum("qc,qhw->chw", torch.tensor(probs[:, :-1]), masks).numpy()


def random_case(rng, batch, num_classes=7):
    probs = jax.nn.softmax(rng.normal(0, 2, (batch, 9, num_classes + 1)).astype(np.float32))
    return rng.normal(0, 4, (batch, 9, 12, 16)).astype(np.float32), np.asarray(probs)


def assert_same_up_to_ties(classes, scores):
    chosen = np.take_along_axis(scores, classes[None].astype(int), 0)[0]
    np.testing.assert_allclose(chosen, scores.max(0), rtol=1e-5)
    assert (classes != scores.argmax(0)).mean() < 0.001


def test_equals_the_reference_with_sizes_in_a_bucket():
    rng = np.random.default_rng(0)
    logits, probs = random_case(rng, 2)
    sources, natives = np.array([[12, 16], [9, 11]]), np.array([[37, 50], [41, 20]])
    maps = semantic_inference(
        logits, probs, output_size=(48, 56), source_size=sources, image_size=natives, strip_rows=7
    )
    assert maps.dtype == np.uint8
    for row, (source, native) in enumerate(zip(sources, natives, strict=True)):
        valid = logits[row, :, : source[0], : source[1]]
        expected = reference(valid, probs[row], tuple(native.tolist()))
        assert_same_up_to_ties(np.asarray(maps[row])[: native[0], : native[1]], expected)


def test_a_tile_is_a_part_of_the_whole():
    logits, probs = random_case(np.random.default_rng(1), 1)
    native = np.array([[37, 50]])
    expected = reference(logits[0], probs[0], (37, 50))
    tile = semantic_inference(
        logits, probs, output_size=(20, 30), image_size=native, origin=np.array([10, 15])
    )
    assert_same_up_to_ties(np.asarray(tile[0]), expected[:, 10:30, 15:45])


def test_equals_transformers_at_its_own_size():
    """transformers works at 384x384 whatever comes in; there the formulas are the same."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(2)
    logits, probs = random_case(rng, 1)
    outputs = type("Outputs", (), {})()
    outputs.masks_queries_logits = torch.tensor(logits)
    outputs.class_queries_logits = torch.tensor(np.log(probs))
    processor = transformers.Mask2FormerImageProcessorPil()
    (theirs,) = processor.post_process_semantic_segmentation(outputs)
    ours = semantic_inference(logits, probs, output_size=(384, 384))[0]
    assert (theirs.numpy() != np.asarray(ours)).mean() < 1e-4


def test_many_classes_need_two_bytes():
    logits, probs = random_case(np.random.default_rng(3), 1, num_classes=300)
    maps = semantic_inference(logits, probs, output_size=(12, 16))
    assert maps.dtype == np.uint16
    assert_same_up_to_ties(np.asarray(maps[0]), reference(logits[0], probs[0], (12, 16)))
