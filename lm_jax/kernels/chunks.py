"""Sums over tokens of a function of their logits, which never exist as a whole.

The rows of a batch are read in chunks. A chunk's logits give its part of the sums and, where a
gradient is asked for, at once the gradient of the logits and with it that of hidden states and
head: three products where a backward pass that computes the logits again takes four.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm_jax import collectives
from lm_jax.kernels import device
from lm_jax.kernels.linear import product

Values = tuple[jax.Array, ...]


def rows_per_chunk(rows: int, width: int) -> int:
    """Default size of a chunk: 8 D rows, 2 D where devices share a batch, and less on a CPU.

    Each chunk reads and writes the float32 gradient of the head, 8 V D bytes, beside at least 12 V
    bytes per row for its logits: from 8 D rows on that is 8 % of the traffic and a larger chunk
    gains nothing. With 2 D rows it is a quarter, 2 % of that of a whole step of 110M parameters,
    whose peak memory halves. An eighth of the rows saves what memory is to be saved on a CPU, and
    1024 rows make a product efficient.
    """
    if device.target().platform == "cpu":
        return max(1024, min(rows // 8, 8 * width))
    alone = collectives.axis_size(*collectives.ROWS, collectives.TENSOR) == 1
    return max(1024, (8 if alone else 2) * width)


def _width(shape: tuple[int, ...], chunk_rows: int | None) -> int:
    """Positions of T per chunk. B is never cut: a batch split over devices stays where it is."""
    B, T, D = shape
    most = max(1, (chunk_rows or rows_per_chunk(B * T, D)) // max(1, B))
    chunks = max(1, -(-T // most))
    if chunk_rows is None:
        # Fewer and up to twice as large if that divides T: else the last one is filled up, and
        # everything copied.
        chunks = next((n for n in range(chunks, chunks // 2, -1) if T % n == 0), chunks)
    return max(1, -(-T // chunks))


def head_operand(head_VD: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The head in the dtype of the product; in 16 bits with rows of 0 up to a multiple of 64.

    The gradient of the logits then has rows that tensor cores can read.
    """
    more = -head_VD.shape[0] % 64 if jnp.finfo(dtype).bits == 16 else 0
    return jnp.pad(head_VD.astype(dtype), ((0, more), (0, 0)))


class How(NamedTuple):
    """The static part: what to do with the logits of a chunk."""

    # (logits_NV, weights_N, rows, shared) -> (values_N, gradient by logits of the first one's sum)
    score: Callable[[jax.Array, jax.Array, Any, Any], tuple[Values, jax.Array]]
    softcap: float
    chunk_rows: int | None  # rows whose logits exist at a time; None: `rows_per_chunk`


def sums(how: How, x_BTD, head_VD, weights_BT, rows, shared) -> Values:
    """Sums of `how.score` over all rows; the first has a gradient, by x and head.

    The arrays of `rows`, [B, T, ...], are cut into chunks as x is; `shared` is what every chunk
    needs. The devices of the mesh's axis `tensor` share the positions, if they can.
    """
    if x_BTD.shape[1] % collectives.axis_size(collectives.TENSOR):
        return _sums(how, x_BTD, head_VD, weights_BT, rows, shared)
    by_position = collectives.enter_parts(x_BTD), weights_BT, rows
    x_BTD, weights_BT, rows = jax.tree.map(lambda a: collectives.own(a, 1), by_position)
    head_VD = collectives.enter_parts(head_VD)
    return collectives.leave_parts(_sums(how, x_BTD, head_VD, weights_BT, rows, shared))  # type: ignore


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(how: How, x_BTD, head_VD, weights_BT, rows, shared) -> Values:
    return jax.tree.map(jnp.sum, terms(how, x_BTD, head_VD, weights_BT, rows, shared))


def terms(how: How, x_BTD, head_VD, weights_BT, rows, shared) -> Values:
    """Values of `how.score`, [B, T]."""
    return _scan(how, x_BTD, head_VD, weights_BT, rows, shared, differentiate=False)[0]


def _forward(how: How, *inputs):
    values, *gradients = _scan(how, *inputs, differentiate=True)
    like = [jnp.zeros((), a.dtype) for a in inputs[:2]]
    return values, (*gradients, like)


