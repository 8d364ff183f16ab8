"""The gradients written for CPUs against those that JAX derives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from concat_jax.models.ops import convolution, deformable_attention
from concat_jax.models.ops.linear import Dense, gelu, relu

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def assert_same_gradients(ours, expected, *arguments):
    cotangent = normal(*jax.eval_shape(expected, *arguments).shape)
    both = (
        jax.jit(lambda *x, f=f: jax.vjp(f, *x)[1](cotangent))(*arguments) for f in (ours, expected)
    )
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_dense():
    inputs = normal(2, 5, 3, 4)
    layer = Dense(6)
    params = layer.init(jax.random.key(0), inputs)["params"]

    def expected(params, inputs):
        return inputs @ params["kernel"] + params["bias"]

    assert_same_gradients(lambda p, x: layer.apply({"params": p}, x), expected, params, inputs)


@pytest.mark.parametrize("channels", [1, 8, 13])  # one bit each, eight a byte
def test_relu(channels):
    inputs = normal(2, 5, channels).at[0, 0].set(0.0)
    assert_same_gradients(relu, jax.nn.relu, inputs)


@pytest.mark.parametrize("dtype, epsilon", [("float32", 5e-7), ("bfloat16", 4e-3)])
def test_gelu(dtype, epsilon):
    inputs = jnp.linspace(-30, 30, 6001).astype(dtype)
    with jax.enable_x64(True):
        exact = functools.partial(jax.nn.gelu, approximate=False)
        expected, slope = jax.jvp(exact, (inputs.astype("float64"),), (jnp.ones(6001),))
        expected, slope = np.asarray(expected), np.asarray(slope)
    values, pullback = jax.vjp(gelu, inputs)
    assert values.dtype == inputs.dtype
    largest = np.maximum(1, np.abs(np.float64(inputs)))
    np.testing.assert_array_less(np.abs(np.float64(values) - expected) / largest, epsilon)
    (gradient,) = pullback(jnp.ones_like(inputs))
    np.testing.assert_allclose(np.float64(gradient), slope, atol=2 * epsilon)


@pytest.mark.parametrize("size, height", [(3, 12), (7, 12), (3, 1)])
def test_depthwise_filters_by_bands(monkeypatch, size, height):
    monkeypatch.setattr(convolution, "BAND_ELEMENTS", 2 * 10 * 4 * 4)  # four rows of the input
    inputs, kernel, edge = normal(2, height, 10, 4), normal(size, size, 1, 4), size // 2

    def ours(inputs, kernel):
        def filtered(rows):
            return convolution.depthwise_by_shifts(jnp.tanh(rows), kernel, row_padding=0)

        return convolution.by_bands(filtered, inputs, edge)

    def expected(inputs, kernel):
        return jax.lax.conv_general_dilated(
            jnp.tanh(inputs),
            kernel,
            (1, 1),
            ((edge, edge),) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=4,
        )

    np.testing.assert_allclose(ours(inputs, kernel), expected(inputs, kernel), atol=1e-4)
    assert_same_gradients(ours, expected, inputs, kernel)


@pytest.mark.parametrize("size, stride, height", [(3, 1, 12), (3, 2, 13), (7, 2, 15), (3, 1, 2)])
def test_convolution_in_bands(monkeypatch, size, stride, height):
    monkeypatch.setattr(convolution, "BAND_ELEMENTS", 10 * 4 * 4)  # four rows of the input
    inputs = normal(2, height, 10, 4)
    layer = convolution.square_conv(
        3, size, stride, dtype=jnp.float32, kernel_init=jax.nn.initializers.normal(), name="conv"
    )
    params = layer.init(jax.random.key(0), inputs)["params"]

    def expected(params, inputs):
        padding = ((size // 2, size // 2),) * 2
        return jax.lax.conv_general_dilated(
            inputs,
            params["kernel"],
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    assert_same_gradients(lambda p, x: layer.apply({"params": p}, x), expected, params, inputs)


def test_deformable_attention_in_chunks(monkeypatch):
    monkeypatch.setattr(deformable_attention, "QUERIES_A_CHUNK", 4)
    values = [normal(2, 3, 4, 2, 3), normal(2, 5, 7, 2, 3)]
    locations = 0.5 + 0.6 * normal(2, 10, 2, 2, 4, 2)  # the last chunk is not full
    weights = normal(2, 10, 2, 2, 4)

    def in_chunks(*arguments):
        return deformable_attention.multi_scale_deformable_attention(
            list(arguments[:2]), *arguments[2:]
        )

    cotangent = normal(2, 10, 6)
    arguments = (*values, locations, weights)
    chunked = jax.vjp(in_chunks, *arguments)[1](cotangent)
    with monkeypatch.context() as patch:
        patch.setattr(deformable_attention, "QUERIES_A_CHUNK", 1000)
        expected = jax.vjp(in_chunks, *arguments)[1](cotangent)
    for a, b in zip(chunked, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
