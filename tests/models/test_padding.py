"""Padded images: on its own area each gives what it gives unpadded, whatever the padding holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.models.backbones import swin as swin_lib
from concat_jax.models.ops.position_encoding import sine_position_encoding
from concat_jax.models.ops.valid_area import resize_within, valid_mask, valid_size, zero_beyond
from concat_jax.models.pixel_decoder import reference_grid
from concat_jax.models.segmentor import make_segmentor
from concat_jax.models.segmentor_output import mask_logits, normalize_images
from concat_jax.models.transformer_decoder import attention_block_mask
from tests import tiny
from tests.golden.cases import relative_error

HEADS = {
    "width": 16,
    "num_queries": 4,
    "num_encoder_layers": 1,
    "num_decoder_layers": 3,
    "num_heads": 2,
    "num_points": 2,
    "ffn_width": 8,
    "decoder_ffn_width": 8,
    "num_groups": 4,
}
BACKBONES = {
    "frozen_batch": {"kind": "resnet", "stage_sizes": (1, 1, 1, 1), "width": 4},
    "group": {
        "kind": "resnet",
        "stage_sizes": (1, 1, 1, 1),
        "width": 4,
        "block": "basic",
        "norm": "group",
        "stem": "small",
    },
    # The second block of a stage shifts its windows.
    "swin": {
        "kind": "swin",
        "stage_sizes": (2, 1, 1, 2),
        "width": 4,
        "num_heads": (1, 1, 2, 2),
        "window_size": 3,
    },
}
BUCKET = (96, 80)
# Odd and without whole windows, one position beyond a stride, and the whole bucket.
SIZES = ((53, 65), (33, 20), BUCKET)


@functools.cache
def model_and_params(name, num_decoder_layers=3):
    """A segmentor and random, not initial, parameters: initial ones hide much behind zeros."""
    heads = HEADS | {"num_decoder_layers": num_decoder_layers}
    model = make_segmentor({**heads, "backbone": BACKBONES[name]})
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        leaf_name = path[-1].key
        if leaf_name in ("scale", "frozen_scale", "frozen_variance"):
            noise = 1 + 0.2 * np.clip(noise, -2, 2)
        elif leaf_name == "kernel":
            noise *= np.prod(leaf.shape[:-1]) ** -0.5
        elif leaf_name in ("bias", "frozen_bias", "frozen_mean"):
            noise *= 0.3
        return jnp.asarray(noise, jnp.float32)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def compiled(*, padded):
    model, _ = model_and_params("frozen_batch")

    def run(params, images, image_size=None):
        output = model.apply({"params": params}, images, image_size)
        return output, mask_logits(output.mask_embeddings, output.mask_features)

    # Positional: a program with, and one without the sizes.
    function = run if padded else lambda params, images: run(params, images)
    return jax.jit(function)


def draw_images(seed=1):
    rng = np.random.default_rng(seed)
    return [
        np.asarray(normalize_images(rng.integers(0, 256, (*size, 3), np.uint8))) for size in SIZES
    ]


def into_bucket(images, fill):
    """Images at the top left of the bucket over padding drawn by `fill`(shape)."""
    padded = np.asarray(fill((len(images), *BUCKET, 3)), np.float32)
    for row, image in zip(padded, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    return padded


# Each size run alone is a program of its own to compile.
def test_padded_equals_unpadded():
    model, params = model_and_params("frozen_batch")
    stride = model.backbone.stride
    images = draw_images()
    noise = np.random.default_rng(2)
    batch = into_bucket(images, lambda shape: noise.normal(scale=50, size=shape))
    sizes = jnp.asarray(SIZES, jnp.int32)
    output, masks = compiled(padded=True)(params, batch, sizes)

    # Not-a-number is the padding that leaks the furthest.
    other = into_bucket(images, lambda shape: np.full(shape, np.nan))
    again, masks_again = compiled(padded=True)(params, other, sizes)
    jax.tree.map(np.testing.assert_array_equal, (output, masks), (again, masks_again))

    for index in (0, 1):
        alone, alone_masks = compiled(padded=False)(params, images[index][None])
        height, width = alone.mask_features.shape[1:3]
        assert (height, width) == tuple(-(-x // stride) for x in SIZES[index])
        assert relative_error(output.queries[index], alone.queries[0]) < 1e-4
        assert relative_error(output.mask_embeddings[index], alone.mask_embeddings[0]) < 1e-4
        features = np.asarray(output.mask_features[index])
        assert relative_error(features[:height, :width], alone.mask_features[0]) < 1e-4
        assert relative_error(masks[index, ..., :height, :width], alone_masks[0]) < 1e-4
        assert not features[height:].any() and not features[:, width:].any()


@pytest.mark.parametrize("name, compared", [("group", (0, 2)), ("swin", (0, 1))])
def test_maps_of_other_backbones_are_those_of_the_unpadded_image(name, compared):
    model, params = model_and_params(name)
    run = jax.jit(
        lambda images, *size: model.backbone.apply({"params": params["backbone"]}, images, *size),
    )
    images, sizes = draw_images(), jnp.asarray(SIZES, jnp.int32)
    maps = run(into_bucket(images, lambda shape: np.full(shape, np.nan)), sizes)
    for index in compared:
        for level, (found, alone) in enumerate(zip(maps, run(images[index][None]), strict=True)):
            shape = tuple(-(-x // (model.backbone.stride * 2**level)) for x in SIZES[index])
            assert alone.shape[1:3] == shape
            assert relative_error(found[index, : shape[0], : shape[1]], alone[0]) < 1e-4


@pytest.mark.parametrize("name", ["group", pytest.param("swin", marks=pytest.mark.slow)])
def test_gradients_are_those_of_the_unpadded_image(name):
    model, params = model_and_params(name, num_decoder_layers=1)
    image = draw_images()[0]
    (batch,) = into_bucket([image], lambda shape: np.full(shape, 7.0))[None]

    def loss(params, images, image_size=None):
        output = model.apply({"params": params}, images, image_size)
        masks = mask_logits(output.mask_embeddings, output.mask_features)
        return jnp.sum(masks**2) + jnp.sum(output.queries**3)

    gradient = jax.jit(jax.grad(loss))
    size = jnp.asarray(SIZES[:1], jnp.int32)
    padded, alone = gradient(params, batch, size), gradient(params, image[None])
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(padded), jax.tree.leaves(alone), strict=True
    ):
        key = jax.tree_util.keystr(path)
        # The bias of all keys cancels in the softmax: its gradient is noise.
        if not key.endswith("['key']['bias']"):
            assert relative_error(a, b) < 1e-3, key


def test_sharded_padded_batch_needs_no_gather():
    model, params = model_and_params("frozen_batch", num_decoder_layers=1)

    def loss(params, images, image_size):
        output = model.apply({"params": params}, images, image_size)
        return jnp.mean(output.mask_features**2) + jnp.mean(output.queries[..., 0] ** 2)

    images = jax.ShapeDtypeStruct((8, 64, 64, 3), jnp.float32)
    sizes = jax.ShapeDtypeStruct((8, 2), jnp.int32)
    tiny.assert_nothing_is_gathered(loss, params, images, sizes)


def test_sizes_out_of_range_are_clipped():
    model, params = model_and_params("frozen_batch")
    images = into_bucket(draw_images(), np.zeros)
    run = compiled(padded=True)
    sizes = jnp.asarray([[0, 0], [1000, 1000], [-3, 7]], jnp.int32)
    clipped = jnp.asarray([[1, 1], BUCKET, [1, 7]], jnp.int32)
    output = run(params, images, sizes)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(output))
    jax.tree.map(np.testing.assert_array_equal, output, run(params, images, clipped))


def test_valid_area_by_hand():
    sizes = jnp.asarray([[5, 8], [1, 9]])
    np.testing.assert_array_equal(valid_size(sizes, 1), sizes)
    np.testing.assert_array_equal(valid_size(sizes, 4), [[2, 2], [1, 3]])
    mask = valid_mask(jnp.asarray([[1, 2]]), 2, 3)
    np.testing.assert_array_equal(mask, [[[True, True, False], [False, False, False]]])
    features = jnp.asarray([[[[1.0], [jnp.nan]], [[2.0], [jnp.inf]]]])
    kept = zero_beyond(features, jnp.asarray([[2, 1]]))
    np.testing.assert_array_equal(kept[0, ..., 0], [[1, 0], [2, 0]])
    assert zero_beyond(features, None) is features


def test_resize_within_reads_the_valid_area_only():
    torch = pytest.importorskip("torch")
    sizes = [(8, 12), (8, 12), (3, 5), (9, 1), (8, 12)]
    targets = [(4, 6), (16, 24), (7, 5), (1, 1), (3, 5)]
    features = np.random.default_rng(0).normal(size=(5, 9, 12, 2)).astype(np.float32)
    height, width = 16, 24
    resize = jax.jit(resize_within, static_argnums=(2, 3))
    resized = np.asarray(resize(features, jnp.asarray(sizes), height, width, jnp.asarray(targets)))
    assert resized.shape == (5, height, width, 2)
    assert np.isfinite(resized).all()
    for row, size, new in zip(range(5), sizes, targets, strict=True):
        valid = torch.from_numpy(features[row, : size[0], : size[1]]).permute(2, 0, 1)[None]
        expected = torch.nn.functional.interpolate(
            valid, size=new, mode="bilinear", align_corners=False
        )[0].permute(1, 2, 0)
        np.testing.assert_allclose(resized[row, : new[0], : new[1]], expected.numpy(), atol=2e-6)


def test_positions_and_references_follow_the_valid_area():
    sizes = [(5, 7), (8, 3), (300, 200)]
    encodings = sine_position_encoding(300, 200, 16, jnp.asarray(sizes))
    grids = reference_grid(300, 200, jnp.asarray(sizes)).reshape(3, 300, 200, 2)
    for encoding, grid, (height, width) in zip(encodings, grids, sizes, strict=True):
        expected = sine_position_encoding(height, width, 16)
        np.testing.assert_allclose(encoding[:height, :width], expected, atol=3e-6)
        expected = reference_grid(height, width).reshape(height, width, 2)
        np.testing.assert_allclose(grid[:height, :width], expected, rtol=1e-6)
    assert (grids[0, :, 7:, 0] > 1).all() and (grids[0, 5:, :, 1] > 1).all()


def test_block_mask_within_the_valid_area():
    # Logits of the queries are plus and minus the only channel; the last place is padding.
    features = jnp.asarray([1.0, -2.0, 3.0]).reshape(1, 1, 3, 1)
    embeddings = jnp.asarray([[[1.0], [-1.0], [0.0]]])
    blocked = attention_block_mask(embeddings, features, jnp.asarray([[1, 2]]))
    expected = [[False, True, True], [True, False, True], [False, False, True]]
    np.testing.assert_array_equal(blocked[0], expected)
    # Only the first place is valid: what the second query may see nothing of, it sees whole.
    blocked = attention_block_mask(embeddings, features, jnp.asarray([[1, 1]]))
    np.testing.assert_array_equal(blocked[0], [[False, True, True]] * 3)


def test_shifted_windows_of_a_bucket():
    # One axis of 5 valid places filled up to 6, in windows of 3, shifted by 1, in a bucket of 9:
    # rolled, the places are 1 2 3 | 4 5 6 | 7 8 0.
    blocked = np.asarray(swin_lib.shifted_window_mask((3, 1), 3, 1, jnp.asarray([[5, 3], [9, 3]])))
    assert blocked.shape == (2, 3, 1, 9, 9)
    # Rows of the windows that see each other in their first column.
    rows = blocked.reshape(2, 3, 3, 3, 3, 3)[:, :, :, 0, :, 0]
    apart = np.asarray([[False, False, True], [False, False, True], [True, True, False]])
    np.testing.assert_array_equal(rows[0], [np.zeros((3, 3), bool), apart, apart])
    np.testing.assert_array_equal(rows[1], [np.zeros((3, 3), bool)] * 2 + [apart])
    static = swin_lib.shifted_window_mask((3, 1), 3, 1)
    np.testing.assert_array_equal(blocked[1], static)
