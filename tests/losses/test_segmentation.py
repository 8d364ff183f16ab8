"""The whole criterion against a plain numpy version with explicit binary masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from concat_jax.losses import masks
from concat_jax.losses.segmentation import SegmentationLossConfig, segmentation_loss

CONFIG = SegmentationLossConfig(num_points=64)
B, L, N, K, D, G = 2, 3, 5, 4, 8, 3


def sample_maps(maps, points):
    """[M, h, w] at [P, 2] -> [M, P]."""
    return masks.sample_features(jnp.moveaxis(maps, 0, -1)[None], points[None])[0].T


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    ids = np.zeros((B, 16, 16), np.uint8)
    ids[:, :8], ids[:, 8:, :8], ids[0, 8:, 8:] = 1, 2, 3
    labels = np.array([[0, 2, 3], [1, 1, -1]], np.int32)
    return dict(
        class_logits=jnp.asarray(rng.normal(size=(B, L, N, K + 1)), jnp.float32),
        mask_embeddings=jnp.asarray(rng.normal(size=(B, L, N, D)), jnp.float32),
        mask_features=jnp.asarray(rng.normal(size=(B, 4, 4, D)), jnp.float32),
        segment_ids=jnp.asarray(ids),
        labels=jnp.asarray(labels),
    )


@pytest.fixture(scope="module")
def result(inputs):
    return jax.jit(lambda: segmentation_loss(jax.random.key(0), config=CONFIG, **inputs))()


def test_matching_is_optimal_for_the_reference_cost(inputs, result):
    rng_match, _ = jax.random.split(jax.random.key(0))
    points = jax.random.uniform(rng_match, (B, CONFIG.num_points, 2))
    for b in range(B):
        valid = np.flatnonzero(inputs["labels"][b] >= 0)
        binary = np.stack([inputs["segment_ids"][b] == g + 1 for g in valid]).astype(np.float32)
        targets = sample_maps(binary, points[b])
        for l in range(L):
            maps = jnp.einsum(
                "nd,hwd->nhw", inputs["mask_embeddings"][b, l], inputs["mask_features"][b]
            )
            logits = sample_maps(maps, points[b])
            probs = jax.nn.softmax(inputs["class_logits"][b, l])
            cost = -2 * np.asarray(probs)[:, np.asarray(inputs["labels"])[b, valid]]
            for j, target in enumerate(targets):
                cost[:, j] += 5 * masks.mask_bce(logits, target) + 5 * masks.mask_dice(
                    logits, target
                )
            rows, cols = linear_sum_assignment(cost)
            query_of_segment = np.asarray(result.query_of_segment)[b, l]
            found = cost[query_of_segment[valid], np.arange(len(valid))].sum()
            np.testing.assert_allclose(found, cost[rows, cols].sum(), rtol=1e-4)


def test_class_loss_is_the_weighted_mean_of_each_set(inputs, result):
    log_probs = np.asarray(jax.nn.log_softmax(inputs["class_logits"]))
    expected = 0.0
    for l in range(L):
        total = weight = 0.0
        for b in range(B):
            for n in range(N):
                segment = np.flatnonzero(np.asarray(result.query_of_segment)[b, l] == n)
                label = int(inputs["labels"][b, segment[0]]) if len(segment) else K
                w = 1.0 if len(segment) else 0.1
                assert result.query_labels[b, l, n] == label
                total -= w * log_probs[b, l, n, label]
                weight += w
        expected += total / weight
    np.testing.assert_allclose(result.loss_class, 2 * expected, rtol=1e-5)


def test_perfect_masks_cost_little_and_wrong_ones_much(inputs):
    features = jax.nn.one_hot(inputs["segment_ids"].astype(int), D)  # at full resolution
    queries = jnp.broadcast_to(jnp.eye(D)[1 : N + 1], (B, L, N, D))

    def loss(embeddings):
        terms = segmentation_loss(
            jax.random.key(1),
            inputs["class_logits"],
            embeddings,
            features,
            inputs["segment_ids"],
            inputs["labels"],
            CONFIG,
        )
        return terms.loss_mask + terms.loss_dice

    perfect = loss(40 * queries - 20)  # +20 inside the segment, -20 outside
    inverted = loss(20 - 40 * queries)
    # What remains is the sampling across edges, where both sides of a pixel mix.
    assert perfect < 0.2 * inverted


def test_all_padding_has_a_finite_gradient(inputs):
    nothing = jnp.full((B, G), -1)

    def loss(logits, embeddings):
        terms = segmentation_loss(
            jax.random.key(0),
            logits,
            embeddings,
            inputs["mask_features"],
            inputs["segment_ids"],
            nothing,
            CONFIG,
        )
        return terms.loss_class + terms.loss_mask + terms.loss_dice

    gradients = jax.grad(loss, argnums=(0, 1))(inputs["class_logits"], inputs["mask_embeddings"])
    assert all(np.isfinite(g).all() for g in gradients)
    assert not np.asarray(gradients[1]).any()


@pytest.mark.parametrize("field, value", [("oversample_ratio", 0.5), ("importance_ratio", 1.5)])
def test_constants_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}.*got"):
        SegmentationLossConfig(**{field: value})
