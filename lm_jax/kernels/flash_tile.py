"""What the flash attention kernels share: settings, ranges of tiles, masks, rings, products.

Letters beside those of `attention`: I tiles of queries, J tiles of keys. A tile of scores is
[queries, keys] where softmax runs along the keys and [keys, queries] in the kernel that sums over
the queries.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lm_jax.kernels import dropout

WARPGROUP = 64  # rows that one warpgroup multiplies at a time (WGMMA's M)
CONSUMERS = 2  # warpgroups that compute; one more loads
LOG2E = math.log2(math.e)
STAGES = 2  # slots in the rings of the backward pass
LAYOUT = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class Settings:
    """The static arguments of the kernels, see `lm_jax.kernels.flash.flash`."""

    length: int  # T before padding; keys from there on do not exist
    causal: bool
    window: int | None
    softcap: float
    scale: float
    dropout_rate: float
    deterministic: bool
    interpret: bool


def backward_tiles(width: int) -> tuple[int, int]:
    """Positions in a tile that stays and in those that move by, as many as registers hold."""
    return CONSUMERS * WARPGROUP, (128 if width == 64 else 64)


def block_ranges(
    segment_ids_BT: jax.Array | None, settings: Settings, batch: int, padded: int, tiles
) -> tuple[jax.Array, jax.Array]:
    """Which tiles matter: for each tile of queries a range of key tiles, and the reverse.

    A range is int32 (first, whole, masked, end): tiles [first, end) may hold visible pairs, and of
    these [whole, masked) hold nothing else, so that they need no mask. Never empty. Ids need not
    be sorted: a tile is skipped only if its ids and those of its counterpart do not overlap.

    Args:
        segment_ids_BT: document numbers padded with 0 to `padded`, or None.
        settings: what hides keys.
        batch: B.
        padded: T after padding.
        tiles: positions in a tile of queries and in a tile of keys.

    Returns:
        ranges of key tiles [B, I, 4] and ranges of query tiles [B, J, 4].
    """
    tile_T, tile_S = tiles
    first_I1 = jnp.arange(0, padded, tile_T)[:, None]
    first_1J = jnp.arange(0, padded, tile_S)[None]
    last_I1, last_1J = first_I1 + tile_T - 1, first_1J + tile_S - 1
    some_IJ = (first_1J < settings.length) & (first_I1 < settings.length)
    all_IJ = jnp.broadcast_to(last_1J < settings.length, some_IJ.shape)
    if settings.causal:
        some_IJ &= first_1J <= last_I1
        all_IJ &= last_1J <= first_I1
    if settings.window is not None:
        some_IJ &= first_I1 - last_1J < settings.window
        all_IJ &= last_I1 - first_1J < settings.window
    some_BIJ, all_BIJ = some_IJ[None], all_IJ[None]
    if segment_ids_BT is not None:
        low_BI1, high_BI1, least_BI1 = (x[:, :, None] for x in _extent(segment_ids_BT, tile_T))
        low_B1J, high_B1J, least_B1J = (x[:, None] for x in _extent(segment_ids_BT, tile_S))
        some_BIJ &= (low_BI1 <= high_B1J) & (low_B1J <= high_BI1)
        one_id = (least_BI1 == high_BI1) & (least_B1J == high_B1J) & (high_BI1 == high_B1J)
        all_BIJ &= one_id & (high_BI1 > 0)
    shape = (batch, *some_IJ.shape)
    some_BIJ, all_BIJ = jnp.broadcast_to(some_BIJ, shape), jnp.broadcast_to(all_BIJ, shape)
    return _ranges(some_BIJ, all_BIJ), _ranges(some_BIJ.swapaxes(1, 2), all_BIJ.swapaxes(1, 2))


def _extent(segment_ids_BT: jax.Array, tile: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The lowest and highest real id of each tile (an empty interval if none), and the least id."""
    ids = segment_ids_BT.reshape(segment_ids_BT.shape[0], -1, tile)
    lowest = jnp.where(ids > 0, ids, jnp.iinfo(ids.dtype).max).min(-1)
    return lowest, ids.max(-1), ids.min(-1)


