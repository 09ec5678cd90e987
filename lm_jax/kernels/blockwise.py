"""Attention in blocks of queries and keys: memory grows with T, not with T squared.

The forward pass is the online softmax of Milakov and Gimelshein (2018, algorithm 3), block by
block; the backward pass recomputes each block of probabilities from the log-sum-exp (Dao 2023,
algorithm 2): five matrix products per pair of blocks and nothing of size [T, T] kept.

Letters beside those of `attention`: N blocks, I queries of a block, J keys of a block.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.kernels import device, dropout

MASKED = -1e30  # finite: the difference of two of them is 0 and not NaN


@dataclasses.dataclass(frozen=True)
class _Options:
    length: int
    block: int
    causal: bool
    window: int | None
    softcap: float
    scale: float
    dropout_rate: float

    @property
    def factor(self) -> float:
        """The factor that `_scores` leaves out."""
        return self.softcap or self.scale


def blockwise(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    segment_ids_BT: jax.Array | None,
    words_2BH: jax.Array | None,
    *,
    causal: bool,
    window: int | None,
    softcap: float,
    scale: float,
    dropout_rate: float,
) -> tuple[jax.Array, jax.Array]:
    """Attention output [B, T, H, C] and log-sum-exp [B, T, H].

    Products are accumulated in float32, or float64 for float64 inputs. Blocks that the causal
    mask or the window rules out are skipped.

    The rest of the arguments are those of `attention.attend`; the scale must not be negative.

    Args:
        words_2BH: of `dropout.head_words`; None switches dropout off.
    """
    B, T, H, C = q_BTHC.shape
    K = k_BTKC.shape[2]
    N = -(-T // largest_block(B * H))
    block = -(-T // N)
    options = _Options(
        T, block, causal, window, softcap, scale, 0.0 if words_2BH is None else dropout_rate
    )

    def split(x: jax.Array, *heads: int) -> jax.Array:
        """[B, T, ...] as [N, B, block, ...], the last block filled up with zeros."""
        x = jnp.pad(x, [(0, 0), (0, N * block - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, N, block, *heads), 1, 0)

    q_NBKGIC = split(q_BTHC, K, H // K, C).transpose(0, 1, 3, 4, 2, 5)
    k_NBKJC, v_NBKJC = (split(x, K, C).swapaxes(2, 3) for x in (k_BTKC, v_BTKC))
    ids_NBI = None if segment_ids_BT is None else split(segment_ids_BT)
    out_NBKGIC, lse_NBKGI = _attend(options, q_NBKGIC, k_NBKJC, v_NBKJC, ids_NBI, words_2BH)
    out_BTHC = out_NBKGIC.transpose(1, 0, 4, 2, 3, 5).reshape(B, N * block, H, C)
    lse_BTH = lse_NBKGI.transpose(1, 0, 4, 2, 3).reshape(B, N * block, H)
    return out_BTHC[:, :T], lse_BTH[:, :T]


def largest_block(heads: int) -> int:
    """The most queries or keys in a block, for `heads` heads over all rows.

    On a CPU the scores of a block, over all rows and heads, should stay in its caches.
    """
    if device.target().platform != "cpu":
        return 256
    return next((size for size in (256, 128) if heads * size**2 <= 2**19), 64)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: _Options, *blocks):
    return _forward(options, *blocks)[0]


def _forward(options: _Options, q_NBKGIC, k_NBKJC, v_NBKJC, ids_NBI, words_2BH):
    N, B, K, G, block, C = q_NBKGIC.shape
    wide = jnp.promote_types(q_NBKGIC.dtype, jnp.float32)

    def of_queries(i):
        q_BKGIC = q_NBKGIC[i]

        def visit(j, _, carry):
            acc_BKGIC, max_BKGI, sum_BKGI = carry
            scores, mask = _scores(options, q_BKGIC, k_NBKJC[j], ids_NBI, i, j)
            scores = jnp.where(mask, scores, MASKED)
            new_max_BKGI = jnp.maximum(max_BKGI, scores.max(-1))
            # Where a row has seen no key yet its maximum is MASKED as well.
            p_BKGIJ = jnp.exp(options.factor * (scores - new_max_BKGI[..., None]))
            p_BKGIJ = jnp.where(mask, p_BKGIJ, 0)
            rescale_BKGI = jnp.exp(options.factor * (max_BKGI - new_max_BKGI))
            sum_BKGI = sum_BKGI * rescale_BKGI + p_BKGIJ.sum(-1)
            p_BKGIJ = _drop(options, words_2BH, p_BKGIJ, i, j).astype(v_NBKJC.dtype)
            products_BKGIC = jnp.einsum(
                "bkgij,bkjc->bkgic", p_BKGIJ, v_NBKJC[j], preferred_element_type=wide
            )
            acc_BKGIC = acc_BKGIC * rescale_BKGI[..., None] + products_BKGIC
            return (), (acc_BKGIC, new_max_BKGI, sum_BKGI)

        return visit

    def finish(carry):
        acc_BKGIC, max_BKGI, sum_BKGI = carry
        safe_BKGI = jnp.where(sum_BKGI > 0, sum_BKGI, 1)
        return (acc_BKGIC / safe_BKGI[..., None]).astype(q_NBKGIC.dtype), max_BKGI, sum_BKGI

    zeros_BKGI = jnp.zeros((B, K, G, block), wide)
    start = (jnp.zeros((B, K, G, block, C), wide), zeros_BKGI + MASKED, zeros_BKGI)
    _, results = _over_pairs(_blocks_in_sight(options, N)[0], of_queries, (), start, finish)
    out_NBKGIC, max_NBKGI, sum_NBKGI = results
    lse_NBKGI = options.factor * max_NBKGI + jnp.log(jnp.where(sum_NBKGI > 0, sum_NBKGI, 1))
    lse_NBKGI = jnp.where(sum_NBKGI > 0, lse_NBKGI, -jnp.inf)
    # Not the log-sum-exp: where scores are large, its rounding would show in the probabilities.
    residuals = (q_NBKGIC, k_NBKJC, v_NBKJC, ids_NBI, words_2BH, out_NBKGIC, max_NBKGI, sum_NBKGI)
    return (out_NBKGIC, lse_NBKGI), residuals


def _backward(options: _Options, residuals, cotangents):
    q_NBKGIC, k_NBKJC, v_NBKJC, ids_NBI, words_2BH, out_NBKGIC, max_NBKGI, sum_NBKGI = residuals
    dout_NBKGIC, dlse_NBKGI = cotangents
    N = q_NBKGIC.shape[0]
    dtype, wide = q_NBKGIC.dtype, sum_NBKGI.dtype
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    inverse_NBKGI = 1 / jnp.where(sum_NBKGI > 0, sum_NBKGI, 1)
    # d softmax: ds = p (dp - <p, dp>) with <p, dp> = <dout, out>, and dlse/ds = p.
    delta_NBKGI = (dout_NBKGIC.astype(wide) * out_NBKGIC.astype(wide)).sum(-1) - dlse_NBKGI

    def of_keys(j):
        k_BKJC, v_BKJC = k_NBKJC[j], v_NBKJC[j]

        def visit(i, dq_NBKGIC, carry):
            dk_BKJC, dv_BKJC = carry
            q_BKGIC, dout_BKGIC = q_NBKGIC[i], dout_NBKGIC[i]
            scores, mask = _scores(options, q_BKGIC, k_BKJC, ids_NBI, i, j)
            p_BKGIJ = jnp.exp(options.factor * (scores - max_NBKGI[i][..., None]))
            p_BKGIJ = jnp.where(mask, p_BKGIJ * inverse_NBKGI[i][..., None], 0)
            dp_BKGIJ = product("bkgic,bkjc->bkgij", dout_BKGIC, v_BKJC)
            dropped_BKGIJ = _drop(options, words_2BH, p_BKGIJ, i, j).astype(dtype)
            dp_BKGIJ = _drop(options, words_2BH, dp_BKGIJ, i, j)
            dv_BKJC += product("bkgij,bkgic->bkjc", dropped_BKGIJ, dout_BKGIC)
            ds_BKGIJ = p_BKGIJ * (dp_BKGIJ - delta_NBKGI[i][..., None])
            if options.softcap:
                ds_BKGIJ *= 1 - jnp.square(scores)
            ds_BKGIJ = ds_BKGIJ.astype(dtype)
            dk_BKJC += product("bkgij,bkgic->bkjc", ds_BKGIJ, q_BKGIC)
            dq_BKGIC = dq_NBKGIC[i] + product("bkgij,bkjc->bkgic", ds_BKGIJ, k_BKJC)
            return dq_NBKGIC.at[i].set(dq_BKGIC), (dk_BKJC, dv_BKJC)

        return visit

    def finish(carry):
        dk_BKJC, dv_BKJC = carry
        return (options.scale * dk_BKJC).astype(dtype), dv_BKJC.astype(dtype)

    dq_NBKGIC = jnp.zeros(q_NBKGIC.shape, wide)
    start = (jnp.zeros(k_NBKJC.shape[1:], wide),) * 2
    dq_NBKGIC, (dk_NBKJC, dv_NBKJC) = _over_pairs(
        _blocks_in_sight(options, N)[1], of_keys, dq_NBKGIC, start, finish
    )
    return (options.scale * dq_NBKGIC).astype(dtype), dk_NBKJC, dv_NBKJC, None, None


_attend.defvjp(_forward, _backward)


def _over_pairs(bounds_N2, visitor, shared, start, finish):
    """Visit every pair of blocks a, b with b in [first, end) = bounds_N2[a], in this order.

    `visitor(a)(b, shared, own)` returns the next `shared` and `own`; `own` is `start` again for
    every a. Returns the last `shared`, and `finish(own)` of every a, stacked.

    On a GPU, a loop whose length depends on a makes the host wait for the device in every
    iteration, so there a single loop runs over the list of pairs, whose length the compiler knows.
    On a CPU that is up to 8 % slower, because it stores `finish(own)` after every pair.
    """
    N = len(bounds_N2)
    if device.target().platform == "cpu":

        def block(shared, a):
            visit = visitor(a)
            first, end = jnp.asarray(bounds_N2)[a]
            carry = (shared, start)
            shared, own = jax.lax.fori_loop(first, end, lambda b, c: visit(b, *c), carry)
            return shared, finish(own)

        return jax.lax.scan(block, shared, jnp.arange(N, dtype=jnp.int32))

    def pair(carry, at):
        shared, own, results = carry
        a, b, is_first = at
        own = jax.tree.map(lambda new, old: jnp.where(is_first, new, old), start, own)
        shared, own = visitor(a)(b, shared, own)
        results = jax.tree.map(lambda all_N, one: all_N.at[a].set(one), results, finish(own))
        return (shared, own, results), None

    counts_N = bounds_N2[:, 1] - bounds_N2[:, 0]
    a_P = np.repeat(np.arange(N, dtype=np.int32), counts_N)
    b_P = np.concatenate([np.arange(*bounds, dtype=np.int32) for bounds in bounds_N2])
    at_P = (a_P, b_P, b_P == bounds_N2[a_P, 0])
    like = jax.eval_shape(finish, start)
    results = jax.tree.map(lambda x: jnp.zeros((N, *x.shape), x.dtype), like)
    (shared, _, results), _ = jax.lax.scan(pair, (shared, start, results), at_P)
    return shared, results


def _blocks_in_sight(options: _Options, N: int) -> tuple[np.ndarray, np.ndarray]:
    """For each query block the key blocks [first, end) it sees something of, and the reverse.

    Both are int32 [N, 2].
    """
    first_N = np.arange(N) * options.block
    last_N = first_N + options.block - 1
    sees_NN = np.ones((N, N), bool)
    if options.causal:
        sees_NN &= first_N <= last_N[:, None]
    if options.window is not None:
        sees_NN &= first_N[:, None] - last_N < options.window

    def bounds(sees_NN: np.ndarray) -> np.ndarray:
        ends = sees_NN.argmax(1), N - sees_NN[:, ::-1].argmax(1)
        return np.stack(ends, 1).astype(np.int32)

    return bounds(sees_NN), bounds(sees_NN.T)


def _positions(options: _Options, i, j):
    """Query positions [1, 1, 1, I, 1] of block i and key positions [1, 1, 1, 1, J] of block j."""
    steps = jnp.arange(options.block, dtype=jnp.int32)
    t = i * options.block + steps[None, None, None, :, None]
    s = j * options.block + steps[None, None, None, None, :]
    return t, s


def _scores(options: _Options, q_BKGIC, k_BKJC, ids_NBI, i, j):
    """Scores [B, K, G, I, J] of a pair of blocks, and which of them count (broadcastable).

    They lack a factor: multiplied only after the maximum is subtracted, it costs large scores no
    precision.
    """
    wide = jnp.promote_types(q_BKGIC.dtype, jnp.float32)
    scores = jnp.einsum("bkgic,bkjc->bkgij", q_BKGIC, k_BKJC, preferred_element_type=wide)
    if options.softcap:
        scores = jnp.tanh(scores * (options.scale / options.softcap))
    t, s = _positions(options, i, j)
    mask = s < options.length
    if options.causal:
        mask = mask & (s <= t)
    if options.window is not None:
        mask = mask & (t - s < options.window)
    if ids_NBI is not None:
        t_ids, s_ids = ids_NBI[i][:, None, None, :, None], ids_NBI[j][:, None, None, None, :]
        mask = mask & (t_ids == s_ids) & (s_ids > 0)
    return scores, mask


def _drop(options: _Options, words_2BH, x_BKGIJ, i, j):
    """Zero what dropout drops of a block and scale up the rest."""
    if not options.dropout_rate:
        return x_BKGIJ
    B, K, G = x_BKGIJ.shape[:3]
    t, s = _positions(options, i, j)
    words = dropout.query_words(words_2BH.reshape(2, B, K, G, 1, 1), t)
    keep = dropout.keep(words, s, options.dropout_rate)
    return jnp.where(keep, x_BKGIJ / (1 - options.dropout_rate), 0)
