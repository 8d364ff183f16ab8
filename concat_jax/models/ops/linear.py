"""Dense layer and activations of the networks: as flax's and JAX's, at less cost."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(inputs: jax.Array, kernel: jax.Array, precision: Any = None) -> jax.Array:
    """[..., K] times [K, N] -> [..., N]; reverse mode only."""
    contracted = ((inputs.ndim - 1,), (0,))
    return jax.lax.dot_general(inputs, kernel, (contracted, ((), ())), precision=precision)


def _matmul_backward(
    precision: Any, residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    inputs, kernel = residuals
    contracted = ((gradient.ndim - 1,), (1,))
    input_gradient = jax.lax.dot_general(
        gradient, kernel, (contracted, ((), ())), precision=precision
    )

    def contract_rows(inputs: jax.Array, gradient: jax.Array) -> jax.Array:
        rows = tuple(range(inputs.ndim - 1))
        return jax.lax.dot_general(inputs, gradient, ((rows, rows), ((), ())), precision=precision)

    def contract_flat_rows(inputs: jax.Array, gradient: jax.Array) -> jax.Array:
        # XLA's CPU compiler transposes an operand in memory when several axes are contracted, which
        # takes longer than the product; for one axis it does not.
        flat = (array.reshape(-1, array.shape[-1]) for array in (inputs, gradient))
        return contract_rows(*flat)

    kernel_gradient = jax.lax.platform_dependent(
        inputs, gradient, cpu=contract_flat_rows, default=contract_rows
    )
    return input_gradient, kernel_gradient


matmul.defvjp(lambda x, k, how: (matmul(x, k, how), (x, k)), _matmul_backward)


def _dot_general(
    inputs: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: Any = None, **_: Any
) -> jax.Array:
    """`lax.dot_general` as flax's Dense calls it; reverse mode only."""
    del dimension_numbers  # the last axis of the inputs with the first of the kernel
    return matmul(inputs, kernel, precision)


# Parameters, numbers and fields are those of flax's `nn.Dense`.
Dense = functools.partial(nn.Dense, dot_general=_dot_general)


@jax.custom_vjp
def relu(inputs: jax.Array) -> jax.Array:
    """max(x, 0), which keeps one bit a number for its gradient.

    The layer behind keeps the output anyway. Of `jax.nn.relu`, or a gradient that reads the
    output's sign, XLA on a CPU keeps the input beside it: it would rather compare anew.
    """
    return jax.nn.relu(inputs)


def _relu_forward(inputs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    outputs = jax.nn.relu(inputs)
    return outputs, (outputs, jnp.packbits(inputs > 0, axis=-1))


def _relu_backward(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array]:
    def by_bits(outputs: jax.Array, is_positive: jax.Array, gradient: jax.Array) -> jax.Array:
        bits = jnp.unpackbits(is_positive, axis=-1, count=gradient.shape[-1])
        return jnp.where(bits == 1, gradient, 0)

    def by_sign(outputs: jax.Array, is_positive: jax.Array, gradient: jax.Array) -> jax.Array:
        return jnp.where(outputs > 0, gradient, 0)

    # Packing bits across lanes is what TPUs are bad at; the residual of the other goes unused.
    return (jax.lax.platform_dependent(*residuals, gradient, tpu=by_sign, default=by_bits),)


relu.defvjp(_relu_forward, _relu_backward)


# erf(x) = x P(x^2) / Q(x^2) up to |x| = 4, highest power first: least relative error, fitted to
# scipy's (2.5e-8, and 4e-7 with float32's rounding).
_ERF_LIMIT = 4.0
_ERF_ABOVE = (1.986755e-6, 2.84562597e-4, 3.88330968e-3, 0.0531016394, 0.193544645, 1.12837914)
_ERF_BELOW = (3.7419712e-5, 1.18555788e-3, 0.0152071872, 0.115349781, 0.504857032, 1.0)


@jax.custom_vjp
def gelu(inputs: jax.Array) -> jax.Array:
    """The exact GELU, in float32 inside, which keeps its input alone for its gradient.

    `jax.nn.gelu` takes erfc, of which XLA computes two branches where erf has one: a block's MLP
    at 4 x 1605 tokens of 768, forward and backward in bfloat16 on a v5e, is 2.68 million cycles by
    the compiler's count with erfc and 1.90 like this. The left tail, where erfc would be better,
    is below the rounding of what it is added to; torch computes it like this, too.
    """
    x = inputs.astype(jnp.float32)
    return (x * _normal_cdf(x)).astype(inputs.dtype)


def _normal_cdf(x: jax.Array) -> jax.Array:
    # Not `jax.lax.erf`, which JAX exports as one operation that TensorFlow 2.21 cannot read.
    x = jnp.clip(x * 0.5**0.5, -_ERF_LIMIT, _ERF_LIMIT)
    square = x * x
    above, below = (
        functools.reduce(lambda sum_, factor: sum_ * square + factor, factors)
        for factors in (_ERF_ABOVE, _ERF_BELOW)
    )
    return 0.5 + 0.5 * jnp.clip(x * above / below, -1.0, 1.0)


def _gelu_backward(inputs: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    x = inputs.astype(jnp.float32)
    slope = _normal_cdf(x) + x * jnp.exp(-0.5 * x * x) * (2 * jnp.pi) ** -0.5
    return ((gradient * slope).astype(inputs.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)
