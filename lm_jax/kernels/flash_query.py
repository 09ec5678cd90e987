"""The gradient of the queries in a fixed order, for `pallas_deterministic`.

A program sums over the keys of its queries, with two products more a tile than
`flash_backward`, which adds to the gradient of the queries as its tiles finish.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lm_jax.kernels import flash_tile as tiles
from lm_jax.kernels.flash_tile import CONSUMERS, LAYOUT, STAGES, WARPGROUP, Masks, Settings


@functools.partial(jax.jit, static_argnames="settings")
def query_gradient(*inputs, settings: Settings):
    """dq in the dtype of q, summed in a fixed order.

    The inputs are those of `key_value_gradients`, with the key tiles of each query tile,
    `ranges_BI4`, in the place of `ranges_BJ4`.
    """
    q_BTHC = inputs[0]
    B, T, H, C = q_BTHC.shape
    tile_T, tile_S = tiles.backward_tiles(C)
    dtype = q_BTHC.dtype
    row = plgpu.SMEM((tile_T,), jnp.float32)
    run = tiles.kernel(
        _query_kernel,
        settings,
        out_type=jax.ShapeDtypeStruct(q_BTHC.shape, dtype),
        grid=(B, H, T // tile_T),
        scratch_types=dict(
            q_smem=tiles.shared((tile_T, C), dtype),
            dout_smem=tiles.shared((tile_T, C), dtype),
            lse_smem=row,
            delta_smem=row,
            k_smem=tiles.shared((STAGES, tile_S, C), dtype),
            v_smem=tiles.shared((STAGES, tile_S, C), dtype),
            stage=tiles.staging(tile_S, dtype, settings),
            q_full=plgpu.Barrier(num_arrivals=4),
            kv_full=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
        ),
    )
    return run(*inputs)


def _query_kernel(
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, segment_ref, words_refs, ranges_ref, dq_ref,
    *, settings: Settings,
    q_smem, dout_smem, lse_smem, delta_smem, k_smem, v_smem, stage, q_full, kv_full, free,
):  # fmt: skip
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    tile = ranges_ref.shape[1] - 1 - lax.axis_index("tile")  # most keys first
    own = lax.axis_index("warpgroup")
    (tile_T, C), tile_S, dtype = q_smem.shape, k_smem.shape[1], q_smem.dtype
    ranges = tuple(ranges_ref[batch, tile, n] for n in range(4))
    first, _, _, end = ranges

    @pl.when(own == CONSUMERS)
    def load():
        plgpu.set_max_registers(24, action="decrease")
        queries = pl.ds(tile * tile_T, tile_T)
        plgpu.copy_gmem_to_smem(q_ref.at[batch, queries, head], q_smem, q_full)
        plgpu.copy_gmem_to_smem(dout_ref.at[batch, queries, head], dout_smem, q_full)
        plgpu.copy_gmem_to_smem(lse_ref.at[batch, head, queries], lse_smem, q_full)
        plgpu.copy_gmem_to_smem(delta_ref.at[batch, head, queries], delta_smem, q_full)
        kv_head = lax.div(head, jnp.int32(q_ref.shape[2] // k_ref.shape[2]))

        @pl.loop(first, end)
        def _(block):
            slot = lax.rem(block - first, jnp.int32(STAGES))
            keys = (batch, pl.ds(block * tile_S, tile_S), kv_head)
            tiles.wait_until_free(free, slot, block - first)
            plgpu.copy_gmem_to_smem(k_ref.at[keys], k_smem.at[slot], kv_full.at[slot])
            plgpu.copy_gmem_to_smem(v_ref.at[keys], v_smem.at[slot], kv_full.at[slot])

        tiles.drain(free, end - first)

    @pl.when(own < CONSUMERS)
    def compute():
        plgpu.set_max_registers(240, action="increase")
        rows = pl.ds(own * WARPGROUP, WARPGROUP)
        t = tile * tile_T + own * WARPGROUP
        shape = (WARPGROUP, tile_S)
        masks = Masks(settings, segment_ref, batch, shape, query_axis=0)
        words = tiles.load_words(words_refs, batch, head, t)
        plgpu.barrier_wait(q_full)
        lse = plgpu.load(lse_smem.at[rows], layout=LAYOUT.reduce(1))
        delta = plgpu.load(delta_smem.at[rows], layout=LAYOUT.reduce(1))

        def step(block, dq):
            slot = lax.rem(block - first, jnp.int32(STAGES))
            plgpu.barrier_wait(kv_full.at[slot])

            def products(scores_acc, dprobs_acc):
                plgpu.wgmma(scores_acc, q_smem.at[rows], k_smem.at[slot].T)
                plgpu.wgmma(dprobs_acc, dout_smem.at[rows], v_smem.at[slot].T)
                scores = plgpu.wgmma_accumulator_load(scores_acc, wait_n=1)
                scores, factor, slope = tiles.capped(scores, settings)
                scores = masks.hide(scores, t, block * tile_S, block, ranges)
                probs = jnp.exp2(scores * factor - lax.broadcast_in_dim(lse, shape, [0]))
                dprobs = dprobs_acc[...]
                if words is not None:
                    keep = masks.keep(words, block * tile_S)
                    dprobs *= 1 / (1 - settings.dropout_rate)
                    dprobs = jnp.where(keep, dprobs, 0.0)
                dscores = probs * (dprobs - lax.broadcast_in_dim(delta, shape, [0]))
                return dscores if slope is None else dscores * slope

            score_acc = plgpu.ACC(shape, jnp.float32)
            dscores = pl.run_scoped(products, score_acc, score_acc).astype(dtype)
            left = tiles.operand(dscores, stage)

            def sums(dq_acc):
                tiles.start(dq_acc, dq, settings.interpret)
                plgpu.wgmma(dq_acc, left, k_smem.at[slot])
                return tiles.finish(dq_acc, dq, settings.interpret)

            dq = pl.run_scoped(sums, plgpu.ACC(dq.shape, jnp.float32))
            plgpu.barrier_arrive(free.at[slot])
            return dq

        dq = lax.fori_loop(first, end, step, tiles.zeros((WARPGROUP, C)))
        q_smem[rows] = (dq * settings.scale).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[rows], dq_ref.at[batch, pl.ds(t, WARPGROUP), head])
        plgpu.wait_smem_to_gmem(0)
