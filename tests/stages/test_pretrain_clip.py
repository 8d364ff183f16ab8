"""CLIP's own training; random erasing: about the right share, of the right pictures."""

import jax
import numpy as np

from concat_jax.stages.pretrain_clip import Config, erase, make_stage
from tests import tiny

IMAGES = 1.0 + np.random.default_rng(0).random((400, 16, 16, 3), np.float32)  # no pixel is 0


def erased_share(probability, max_erased, seed=0):
    """[B] share of each picture that is painted over, and the result."""
    config = Config(erase_probability=probability, max_erased=max_erased)
    result = np.asarray(erase(jax.random.key(seed), IMAGES, config))
    painted = (result == 0).all(axis=-1)
    # A pixel is erased in all channels or in none, and what is left is left as it was.
    np.testing.assert_array_equal(result[~painted], IMAGES[~painted])
    return painted.mean(axis=(1, 2)), result


def test_shares_are_uniform_up_to_the_greatest():
    share, _ = erased_share(1.0, 0.6)
    assert share.max() <= 0.6
    np.testing.assert_allclose(share.mean(), 0.3, atol=0.03)  # three deviations are 0.026
    np.testing.assert_allclose(np.quantile(share, [0.25, 0.75]), [0.15, 0.45], atol=0.05)


def test_probability_decides_which_pictures():
    share, result = erased_share(0.25, 0.9)
    # 0.9 / 256 of the erased ones round to no pixel at all.
    np.testing.assert_allclose((share > 0).mean(), 0.25, atol=0.07)
    untouched = share == 0
    np.testing.assert_array_equal(result[untouched], IMAGES[untouched])


def test_probability_zero_and_share_zero_change_nothing():
    for probability, most in ((0.0, 0.9), (1.0, 0.0)):
        _, result = erased_share(probability, most)
        np.testing.assert_array_equal(result, IMAGES)


def test_regions_are_smooth_and_differ_between_pictures():
    _, result = erased_share(1.0, 0.7)
    painted = (result == 0).all(axis=-1)
    # Neighbours share their fate: a salt-and-pepper mask of that share would change at 4 in 10.
    changes = (painted[:, 1:] != painted[:, :-1]).mean()
    assert changes < 0.1
    assert len({mask.tobytes() for mask in painted}) > 350


def test_erasing_is_a_function_of_the_key():
    _, first = erased_share(0.5, 0.7)
    _, same = erased_share(0.5, 0.7)
    _, other = erased_share(0.5, 0.7, seed=1)
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


def test_pretrain_clip_trains_all_of_clip():
    stage = make_stage(tiny.context(), Config(erase_probability=0.5))
    batch, function = tiny.caption_batch(), tiny.evaluate(stage)
    assert set(batch) == set(stage.batch_fields)
    (value, metrics), (gradients, _) = function(tiny.trained(stage), {}, batch, tiny.KEY)
    assert stage.trains == ("clip",) and stage.reads == ()
    tiny.assert_finite(value, metrics, gradients)
    assert tiny.unreached(stage, gradients) == set()
    # With every caption alike nothing can be told apart, and nothing is asked to be.
    same = {**batch, "tokens": np.repeat(batch["tokens"][:1], 4, axis=0)}
    (_, metrics), _ = function(tiny.trained(stage), {}, same, tiny.KEY)
    assert metrics["accuracy"] == 1
