"""Instances against the reference's formula in torch, and the run-length encoding."""

import jax
import numpy as np
import pytest

from concat_jax.core.mask_codes import encode_rle
from concat_jax.inference.instance import instance_inference


def reference(mask_logits, probs, size, top, is_thing):
    """`instance_inference` of Mask2Former, by hand in torch: (scores, labels, masks)."""
    torch = pytest.importorskip("torch")
    masks = torch.nn.functional.interpolate(
        torch.tensor(mask_logits)[None], size=size, mode="bilinear", align_corners=False
    )[0]
    num_classes = probs.shape[1] - 1
    scores, pairs = torch.tensor(probs[:, :-1]).flatten().topk(top)
    labels, masks = pairs % num_classes, masks[pairs // num_classes]
    if is_thing is not None:
        keep = torch.tensor(is_thing)[labels]
        scores, labels, masks = scores[keep], labels[keep], masks[keep]
    binary = (masks > 0).float()
    quality = (masks.sigmoid() * binary).sum((1, 2)) / (binary.sum((1, 2)) + 1e-6)
    order = (scores * quality).argsort(descending=True)
    return [x[order].numpy() for x in (scores * quality, labels, binary.bool())]


@pytest.mark.parametrize("is_thing", [None, np.array([True, False, True, True, False])])
def test_equals_the_reference(is_thing):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (8, 12, 16)).astype(np.float32)
    probs = np.asarray(jax.nn.softmax(rng.normal(0, 2, (8, 6)).astype(np.float32)))
    scores, labels, masks = reference(logits, probs, (31, 50), 20, is_thing)
    padded = np.pad(logits, ((0, 0), (0, 5), (0, 3)), constant_values=50)
    instances = instance_inference(
        padded, probs, image_size=(31, 50), source_size=(12, 16), is_thing=is_thing, top=20
    )
    np.testing.assert_allclose([i.score for i in instances], scores, rtol=1e-5)
    assert [i.label for i in instances] == labels.tolist()
    for instance, mask in zip(instances, masks, strict=True):
        assert (instance.mask != mask).mean() < 0.002


def test_scores_under_the_threshold_and_empty_masks_are_left_out():
    logits = np.stack([np.full((4, 4), 9.0), np.full((4, 4), -9.0), np.full((4, 4), 0.1)])
    probs = np.array([[0.6, 0.3, 0.1], [0.9, 0.0, 0.1], [0.0, 0.8, 0.2]], np.float32)
    every = instance_inference(logits, probs, image_size=(4, 4))
    # Query 1 has no pixel; the quality of query 2 is sigmoid(0.1) = 0.525.
    assert [(i.query, i.label) for i in every] == [(0, 0), (2, 1), (0, 1)]
    assert every[1].score == pytest.approx(0.8 * 0.52498, abs=1e-4)
    some = instance_inference(logits, probs, image_size=(4, 4), score_threshold=0.5)
    assert [(i.query, i.label) for i in some] == [(0, 0)]


def test_rle_by_hand():
    # Column by column 0 1 | 1 0 | 0 0: runs 1 2 3.
    mask = np.array([[0, 1, 0], [1, 0, 0]], bool)
    assert encode_rle(mask) == {"size": [2, 3], "counts": "123"}
    # A first pixel that is set: an empty run of zeros leads. 40 = 01000|1 in base 32, low first.
    assert encode_rle(np.ones((1, 40), bool)) == {"size": [1, 40], "counts": "0X1"}
    # From the fourth run on differences: runs 0 5 5 3 2 are written 0 5 5 3-5 2-5, and -2 in five
    # bits is 30, -3 is 29.
    mask = np.repeat([True, False, True, False], [5, 5, 3, 2])[None]
    assert encode_rle(mask)["counts"] == "055" + chr(48 + 30) + chr(48 + 29)
