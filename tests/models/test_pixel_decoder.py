"""Pixel decoder: its position encoding and resize beside the references, shapes, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.models.ops.position_encoding import sine_position_encoding
from concat_jax.models.ops.valid_area import resize_bilinear
from concat_jax.models.pixel_decoder import PixelDecoder, reference_grid


@pytest.mark.parametrize("height, width, channels", [(5, 7, 16), (32, 20, 256)])
def test_position_encoding_matches_transformers(height, width, channels):
    torch = pytest.importorskip("torch")
    from transformers.models.mask2former import modeling_mask2former

    reference = modeling_mask2former.Mask2FormerSinePositionEmbedding(
        num_position_features=channels // 2, normalize=True
    )
    theirs = reference((1, channels, height, width), "cpu", torch.float32)[0].permute(1, 2, 0)
    ours = sine_position_encoding(height, width, channels)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-6)


def test_position_encoding_by_hand():
    # Two rows: y is pi and 2 pi up to the epsilon; one column: x is 2 pi.
    encoding = sine_position_encoding(2, 1, 4)
    np.testing.assert_allclose(encoding[:, 0, 1], [-1, 1], atol=1e-5)
    np.testing.assert_allclose(encoding[:, 0, 3], [1, 1], atol=1e-5)
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
        sine_position_encoding(2, 2, 6)


@pytest.mark.parametrize(
    "size, target",
    [
        ((8, 12), (4, 6)),
        ((16, 8), (4, 2)),
        ((16, 24), (2, 3)),
        ((9, 13), (5, 7)),
        ((6, 5), (12, 10)),
    ],
    ids=["half", "quarter", "eighth", "odd", "double"],
)
def test_resize_matches_torch(size, target):
    torch = pytest.importorskip("torch")
    features = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(features).permute(0, 3, 1, 2),
        size=target,
        mode="bilinear",
        align_corners=False,
    )
    ours = resize_bilinear(features, *target)
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), atol=1e-5)


def test_reference_grid():
    grid = reference_grid(2, 4)
    assert grid.shape == (8, 2)
    np.testing.assert_allclose(grid[1], [0.375, 0.25])
    np.testing.assert_allclose(grid[4], [0.125, 0.75])


def make_features(batch=2, size=64, width=8):
    return [
        jax.ShapeDtypeStruct((batch, size // s, size // s, width * i), jnp.float32)
        for i, s in enumerate((4, 8, 16, 32), start=1)
    ]


def test_shapes_and_dtypes():
    decoder = PixelDecoder(width=32, num_layers=2, num_groups=8, num_heads=4, dtype=jnp.bfloat16)
    (mask_features, scales), variables = jax.eval_shape(
        decoder.init_with_output, jax.random.key(0), make_features()
    )
    assert mask_features.shape == (2, 16, 16, 32)
    assert [s.shape for s in scales] == [(2, 2, 2, 32), (2, 4, 4, 32), (2, 8, 8, 32)]
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert mask_features.dtype == jnp.bfloat16


def test_bad_input():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="got 3 maps"):
        jax.eval_shape(PixelDecoder().init, key, make_features()[1:])
