"""A pre-norm decoder: the dense family.

Letters of the shape suffixes, used in the whole package: B batch, T time, D model width,
H query heads, K key/value heads, C head width, F MLP width, V vocabulary, L layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax.config import ModelConfig
from lm_jax.kernels.attention import attend, attend_cache
from lm_jax.kernels.dropout import dropout
from lm_jax.kernels.linear import linear
from lm_jax.kernels.rowwise import along_last, swiglu
from lm_jax.models.layers import (
    Cache,
    Decoder,
    Linear,
    Norm,
    Read,
    gather,
    normal,
    scaled,
    zero_cache,
)
from lm_jax.models.rotary import rotary
from lm_jax.models.size import Size


class Attention(nnx.Module):
    """Causal self-attention with grouped key/value heads.

    `embedding_values` adds a linear map of the embedded tokens to the values, so that a head can
    copy a token whatever the layers before made of it (Zhou et al. 2024, arXiv 2410.17897, have
    the first layer's values instead). `head_gate` multiplies what a head found by 2 sigmoid of a
    linear map of x (Qiu et al. 2025, arXiv 2505.06708, section 3); both maps start at 0.
    """

    def __init__(self, cfg: ModelConfig, impl: str, rngs: nnx.Rngs):
        """One matrix makes queries, keys and values: [D, (H + 2 K) C]."""
        self.cfg, self.impl = cfg, impl
        D, H, C = cfg.d_model, cfg.heads, cfg.head_dim
        self.qkv = Linear(D, (H + 2 * cfg.kv_heads) * C, matrix_std(cfg, D), cfg.bias, rngs)
        out_bias = cfg.bias and cfg.bias_in != "qkv"
        self.out = Linear(H * C, D, residual_std(cfg, H * C), out_bias, rngs)
        self.q_norm = Norm(C, "rmsnorm", False, cfg.norm_eps, True) if cfg.qk_norm else None
        self.k_norm = Norm(C, "rmsnorm", False, cfg.norm_eps, True) if cfg.qk_norm else None
        self.gate = Linear(D, H, 0.0, False, rngs) if cfg.head_gate else None
        own = cfg.embedding_values
        self.embedded_norm = Norm(D, "rmsnorm", False, cfg.norm_eps) if own else None
        self.embedded_values = Linear(D, cfg.kv_heads * C, 0.0, False, rngs) if own else None

    def __call__(
        self, x_BTD, read: Read, draw, cache=None
    ) -> tuple[jax.Array, Cache | None, tuple[jax.Array, jax.Array]]:
        """Attend inside segments, or to the cache; `draw` switches dropout on.

        Returns the output, the longer cache, and the queries [B, T, H, C] and keys [B, T, K, C].
        """
        cfg = self.cfg
        B, T, _ = x_BTD.shape
        lengths = [heads * cfg.head_dim for heads in (cfg.heads, cfg.kv_heads, cfg.kv_heads)]
        qkv_BTNC = self.qkv.apart(x_BTD, *lengths).reshape(B, T, -1, cfg.head_dim)
        K = qkv_BTNC.shape[2] * cfg.kv_heads // (cfg.heads + 2 * cfg.kv_heads)
        q, k, v = jnp.split(qkv_BTNC, (qkv_BTNC.shape[2] - 2 * K, qkv_BTNC.shape[2] - K), axis=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if cfg.positions == "rotary":
            q, k = (rotary(x, read.positions_BT, cfg.rope_theta, cfg.rope_scaling) for x in (q, k))
        if self.embedded_norm is not None and self.embedded_values is not None:
            tokens_BTD = self.embedded_norm(read.embedded_BTD)
            v = v + self.embedded_values.apart(tokens_BTD, lengths[2]).reshape(v.shape)
        if cache is not None:
            cache, k_BKSC, v_BKSC = cache.append(k, v)
            if cfg.key_offset:
                k_BKSC = offset_keys(k_BKSC, cache.positions()[:, None])
            y_BTHC = attend_cache(q, k_BKSC, v_BKSC, mask_BTS=cache.mask(T, cfg.window))
        else:
            if cfg.key_offset:
                k = offset_keys(k.swapaxes(1, 2), read.positions_BT[:, None]).swapaxes(1, 2)
            y_BTHC = attend(
                q,
                k,
                v,
                segment_ids_BT=read.segment_ids_BT,
                impl=self.impl,
                window=cfg.window or None,
                dropout_rate=cfg.attention_dropout,
                draw=draw,
                finite_padding=True,
            )
        if self.gate is not None:
            y_BTHC = y_BTHC * (2 * jax.nn.sigmoid(self.gate.apart(x_BTD, cfg.heads)))[..., None]
        return self.out.together(y_BTHC.reshape(B, T, -1)), cache, (q, k)


def offset_keys(k_BKTC: jax.Array, positions_B1T: jax.Array) -> jax.Array:
    """Keys whose slower half of the rotary pairs is that of the token before in the document.

    A query then finds what followed a token like its own with one layer, not two (as in
    the modded-nanogpt speedruns). The first token keeps its key.
    """
    C = k_BKTC.shape[-1]
    by_one = (0, 0, 0), (0, 0, 0), (1, -1, 0), (0, 0, 0)
    before_BKTC = jax.lax.pad(k_BKTC, jnp.zeros((), k_BKTC.dtype), by_one)
    slower_111C = along_last(jnp.arange(C) % (C // 2) >= C // 4, k_BKTC)
    return jnp.where((positions_B1T > 0)[..., None] & slower_111C, before_BKTC, k_BKTC)


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020), GELU (Hendrycks and Gimpel 2016) or squared ReLU (So 2021).

    gelu is exact; gelu_tanh is its approximation in the same paper, section 2.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        """For swiglu one matrix makes gate and value: [D, 2 F]."""
        self.kind = cfg.mlp
        self.lengths = (cfg.d_ff,) * (2 if cfg.mlp == "swiglu" else 1)
        bias = cfg.bias and cfg.bias_in == "all"
        self.up = Linear(cfg.d_model, sum(self.lengths), matrix_std(cfg, cfg.d_model), bias, rngs)
        self.down = Linear(cfg.d_ff, cfg.d_model, residual_std(cfg, cfg.d_ff), bias, rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Apply position by position."""
        y = self.up.apart(x_BTD, *self.lengths)
        if self.kind == "swiglu":
            return self.down.together(swiglu(y))
        if self.kind == "relu2":
            return self.down.together(jnp.square(jax.nn.relu(y)))
        return self.down.together(jax.nn.gelu(y, approximate=self.kind == "gelu_tanh"))


class Observed(NamedTuple):
    """What a layer computes; `Decoder.observed` adds the axis of layers."""

    x_LBTD: jax.Array  # the residual stream after it
    q_LBTHC: jax.Array
    k_LBTKC: jax.Array


class Block(nnx.Module):
    """x + attention(norm x), then x + mlp(norm x).

    With `embedding_skip` x is first a x + b x0, x0 the embedded tokens; a starts at 1, b at 0.
    """

    def __init__(self, cfg: ModelConfig, impl: str, rngs: nnx.Rngs):
        """Build one layer."""
        self.rate = cfg.dropout
        self.attention_norm = Norm(cfg.d_model, cfg.norm, cfg.bias, cfg.norm_eps)
        self.attention = Attention(cfg, impl, rngs)
        self.mlp_norm = Norm(cfg.d_model, cfg.norm, cfg.bias, cfg.norm_eps)
        self.mlp = MLP(cfg, rngs)
        self.skip = nnx.Param(jnp.array([1.0, 0.0])) if cfg.embedding_skip else None

    def __call__(
        self, x_BTD, read: Read, draw, cache=None
    ) -> tuple[jax.Array, Cache | None, Observed]:
        """Apply the layer, see `Decoder`; `draw` switches dropout on."""
        if self.skip is not None:
            a, b = self.skip[...]
            x_BTD = scaled(x_BTD, a) + scaled(read.embedded_BTD, b)
        probs, branch, mlp = (None,) * 3 if draw is None else draw.split(3)
        y, cache, (q, k) = self.attention(self.attention_norm(x_BTD), read, probs, cache)
        x_BTD = x_BTD + dropout(y, self.rate, branch)
        x_BTD = x_BTD + dropout(self.mlp(self.mlp_norm(x_BTD)), self.rate, mlp)
        return x_BTD, cache, Observed(x_BTD, q, k)


class Transformer(Decoder):
    """The dense decoder.

    With a tied head and factorised embeddings its hidden states have the rank of the table.
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
        """Draw all parameters in float32.

        Args:
            cfg: a resolved model config.
            vocab_size: V, rows of the token table.
            max_len: rows of the position table, if there is one.
            impl: attention implementation.
            rngs: stream "params".
            segmented: see `Decoder`.
        """
        self.cfg, self.segmented = cfg, segmented
        D = cfg.d_model
        rank = cfg.embedding_rank
        self.embedding = nnx.Param(normal(rngs, (vocab_size, rank or D), cfg.init_std))
        if rank:  # Lan et al. 2020 (ALBERT), section 3.1
            self.projection = nnx.Param(normal(rngs, (rank, D), rank**-0.5))
        if cfg.positions == "learned":
            self.position_embedding = nnx.Param(normal(rngs, (max_len, D), cfg.init_std))
        make = nnx.vmap(lambda key: Block(cfg, impl, nnx.Rngs(params=key)))
        self.blocks = make(jax.random.split(rngs.params(), cfg.layers))
        self.final_norm = Norm(D, cfg.norm, cfg.bias, cfg.norm_eps)
        if not cfg.tied:
            self.head = Linear(D, vocab_size, matrix_std(cfg, D), False, rngs)

    def gather(self, dtype: jnp.dtype) -> None:
        """Make tables and head whole."""
        D, rank = self.cfg.d_model, self.cfg.embedding_rank
        for name, width in (("embedding", rank or D), ("projection", D), ("position_embedding", D)):
            if hasattr(self, name):
                gather(getattr(self, name), 1, width, dtype)
        if not self.cfg.tied:
            self.head.gather(dtype)

    def empty_cache(self, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
        """A cache for `slots` tokens in each of `rows` rows."""
        cfg = self.cfg
        return zero_cache([(rows, cfg.kv_heads, slots, cfg.head_dim)] * cfg.layers, dtype)

    def embed(self, tokens_BT, positions_BT, dtype, draw) -> jax.Array:
        """The hidden states before the first layer; `draw` switches dropout on."""
        cfg = self.cfg
        # Gather, then cast: the gradient of a table is summed in the table's float32.
        x_BTD = self.embedding[...][tokens_BT].astype(dtype)
        if cfg.embedding_rank:
            x_BTD = linear(x_BTD, self.projection[...], dtype)
        if cfg.positions == "learned":
            x_BTD = x_BTD + self.position_embedding[...][positions_BT].astype(dtype)
        return dropout(x_BTD, cfg.embedding_dropout, draw)

    def finish(self, x_BTD: jax.Array) -> jax.Array:
        """The final norm, and a projection to the rank of a tied factorised table."""
        x_BTD = self.final_norm(x_BTD)
        if self.cfg.embedding_rank and self.cfg.tied:
            x_BTD = linear(x_BTD, self.projection[...].T, x_BTD.dtype)
        return x_BTD

    def head_VD(self) -> jax.Array:
        """The matrix that turns hidden states into logits, one row per vocabulary entry."""
        return self.embedding[...] if self.cfg.tied else self.head.kernel[...].T


def matrix_std(cfg: ModelConfig, inputs: int) -> float:
    """Standard deviation of a matrix at the start."""
    return inputs**-0.5 if cfg.init == "fan_in" else cfg.init_std


def residual_std(cfg: ModelConfig, inputs: int) -> float:
    """Standard deviation of a matrix that writes to the residual stream: sqrt(2 L) less (GPT-2)."""
    return matrix_std(cfg, inputs) * (2 * cfg.layers) ** -0.5


def dense_size(cfg: ModelConfig, vocab_size: int, seq_len: int) -> Size:
    """The size of a dense model; arguments as for `models.families.size`."""
    D, H, K, C, F = cfg.d_model, cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.d_ff
    inner = 2 * F if cfg.mlp == "swiglu" else F
    matrices = D * (H + 2 * K) * C + H * C * D + D * inner + F * D
    biases = 0
    if cfg.bias:
        biases = (H + 2 * K) * C
        biases += D if cfg.bias_in != "qkv" else 0
        biases += inner + D if cfg.bias_in == "all" else 0
    norm = D * (2 if cfg.norm == "layernorm" and cfg.bias else 1)
    matrices += (D * K * C if cfg.embedding_values else 0) + (D * H if cfg.head_gate else 0)
    layer = matrices + biases + 2 * norm + (2 * C if cfg.qk_norm else 0)
    layer += (D if cfg.embedding_values else 0) + (2 if cfg.embedding_skip else 0)
    rank = cfg.embedding_rank
    table = vocab_size * rank + rank * D if rank else vocab_size * D
    head = table if cfg.tied else vocab_size * D
    products = cfg.layers * matrices + head + rank * D
    seen = min(cfg.window or seq_len, seq_len)  # by a late position; the mean is less
    scores = 2 * seen * (1 - seen / (2 * seq_len))
    return Size(
        table=table + (0 if cfg.tied else head),
        positions=seq_len * D if cfg.positions == "learned" else 0,
        blocks=cfg.layers * layer + norm,
        forward_flops=2.0 * products + 2.0 * cfg.layers * scores * H * C,
    )
