"""Point sampling against torch grid_sample and explicit binary masks; losses by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from concat_jax.losses import masks

RNG = np.random.default_rng(0)


def torch_point_sample(maps: np.ndarray, points: np.ndarray) -> np.ndarray:
    """detectron2's convention: [B, C, h, w] at [B, P, 2] in [0, 1]."""
    grid = torch.from_numpy(2.0 * points[:, :, None] - 1.0)
    sampled = F.grid_sample(torch.from_numpy(maps), grid, align_corners=False)
    return sampled[..., 0].numpy()


def points_beyond_the_border(shape):
    return RNG.uniform(-0.1, 1.1, (*shape, 2)).astype(np.float32)


def test_sample_features_equals_grid_sample():
    features = RNG.normal(size=(2, 7, 5, 3)).astype(np.float32)
    points = points_beyond_the_border((2, 40))
    expected = torch_point_sample(features.transpose(0, 3, 1, 2), points).transpose(0, 2, 1)
    np.testing.assert_allclose(masks.sample_features(features, points), expected, atol=1e-5)


def test_sample_maps_equals_grid_sample_at_own_points():
    maps = RNG.normal(size=(2, 3, 6, 9)).astype(np.float32)
    points = points_beyond_the_border((2, 3, 20))
    expected = np.stack(
        [torch_point_sample(maps[:, m : m + 1], points[:, m])[:, 0] for m in range(3)], axis=1
    )
    np.testing.assert_allclose(masks.sample_maps(maps, points), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_id_map_samples_equal_samples_of_binary_masks(dtype):
    ids = RNG.integers(0, 5, (2, 11, 13)).astype(dtype)
    num_segments = 6  # two of them have no pixel
    binary = np.stack([ids == g for g in range(1, num_segments + 1)], axis=1).astype(np.float32)
    points = points_beyond_the_border((2, 200))
    shared = masks.sample_segments(ids, points, num_segments)
    np.testing.assert_allclose(shared, torch_point_sample(binary, points), atol=1e-6)

    own_points = points_beyond_the_border((2, num_segments, 50))
    expected = np.stack(
        [torch_point_sample(binary[:, [g]], own_points[:, g])[:, 0] for g in range(num_segments)],
        axis=1,
    )
    np.testing.assert_allclose(masks.sample_own_segment(ids, own_points), expected, atol=1e-6)


def test_uncertain_points_lie_on_the_boundary():
    column = jnp.linspace(-8, 8, 16)
    logits = jnp.broadcast_to(column, (1, 2, 16, 16))  # zero at x = 0.5
    points = masks.sample_uncertain_points(
        jax.random.key(0), logits, 40, oversample_ratio=3.0, importance_ratio=0.75
    )
    assert points.shape == (1, 2, 40, 2)
    distance = np.abs(np.asarray(points[..., 0]) - 0.5)
    assert distance[:, :, :30].mean() < 0.15 < distance[:, :, 30:].mean()
    # The kept ones are the most uncertain of 120 candidates: none can be far off.
    assert distance[:, :, :30].max() < 0.25


def test_uncertain_points_refuse_bad_ratios():
    with pytest.raises(ValueError, match="importance_ratio"):
        masks.sample_uncertain_points(
            jax.random.key(0), jnp.zeros((1, 1, 4, 4)), 4, oversample_ratio=3, importance_ratio=2
        )


def test_losses_by_hand():
    logits = jnp.array([[0.0, jnp.log(3.0)]])  # probabilities 0.5 and 0.75
    targets = jnp.array([[1.0, 0.0]])
    bce = (-np.log(0.5) - np.log(0.25)) / 2
    np.testing.assert_allclose(masks.mask_bce(logits, targets), [bce], rtol=1e-6)
    dice = 1 - (2 * 0.5 + 1) / (1.25 + 1 + 1)
    np.testing.assert_allclose(masks.mask_dice(logits, targets), [dice], rtol=1e-6)


def test_pairwise_losses_equal_the_single_ones():
    logits = RNG.normal(size=(2, 4, 30)).astype(np.float32) * 5
    targets = RNG.uniform(size=(2, 3, 30)).astype(np.float32)
    for pairwise, single in (
        (masks.pairwise_mask_bce, masks.mask_bce),
        (masks.pairwise_mask_dice, masks.mask_dice),
    ):
        expected = single(jnp.asarray(logits)[:, :, None], jnp.asarray(targets)[:, None])
        np.testing.assert_allclose(pairwise(logits, targets), expected, rtol=1e-5, atol=1e-5)


def test_losses_are_finite_at_extreme_logits():
    logits = jnp.array([[-1e4, 1e4]])
    targets = jnp.array([[1.0, 0.0]])
    for loss in (masks.mask_bce, masks.mask_dice):
        value, gradient = jax.value_and_grad(lambda x, f=loss: f(x, targets).sum())(logits)
        assert np.isfinite(value) and np.isfinite(gradient).all()
