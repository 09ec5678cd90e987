"""MU-SOTA: a token is an 8 x 8 matrix of 16 named 2 x 2 blocks, each updated by its own gate.

The model of github.com/PlanetDestroyyer/MU with the causal masks, and the one bijection between
matrices and blocks, that the original lacks. Letters beside those of `models.transformer`: k blocks
(16). D is 64, 16 blocks of 4 numbers.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax.config import ModelConfig
from lm_jax.kernels.attention import attend, attend_cache
from lm_jax.kernels.dropout import dropout
from lm_jax.kernels.rowwise import along_last
from lm_jax.models.layers import (
    Cache,
    Decoder,
    Linear,
    Norm,
    Read,
    add_bias,
    gather,
    normal,
    zero_cache,
)
from lm_jax.models.size import Size

BLOCKS = (  # the grid of 2 x 2 blocks, row by row; nothing in the loss ties a block to its name
    *("identity", "structure", "local context", "global context"),
    *("syntactic relation", "semantic relation", "transformation", "knowledge"),
    *("global coherence", "modality", "discourse", "frame"),
    *("position", "entity", "affect", "extension"),
)
D, K = 64, len(BLOCKS)
BLOCK_HEADS = 2  # of a block, of width 2
HEADS = K * BLOCK_HEADS  # of attention inside blocks, in one call
CROSS_HEADS = 8  # of width 8
D_FF = 256
GATE_HIDDEN = 32
UNUSED = "gate/interaction"  # end of the name of the parameters that nothing reads


def to_blocks(x: jax.Array) -> jax.Array:
    """[..., 64] of a matrix, row by row, to [..., 64] of its blocks, each row by row."""
    grid = x.reshape(*x.shape[:-1], 4, 2, 4, 2)  # block row, row in it, block column, column in it
    return jnp.swapaxes(grid, -3, -2).reshape(x.shape)


def to_matrix(x: jax.Array) -> jax.Array:
    """The inverse of `to_blocks`."""
    grid = x.reshape(*x.shape[:-1], 4, 4, 2, 2)
    return jnp.swapaxes(grid, -3, -2).reshape(x.shape)


def glorot(inputs: int, outputs: int) -> float:
    """Standard deviation of a matrix at the start (Glorot and Bengio 2010, equation 16)."""
    return (2 / (inputs + outputs)) ** 0.5


class BlockLinear(nnx.Module):
    """A linear map of its own for each block."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        """Draw w; b starts at 0."""
        self.kernel = nnx.Param(normal(rngs, (K, inputs, outputs), glorot(inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros((K, outputs)))

    def __call__(self, x_BTkI: jax.Array) -> jax.Array:
        """Map [B, T, 16, inputs] to [B, T, 16, outputs]."""
        y_BTkO = jnp.einsum("btki,kio->btko", x_BTkI, self.kernel[...].astype(x_BTkI.dtype))
        return add_bias(y_BTkO, self.bias[...][None, None])


class Within(nnx.Module):
    """Causal self-attention of every block with itself over time; 32 heads in one call."""

    def __init__(self, impl: str, rngs: nnx.Rngs):
        """16 attentions of width 4."""
        self.impl = impl
        self.qkv = BlockLinear(4, 12, rngs)
        self.out = BlockLinear(4, 4, rngs)

    def __call__(self, x_BTD, segment_ids_BT, cache) -> tuple[jax.Array, Cache | None]:
        """Attend inside segments, or to the cache."""
        B, T, _ = x_BTD.shape
        qkv = self.qkv(x_BTD.reshape(B, T, K, 4)).reshape(B, T, K, 3, BLOCK_HEADS, -1)
        q, k, v = (qkv[:, :, :, i].reshape(B, T, K * BLOCK_HEADS, -1) for i in range(3))
        if cache is not None:
            cache, *kv = cache.append(k, v)
            y = attend_cache(q, *kv, mask_BTS=cache.mask(T))
        else:
            y = attend(q, k, v, segment_ids_BT=segment_ids_BT, impl=self.impl)
        return self.out(y.reshape(B, T, K, 4)).reshape(x_BTD.shape), cache


class Across(nnx.Module):
    """Causal self-attention over time of all blocks together, and the entropy of its weights."""

    def __init__(self, rngs: nnx.Rngs):
        """8 heads of width 8."""
        self.qkv = Linear(D, 3 * D, glorot(D, 3 * D), True, rngs)
        self.out = Linear(D, D, glorot(D, D), True, rngs)

    def __call__(
        self, x_BTD, segment_ids_BT, positions_BT, cache
    ) -> tuple[jax.Array, jax.Array, Cache | None]:
        """The output, the entropy [B, T] as a share of its maximum, and the longer cache."""
        B, T, _ = x_BTD.shape
        q, k, v = jnp.split(self.qkv(x_BTD).reshape(B, T, 3 * CROSS_HEADS, -1), 3, axis=2)
        if cache is not None:
            cache, *kv = cache.append(k, v)
            k, v = (x_BHSC.swapaxes(1, 2) for x_BHSC in kv)
            mask_BTS = cache.mask(T)
        else:
            mask_BTS = jnp.tri(T, dtype=bool)[None]
        if segment_ids_BT is not None:
            mask_BTS &= segment_ids_BT[:, :, None] == segment_ids_BT[:, None]
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        scores_BHTS = jnp.einsum("bthc,bshc->bhts", q, k, preferred_element_type=wide)
        scores_BHTS = jnp.where(mask_BTS[:, None], scores_BHTS * q.shape[-1] ** -0.5, -jnp.inf)
        probs_BHTS = jax.nn.softmax(scores_BHTS, axis=-1)
        y_BTHC = jnp.einsum("bhts,bshc->bthc", probs_BHTS.astype(v.dtype), v)
        entropy_BT = normalised_entropy(probs_BHTS.mean(1), positions_BT)
        return self.out(y_BTHC.reshape(x_BTD.shape)), entropy_BT, cache


def normalised_entropy(probs_BTS: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """-sum_s a_ts ln(a_ts + 1e-9) / ln(t + 1), and 0 at t = 0; t is the position in a document."""
    entropy_BT = -(probs_BTS * jnp.log(probs_BTS + 1e-9)).sum(-1)
    most_BT = jnp.log(jnp.maximum(positions_BT, 1) + 1.0).astype(entropy_BT.dtype)
    return jnp.where(positions_BT > 0, entropy_BT / most_BT, 0)


class Gate(nnx.Module):
    """How far each block of a token moves, from the token and the entropy of its attention."""

    def __init__(self, vocab_size: int, rate: float, rngs: nnx.Rngs):
        """A table [V, 16], an MLP from 17 to 16 numbers, and the largest values."""
        self.rate = rate
        self.affinity = nnx.Param(normal(rngs, (vocab_size, K), 0.1))
        self.up = Linear(K + 1, GATE_HIDDEN, glorot(K + 1, GATE_HIDDEN), True, rngs)
        self.down = Linear(GATE_HIDDEN, K, glorot(GATE_HIDDEN, K), True, rngs)
        self.base = nnx.Param(0.5 + normal(rngs, (K,), 0.1))
        # Nothing reads it, as in the original, whose number of parameters includes it.
        self.interaction = nnx.Param(normal(rngs, (K, K), 0.1))

    def __call__(self, tokens_BT, entropy_BT, dtype, draw) -> jax.Array:
        """The sensitivities, [B, T, 16] between 0 and the base."""
        affinity_BTk = self.affinity[...][tokens_BT].astype(dtype)
        x = jnp.concatenate([affinity_BTk, entropy_BT[..., None].astype(dtype)], axis=-1)
        hidden = dropout(jax.nn.gelu(self.up(x), approximate=False), self.rate, draw)
        s_BTk = jax.nn.sigmoid(self.down(hidden))
        return along_last(self.base[...].astype(dtype), s_BTk) * s_BTk


class Layer(nnx.Module):
    """Attention inside blocks, attention across blocks, MLP, and the gated update."""

    def __init__(self, cfg: ModelConfig, vocab_size: int, impl: str, rngs: nnx.Rngs):
        """Build one layer."""
        self.rate = cfg.dropout
        self.within = Within(impl, rngs)
        self.across = Across(rngs)
        self.across_norm = Norm(D, "layernorm", True)
        self.up = Linear(D, D_FF, glorot(D, D_FF), True, rngs)
        self.down = Linear(D_FF, D, glorot(D_FF, D), True, rngs)
        self.mlp_norm = Norm(D, "layernorm", True)
        self.gate = Gate(vocab_size, cfg.dropout, rngs)

    def __call__(self, x_BTD, read: Read, draw, cache) -> tuple[jax.Array, Cache | None, jax.Array]:
        """Apply the layer to blocks; also the longer cache and the sensitivities [B, T, 16]."""
        B, T, _ = x_BTD.shape
        of_across, of_mlp, of_gate = (None,) * 3 if draw is None else draw.split(3)
        z_BTD, cache = self.within(x_BTD, read.segment_ids_BT, cache)
        y_BTD, entropy_BT, cache = self.across(z_BTD, read.segment_ids_BT, read.positions_BT, cache)
        z_BTD = self.across_norm(z_BTD + dropout(y_BTD, self.rate, of_across))
        y_BTD = self.down(jax.nn.gelu(self.up(z_BTD), approximate=False))
        z_BTD = self.mlp_norm(z_BTD + dropout(y_BTD, self.rate, of_mlp))
        s_BTk = self.gate(read.tokens_BT, entropy_BT, x_BTD.dtype, of_gate)
        change_BTk4 = (z_BTD - x_BTD).reshape(B, T, K, 4)
        x_BTD = x_BTD + (s_BTk[..., None] * change_BTk4).reshape(x_BTD.shape)
        return x_BTD, cache, s_BTk


class MuSota(Decoder):
    """The matrix decoder; `observed` gives the sensitivities, [L, B, T, 16].

    The last of 65 hidden numbers is 1, so that the head's bias is a column of its matrix.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        vocab_size: int,
        max_len: int,
        impl: str,
        rngs: nnx.Rngs,
        *,
        segmented: bool = True,
    ):
        """Draw all parameters in float32; arguments as for `Transformer`."""
        self.cfg, self.segmented = cfg, segmented
        self.embedding = nnx.Param(normal(rngs, (vocab_size, D), cfg.init_std))
        self.position_embedding = nnx.Param(normal(rngs, (max_len, D), cfg.init_std))
        make = nnx.vmap(lambda key: Layer(cfg, vocab_size, impl, nnx.Rngs(params=key)))
        self.blocks = make(jax.random.split(rngs.params(), cfg.layers))
        self.final_norm = Norm(D, "layernorm", True)
        self.head = Linear(D, vocab_size, glorot(D, vocab_size), False, rngs)
        self.head_bias = nnx.Param(jnp.zeros((vocab_size,)))

    def gather(self, dtype: jnp.dtype) -> None:
        """Make tables and head whole."""
        for table in (self.embedding, self.position_embedding):
            gather(table, 1, D, dtype)
        self.head.gather(dtype)

    def sensitivities(self, read: Sequence[Any], weights_BT, dtype) -> tuple[jax.Array, jax.Array]:
        """The hidden states of what `__call__` reads, and sums [L, 16] over the scored tokens."""
        x_BTD, s_LBTk = self.observed(*read, dtype=dtype)
        return x_BTD, jnp.einsum("bt,lbtk->lk", weights_BT, s_LBTk)

    def empty_cache(self, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
        """A cache for `slots` tokens in each of `rows` rows."""
        within = (rows, HEADS, slots, D // HEADS)
        across = (rows, CROSS_HEADS, slots, D // CROSS_HEADS)
        return zero_cache([within, across] * self.cfg.layers, dtype)

    def embed(self, tokens_BT, positions_BT, dtype, draw) -> jax.Array:
        """The blocks before the first layer; `draw` switches dropout on."""
        x_BTD = self.embedding[...][tokens_BT] + self.position_embedding[...][positions_BT]
        return to_blocks(dropout(x_BTD.astype(dtype), self.cfg.embedding_dropout, draw))

    def finish(self, x_BTD: jax.Array) -> jax.Array:
        """The final norm of the matrices, and a 1 after each."""
        x_BTD = self.final_norm(to_matrix(x_BTD))
        return jnp.concatenate([x_BTD, jnp.ones_like(x_BTD[..., :1])], axis=-1)

    def head_VD(self) -> jax.Array:
        """The head and its bias, [V, 65]."""
        return jnp.concatenate([self.head.kernel[...].T, self.head_bias[...][:, None]], axis=1)


def musota_size(cfg: ModelConfig, vocab_size: int, seq_len: int) -> Size:
    """In all V (129 + 16 n) + 64 T + 52,640 n + 128 parameters, n the number of layers."""
    layers, F, G = cfg.layers, D_FF, GATE_HIDDEN
    within, across, gate = K * (4 * 12 + 4 * 4), D * 3 * D + D * D, (K + 1) * G + G * K
    matrices = within + across + 2 * D * F + gate
    biases = K * (12 + 4) + 4 * D + F + D + G + K
    rest = 2 * 2 * D + K + K * K  # two norms, the gate's base, the interaction
    attention = 2 * 2.0 * seq_len * D  # inside blocks and across them
    return Size(
        table=vocab_size * (D + D + 1 + layers * K),
        positions=seq_len * D,
        blocks=layers * (matrices + biases + rest) + 2 * D,
        forward_flops=2.0 * (layers * matrices + vocab_size * (D + 1)) + layers * attention,
    )
