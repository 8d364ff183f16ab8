"""Windows and masked crops by hand, and the embeddings that CON pulls to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.models.clip import make_clip
from concat_jax.models.clip_images import normalize_clip_images
from concat_jax.stages import clip_targets as module
from concat_jax.stages.clip_targets import CropConfig, clip_targets, segment_windows
from tests import tiny

masked_crops = jax.jit(module.masked_crops, static_argnums=(2, 3, 4))

RED, BLUE, GREEN = (250, 10, 10), (10, 10, 250), (10, 250, 10)
# What a colour is to CLIP: a crop of one colour holds these three numbers everywhere.
AS_CLIP = {c: np.asarray(normalize_clip_images(jnp.asarray(c, jnp.uint8))) for c in (RED, BLUE)}


def windows(ids, num_segments, **fields):
    centres, sides = segment_windows(jnp.asarray(ids), num_segments, CropConfig(**fields))
    return np.asarray(centres), np.asarray(sides)


def test_windows_by_hand():
    ids = np.zeros((1, 20, 30), np.uint8)
    ids[0, 2:6, 10:20] = 1  # rows 2..5, columns 10..19: 4 x 10 pixels
    ids[0, 19, 29] = 3  # one pixel in the corner; 2 is absent
    centres, sides = windows(ids, 3, margin=0.1)
    np.testing.assert_allclose(centres[0, 0], [4, 15])
    np.testing.assert_allclose(sides[0, 0], 12)  # the longer side and a tenth of it on either end
    np.testing.assert_allclose(centres[0, 2], [19.5, 29.5])
    np.testing.assert_allclose(sides[0, 2], 1.2)
    np.testing.assert_allclose(centres[0, 1], [0, 0])
    np.testing.assert_allclose(sides[0, 1], 1.2)


def test_least_and_greatest_side():
    ids = np.zeros((1, 40, 40), np.uint8)
    ids[0, :, :2] = 1  # an L: its box is the whole image, its mean is not
    ids[0, 38:, :] = 1
    ids[0, 10:12, 20:22] = 2
    centres, sides = windows(ids, 2, margin=0.0, min_side=8.0, max_side=16.0)
    np.testing.assert_allclose(sides[0], [16, 8])
    rows = np.argwhere(ids[0] == 1).mean(axis=0) + 0.5
    np.testing.assert_allclose(centres[0, 0], rows, rtol=1e-5)  # where most of the region is
    np.testing.assert_allclose(centres[0, 1], [11, 21])
    uncapped, sides = windows(ids, 2, margin=0.0)
    np.testing.assert_allclose(uncapped[0, 0], [20, 20])
    np.testing.assert_allclose(sides[0, 0], 40)


def test_each_image_has_windows_of_its_own():
    ids = np.zeros((2, 16, 16), np.uint16)
    ids[0, :4, :4] = 1
    ids[1, 8:, 8:] = 1
    centres, sides = windows(ids, 1, margin=0.0)
    np.testing.assert_allclose(centres[:, 0], [[2, 2], [12, 12]])
    np.testing.assert_allclose(sides[:, 0], [4, 8])


def two_colours():
    """A red disc (segment 1) on blue (segment 2) with a green bar across (segment 3)."""
    y, x = np.mgrid[:48, :48] + 0.5
    ids = np.where((y - 20) ** 2 + (x - 26) ** 2 < 15**2, 1, 2).astype(np.uint8)
    ids[30:34, :] = 3
    image = np.asarray([(0, 0, 0), RED, BLUE, GREEN], np.uint8)[ids]
    return image[None], ids[None]


def erode(mask, radius):
    """Pixels of which all neighbours up to `radius` steps away are in the mask and the picture."""
    padded = np.pad(mask, radius)
    shifts = [(dy, dx) for dy in range(2 * radius + 1) for dx in range(2 * radius + 1)]
    height, width = mask.shape
    return np.all([padded[dy : dy + height, dx : dx + width] for dy, dx in shifts], axis=0)


# At native scale, blown up, shrunk.
@pytest.mark.parametrize(("side", "size"), [(40.0, 40), (40.0, 80), (48.0, 24)])
def test_a_crop_shows_its_own_segment_and_nothing_else(side, size):
    image, ids = two_colours()
    config = CropConfig(margin=0.0, min_side=side, max_side=side)
    crops = np.asarray(masked_crops(image, ids, 4, size, config))
    seam_width = 2 * max(1, round(size / side))  # reach of the bicubic kernel
    assert crops.shape == (1, 4, size, size, 3) and crops.dtype == np.float32
    for segment, colour in ((1, RED), (2, BLUE)):
        crop = crops[0, segment - 1]
        shown = (crop != 0).any(axis=-1)
        assert 0.2 < shown.mean() < 0.95
        # Away from the outline: the segment's colour to the last digit, so nothing of the others.
        core = erode(shown, seam_width)
        inner = crop[core]
        assert len(inner) > 50
        np.testing.assert_allclose(inner, np.broadcast_to(AS_CLIP[colour], inner.shape), atol=2e-3)
        # On the outline the antialiasing blends, but the segment's own colour prevails.
        seam = crop[shown & ~core]
        own = np.abs(seam - AS_CLIP[colour]).sum(axis=-1)
        other = np.abs(seam - AS_CLIP[BLUE if colour == RED else RED]).sum(axis=-1)
        assert np.mean(own < other) > 0.9
        # The green bar goes through both segments and shows in neither.
        assert not (crop[..., 1] > 1.5).any()


def test_changing_the_surroundings_far_from_the_outline_changes_nothing():
    image, ids = two_colours()
    config = CropConfig(margin=0.1)
    crops = np.asarray(masked_crops(image, ids, 3, 32, config))
    changed = image.copy()
    far = erode(ids[0] != 1, 4)
    changed[0][far] = 255 - changed[0][far]
    assert far.any()
    other = np.asarray(masked_crops(changed, ids, 3, 32, config))
    np.testing.assert_allclose(other[0, 0], crops[0, 0], atol=1e-5)
    assert np.abs(other[0, 1] - crops[0, 1]).max() > 1


def test_the_crop_is_the_picture_at_native_scale():
    """A window of the crop's own size on whole pixels is a copy."""
    image = np.random.default_rng(0).integers(0, 256, (1, 24, 24, 3), dtype=np.uint8)
    ids = np.zeros((1, 24, 24), np.uint8)
    ids[0, 4:20, 2:18] = 1
    config = CropConfig(margin=0.0)
    crop = np.asarray(masked_crops(image, ids, 1, 16, config))[0, 0]
    expected = np.asarray(normalize_clip_images(image[0, 4:20, 2:18]))
    np.testing.assert_allclose(crop, expected, atol=1e-4)


