"""Point sampling against torch grid_sample and explicit binary masks; losses by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.losses import masks

RNG = np.random.default_rng(0)


def torch_point_sample(maps: np.ndarray, points: np.ndarray) -> np.ndarray:
    """detectron2's convention: [B, C, h, w] at [B, P, 2] in [0, 1]."""
    torch = pytest.importorskip("torch")
    grid = torch.from_numpy(2.0 * points[:, :, None] - 1.0)
    sampled = torch.nn.functional.grid_sample(torch.from_numpy(maps), grid, align_corners=False)
    return sampled[..., 0].numpy()


def points_beyond_the_border(shape):
    return RNG.uniform(-0.1, 1.1, (*shape, 2)).astype(np.float32)


def test_sample_features_equals_grid_sample():
    features = RNG.normal(size=(2, 7, 5, 3)).astype(np.float32)
    points = points_beyond_the_border((2, 40))
    expected = torch_point_sample(features.transpose(0, 3, 1, 2), points).transpose(0, 2, 1)
    np.testing.assert_allclose(masks.sample_features(features, points), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_id_map_samples_equal_samples_of_binary_masks(dtype):
    ids = RNG.integers(0, 5, (2, 11, 13)).astype(dtype)
    num_segments = 6  # two of them have no pixel
    binary = np.stack([ids == g for g in range(1, num_segments + 1)], axis=1).astype(np.float32)
    points = points_beyond_the_border((2, 200))
    shared = masks.sample_segments(ids, points, num_segments)
    np.testing.assert_allclose(shared, torch_point_sample(binary, points), atol=1e-6)


def test_uncertainty_weights_pick_the_smallest():
    logits = RNG.normal(size=(2, 3, 50)).astype(np.float32)
    weights = np.asarray(masks.uncertainty_weights(jnp.asarray(logits), 20))
    expected = np.zeros(logits.shape)
    picked = np.argsort(np.abs(logits), axis=-1)[..., :20]
    np.put_along_axis(expected, picked, 1.0, axis=-1)
    np.testing.assert_array_equal(weights, expected)


@pytest.mark.parametrize("count", [0, 5, 8])
def test_uncertainty_weights_share_the_last_places_between_ties(count):
    logits = jnp.asarray([0.0, 1.0, -1.0, 1.0, 3.0, -3.0, jnp.inf, 9.0])
    weights = masks.uncertainty_weights(logits, count)
    expected = {0: [0] * 8, 5: [1, 1, 1, 1, 0.5, 0.5, 0, 0], 8: [1] * 8}[count]
    np.testing.assert_allclose(weights, expected)
    nothing_known = masks.uncertainty_weights(jnp.zeros(10), 4)
    np.testing.assert_allclose(nothing_known, np.full(10, 0.4), rtol=1e-6)


def test_weights_of_zero_and_one_select_points():
    logits, targets = RNG.normal(size=(2, 30)), RNG.uniform(size=(2, 30))
    weights = np.zeros((2, 30))
    weights[:, 10:25] = 1
    for loss in (masks.mask_bce, masks.mask_dice):
        selected = loss(jnp.asarray(logits[:, 10:25]), jnp.asarray(targets[:, 10:25]))
        weighted = loss(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weights))
        np.testing.assert_allclose(weighted, selected, rtol=1e-5)


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
