"""What a step asks of the devices, and how long they wait for its data."""

import time

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from concat_jax.training import speed


def flops(function, *shapes):
    return speed.count_flops(jax.make_jaxpr(function)(*map(jnp.zeros, shapes)).jaxpr)


def test_products_count_as_often_as_they_run():
    weights, x = (8, 8), (4, 8)
    once = 2 * 4 * 8 * 8
    assert flops(lambda w, x: x @ w, weights, x) == once

    def looped(w, x):
        return lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]

    assert flops(looped, weights, x) == 5 * once
    # Of a product's gradients each is one more; what is recomputed counts again.
    gradient = jax.grad(lambda w, x: looped(w, x).sum(), argnums=(0, 1))
    assert flops(gradient, weights, x) == 15 * once
    saving = jax.grad(lambda w, x: jax.checkpoint(jnp.tanh)(x @ w).sum(), argnums=(0, 1))
    assert flops(jax.jit(saving), weights, x) == 3 * once
    branches = lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w)  # noqa: E731
    assert flops(branches, weights, x) == 2 * once


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (1, 2), (4, 1)])
def test_a_convolution_and_its_gradients_are_as_dear_as_each_other(groups, stride):
    image, kernel = (2, 16, 16, 8), (3, 3, 8 // groups, 12)

    def convolve(x, k):
        return lax.conv_general_dilated(
            x,
            k,
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    side = 16 // stride
    once = 2 * (2 * side * side * 12) * (3 * 3 * 8 // groups)
    assert flops(convolve, image, kernel) == once
    gradient = jax.grad(lambda x, k: (convolve(x, k) ** 2).sum(), argnums=(0, 1))
    # XLA's own count leaves out what falls on the padding.
    assert flops(gradient, image, kernel) == pytest.approx(3 * once, rel=0.15)


def test_xla_counts_the_same():
    def network(w, x):
        return jnp.tanh(jnp.tanh(x @ w) @ w.T).sum()

    arguments = jnp.ones((128, 96)), jnp.ones((64, 128))
    program = jax.jit(jax.grad(network))
    counted = program.lower(*arguments).compile().cost_analysis()["flops"]
    assert flops(jax.grad(network), (128, 96), (64, 128)) == pytest.approx(counted, rel=0.03)


def test_a_call_at_peak(monkeypatch):
    program, matrix = jax.jit(lambda x: x @ x), jnp.ones((16, 16))
    devices = jax.devices()[:2]
    assert speed.seconds_at_peak(program, (matrix,), devices) == 0  # nobody knows a CPU's
    monkeypatch.setitem(speed.PEAKS, devices[0].device_kind, 1e6)
    assert speed.seconds_at_peak(program, (matrix,), devices) == 2 * 16**3 / 2e6


def test_only_idle_devices_wait():
    def slow(seconds, number):
        for _ in range(number):
            time.sleep(seconds)
            yield None

    awaited = speed.Awaited(slow(0.02, 3))
    for _ in awaited:
        awaited.works_on(jnp.ones(()))
    assert 0.05 < awaited.take_seconds() < 0.5
    assert awaited.take_seconds() == 0
    awaited.close()

    # As long as a step runs, the host may wait as long as it likes.
    busy = speed.Awaited(slow(0.02, 3))
    busy._note_when_ready = None
    for number, _ in enumerate(busy):
        if number == 0:
            assert busy.take_seconds() > 0.01
        busy.works_on(Unready())
    assert busy.take_seconds() == 0
    busy.close()


class Unready:
    """An array that is long in coming."""

    def block_until_ready(self):
        time.sleep(0.2)
        return self
