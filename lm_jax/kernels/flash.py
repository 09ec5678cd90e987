"""Flash attention for Hopper GPUs in Pallas Mosaic GPU, with its own backward pass.

The scores are never in global memory (Dao et al. 2022, FlashAttention; the kernels say what they
follow). Work is skipped in whole tiles where causality, the window or the segments hide all pairs.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import custom_batching

from lm_jax.kernels import dropout, flash_backward, flash_forward, mosaic
from lm_jax.kernels.flash_query import query_gradient
from lm_jax.kernels.flash_tile import LOG2E, Settings, backward_tiles, block_ranges

_ROWS = 128  # T is padded to a multiple of it; every tile divides it


def flash(
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
    deterministic: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention as (out [B, T, H, C], lse [B, T, H] float32), differentiable in both.

    A row that sees nothing has output 0, log-sum-exp -inf and gradient 0. Under `vmap` the mapped
    axis joins the batch. Widths other than 64 and 128 are padded with zeros to the next of the two,
    and T to a multiple of 128; both cost a copy.

    The rest of the arguments are those of `attention.attend`. Queries, keys and values are bfloat16
    or float16, and C is a multiple of 8 up to 128.

    Args:
        words_2BH: of `dropout.head_words`; None switches dropout off.
        deterministic: sum the gradient of the queries in a fixed order, with seven products a
            tile instead of five; the other gradients always are.
        interpret: run on the CPU interpreter, with race detection.

    Raises:
        ValueError: where the kernels cannot run, with the reason.
    """
    B, T, H, C = q_BTHC.shape
    reason = mosaic.unavailable(q_BTHC.dtype, C, interpret=interpret)
    if reason:
        raise ValueError(f"Flash attention cannot run: {reason}; choose another implementation.")
    if scale == 0:
        raise ValueError("A scale of 0 makes all scores equal; give another one.")
    assert k_BTKC.shape == v_BTKC.shape and H % k_BTKC.shape[2] == 0
    settings = Settings(
        length=T,
        causal=causal,
        window=window,
        softcap=softcap,
        scale=scale,
        dropout_rate=0.0 if words_2BH is None else dropout_rate,
        deterministic=deterministic,
        interpret=interpret,
    )
    rows, width = -T % _ROWS, (64 if C <= 64 else 128) - C
    inputs = (jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, width))) for x in (q_BTHC, k_BTKC, v_BTKC))
    words_BHT = None
    if settings.dropout_rate > 0:
        assert words_2BH is not None
        words_BHT = dropout.query_words(words_2BH[..., None], jnp.arange(T + rows)[None, None])
    if segment_ids_BT is not None:
        segment_ids_BT = jnp.pad(segment_ids_BT.astype(jnp.int32), ((0, 0), (0, rows)))
    out_BTHC, lse_BHT = _attention(settings, *inputs, segment_ids_BT, words_BHT)
    return out_BTHC[:, :T, :, :C], lse_BHT[:, :, :T].swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings: Settings, *inputs):
    """(out [B, T, H, C], lse [B, H, T]) of padded queries, keys, values, segment ids and words."""

    def run(*inputs):
        q_BTHC, *_, segment_ids_BT, _ = inputs
        B, T = q_BTHC.shape[:2]
        ranges_BI4, _ = block_ranges(segment_ids_BT, settings, B, T, flash_forward.TILES)
        return flash_forward.forward(*inputs, ranges_BI4, settings)

    return _batched(run)(*inputs)


def _attention_forward(settings: Settings, *inputs):
    results = _attention(settings, *inputs)
    return results, (*inputs, *results)


def _attention_backward(settings: Settings, residuals, gradients):
    q_BTHC, k_BTKC, v_BTKC, segment_ids_BT, words_BHT, out_BTHC, lse_BHT = residuals
    dout_BTHC, dlse_BHT = gradients

    def run(*inputs):
        q_BTHC, *_, segment_ids_BT, _ = inputs
        B, T, _, C = q_BTHC.shape
        stays, moves = backward_tiles(C)
        ranges = functools.partial(block_ranges, segment_ids_BT, settings, B, T)
        _, ranges_BJ4 = ranges((moves, stays))
        dq_BTHC, dk_BTKC, dv_BTKC = flash_backward.key_value_gradients(
            *inputs, ranges_BJ4, settings
        )
        if settings.deterministic:
            ranges_BI4, _ = ranges((stays, moves))
            return query_gradient(*inputs, ranges_BI4, settings=settings), dk_BTKC, dv_BTKC
        return (dq_BTHC * settings.scale).astype(q_BTHC.dtype), dk_BTKC, dv_BTKC

    # Softmax hands to each score of a row the same share: that of the output, and the row's own
    # log-sum-exp with the opposite sign.
    delta_BHT = jnp.einsum(
        "bthc,bthc->bht", out_BTHC, dout_BTHC, preferred_element_type=jnp.float32
    )
    hidden_BHT = lse_BHT == -jnp.inf
    delta_BHT = jnp.where(hidden_BHT, 0.0, delta_BHT - dlse_BHT)
    lse_BHT = jnp.where(hidden_BHT, jnp.inf, lse_BHT * LOG2E)
    gradients = _batched(run)(
        q_BTHC, k_BTKC, v_BTKC, dout_BTHC, lse_BHT, delta_BHT, segment_ids_BT, words_BHT
    )
    return *gradients, None, None


_attention.defvjp(_attention_forward, _attention_backward)


def _batched(run: Callable) -> Callable:
    """`run`, whose arrays all begin with B, such that `vmap` makes its axis part of B."""
    run = custom_batching.custom_vmap(run)

    @run.def_vmap
    def rule(size, mapped, *inputs):
        def merge(x, is_mapped):
            x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(size * x.shape[1], *x.shape[2:])

        outputs = run(*jax.tree.map(merge, inputs, tuple(mapped)))
        outputs = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), outputs)
        return outputs, jax.tree.map(lambda _: True, outputs)

    return run
