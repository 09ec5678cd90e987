"""Dropout of activations, and which attention probabilities dropout keeps.

Both draw from a counter-based generator: whether an element survives is a function of the seed and
of its place alone. In attention the place is (batch row and head, query t, key s). Every
implementation, forward and backward, whatever its tiling, therefore drops the same ones, and
nothing needs to be stored. The rows are those of the whole batch: however many devices and
micro-batches share them, the same elements are dropped.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm_jax import collectives

_GOLDEN, _FIRST, _SECOND = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35


class Draw(NamedTuple):
    """The random numbers of some rows of a batch: those first, first + step, ..."""

    key: jax.Array
    first: jax.typing.ArrayLike = 0
    step: int = 1

    def split(self, number: int) -> list["Draw"]:
        """As many draws that have nothing to do with each other."""
        return [self._replace(key=key) for key in jax.random.split(self.key, number)]

    def rows(self, number: int) -> jax.Array:
        """The numbers of so many rows in the batch, uint32."""
        first = jnp.asarray(self.first, jnp.uint32)
        return first + jnp.uint32(self.step) * jnp.arange(number, dtype=jnp.uint32)


def dropout(x: jax.Array, rate: float, draw: Draw | None) -> jax.Array:
    """Zero each element of [B, ...] with probability `rate`, scale the rest by 1 / (1 - rate).

    Without a draw, as in evaluation, `x` is returned as it is.
    """
    if draw is None or rate == 0:
        return x
    B, *inner, _ = x.shape
    seed = jax.random.bits(draw.key, (2,), "uint32")
    place = jnp.arange(math.prod(inner), dtype=jnp.uint32).reshape(1, *inner, 1)
    row = draw.rows(B).reshape(B, *(1,) * (x.ndim - 1)) * jnp.uint32(math.prod(inner)) + place
    column = jnp.arange(x.shape[-1]).reshape(*(1,) * (x.ndim - 1), -1)
    kept = keep(query_words(seed_words(seed, jnp.zeros_like(row)), row), column, rate)
    return jnp.where(kept, x / (1 - rate), 0)


def head_words(draw: Draw, rows: int, heads: int) -> jax.Array:
    """Two words for each batch row and head, uint32 [2, B, H], to be handed to `query_words`."""
    parts = collectives.axis_size(collectives.TENSOR)
    first = jnp.asarray(collectives.axis_index(collectives.TENSOR) * heads, jnp.uint32)
    row_BH = draw.rows(rows)[:, None] * jnp.uint32(heads * parts)
    row_BH = row_BH + (first + jnp.arange(heads, dtype=jnp.uint32))[None]
    return seed_words(jax.random.bits(draw.key, (2,), "uint32"), row_BH)


def seed_words(seed: jax.Array, row: jax.Array) -> jax.Array:
    """Two words for each row, [2, ...], from a seed, uint32 [2]."""
    row = row.astype(jnp.uint32)
    return jnp.stack([_mix(row ^ _mix(seed[0])), _mix(row ^ _mix(seed[1] + jnp.uint32(_GOLDEN)))])


def query_words(words: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two words for each query, to be handed to `keep`.

    Args:
        words: of the row, uint32 [2, ...]; each is broadcast against `t`.
        t: query position, any integer dtype.
    """
    t = t.astype(jnp.uint32)
    return _mix(t ^ words[0]), _mix(t ^ words[1])


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
