"""The symmetric image-text loss against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.losses.alignment import contrastive_loss


def test_two_pairs_by_hand():
    # Cosines: image 0 with texts (1, 0), image 1 with texts (0.6, 0.8). Scale 2.
    images = jnp.asarray([[3.0, 0.0], [0.6, 0.8]])
    texts = jnp.asarray([[1.0, 0.0], [0.0, 5.0]])
    logits = np.array([[2.0, 0.0], [1.2, 1.6]])
    rows = [np.log(np.exp(logits[b]).sum()) - logits[b, b] for b in range(2)]
    columns = [np.log(np.exp(logits[:, b]).sum()) - logits[b, b] for b in range(2)]
    expected = (np.array(rows) + np.array(columns)) / 2
    loss = contrastive_loss(images, texts, jnp.asarray(2.0))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(loss[0], 0.249014, rtol=1e-4)  # (0.126928 + 0.371101) / 2


def test_equal_captions_share_the_target():
    # Three pairs, the first two with one caption, logits all zero: every row of the softmax is 1/3,
    # and any target distribution gives log 3.
    zero = jnp.zeros((3, 4)).at[:, 0].set(1.0)
    same = jnp.asarray([[1, 1, 0], [1, 1, 0], [0, 0, 1]], bool)
    loss = contrastive_loss(zero, zero, jnp.asarray(0.0), same_caption=same)
    np.testing.assert_allclose(loss, np.full(3, np.log(3)), rtol=1e-6)
    # Images and texts agree perfectly: row 0 has logits (s, s, 0), so half the mass goes to each of
    # the equal captions, and its loss is log 2 + log(1 + exp(-s) / 2), the least that can be had.
    vectors = jnp.asarray([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    loss = contrastive_loss(vectors, vectors, jnp.asarray(3.0), same_caption=same)
    expected = np.log(2) + np.log1p(np.exp(-3) / 2)
    np.testing.assert_allclose(loss[:2], [expected, expected], rtol=1e-5)
    np.testing.assert_allclose(loss[2], np.log1p(2 * np.exp(-3)), rtol=1e-5)


def test_equal_captions_are_not_pushed_apart():
    vectors = jnp.asarray([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    same = jnp.asarray([[1, 1, 0], [1, 1, 0], [0, 0, 1]], bool)
    # A tie between equal captions costs log 2 in both, but moving one image off its twin's text
    # pays only without the mask.
    apart = jnp.asarray([[0.8, 0.6], [1.0, 0.0], [0.0, 1.0]])
    moved = contrastive_loss(apart, apart, jnp.asarray(5.0), same_caption=None).sum()
    still = contrastive_loss(vectors, vectors, jnp.asarray(5.0), same_caption=None).sum()
    assert moved < still
    moved = contrastive_loss(apart, apart, jnp.asarray(5.0), same_caption=same).sum()
    still = contrastive_loss(vectors, vectors, jnp.asarray(5.0), same_caption=same).sum()
    assert moved > still


def test_the_diagonal_is_always_positive():
    rng = np.random.default_rng(0)
    images, texts = jnp.asarray(rng.normal(size=(2, 4, 6)), jnp.float32)
    scale = jnp.asarray(10.0)
    np.testing.assert_array_equal(
        contrastive_loss(images, texts, scale, same_caption=jnp.zeros((4, 4), bool)),
        contrastive_loss(images, texts, scale),
    )


def test_equals_transformers():
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.clip.modeling_clip")
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(2, 7, 5)).astype(np.float32)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts)]
    theirs = modeling.image_text_contrastive_loss(torch.from_numpy(30 * unit[1] @ unit[0].T))
    ours = contrastive_loss(jnp.asarray(images), jnp.asarray(texts), jnp.asarray(30.0)).mean()
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5)


def test_is_float32_and_finite_for_half_precision_and_zero_embeddings():
    images = jnp.zeros((3, 4), jnp.bfloat16)
    texts = jnp.ones((3, 4), jnp.bfloat16)

    def loss_of(x, y, s):
        return contrastive_loss(x, y, s).mean()

    value, gradients = jax.value_and_grad(loss_of, argnums=(0, 1, 2))(
        images, texts, jnp.asarray(100.0)
    )
    assert value.dtype == jnp.float32 and np.isfinite(value)
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in gradients)
