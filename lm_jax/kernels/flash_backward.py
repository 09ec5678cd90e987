"""Flash attention, backward, for Hopper GPUs.

`key_value_gradients` goes once over all visible pairs with five products: scores and their
gradient are formed transposed, keys by queries, so that they are left operands of the products for
values and keys as they stand, and each tile adds its share of the query gradient to float32 in
global memory (Dao 2023, FlashAttention-2, section 3.1.2; Shah et al. 2024, FlashAttention-3,
section 3.1 on the roles of the warpgroups). That sum runs in any order. `query_gradient` is its
fixed-order alternative, for three more products of which two repeat what the other kernel did.

Both take `lse_BHT`, the log-sum-exp in powers of 2, +inf in rows without a key so that their
probabilities are 0, and `delta_BHT`, the gradient that all scores of a row share.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lm_jax.kernels import flash_tile as tiles
from lm_jax.kernels.flash_tile import CONSUMERS, LAYOUT, STAGES, WARPGROUP, Masks, Settings


# Jitted, so that layers of the same shape are lowered and compiled once.
@functools.partial(jax.jit, static_argnames="settings")
def key_value_gradients(
    q_BTHC, k_BTKC, v_BTKC, dout_BTHC, lse_BHT, delta_BHT,
    segment_ids_BT, words_BHT, ranges_BJ4, settings: Settings,
):  # fmt: skip
    """(dq float32, dk, dv); dq is None if `settings.deterministic`, and lacks the factor scale.

    Args: as `lm_jax.kernels.flash_forward.forward`, with the query tiles of each key tile as
    `ranges_BJ4`. Under the interpreter, which has no adding copies, the shares of dq are summed
    afterwards.
    """
    B, T, K, C = k_BTKC.shape
    tile_S, tile_T = tiles.backward_tiles(C)
    dtype = q_BTHC.dtype
    row = plgpu.SMEM((STAGES, tile_T), jnp.float32)
    word: Any = None if words_BHT is None else plgpu.SMEM((STAGES, tile_T), jnp.uint32)
    dq_ref = dscores_smem = dq_smem = None
    if not settings.deterministic:
        dscores_smem = tiles.shared((2, tile_S, tile_T), dtype)
        dq_smem = tiles.shared((CONSUMERS, WARPGROUP, 64), jnp.float32)
        slots = (T // tile_S,) if settings.interpret else ()
        dq_ref = jax.new_ref(jnp.zeros((*slots, *q_BTHC.shape), jnp.float32))
    run = tiles.kernel(
        _key_value_kernel,
        settings,
        out_type=(jax.ShapeDtypeStruct(k_BTKC.shape, dtype),) * 2,
        grid=(B, K, T // tile_S),
        scratch_types=dict(
            k_smem=tiles.shared((tile_S, C), dtype),
            v_smem=tiles.shared((tile_S, C), dtype),
            q_smem=tiles.shared((STAGES, tile_T, C), dtype),
            dout_smem=tiles.shared((STAGES, tile_T, C), dtype),
            lse_smem=row,
            delta_smem=row,
            words_smem=(word, word),
            dscores_smem=dscores_smem,
            dq_smem=dq_smem,
            stage=tiles.staging(tile_T, dtype, settings),
            kv_full=plgpu.Barrier(num_arrivals=2),
            q_full=plgpu.Barrier(num_arrivals=2 if word is None else 4, num_barriers=STAGES),
            dout_full=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
            met=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=2),
        ),
    )
    dk_BTKC, dv_BTKC = run(
        q_BTHC, k_BTKC, v_BTKC, dout_BTHC, lse_BHT, delta_BHT,
        segment_ids_BT, words_BHT, ranges_BJ4, dq_ref,
    )  # fmt: skip
    if dq_ref is None:
        return None, dk_BTKC, dv_BTKC
    dq = jax.freeze(dq_ref)
    return (dq.sum(0) if settings.interpret else dq), dk_BTKC, dv_BTKC


def _key_value_kernel(
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, segment_ref, words_refs, ranges_ref, dq_ref,
    dk_ref, dv_ref, *, settings: Settings,
    k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem, words_smem, dscores_smem, dq_smem,
    stage, kv_full, q_full, dout_full, free, met,
):  # fmt: skip
    batch, kv_head = lax.axis_index("batch"), lax.axis_index("head")
    tile, own = lax.axis_index("tile"), lax.axis_index("warpgroup")
    (tile_S, C), tile_T, dtype = k_smem.shape, q_smem.shape[1], q_smem.dtype
    ranges = tuple(ranges_ref[batch, tile, n] for n in range(4))
    first, _, _, end = ranges
    count, group = end - first, q_ref.shape[2] // k_ref.shape[2]
    steps = count * group  # all query tiles of one query head, then those of the next

    def place(step):
        """Query head and query tile of a step."""
        return kv_head * group + lax.div(step, count), first + lax.rem(step, count)

    @pl.when(own == CONSUMERS)
    def load():
        plgpu.set_max_registers(24, action="decrease")
        keys = (batch, pl.ds(tile * tile_S, tile_S), kv_head)
        plgpu.copy_gmem_to_smem(k_ref.at[keys], k_smem, kv_full)
        plgpu.copy_gmem_to_smem(v_ref.at[keys], v_smem, kv_full)

        @pl.loop(0, steps)
        def _(step):
            slot = lax.rem(step, jnp.int32(STAGES))
            head, block = place(step)
            queries = pl.ds(block * tile_T, tile_T)
            row = (batch, head, queries)
            tiles.wait_until_free(free, slot, step)

            def copy(source, target, barrier):
                plgpu.copy_gmem_to_smem(source, target.at[slot], barrier.at[slot])

            copy(q_ref.at[batch, queries, head], q_smem, q_full)
            copy(lse_ref.at[row], lse_smem, q_full)
            if words_refs is not None:
                copy(words_refs[0].at[row], words_smem[0], q_full)
                copy(words_refs[1].at[row], words_smem[1], q_full)
            copy(dout_ref.at[batch, queries, head], dout_smem, dout_full)
            copy(delta_ref.at[row], delta_smem, dout_full)

        tiles.drain(free, steps)

    @pl.when(own < CONSUMERS)
    def compute():
        plgpu.set_max_registers(240, action="increase")
        rows = pl.ds(own * WARPGROUP, WARPGROUP)
        s = tile * tile_S + own * WARPGROUP
        shape = (WARPGROUP, tile_T)
        masks = Masks(settings, segment_ref, batch, shape, query_axis=1)
        # The half of a tile's dq that this warpgroup forms: half its rows, or half its columns.
        dq_rows, dq_columns = (own * 64, 0) if tile_T == 128 else (0, own * 64)

        def per_query(smem, slot):
            return plgpu.load(smem.at[slot], layout=LAYOUT.reduce(0))

        def spread(values):
            return lax.broadcast_in_dim(values, shape, [1])

        def meet(step):
            """Wait for the other warpgroup, which has then ended the step before."""
            plgpu.barrier_arrive(met.at[lax.rem(step, jnp.int32(2))])
            plgpu.barrier_wait(met.at[lax.rem(step, jnp.int32(2))])

        def add_to_query_gradient(dq, head, block):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            dq_smem[own] = dq
            plgpu.commit_smem()
            base = dq_ref.at[tile] if settings.interpret else dq_ref
            queries = pl.ds(block * tile_T + dq_rows, 64)
            plgpu.copy_smem_to_gmem(
                dq_smem.at[own],
                base.at[batch, queries, head, pl.ds(dq_columns, 64)],
                reduction_op=None if settings.interpret else "add",
            )

        plgpu.barrier_wait(kv_full)

        def one_step(step, carry):
            dk, dv = carry
            slot = lax.rem(step, jnp.int32(STAGES))
            head, block = place(step)
            t = block * tile_T
            plgpu.barrier_wait(q_full.at[slot])
            plgpu.barrier_wait(dout_full.at[slot])

            def products(scores_acc, dprobs_acc, dv_acc):
                tiles.start(dv_acc, dv, settings.interpret)
                plgpu.wgmma(scores_acc, k_smem.at[rows], q_smem.at[slot].T)
                plgpu.wgmma(dprobs_acc, v_smem.at[rows], dout_smem.at[slot].T)
                scores = plgpu.wgmma_accumulator_load(scores_acc, wait_n=1)
                scores, factor, slope = tiles.capped(scores, settings)
                scores = masks.hide(scores, t, s, block, ranges)
                probs = jnp.exp2(scores * factor - spread(per_query(lse_smem, slot)))
                left = probs
                if words_refs is not None:
                    # Dropped ones become negative: a mask beside them would take more registers.
                    keep = masks.keep(tuple(per_query(words, slot) for words in words_smem), s)
                    probs = jnp.where(keep, probs, -probs)
                    left = jnp.maximum(probs, 0.0)
                left = tiles.operand(left.astype(dtype), stage)
                plgpu.wgmma(dv_acc, left, dout_smem.at[slot])
                dprobs = plgpu.wgmma_accumulator_load(dprobs_acc, wait_n=1)
                if words_refs is not None:
                    dprobs *= 1 / (1 - settings.dropout_rate)
                    dprobs = jnp.where(probs >= 0, dprobs, 0.0)
                    probs = jnp.abs(probs)
                dscores = probs * (dprobs - spread(per_query(delta_smem, slot)))
                if slope is not None:
                    dscores *= slope
                return dscores, tiles.finish(dv_acc, dv, settings.interpret)

            score_acc = plgpu.ACC(shape, jnp.float32)
            grad_acc = plgpu.ACC((WARPGROUP, C), jnp.float32)
            dscores, dv = pl.run_scoped(products, score_acc, score_acc, grad_acc)
            dscores = lax.optimization_barrier(dscores).astype(dtype)
            half = lax.rem(step, jnp.int32(2))
            if dq_ref is not None:
                dscores_smem[half, rows] = dscores
                plgpu.commit_smem()
                meet(step)
            left = tiles.operand(dscores, stage)

            def sums(dk_acc, *dq_acc):
                tiles.start(dk_acc, dk, settings.interpret)
                plgpu.wgmma(dk_acc, left, q_smem.at[slot])
                for acc in dq_acc:
                    transposed = dscores_smem.at[half, :, pl.ds(dq_rows, 64)].T
                    plgpu.wgmma(acc, transposed, k_smem.at[:, pl.ds(dq_columns, 64)])
                return tiles.finish(dk_acc, dk, settings.interpret), *(acc[...] for acc in dq_acc)

            dq_acc = () if dq_ref is None else (plgpu.ACC((WARPGROUP, 64), jnp.float32),)
            dk, *dq = pl.run_scoped(sums, grad_acc, *dq_acc)
            plgpu.barrier_arrive(free.at[slot])
            if dq:
                add_to_query_gradient(dq[0], head, block)
            return dk, dv

        nothing = tiles.zeros((WARPGROUP, C))
        dk, dv = lax.fori_loop(0, steps, one_step, (nothing, nothing))
        if dq_ref is not None:
            meet(steps)  # the other one has read these keys
        k_smem[rows] = (dk * settings.scale).astype(dtype)
        v_smem[rows] = (dv * (1 / (1 - settings.dropout_rate))).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_smem.at[rows], dk_ref.at[batch, pl.ds(s, WARPGROUP), kv_head])
        plgpu.copy_smem_to_gmem(v_smem.at[rows], dv_ref.at[batch, pl.ds(s, WARPGROUP), kv_head])
        plgpu.wait_smem_to_gmem(0)
