"""Cross-entropy of next-token logits that never exist as a whole: the head matrix is inside."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm_jax.kernels import chunks, device


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

    Under a jit that partitions by itself the gradient of the head may be summed over the devices
    after every chunk; inside `jax.shard_map` over B it is left to the caller, once.

    Args:
        x_BTD: hidden states, any float dtype.
        head_VD: one row per vocabulary entry, any V.
        targets_BT: ids in [0, V); where the weight is 0 any id is allowed and ignored. An id
            outside makes the sums NaN.
        weights_BT: factor of each position. Where it is 0, x may hold anything, NaN included.
        softcap: if c > 0, logits are c tanh(z / c) (Gemma Team 2024, section 2).
        z_loss: factor of lse^2 (Chowdhery et al. 2022, section 5).
        label_smoothing: e in [0, 1).
        chunk_rows: rows whose logits exist at a time; default see `chunks.rows_per_chunk`.
        summed: else the fields are the terms of the sums, [B, T], for use without a gradient.
    """
    assert x_BTD.shape[:2] == targets_BT.shape == weights_BT.shape

    def score(z_NV: jax.Array, weights_N: jax.Array, rows, _) -> tuple[chunks.Values, jax.Array]:
        V = z_NV.shape[1]
        target_N1, picked_N, top_N, lse_N = pick(z_NV, rows, weights_N)
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

    add = chunks.sums if summed else chunks.terms
    how = chunks.How(score, softcap, chunk_rows)
    return LinearLoss(*add(how, x_BTD, head_VD, weights_BT, targets_BT, ()))


def pick(z_NV: jax.Array, targets_N: jax.Array, weights_N: jax.Array) -> tuple[jax.Array, ...]:
    """Target [N, 1], its logit, the highest logit and log sum_v exp z_v, [N], of each row.

    Where the weight is 0 the target is 0; a scored one outside [0, V) has the logit NaN.
    """
    target_N = jnp.where(weights_N != 0, targets_N, 0)
    # A negative id is out of range, which gives NaN, and not counted from the end.
    target_N1 = jnp.where(target_N < 0, z_NV.shape[1], target_N)[:, None]
    picked_N = jnp.take_along_axis(z_NV, target_N1, axis=1)[:, 0]
    top_N, lse_N = top_and_lse(z_NV)
    return target_N1, picked_N, top_N, lse_N


def top_and_lse(z_NV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The highest logit of each row and log sum_v exp z_v.

    A GPU reads the logits once for both, at the price of a second exponential. A CPU, which
    computes exponentials more slowly than it reads, takes one pass for each.
    """
    if device.target().platform == "cpu":
        top_N = z_NV.max(1)
        return top_N, top_N + jnp.log(jnp.exp(z_NV - top_N[:, None]).sum(1))

    lowest = float(jnp.finfo(z_NV.dtype).min)

    def join(a, b):
        (top_a, sum_a), (top_b, sum_b) = a, b
        top = jnp.maximum(jnp.maximum(top_a, top_b), lowest)  # the difference of two -inf is NaN
        return top, sum_a * jnp.exp(top_a - top) + sum_b * jnp.exp(top_b - top)

    nothing = jnp.asarray(lowest, z_NV.dtype), jnp.zeros((), z_NV.dtype)
    top_N, sum_N = jax.lax.reduce((z_NV, jnp.ones_like(z_NV)), nothing, join, (1,))
    return top_N, top_N + jnp.log(sum_N)
