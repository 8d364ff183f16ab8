"""Deformable attention beside torch's grid_sample, by hand, and compiled for eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from concat_jax.models.ops.deformable_attention import (
    compass_offsets,
    multi_scale_deformable_attention,
)

SIZES = ((3, 4), (5, 7))


def random_inputs(seed=0, batch=2, queries=6, heads=2, depth=3, points=4, spread=0.6):
    """Values, locations (a third of them outside the map) and weights."""
    rng = np.random.default_rng(seed)
    values = [rng.normal(size=(batch, *size, heads, depth)).astype(np.float32) for size in SIZES]
    shape = (batch, queries, heads, len(SIZES), points)
    locations = (0.5 + spread * rng.normal(size=(*shape, 2))).astype(np.float32)
    weights = rng.uniform(size=shape).astype(np.float32)
    return values, locations, weights


def torch_reference(values, locations, weights):
    torch = pytest.importorskip("torch")
    batch, queries, heads, levels, points, _ = locations.shape
    depth = values[0].shape[-1]
    output = torch.zeros(batch, heads, depth, queries)
    for level in range(levels):
        for b in range(batch):
            value = torch.from_numpy(values[level][b]).permute(2, 3, 0, 1)
            grid = torch.from_numpy(locations[b, :, :, level]).permute(1, 0, 2, 3) * 2 - 1
            sampled = torch.nn.functional.grid_sample(
                value, grid, mode="bilinear", padding_mode="zeros", align_corners=False
            )
            weight = torch.from_numpy(weights[b, :, :, level]).permute(1, 0, 2)
            output[b] += (sampled * weight[:, None]).sum(-1)
    return output.permute(0, 3, 1, 2).reshape(batch, queries, heads * depth).numpy()


def test_matches_grid_sample():
    values, locations, weights = random_inputs()
    assert 0.1 < np.mean((locations < 0) | (locations > 1)) < 0.9
    ours = multi_scale_deformable_attention(values, locations, weights)
    theirs = torch_reference(values, locations, weights)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_by_hand():
    value = jnp.asarray([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 2, 1, 1)
    # Centre of the map, centre of the first pixel, its outer edge (half outside), far outside.
    points = jnp.asarray([[0.5, 0.5], [0.25, 0.25], [0.0, 0.25], [5.0, -5.0]])
    locations = points.reshape(1, 4, 1, 1, 1, 2)
    weights = jnp.asarray([1.0, 1.0, 1.0, 1.0]).reshape(1, 4, 1, 1, 1)
    output = multi_scale_deformable_attention([value], locations, weights)
    np.testing.assert_allclose(output[0, :, 0], [2.5, 1.0, 0.5, 0.0], atol=1e-6)


def test_gradients():
    # float32 finite differences: away from pixel borders, where the function has kinks.
    values, locations, weights = random_inputs(batch=1, queries=2, points=2, depth=2, spread=0.3)
    for level, (height, width) in enumerate(SIZES):
        pixels = locations[:, :, :, level] * np.float32([width, height]) - 0.5
        pixels = np.floor(pixels) + np.clip(pixels - np.floor(pixels), 0.2, 0.8)
        locations[:, :, :, level] = (pixels + 0.5) / np.float32([width, height])
    values = [jnp.asarray(v) for v in values]
    check_grads(
        multi_scale_deformable_attention,
        (values, jnp.asarray(locations), jnp.asarray(weights)),
        order=1,
        modes=["rev"],
        atol=2e-2,
        rtol=2e-2,
        eps=1e-2,
    )


def test_bfloat16_values_are_summed_in_float32():
    values, locations, weights = random_inputs(points=16)
    exact = multi_scale_deformable_attention(values, locations, weights)
    halved = [jnp.asarray(v, jnp.bfloat16) for v in values]
    ours = multi_scale_deformable_attention(halved, locations, weights)
    assert ours.dtype == jnp.bfloat16
    expected = multi_scale_deformable_attention(
        [v.astype(jnp.float32) for v in halved], locations, weights
    ).astype(jnp.bfloat16)
    np.testing.assert_array_equal(ours, expected)
    assert np.abs(np.asarray(ours, np.float32) - exact).max() < 0.1


def test_compass_offsets():
    offsets = compass_offsets(num_heads=8, num_levels=3, num_points=4)
    assert offsets.shape == (8, 3, 4, 2)
    # East, then south-east on the square's corner (y points down), then south.
    np.testing.assert_allclose(offsets[:3, 0, 0], [[1, 0], [1, 1], [0, 1]], atol=1e-6)
    np.testing.assert_allclose(offsets[0, 2, :, 0], [1, 2, 3, 4], atol=1e-6)


def test_no_collectives_when_the_batch_is_sharded():
    devices = jax.devices()[:8]
    if len(devices) < 8:
        pytest.skip(f"needs 8 devices, found {len(devices)}")
    sharding = NamedSharding(Mesh(np.asarray(devices), ("data",)), PartitionSpec("data"))
    inputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        random_inputs(batch=8),
    )

    def loss(values, locations, weights):
        output = multi_scale_deformable_attention(values, locations, weights)
        return jnp.sum(output**2, axis=(1, 2))

    def step(values, locations, weights):
        output, vjp = jax.vjp(loss, values, locations, weights)
        return output, vjp(jnp.ones_like(output))

    text = jax.jit(step).lower(*inputs).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text


def test_padding_is_as_good_as_absent():
    """Maps padded with noise to one size, each image with a valid part of its own."""
    values, locations, weights = random_inputs()
    rng = np.random.default_rng(5)
    padded = [
        np.concatenate(
            [
                np.concatenate([v, rng.normal(size=(*v.shape[:2], 3, *v.shape[3:]))], axis=2),
                rng.normal(size=(v.shape[0], 2, v.shape[2] + 3, *v.shape[3:])),
            ],
            axis=1,
        ).astype(np.float32)
        for v in values
    ]
    smaller = ((2, 4), (5, 3))  # valid sizes of the second image
    valid_sizes = np.asarray([SIZES, smaller], np.int32)
    output = multi_scale_deformable_attention(padded, locations, weights, valid_sizes)
    for index, sizes in enumerate((SIZES, smaller)):
        alone = [
            p[index : index + 1, :height, :width]
            for p, (height, width) in zip(padded, sizes, strict=True)
        ]
        image = slice(index, index + 1)
        expected = multi_scale_deformable_attention(alone, locations[image], weights[image])
        np.testing.assert_allclose(output[image], expected, rtol=1e-5, atol=1e-6)
