"""The criterion beside transformers' Mask2FormerLoss on the same random predictions and points.

At full size, through the whole model: tests/slow/test_reference_parity.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.losses.segmentation import SegmentationLossConfig, segmentation_loss

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
reference = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")

B, L, N, K, D = 2, 3, 7, 5, 8
HEIGHT, WIDTH = 40, 56
NUM_POINTS = 96
# These programs run once; without LLVM's optimisations they compile in half the time.
QUICK = {"xla_backend_optimization_level": 0}


def make_inputs(counts):
    """Predictions as random numbers, id maps of `counts` segments and void, labels."""
    rng = np.random.default_rng(0)
    predictions = (
        rng.normal(size=(B, L, N, K + 1)).astype(np.float32),
        rng.normal(size=(B, L, N, D)).astype(np.float32),
        rng.normal(size=(B, HEIGHT // 4, WIDTH // 4, D)).astype(np.float32),
    )
    ids = np.zeros((B, HEIGHT, WIDTH), np.uint8)
    labels = np.full((B, max(counts)), -1, np.int32)
    for b, count in enumerate(counts):
        blocks = rng.integers(0, count + 1, (HEIGHT // 8, WIDTH // 8))
        blocks.flat[: count + 1] = np.arange(count + 1)  # each at least once
        ids[b] = blocks.repeat(8, axis=0).repeat(8, axis=1)
        labels[b, :count] = rng.integers(0, K, count)
    return predictions, ids, labels


def our_draws(monkeypatch, criterion, predictions):
    """Random points in the shapes in which our criterion asks for them, in its order."""
    shapes = []

    def record(key, shape=(), *args, **kwargs):
        shapes.append(shape)
        return jnp.zeros(shape)

    with monkeypatch.context() as patch:
        patch.setattr(jax.random, "uniform", record)
        jax.eval_shape(criterion, *predictions)
    rng = np.random.default_rng(1)
    return [rng.random(shape, np.float32) for shape in shapes]


def our_loss(monkeypatch, criterion, predictions, draws):
    """Terms, matching and gradients with those points."""

    def loss(predictions, draws):
        left = list(draws)
        with monkeypatch.context() as patch:
            patch.setattr(jax.random, "uniform", lambda key, shape, *args: left.pop(0))
            terms = criterion(*predictions)
        assert not left
        return terms.loss_class + terms.loss_mask + terms.loss_dice, terms

    gradient = jax.value_and_grad(loss, has_aux=True)
    (_, terms), gradients = jax.jit(gradient, compiler_options=QUICK)(predictions, draws)
    return terms, gradients


def their_loss(monkeypatch, predictions, ids, labels, counts, draws):
    """The same of the reference: terms, matchings, gradients.

    The reference draws set by set, the last first: points for the matching of each image, then
    candidates and uniform points with one row a matched query, image by image. Ours draws each kind
    once an image, candidates and uniform points together.
    """
    config = transformers.Mask2FormerConfig(num_labels=K, train_num_points=NUM_POINTS)
    weights = {
        "loss_cross_entropy": config.class_weight,
        "loss_mask": config.mask_weight,
        "loss_dice": config.dice_weight,
    }
    criterion = reference.Mask2FormerLoss(config, weights)
    matchings = []
    criterion.matcher.register_forward_hook(lambda module, args, found: matchings.append(found))
    matching, points = draws
    candidates, uniform = np.split(points, [int(config.oversample_ratio * NUM_POINTS)], axis=1)
    one_set = [
        matching[:1],
        matching[1:],
        *(x.repeat(counts, axis=0) for x in (candidates, uniform)),
    ]
    calls = iter(L * one_set)

    def rand(*shape, device=None):
        points = next(calls)
        assert points.shape == shape
        return torch.from_numpy(points)

    class_logits, embeddings, features = (torch.from_numpy(p).requires_grad_() for p in predictions)
    masks = torch.einsum("blnd,bhwd->blnhw", embeddings, features)
    sets = [
        {"masks_queries_logits": masks[:, i], "class_queries_logits": class_logits[:, i]}
        for i in range(L)
    ]
    binary = [
        torch.from_numpy((ids[b] == np.arange(1, n + 1)[:, None, None]).astype(np.float32))
        for b, n in enumerate(counts)
    ]
    classes = [torch.from_numpy(labels[b, :n]).long() for b, n in enumerate(counts)]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", rand)
        losses = criterion(
            sets[-1]["masks_queries_logits"],
            sets[-1]["class_queries_logits"],
            binary,
            classes,
            auxiliary_predictions=sets[:-1],
        )
    assert next(calls, None) is None
    terms = {
        name: weight * sum(value for key, value in losses.items() if key.startswith(name))
        for name, weight in weights.items()
    }
    sum(terms.values()).backward()
    gradients = [leaf.grad.numpy() for leaf in (class_logits, embeddings, features)]
    return {key: value.item() for key, value in terms.items()}, matchings, gradients


@pytest.mark.parametrize("counts", [(2, 4), (5, 5)], ids=["padded", "full"])
def test_terms_matching_and_gradients(counts, monkeypatch):
    predictions, ids, labels = make_inputs(counts)

    def criterion(*predictions):
        config = SegmentationLossConfig(num_points=NUM_POINTS)
        return segmentation_loss(
            jax.random.key(0), *predictions, jnp.asarray(ids), jnp.asarray(labels), config
        )

    draws = our_draws(monkeypatch, criterion, predictions)
    terms, gradients = our_loss(monkeypatch, criterion, predictions, draws)
    expected, matchings, expected_gradients = their_loss(
        monkeypatch, predictions, ids, labels, counts, draws
    )

    for index, found in zip((L - 1, *range(L - 1)), matchings, strict=True):
        for b, (queries, segments) in enumerate(found):
            np.testing.assert_array_equal(
                np.asarray(terms.query_of_segment)[b, index, segments.numpy()], queries.numpy()
            )
    found = (terms.loss_class, terms.loss_mask, terms.loss_dice)
    for ours, (name, theirs) in zip(found, expected.items(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, err_msg=name)
    names = ("class logits", "mask embeddings", "mask features")
    for name, ours, theirs in zip(names, gradients, expected_gradients, strict=True):
        scale = np.abs(theirs).max()
        assert scale > 1e-3, name
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * scale, err_msg=name)
