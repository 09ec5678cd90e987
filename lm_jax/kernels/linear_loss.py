"""Losses of next-token logits that never exist as a whole: the head matrix is inside.

The rows of a batch are read in chunks. A chunk's logits give its part of the sums and, where a
gradient is asked for, at once the gradient of the logits and with it that of hidden states and
head: three products where a backward pass that computes the logits again takes four.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

Values = tuple[jax.Array, ...]


class LinearLoss(NamedTuple):
    """Sums over weighted tokens, or their terms; float32 (float64 for float64 inputs)."""

    objective: jax.Array  # what to minimise; the only differentiable one
    nats: jax.Array  # plain negative log likelihood, what is reported
    count: jax.Array  # type: ignore[assignment]  # sum of the weights
    correct: jax.Array  # weight of the positions where no token is more likely than the target


def linear_cross_entropy(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk_rows: int | None = None,
    summed: bool = True,
) -> LinearLoss:
    """Cross-entropy of z = x head' without an array of the size [B, T, V].

    With e the label smoothing (Szegedy et al. 2016, section 7) and lse = log sum_v exp z_v:

        objective = sum_bt w ((1 - e) (lse - z_target) + e (lse - mean_v z_v) + z_loss lse^2)
        nats      = sum_bt w (lse - z_target)

    The products are in the dtype of x, accumulated in float32; logits and loss are float32 or
    wider. The gradients have the dtypes of x and head, that of the head is summed in float32;
    targets and weights get none. Reverse mode only. In float16 the gradient of a logit, at most
    the weight where there is no z-loss, must stay below 60.

    Inside `jax.shard_map` over B, call it with the head cast to varying (`jax.lax.pcast`): its
    gradient is then summed over the devices once. Under a jit that partitions by itself it may be
    summed after every chunk.

    Args:
        x_BTD: hidden states, any float dtype.
        head_VD: one row per vocabulary entry, any V.
        targets_BT: ids in [0, V); where the weight is 0 any id is allowed and ignored. An id
            outside makes the sums NaN.
        weights_BT: factor of each position. Where it is 0, x may hold anything, NaN included.
        softcap: if c > 0, logits are c tanh(z / c) (Gemma Team 2024, section 2).
        z_loss: factor of lse^2 (Chowdhery et al. 2022, section 5).
        label_smoothing: e in [0, 1).
        chunk_rows: rows whose logits exist at a time, those of all devices together where jit
            splits B over several; default see `rows_per_chunk`.
        summed: else the fields are the terms of the sums, [B, T], for use without a gradient.
    """
    assert x_BTD.shape[:2] == targets_BT.shape == weights_BT.shape

    def score(z_NV: jax.Array, weights_N: jax.Array, rows, _) -> tuple[Values, jax.Array]:
        V = z_NV.shape[1]
        target_N = jnp.where(weights_N != 0, rows, 0)
        # A negative id is out of range, which gives NaN, and not counted from the end.
        target_N1 = jnp.where(target_N < 0, V, target_N)[:, None]
        picked_N = jnp.take_along_axis(z_NV, target_N1, axis=1)[:, 0]
        top_N = z_NV.max(1)
        lse_N = top_N + jnp.log(jnp.exp(z_NV - top_N[:, None]).sum(1))
        nats_N = lse_N - picked_N
        objective_N = nats_N + z_loss * jnp.square(lse_N)
        if label_smoothing:
            objective_N += label_smoothing * (picked_N - z_NV.mean(1))
        per_row = (objective_N, nats_N, jnp.ones_like(nats_N), picked_N >= top_N)
        values = tuple(weights_N * value_N for value_N in per_row)

        p_NV = jnp.exp(z_NV - lse_N[:, None])
        is_target_NV = jnp.arange(V)[None] == target_N1
        lse_slope_N = weights_N * (1 + 2 * z_loss * lse_N)
        target_slope_N = weights_N * (1 - label_smoothing)
        dz_NV = p_NV * lse_slope_N[:, None] - jnp.where(is_target_NV, target_slope_N[:, None], 0)
        if label_smoothing:
            dz_NV -= weights_N[:, None] * (label_smoothing / V)
        return values, dz_NV

    how = _How(score, softcap, _width(x_BTD.shape, chunk_rows))
    arguments = (how, x_BTD, head_VD, weights_BT, targets_BT, ())
    return LinearLoss(*(_in_chunks(*arguments) if summed else _per_row(*arguments)))


def linear_divergence(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    teacher_x_BTE: jax.Array,
    teacher_head_VE: jax.Array,
    weights_BT: jax.Array,
    *,
    kind: Literal["forward", "reverse", "jsd"],
    temperature: float = 1.0,
    beta: float = 0.5,
    softcap: float = 0.0,
    teacher_softcap: float = 0.0,
    chunk_rows: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Summed divergence of a student from a teacher, and the sum of the weights.

    With p and q the softmax of logits / temperature of teacher and student:

        forward  KL(p || q) (Hinton et al. 2015, section 2)
        reverse  KL(q || p)
        jsd      beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q
                 (Agarwal et al. 2023, section 2)

    Gradients shrink with temperature^2; the value is not multiplied by it, the caller does that
    where the temperature shall not change the balance with another loss. Dtypes as in
    `linear_cross_entropy`; only x and head get a gradient. Per chunk this is one product for the
    teacher and one for the student, and two more for the gradient.

    Args:
        x_BTD: hidden states of the student.
        head_VD: head matrix of the student.
        teacher_x_BTE: hidden states of the teacher, of any width.
        teacher_head_VE: head matrix of the teacher, over the same vocabulary.
        weights_BT: factor of each position; where it is 0, both x may hold anything.
        kind: which divergence.
        temperature: divides both logits.
        beta: weight of the teacher in `jsd`, inside (0, 1).
        softcap: cap of the student's logits, 0 for none.
        teacher_softcap: the same for the teacher's.
        chunk_rows: as in `linear_cross_entropy`.

    Raises:
        ValueError: the vocabularies differ, or an option is outside its range.
    """
    if head_VD.shape[0] != teacher_head_VE.shape[0]:
        raise ValueError(
            f"teacher_head: {teacher_head_VE.shape[0]} tokens, but head has {head_VD.shape[0]}; "
            "teacher and student must share a tokenizer."
        )
    if kind not in ("forward", "reverse", "jsd"):
        raise ValueError(f"kind: {kind!r} is none of forward, reverse, jsd.")
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature} must be above 0.")
    if not 0 < beta < 1:
        raise ValueError(
            f"beta: {beta} must lie inside (0, 1); for a bound use forward or reverse."
        )
    assert x_BTD.shape[:2] == teacher_x_BTE.shape[:2] == weights_BT.shape

    def score(z_NV: jax.Array, weights_N: jax.Array, rows, head) -> tuple[Values, jax.Array]:
        teacher_NV, _ = _logits(_scored(rows, weights_N), head, z_NV.shape[1], teacher_softcap)
        log_p_NV = jax.nn.log_softmax(teacher_NV.astype(z_NV.dtype) / temperature)
        log_q_NV = jax.nn.log_softmax(z_NV / temperature)
        p_NV, q_NV = jnp.exp(log_p_NV), jnp.exp(log_q_NV)
        if kind == "forward":
            value_N = (p_NV * (log_p_NV - log_q_NV)).sum(1)
            slope_NV = q_NV - p_NV
        else:
            log_m_NV, share = log_p_NV, 1.0
            if kind == "jsd":
                log_m_NV = jnp.logaddexp(math.log(beta) + log_p_NV, math.log1p(-beta) + log_q_NV)
                share = 1 - beta
            excess_NV = log_q_NV - log_m_NV
            value_N = share * (q_NV * excess_NV).sum(1)
            slope_NV = share * q_NV * excess_NV - q_NV * value_N[:, None]
            if kind == "jsd":
                value_N += beta * (p_NV * (log_p_NV - log_m_NV)).sum(1)
        values = weights_N * value_N, weights_N
        return values, slope_NV * (weights_N / temperature)[:, None]

    how = _How(score, softcap, _width(x_BTD.shape, chunk_rows))
    teacher_head = _operand(teacher_head_VE, teacher_x_BTE.dtype)
    value, count = _in_chunks(how, x_BTD, head_VD, weights_BT, teacher_x_BTE, teacher_head)
    return value, count


