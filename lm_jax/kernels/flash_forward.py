"""Flash attention, forward, for Hopper GPUs.

One warpgroup loads (TMA), two multiply (WGMMA), each 64 queries of a tile of 128. The two take
turns at the tensor cores, so that one computes its softmax while the other multiplies, and each
issues the scores of a block together with the values of the block before (Shah et al. 2024,
FlashAttention-3, sections 3.1 and 3.2). The online softmax is that of Dao 2023, FlashAttention-2,
section 3.1; probabilities are powers of 2, so that an exponential is one instruction.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lm_jax.kernels import flash_tile as tiles
from lm_jax.kernels.flash_tile import CONSUMERS, LAYOUT, LOG2E, WARPGROUP, Masks, Settings

TILES = (CONSUMERS * WARPGROUP, 128)  # queries, keys


# Jitted, so that layers of the same shape are lowered and compiled once.
@functools.partial(jax.jit, static_argnames="settings")
def forward(q_BTHC, k_BTKC, v_BTKC, segment_ids_BT, words_BHT, ranges_BI4, settings: Settings):
    """(out [B, T, H, C], lse [B, H, T] float32) of padded inputs; natural logarithm.

    Args:
        q_BTHC: queries; T a multiple of 128, C 64 or 128.
        k_BTKC: keys.
        v_BTKC: values.
        segment_ids_BT: int32, or None.
        words_BHT: the two words of each query for `dropout.keep`, or None.
        ranges_BI4: key tiles of each query tile, see `block_ranges`.
        settings: the rest.
    """
    B, T, H, C = q_BTHC.shape
    tile_T, tile_S = TILES
    stages = 3 if C == 64 else 2
    dtype = q_BTHC.dtype
    run = tiles.kernel(
        _kernel,
        settings,
        out_type=(
            jax.ShapeDtypeStruct(q_BTHC.shape, dtype),
            jax.ShapeDtypeStruct((B, H, T), jnp.float32),
        ),
        grid=(B, H, T // tile_T),
        scratch_types=dict(
            q_smem=tiles.shared((tile_T, C), dtype),
            k_smem=tiles.shared((stages, tile_S, C), dtype),
            v_smem=tiles.shared((stages, tile_S, C), dtype),
            lse_smem=plgpu.SMEM((tile_T,), jnp.float32),
            stage=tiles.staging(tile_S, dtype, settings),
            q_full=plgpu.Barrier(),
            k_full=plgpu.Barrier(num_barriers=stages),
            v_full=plgpu.Barrier(num_barriers=stages),
            k_free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
            v_free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
            turn=plgpu.Barrier(num_barriers=CONSUMERS),
        ),
    )
    return run(q_BTHC, k_BTKC, v_BTKC, segment_ids_BT, words_BHT, ranges_BI4)


def _kernel(
    q_ref, k_ref, v_ref, segment_ref, words_refs, ranges_ref, out_ref, lse_ref, *,
    settings: Settings,
    q_smem, k_smem, v_smem, lse_smem, stage, q_full, k_full, v_full, k_free, v_free, turn,
):  # fmt: skip
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    # The tiles with most keys first, so that the last ones to finish are short.
    tile = ranges_ref.shape[1] - 1 - lax.axis_index("tile")
    own = lax.axis_index("warpgroup")
    tile_T, (stages, tile_S, C), dtype = q_smem.shape[0], k_smem.shape, q_smem.dtype
    ranges = tuple(ranges_ref[batch, tile, n] for n in range(4))
    first, _, _, end = ranges

    def slot_of(block):
        return lax.rem(block - first, jnp.int32(stages))

    @pl.when(own == CONSUMERS)
    def load():
        plgpu.set_max_registers(24, action="decrease")
        plgpu.copy_gmem_to_smem(q_ref.at[batch, pl.ds(tile * tile_T, tile_T), head], q_smem, q_full)
        kv_head = lax.div(head, jnp.int32(q_ref.shape[2] // k_ref.shape[2]))

        @pl.loop(first, end)
        def _(block):
            slot = slot_of(block)
            rows = (batch, pl.ds(block * tile_S, tile_S), kv_head)
            tiles.wait_until_free(k_free, slot, block - first)
            plgpu.copy_gmem_to_smem(k_ref.at[rows], k_smem.at[slot], k_full.at[slot])
            tiles.wait_until_free(v_free, slot, block - first)
            plgpu.copy_gmem_to_smem(v_ref.at[rows], v_smem.at[slot], v_full.at[slot])

        tiles.drain(k_free, end - first)
        tiles.drain(v_free, end - first)

    @pl.when(own < CONSUMERS)
    def compute():
        plgpu.set_max_registers(240, action="increase")
        rows = pl.ds(own * WARPGROUP, WARPGROUP)
        t = tile * tile_T + own * WARPGROUP
        shape = (WARPGROUP, tile_S)
        masks = Masks(settings, segment_ref, batch, shape, query_axis=0)
        words = tiles.load_words(words_refs, batch, head, t)

        def softmax(scores, block, highest, total):
            """Probabilities, their row maximum and sum so far, and what rescales older sums."""
            scores, factor, _ = tiles.capped(scores, settings)
            scores = masks.hide(scores, t, block * tile_S, block, ranges)
            new = jnp.maximum(highest, scores.max(axis=1) * factor)
            # A row without a key so far keeps -inf; it is shifted by 0, for exp2(-inf) = 0.
            shift = jnp.where(new == -jnp.inf, 0.0, new)
            probs = jnp.exp2(scores * factor - lax.broadcast_in_dim(shift, shape, [0]))
            rescale = jnp.exp2(highest - shift)
            total = total * rescale + probs.sum(axis=1)
            if words is not None:
                probs = jnp.where(masks.keep(words, block * tile_S), probs, 0.0)
            return probs, new, total, rescale

        def take_turn():
            plgpu.barrier_wait(turn.at[own])

        def give_turn():
            plgpu.barrier_arrive(turn.at[1 - own])

        def per_query(value):
            return plgpu.layout_cast(jnp.full(WARPGROUP, value, jnp.float32), LAYOUT.reduce(1))

        pl.when(own == 1)(give_turn)
        plgpu.barrier_wait(q_full)
        plgpu.barrier_wait(k_full.at[0])

        def first_scores(scores_acc):
            take_turn()
            plgpu.wgmma(scores_acc, q_smem.at[rows], k_smem.at[0].T)
            give_turn()
            return scores_acc[...]

        scores = pl.run_scoped(first_scores, plgpu.ACC(shape, jnp.float32))
        plgpu.barrier_arrive(k_free.at[0])
        probs, highest, total, _ = softmax(scores, first, per_query(-jnp.inf), per_query(0))
        probs = probs.astype(dtype)
        out = tiles.zeros((WARPGROUP, C))

        def step(block, carry):
            """Scores of `block`, values of the block before."""
            out, probs, highest, total = carry
            slot, before = slot_of(block), slot_of(block - 1)
            plgpu.barrier_wait(k_full.at[slot])
            plgpu.barrier_wait(v_full.at[before])
            left = tiles.operand(probs, stage)

            def multiply(scores_acc, out_acc):
                tiles.start(out_acc, out, settings.interpret)
                take_turn()
                plgpu.wgmma(scores_acc, q_smem.at[rows], k_smem.at[slot].T)
                plgpu.wgmma(out_acc, left, v_smem.at[before])
                give_turn()
                scores = plgpu.wgmma_accumulator_load(scores_acc, wait_n=1)
                plgpu.barrier_arrive(k_free.at[slot])
                result = softmax(scores, block, highest, total)
                return *result, tiles.finish(out_acc, out, settings.interpret)

            probs, highest, total, rescale, new = pl.run_scoped(
                multiply, plgpu.ACC(shape, jnp.float32), plgpu.ACC(out.shape, jnp.float32)
            )
            plgpu.barrier_arrive(v_free.at[before])
            out = new * lax.broadcast_in_dim(rescale, out.shape, [0])
            probs = lax.optimization_barrier(probs).astype(dtype)
            return out, probs, highest, total

        out, probs, highest, total = lax.fori_loop(
            first + 1, end, step, (out, probs, highest, total)
        )
        last = slot_of(end - 1)
        plgpu.barrier_wait(v_full.at[last])
        left = tiles.operand(probs, stage)

        def last_values(out_acc):
            tiles.start(out_acc, out, settings.interpret)
            take_turn()
            plgpu.wgmma(out_acc, left, v_smem.at[last])
            give_turn()
            return tiles.finish(out_acc, out, settings.interpret)

        out = pl.run_scoped(last_values, plgpu.ACC(out.shape, jnp.float32))
        plgpu.barrier_arrive(v_free.at[last])
        pl.when(own == 0)(take_turn)

        kept = total * (1 - settings.dropout_rate)
        inverse = jnp.where(total == 0, 0.0, 1 / kept)
        q_smem[rows] = (out * lax.broadcast_in_dim(inverse, out.shape, [0])).astype(dtype)
        lse_smem[rows] = jnp.where(total == 0, -jnp.inf, (highest + jnp.log2(total)) * (1 / LOG2E))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[rows], out_ref.at[batch, pl.ds(t, WARPGROUP), head])
        plgpu.copy_smem_to_gmem(lse_smem.at[rows], lse_ref.at[batch, head, pl.ds(t, WARPGROUP)])
        plgpu.wait_smem_to_gmem(0)
