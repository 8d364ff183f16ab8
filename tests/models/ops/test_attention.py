"""Attention in turns beside jax's own, which holds everything."""

import jax
import numpy as np
import pytest

from concat_jax.models.ops.attention import CHUNK, attend


@pytest.mark.parametrize(("length", "is_masked"), [(CHUNK, True), (2 * CHUNK + 3, False)])
def test_equals_jax_forward_and_backward(length, is_masked):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(2, n, 3, 8)).astype(np.float32) for n in (length, 40, 40, length)]
    allowed = rng.random((2, length, 40)) < 0.1 if is_masked else None
    if is_masked:
        allowed[0, 0] = False  # who sees nobody sees all alike

    def check(function):
        attended, backward = jax.vjp(function, *arrays[:3])
        return attended, *backward(arrays[3])

    ours = jax.jit(lambda: check(lambda q, k, v: attend(q, k, v, allowed)))()
    mask = None if allowed is None else allowed[:, None]
    theirs = jax.jit(
        lambda: check(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=mask))
    )()
    for found, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