def rows_per_chunk(rows: int, width: int) -> int:
    """Default size of a chunk: an eighth of the rows, but 1024 at least and 8 D at most.

    An eighth saves what is to be saved. 1024 rows make a product efficient. Each chunk reads and
    writes the float32 gradient of the head, 8 V D bytes, beside at least 12 V bytes per row for
    its logits: from 8 D rows on that is 8 % of the traffic and a larger chunk gains nothing.
    """
    return max(1024, min(rows // 8, 8 * width))


def _width(shape: tuple[int, ...], chunk_rows: int | None) -> int:
    """Positions of T per chunk. B is never cut: a batch split over devices stays where it is."""
    B, T, D = shape
    most = max(1, (chunk_rows or rows_per_chunk(B * T, D)) // max(1, B))
    chunks = max(1, -(-T // most))
    return max(1, -(-T // chunks))


def _operand(head_VD: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The head in the dtype of the product; in 16 bits with rows of 0 up to a multiple of 64.

    The gradient of the logits then has rows that tensor cores can read.
    """
    more = -head_VD.shape[0] % 64 if jnp.finfo(dtype).bits == 16 else 0
    return jnp.pad(head_VD.astype(dtype), ((0, more), (0, 0)))


class _How(NamedTuple):
    """The static part: what to do with the logits of a chunk."""

    # (logits_NV, weights_N, rows, shared) -> (values_N, gradient by logits of the first one's sum)
    score: Callable[[jax.Array, jax.Array, Any, Any], tuple[Values, jax.Array]]
    softcap: float
    width: int  # positions of T per chunk


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_chunks(how: _How, x_BTD, head_VD, weights_BT, rows_BT, shared) -> Values:
    """Sums of `how.score` over all rows; the first has a gradient, by x and head.

    `rows_BT` [B, T, ...] is cut into chunks as x is; `shared` is what every chunk needs.
    """
    per_row = _per_row(how, x_BTD, head_VD, weights_BT, rows_BT, shared)
    return jax.tree.map(jnp.sum, per_row)


def _per_row(how: _How, x_BTD, head_VD, weights_BT, rows_BT, shared) -> Values:
    """Values of `how.score`, [B, T]."""
    return _scan(how, x_BTD, head_VD, weights_BT, rows_BT, shared, differentiate=False)[0]


def _forward(how: _How, x_BTD, head_VD, weights_BT, rows_BT, shared):
    sums, dx_BTD, dhead_VD = _scan(
        how, x_BTD, head_VD, weights_BT, rows_BT, shared, differentiate=True
    )
    like = [jnp.zeros((), a.dtype) for a in (x_BTD, head_VD)]
    return sums, (dx_BTD, dhead_VD, like)


def _backward(how: _How, residuals, g: Values):
    *gradients, like = residuals
    dx_BTD, dhead_VD = ((g[0] * d).astype(a.dtype) for d, a in zip(gradients, like, strict=True))
    return dx_BTD, dhead_VD, None, None, None


_in_chunks.defvjp(_forward, _backward)


def _scan(how: _How, x_BTD, head_VD, weights_BT, rows_BT, shared, *, differentiate: bool):
    """The sums, and the gradients of the first by x and head in float32 or wider.

    Without the gradients, not the sums but the values of all rows, [B, T].
    """
    B, T, D = x_BTD.shape
    wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
    # Small probabilities times a weight would underflow in float16.
    scale = 2.0**10 if x_BTD.dtype == jnp.float16 else 1.0
    V = head_VD.shape[0]
    operand_VD = _operand(head_VD, x_BTD.dtype)
    chunks = max(1, -(-T // how.width))

    def pad(a: jax.Array) -> jax.Array:
        return jnp.pad(a, [(0, 0), (0, chunks * how.width - T)] + [(0, 0)] * (a.ndim - 2))

    x_BTD, weights_BT, rows_BT = map(pad, (x_BTD, weights_BT.astype(wide), rows_BT))

    def body(carry, start: jax.Array):
        def cut(a: jax.Array) -> jax.Array:
            a = jax.lax.dynamic_slice_in_dim(a, start, how.width, axis=1)
            return a.reshape(B * how.width, *a.shape[2:])

        weights_N = cut(weights_BT)
        x_ND = _scored(cut(x_BTD), weights_N)
        z_NV, slope_NV = _logits(x_ND, operand_VD, V, how.softcap)
        values, dz_NV = how.score(z_NV, weights_N, cut(rows_BT), shared)
        if not differentiate:
            return carry, values
        dx_BTD, dhead_DV = carry
        dz_NV = (dz_NV * slope_NV * scale).astype(x_ND.dtype)
        dz_NV = jnp.pad(dz_NV, ((0, 0), (0, operand_VD.shape[0] - V)))
        dx_ND = _product(dz_NV, operand_VD, 1, 0, wide) / scale
        dx_BTD = jax.lax.dynamic_update_slice_in_dim(
            dx_BTD, dx_ND.reshape(B, how.width, D), start, axis=1
        )
        # [D, V] and not [V, D]: XLA on CPUs transposes the left operand, here the narrow one.
        dhead_DV += _product(x_ND, dz_NV, 0, 0, wide)
        return (dx_BTD, dhead_DV), jax.tree.map(jnp.sum, values)

    starts = how.width * jnp.arange(chunks)
    if not differentiate:

        def join(a: jax.Array) -> jax.Array:
            """[chunks, B width] to [B, T]."""
            return a.reshape(chunks, B, how.width).swapaxes(0, 1).reshape(B, -1)[:, :T]

        _, values = jax.lax.scan(body, None, starts)
        return jax.tree.map(join, values), None, None
    # `zeros_like`: inside shard_map they vary over the mesh axes over which x and head do.
    zeros = (jnp.zeros_like(x_BTD, wide), jnp.zeros_like(operand_VD.T, wide))
    (dx_BTD, dhead_DV), sums = jax.lax.scan(body, zeros, starts)
    return jax.tree.map(lambda s: s.sum(), sums), dx_BTD[:, :T], (dhead_DV[:, :V] / scale).T


def _product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int, dtype) -> jax.Array:
    """Matrix product over one axis of each, accumulated into `dtype`."""
    axes = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=dtype)


def _scored(x_ND: jax.Array, weights_N: jax.Array) -> jax.Array:
    """Rows of weight 0 set to 0: 0 * NaN would be NaN, in the sums and in the head's gradient."""
    return jnp.where(weights_N[:, None] != 0, x_ND, 0)


def _logits(
    x_ND: jax.Array, operand_VD: jax.Array, vocabulary: int, softcap: float
) -> tuple[jax.Array, Any]:
    """Logits in float32 or wider, and their derivative by the uncapped ones."""
    wide = jnp.promote_types(x_ND.dtype, jnp.float32)
    # Columns behind the vocabulary would add exp(0) to every sum.
    z_NV = _product(x_ND, operand_VD, 1, 1, wide)[:, :vocabulary]
    if not softcap:
        return z_NV, 1.0
    tanh_NV = jnp.tanh(z_NV / softcap)
    return softcap * tanh_NV, 1 - jnp.square(tanh_NV)
