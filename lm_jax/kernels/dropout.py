"""Dropout of activations, and which attention probabilities dropout keeps.

Both draw from a counter-based generator: whether an element survives is a function of the seed and
of its place alone. In attention the place is (batch row and head, query t, key s). Every
implementation, forward and backward, whatever its tiling, therefore drops the same ones, and
nothing needs to be stored.
"""

import math

import jax
import jax.numpy as jnp

_GOLDEN, _FIRST, _SECOND = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero each element with probability `rate` and scale the rest by 1 / (1 - rate).

    Without a key, as in evaluation, `x` is returned as it is.
    """
    if key is None or rate == 0:
        return x
    seed = jax.random.bits(key, (2,), "uint32")
    row = jnp.arange(math.prod(x.shape[:-1])).reshape(*x.shape[:-1], 1)
    column = jnp.arange(x.shape[-1]).reshape(*(1,) * (x.ndim - 1), -1)
    kept = keep(row_words(seed, jnp.zeros_like(row), row), column, rate)
    return jnp.where(kept, x / (1 - rate), 0)


def row_words(seed: jax.Array, row: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two words for each query, to be handed to `keep`.

    Args:
        seed: uint32 [2].
        row: batch row times heads plus head, any integer dtype; broadcast against `t`.
        t: query position.
    """
    row, t = row.astype(jnp.uint32), t.astype(jnp.uint32)
    first = _mix(t ^ _mix(row ^ _mix(seed[0])))
    second = _mix(t ^ _mix(row ^ _mix(seed[1] + jnp.uint32(_GOLDEN))))
    return first, second


def keep(words: tuple[jax.Array, jax.Array], s: jax.Array, rate: float) -> jax.Array:
    """Whether the probability of key position `s` survives; True with probability 1 - rate.

    The words of the query and `s` are broadcast against each other. Per element the work is two
    multiplications, since it is repeated in the backward pass.
    """
    first, second = words
    x = (s.astype(jnp.uint32) * jnp.uint32(_GOLDEN)) ^ first
    x = (x ^ (x >> 16)) * jnp.uint32(_FIRST) + second
    x = (x ^ (x >> 13)) * jnp.uint32(_SECOND)
    x = x ^ (x >> 16)
    return x >= jnp.uint32(round(rate * 2**32))


def _mix(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3 (Appleby 2011): a bijection that spreads every input bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(_FIRST)
    x = (x ^ (x >> 13)) * jnp.uint32(_SECOND)
    return x ^ (x >> 16)