def test_beyond_the_picture_and_for_absent_segments_the_crop_is_filled():
    image, ids = two_colours()
    ids = np.where(ids == 3, 0, ids)
    config = CropConfig(margin=0.5, min_side=8.0)
    crops = np.asarray(masked_crops(image, ids, 5, 24, config))
    assert np.isfinite(crops).all()
    assert not crops[0, 2:].any()  # 3 is void now, 4 and 5 never were
    assert not crops[0, 1, 0].any()  # blue fills the image: the window reaches a half beyond
    corner = np.asarray(masked_crops(image[:, :10, :10], ids[:, :10, :10], 2, 8, CropConfig()))
    assert np.isfinite(corner).all()


def test_no_fill_leaves_the_surroundings():
    image, ids = two_colours()
    config = CropConfig(margin=0.0, min_side=40.0, max_side=40.0, fill="none")
    crops = np.asarray(masked_crops(image, ids, 3, 40, config))
    inside = crops[0, 0][:, :, 2]
    assert (np.abs(inside - AS_CLIP[BLUE][2]) < 1e-2).any()
    assert (np.abs(inside - AS_CLIP[RED][2]) < 1e-2).any()


def test_an_unknown_fill_is_refused():
    with pytest.raises(ValueError, match="Crop fill is 'black'"):
        CropConfig(fill="black")


@pytest.fixture(scope="module")
def targets():
    """CLIP, its parameters, and images with their targets."""
    clip = make_clip(dict(tiny.MODEL["clip"], embed_dim=12, context_length=4))
    images, ids = two_colours()
    images, ids = np.concatenate([images, images]), np.concatenate([ids, ids])
    images[1] = np.random.default_rng(0).integers(0, 256, images[1].shape)
    ids[1] = np.where(ids[1] == 3, 0, ids[1])
    blank = jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 4), jnp.int32)
    params = jax.jit(clip.init)(jax.random.key(0), *blank)
    params = params["params"]
    config = CropConfig(min_side=16.0, max_side=16.0)

    def function(params, images, ids):
        return clip_targets(clip, params, images, ids, 4, config)

    return clip, params, config, images, ids, jax.jit(function)