def _ranges(some: jax.Array, whole: jax.Array) -> jax.Array:
    """(first, whole, masked, end) along the last axis, see `block_ranges`."""
    count = some.shape[-1]
    index = jnp.arange(count)[None, None]
    first = jnp.argmax(some, axis=-1)
    end = count - jnp.argmax(some[..., ::-1], axis=-1)
    end = jnp.where(some.any(-1), end, 1)
    start = jnp.where(whole.any(-1), jnp.argmax(whole, axis=-1), count)
    stop = jnp.where(~whole & (index >= start[..., None]), index, count).min(-1)
    return jnp.stack([first, start, stop, end], axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Masks:
    """Masks of one tile of scores: hidden and dropped."""

    settings: Settings
    segment_ref: Any  # int32 [B, T] in global memory, or None
    batch: jax.Array
    shape: tuple[int, int]  # of the tile
    query_axis: int  # 0 for [queries, keys], 1 for [keys, queries]

    def _position(self, axis: int, start) -> jax.Array:
        # Behind the barrier each use computes its own: shared ones would occupy registers for long.
        start = lax.optimization_barrier(start)
        return plgpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=LAYOUT) + start

    def _segments(self, axis: int, start) -> jax.Array:
        ids = plgpu.load(
            self.segment_ref.at[self.batch, pl.ds(start, self.shape[axis])],
            layout=LAYOUT.reduce(1 - axis),
            optimized=False,
        )
        return lax.broadcast_in_dim(ids, self.shape, [axis])

    def hide(self, scores, t, s, block, ranges) -> jax.Array:
        """The scores, -inf where the query may not see the key; whole tiles cost one comparison.

        The tile begins at query t and key s. `block` is the index of the tile that moves, `ranges`
        are those of the tile that stays, see `block_ranges`.
        """
        _, whole, masked, _ = ranges
        some_hidden = (block < whole) | (block >= masked)
        return lax.cond(some_hidden, lambda x: self._hide(x, t, s), lambda x: x, scores)

    def _hide(self, scores, t, s) -> jax.Array:
        # One condition after the other, for a mask of them all would take registers.
        settings, query_axis = self.settings, self.query_axis
        query = self._position(query_axis, t)
        key = self._position(1 - query_axis, s)
        if settings.causal:
            scores = jnp.where(key <= query, scores, -jnp.inf)
        elif self.segment_ref is None:
            scores = jnp.where(key < settings.length, scores, -jnp.inf)
        if settings.window is not None:
            scores = jnp.where(query - key < settings.window, scores, -jnp.inf)
        if self.segment_ref is not None:
            rows, columns = (s, t) if query_axis else (t, s)
            ids = self._segments(0, rows)
            scores = jnp.where(ids > 0, scores, -jnp.inf)
            scores = jnp.where(ids == self._segments(1, columns), scores, -jnp.inf)
        return scores

    def keep(self, words, s) -> jax.Array:
        """Which probabilities survive dropout, from the words of the queries."""
        words = tuple(lax.broadcast_in_dim(w, self.shape, [self.query_axis]) for w in words)
        key = self._position(1 - self.query_axis, s)
        return dropout.keep(words, key, self.settings.dropout_rate)


def capped(products: jax.Array, settings: Settings):
    """Scores from products of queries and keys: (x, factor, slope) of x * factor in powers of 2.

    slope is the derivative of the softcap, None without one. The hyperbolic tangent is accurate to
    the float32 rounding of 1; the approximate instruction would be off by 5e-4.
    """
    if not settings.softcap:
        return products, settings.scale * LOG2E, None
    power = jnp.exp2(products * (2 * LOG2E * settings.scale / settings.softcap))
    tanh = 1 - 2 / (1 + power)
    return tanh, settings.softcap * LOG2E, 1 - tanh * tanh


def load_words(refs, batch, head, t):
    """The words for dropout of the queries of a warpgroup, from global memory; None without."""
    if refs is None:
        return None
    place = (batch, head, pl.ds(t, WARPGROUP))
    return tuple(plgpu.load(r.at[place], layout=LAYOUT.reduce(1), optimized=False) for r in refs)


def kernel(body: Callable, settings: Settings, **options: Any) -> Callable:
    """`plgpu.kernel` over batch, head and tile; the last of its warpgroups is to load."""
    return plgpu.kernel(
        functools.partial(body, settings=settings),
        grid_names=("batch", "head", "tile"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if settings.interpret else False,
        **options,
    )


def shared(shape, dtype) -> Any:
    """Shared memory laid out for WGMMA and TMA: rows of 128 bytes, swizzled."""
    columns = 128 // jnp.dtype(dtype).itemsize
    tiling = plgpu.TilingTransform((8, columns))  # type: ignore[abstract]
    transforms = (tiling, plgpu.SwizzleTransform(128))  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def wait_until_free(barriers, slot, loads) -> None:
    """Wait before a slot of a ring is filled, unless it is the first time.

    Each slot has a barrier, arrived at when it is free; there were `loads` fillings before.
    """

    @pl.when(loads >= barriers.shape[0])
    def _():
        plgpu.barrier_wait(barriers.at[slot])


def drain(barriers, loads) -> None:
    """Wait at the end until every slot of a ring is free, so that no barrier is left half used."""
    for slot in range(barriers.shape[0]):

        @pl.when(slot < loads)
        def _(slot=slot):
            plgpu.barrier_wait(barriers.at[slot])


def zeros(shape) -> jax.Array:
    """A float32 accumulator of zeros in registers."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), LAYOUT)


def staging(columns: int, dtype, settings: Settings) -> Any:
    """Shared memory for `operand`, which the interpreter alone needs; else None."""
    return shared((CONSUMERS, WARPGROUP, columns), dtype) if settings.interpret else None


def operand(values: jax.Array, staging_ref):
    """The left operand of WGMMA: registers, or what `staging` gave."""
    if staging_ref is None:
        return lax.optimization_barrier(values)
    own_ref = staging_ref.at[lax.axis_index("warpgroup")]
    own_ref[...] = values
    plgpu.commit_smem()
    return own_ref


def start(acc_ref, values: jax.Array, interpret: bool) -> None:
    """Let an accumulator begin at `values`; the interpreter only knows ones that begin at 0."""
    if not interpret:
        acc_ref[...] = values


def finish(acc_ref, values: jax.Array, interpret: bool) -> jax.Array:
    """The final value of an accumulator that began at `values`."""
    return acc_ref[...] + values if interpret else acc_ref[...]