def _backward(how: How, residuals, g: Values):
    *gradients, like = residuals
    dx_BTD, dhead_VD = ((g[0] * d).astype(a.dtype) for d, a in zip(gradients, like, strict=True))
    return dx_BTD, dhead_VD, None, None, None


_sums.defvjp(_forward, _backward)


def _scan(how: How, x_BTD, head_VD, weights_BT, rows, shared, *, differentiate: bool):
    """The sums, and the gradients of the first by x and head in float32 or wider.

    Without the gradients, not the sums but the values of all rows, [B, T].
    """
    B, T, D = x_BTD.shape
    wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
    # Small probabilities times a weight would underflow in float16.
    scale = 2.0**10 if x_BTD.dtype == jnp.float16 else 1.0
    V = head_VD.shape[0]
    operand_VD = head_operand(head_VD, x_BTD.dtype)
    width = _width(x_BTD.shape, how.chunk_rows)
    chunks = max(1, -(-T // width))

    def pad(a: jax.Array) -> jax.Array:
        return jnp.pad(a, [(0, 0), (0, chunks * width - T)] + [(0, 0)] * (a.ndim - 2))

    x_BTD, weights_BT, rows = jax.tree.map(pad, (x_BTD, weights_BT.astype(wide), rows))

    def body(carry, start: jax.Array):
        def cut(a: jax.Array) -> jax.Array:
            a = jax.lax.dynamic_slice_in_dim(a, start, width, axis=1)
            return a.reshape(B * width, *a.shape[2:])

        weights_N = cut(weights_BT)
        x_ND = scored(cut(x_BTD), weights_N)
        z_NV, slope_NV = logits(x_ND, operand_VD, V, how.softcap)
        values, dz_NV = how.score(z_NV, weights_N, jax.tree.map(cut, rows), shared)
        if not differentiate:
            return carry, values
        dx_BTD, dhead_DV = carry
        dz_NV = (dz_NV * slope_NV * scale).astype(x_ND.dtype)
        dz_NV = jnp.pad(dz_NV, ((0, 0), (0, operand_VD.shape[0] - V)))
        dx_ND = product(dz_NV, operand_VD, 1, 0, wide) / scale
        dx_BTD = jax.lax.dynamic_update_slice_in_dim(
            dx_BTD, dx_ND.reshape(B, width, D), start, axis=1
        )
        # [D, V] and not [V, D]: XLA on CPUs transposes the left operand, here the narrow one.
        dhead_DV += product(x_ND, dz_NV, 0, 0, wide)
        return (dx_BTD, dhead_DV), jax.tree.map(jnp.sum, values)

    starts = width * jnp.arange(chunks)
    if not differentiate:

        def join(a: jax.Array) -> jax.Array:
            """[chunks, B width] to [B, T]."""
            return a.reshape(chunks, B, width).swapaxes(0, 1).reshape(B, -1)[:, :T]

        _, values = jax.lax.scan(body, None, starts)
        return jax.tree.map(join, values), None, None
    zeros = (jnp.zeros_like(x_BTD, wide), jnp.zeros_like(operand_VD.T, wide))
    (dx_BTD, dhead_DV), values = jax.lax.scan(body, zeros, starts)
    return jax.tree.map(jnp.sum, values), dx_BTD[:, :T], (dhead_DV[:, :V] / scale).T


def scored(x_ND: jax.Array, weights_N: jax.Array) -> jax.Array:
    """Rows of weight 0 set to 0: 0 * NaN would be NaN, in the sums and in all gradients."""
    return jnp.where(weights_N[..., None] != 0, x_ND, 0)


def logits(
    x_ND: jax.Array, operand_VD: jax.Array, vocabulary: int, softcap: float
) -> tuple[jax.Array, Any]:
    """Logits in float32 or wider, and their derivative by the uncapped ones."""
    wide = jnp.promote_types(x_ND.dtype, jnp.float32)
    # Columns behind the vocabulary would add exp(0) to every sum.
    z_NV = product(x_ND, operand_VD, 1, 1, wide)[:, :vocabulary]
    if not softcap:
        return z_NV, 1.0
    tanh_NV = jnp.tanh(z_NV / softcap)
    return softcap * tanh_NV, 1 - jnp.square(tanh_NV)
