"""Weighted cross-entropy against torch."""

import numpy as np
import pytest

from concat_jax.losses.segmentation import weighted_cross_entropy


def test_equals_torch_weighted_mean():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 7, 4)).astype(np.float32)
    labels = rng.integers(0, 4, (5, 7))
    weights = np.array([1.0, 1.0, 2.0, 0.1], np.float32)
    losses, row_weights = weighted_cross_entropy(logits, labels, weights)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).permute(0, 2, 1),
        torch.from_numpy(labels),
        torch.from_numpy(weights),
    )
    np.testing.assert_allclose(losses.sum() / row_weights.sum(), expected, rtol=1e-5)


def test_label_minus_one_is_left_out():
    logits = np.zeros((2, 3), np.float32)
    losses, weights = weighted_cross_entropy(logits, np.array([-1, 2]), np.ones(3, np.float32))
    np.testing.assert_allclose(losses, [0, np.log(3)], rtol=1e-6)
    np.testing.assert_array_equal(weights, [0, 1])