def test_targets_are_unit_vectors_of_image_and_segments(targets):
    clip, params, config, images, ids, function = targets
    whole, segments = function(params, images, ids)
    assert whole.shape == (2, 12) and segments.shape == (2, 4, 12)
    assert whole.dtype == segments.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(whole, axis=-1), 1, rtol=1e-5)
    present = [[1, 1, 1, 0], [1, 1, 0, 0]]  # the rest are zeros: no segment, no target
    np.testing.assert_allclose(np.linalg.norm(segments, axis=-1), present, rtol=1e-5)
    # One by one, the long way round.
    crop = masked_crops(images[1:], ids[1:], 4, 16, config)[0, 1]
    alone = clip.apply({"params": params}, crop[None], method="encode_image")[0]
    np.testing.assert_allclose(segments[1, 1], alone / np.linalg.norm(alone), atol=1e-5)
    assert np.abs(segments[0, 0] - segments[0, 1]).max() > 1e-3


def test_targets_do_not_depend_on_the_rest_of_the_batch(targets):
    _, params, _, images, ids, function = targets
    whole, segments = function(params, images, ids)
    swapped_whole, swapped_segments = function(params, images[::-1], ids[::-1])
    np.testing.assert_allclose(swapped_whole[::-1], whole, atol=1e-6)
    np.testing.assert_allclose(swapped_segments[::-1], segments, atol=1e-6)


def test_targets_give_clip_no_gradient(targets):
    clip, params, config, images, ids, _ = targets

    def total(params):
        whole, segments = clip_targets(clip, params, images, ids, 4, config)
        return whole.sum() + segments.sum()

    gradients = jax.jit(jax.grad(total))(params)
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(gradients))


def test_only_the_largest_segments_are_looked_at(targets):
    clip, params, config, images, ids, function = targets
    areas = np.stack([np.bincount(i.ravel(), minlength=5)[1:5] for i in ids])
    few = jax.jit(lambda *arrays: clip_targets(clip, *arrays, 4, config, max_segments=2))
    whole, segments = few(params, images, ids)
    expected_whole, expected = function(params, images, ids)
    np.testing.assert_allclose(whole, expected_whole, atol=1e-5)
    for image in range(2):
        largest = np.argsort(-areas[image], kind="stable")[:2]
        for row in range(4):
            wanted = expected[image, row] if row in largest else np.zeros(12)
            np.testing.assert_allclose(segments[image, row], wanted, atol=1e-5)


def test_bfloat16_and_other_sizes(targets):
    clip, params, config, images, ids, function = targets
    _, expected = function(params, images, ids)

    def segments(**fields):
        settings = dataclasses.replace(config, **fields)
        return jax.jit(lambda *arrays: clip_targets(clip, *arrays, 4, settings))(
            params, images, ids
        )[1]

    def cosines(a, b):
        return (a * b).sum(-1)[np.linalg.norm(b, axis=-1) > 0]

    coarse = segments(dtype="bfloat16")
    assert coarse.dtype == jnp.float32
    assert 0.999 < cosines(coarse, expected).min() < 1 - 1e-7
    larger = segments(size=32)
    assert cosines(larger, expected).min() > 0.5
    assert np.abs(larger - expected).max() > 1e-3


def test_void_is_hidden_from_the_target_of_the_image_where_it_is_told_to():
    """What is there does not matter then; to CLIP it has the mean colour."""
    clip, params = tiny.networks().clip, tiny.params("clip")
    ids = np.zeros((1, 16, 16), np.uint8)
    ids[:, :, :8] = 1
    images = np.full((1, 16, 16, 3), RED, np.uint8)
    others = np.where(ids[..., None] == 0, np.uint8(BLUE), images)

    def of_image(pictures, hide):
        config = CropConfig(hide_void=hide)
        return np.asarray(clip_targets(clip, params, pictures, ids, 1, config)[0])

    np.testing.assert_array_equal(of_image(images, True), of_image(others, True))
    assert np.abs(of_image(images, False) - of_image(others, False)).max() > 1e-3
