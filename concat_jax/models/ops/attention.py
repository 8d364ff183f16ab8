"""Dot-product attention that never holds all pairs of tokens at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Queries whose logits exist at the same time: small enough for a cache, large enough for products
# at full speed.
CHUNK = 256


def attend(
    queries: jax.Array, keys: jax.Array, values: jax.Array, allowed: jax.Array | None = None
) -> jax.Array:
    """Softmax attention, in float32 inside: [B, T, heads, C], twice [B, S, heads, C] -> the first.

    `allowed` [B or 1, T, S] bool says who (row) sees whom; it is for few queries, as its logits are
    held all at once. Without it more than `CHUNK` queries take turns, in the backward pass, too,
    which computes their weights again.
    """
    # Heads before tokens: XLA's CPU compiler would transpose weights instead, which are many more.
    queries, keys, values = (jnp.swapaxes(x, 1, 2) for x in (queries, keys, values))
    batch, heads, length, channels = queries.shape
    num_chunks = -(-length // CHUNK)
    if allowed is not None or num_chunks == 1:
        attended = _attend(queries, keys, values, allowed)
        return jnp.swapaxes(attended, 1, 2)

    @jax.checkpoint
    def attend_chunk(chunk: jax.Array) -> jax.Array:
        return _attend(chunk, keys, values, None)

    size = -(-length // num_chunks)
    missing = num_chunks * size - length
    chunks = jnp.pad(queries, ((0, 0), (0, 0), (0, missing), (0, 0)))
    chunks = jnp.moveaxis(chunks.reshape(batch, heads, num_chunks, size, channels), 2, 0)
    attended = jnp.moveaxis(jax.lax.map(attend_chunk, chunks), (0, 3), (1, 2))
    return attended.reshape(batch, -1, heads, channels)[:, :length]


def _attend(
    queries: jax.Array, keys: jax.Array, values: jax.Array, allowed: jax.Array | None
) -> jax.Array:
    """As `attend`, with heads before tokens."""

    def product(subscripts: str, *operands: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32)

    logits = product("bhtc,bhsc->bhts", queries, keys)
    if allowed is not None:
        logits = jnp.where(allowed[:, None], logits, jnp.finfo(jnp.float32).min)
    # Of weights that are no shares yet; of what they sum to there are fewer numbers to divide.
    largest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp((logits - largest) * queries.shape[-1] ** -0.5)
    attended = product("bhts,bhsc->bhtc", weights.astype(values.dtype), values)
    return (attended / weights.sum(axis=-1, keepdims=True)).astype(values.dtype)
