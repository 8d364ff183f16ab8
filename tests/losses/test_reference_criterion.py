"""The criterion beside transformers' Mask2FormerLoss on the same random predictions and points.

What that says is in the golden files, made and checked by tests/golden. At full size, through the
whole model: tests/slow/test_reference_parity.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.losses.segmentation import SegmentationLossConfig, segmentation_loss
from tests.golden import cases


@pytest.mark.parametrize("name", cases.CRITERION_COUNTS)
def test_terms_matching_and_gradients(name, monkeypatch):
    counts = cases.CRITERION_COUNTS[name]
    predictions, ids, labels = cases.criterion_inputs(counts)
    config = SegmentationLossConfig(num_points=cases.CRITERION_POINTS)

    def loss(predictions, draws):
        left = list(draws)

        def give(key, shape):
            assert left[0].shape == shape
            return left.pop(0)

        with monkeypatch.context() as patch:
            patch.setattr(jax.random, "uniform", give)
            terms = segmentation_loss(
                jax.random.key(0), *predictions, jnp.asarray(ids), jnp.asarray(labels), config
            )
        assert not left
        return terms.loss_class + terms.loss_mask + terms.loss_dice, terms

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, terms), gradients = gradient(predictions, cases.criterion_draws(counts))

    golden = cases.load(f"criterion_{name}")
    matching = np.asarray(terms.query_of_segment).swapaxes(0, 1)
    for b, count in enumerate(counts):
        np.testing.assert_array_equal(
            matching[:, b, :count], golden["query_of_segment"][:, b, :count]
        )
    found = [terms.loss_class, terms.loss_mask, terms.loss_dice]
    np.testing.assert_allclose(found, golden["terms"], rtol=1e-5)
    names = ("class_logits", "mask_embeddings", "mask_features")
    for key, ours in zip(names, gradients, strict=True):
        assert np.abs(golden[key]).max() > 1e-3, key
        assert cases.relative_error(ours, golden[key]) < 1e-5, key
