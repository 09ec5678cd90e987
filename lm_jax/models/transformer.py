"""A pre-norm decoder: the dense family.

Letters of the shape suffixes, used in the whole package: B batch, T time, D model width,
H query heads, K key/value heads, C head width, F MLP width, V vocabulary, L layers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax.config import ModelConfig
from lm_jax.kernels.attention import attend, attend_cache
from lm_jax.kernels.dropout import dropout
from lm_jax.kernels.linear import linear
from lm_jax.kernels.rowwise import along_last, normalise, swiglu

Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def normal(std: float) -> Initializer:
    """N(0, std^2) in float32."""
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


class Linear(nnx.Module):
    """y = x w + b, computed in the dtype of x."""

    def __init__(self, inputs: int, outputs: int, std: float, bias: bool, rngs: nnx.Rngs):
        """Draw w from N(0, std^2); b starts at 0."""
        self.kernel = nnx.Param(normal(std)(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros((outputs,))) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map the last axis from `inputs` to `outputs`."""
        y = linear(x, self.kernel[...], x.dtype)
        return y if self.bias is None else add_bias(y, along_last(self.bias[...], y))


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """y + bias in the dtype of y; the bias's gradient, a sum over all positions, in float32."""
    wide = jnp.promote_types(y.dtype, jnp.float32)
    return (y.astype(wide) + bias).astype(y.dtype)


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm (Ba et al. 2016), in float32 or wider."""

    def __init__(self, size: int, kind: str, bias: bool, eps: float = 1e-6):
        """Scale starts at 1, the bias of layernorm at 0; `eps` is added to the mean square."""
        self.kind, self.eps = kind, eps
        self.scale = nnx.Param(jnp.ones((size,)))
        self.bias = nnx.Param(jnp.zeros((size,))) if bias and kind == "layernorm" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise over the last axis."""
        bias = None if self.bias is None else self.bias[...]
        return normalise(x, self.scale[...], bias, self.kind == "layernorm", self.eps)


def rotary(x_BTHC: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotate pairs (i, i + C/2) by position * theta^(-2i/C) (Su et al. 2021, half-split)."""
    half = x_BTHC.shape[-1] // 2
    wide = jnp.promote_types(x_BTHC.dtype, jnp.float32)
    frequencies = theta ** (-jnp.arange(half, dtype=wide) / half)
    angles_BT1C = positions_BT[:, :, None, None].astype(wide) * along_last(frequencies, x_BTHC)
    cos, sin = (f(angles_BT1C).astype(x_BTHC.dtype) for f in (jnp.cos, jnp.sin))
    a, b = x_BTHC[..., :half], x_BTHC[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Cache(NamedTuple):
    """Keys and values of the tokens read so far, slot by slot; for decoding."""

    k_LBSKC: jax.Array
    v_LBSKC: jax.Array
    length: jax.Array  # int32, slots filled in every layer
    layer: jax.Array  # int32, the layer that appends next

    def append(self, k_BTKC: jax.Array, v_BTKC: jax.Array) -> "Cache":
        """Fill the next T slots of the layer whose turn it is."""
        at = (self.layer, 0, self.length, 0, 0)
        return self._replace(
            k_LBSKC=jax.lax.dynamic_update_slice(self.k_LBSKC, k_BTKC[None], at),
            v_LBSKC=jax.lax.dynamic_update_slice(self.v_LBSKC, v_BTKC[None], at),
            layer=self.layer + 1,
        )

    def last(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, K, C] of the layer that appended last."""
        at = self.layer - 1
        return (
            jax.lax.dynamic_index_in_dim(self.k_LBSKC, at, keepdims=False),
            jax.lax.dynamic_index_in_dim(self.v_LBSKC, at, keepdims=False),
        )


def zero_cache(shape: tuple[int, int, int, int, int], dtype: jnp.dtype) -> Cache:
    """An empty cache of keys and values [L, B, S, K, C]."""
    zero = jnp.zeros((), jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), zero, zero)


class Attention(nnx.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, cfg: ModelConfig, impl: str, rngs: nnx.Rngs):
        """One matrix makes queries, keys and values: [D, (H + 2 K) C]."""
        self.cfg, self.impl = cfg, impl
        D, C = cfg.d_model, cfg.d_model // cfg.heads
        heads = cfg.heads + 2 * cfg.kv_heads
        self.qkv = Linear(D, heads * C, matrix_std(cfg, D), cfg.bias, rngs)
        self.out = Linear(D, D, residual_std(cfg, D), cfg.bias, rngs)
        self.q_norm = Norm(C, "rmsnorm", False, cfg.norm_eps) if cfg.qk_norm else None
        self.k_norm = Norm(C, "rmsnorm", False, cfg.norm_eps) if cfg.qk_norm else None

    def __call__(
        self, x_BTD, segment_ids_BT, positions_BT, key, cache=None
    ) -> tuple[jax.Array, Cache | None, tuple[jax.Array, jax.Array]]:
        """Attend inside segments, or to the cache; `key` switches dropout on.

        Returns the output, the longer cache, and the queries [B, T, H, C] and keys [B, T, K, C].
        """
        cfg = self.cfg
        B, T, _ = x_BTD.shape
        qkv_BTNC = self.qkv(x_BTD).reshape(B, T, -1, cfg.d_model // cfg.heads)
        q, k, v = jnp.split(qkv_BTNC, (cfg.heads, cfg.heads + cfg.kv_heads), axis=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if cfg.positions == "rotary":
            q = rotary(q, positions_BT, cfg.rope_theta)
            k = rotary(k, positions_BT, cfg.rope_theta)
        if cache is not None:
            start, cache = cache.length, cache.append(k, v)
            y_BTHC = attend_cache(q, *cache.last(), start=start)
        else:
            y_BTHC = attend(
                q,
                k,
                v,
                segment_ids_BT=segment_ids_BT,
                impl=self.impl,
                dropout_rate=cfg.attention_dropout,
                dropout_key=key,
                finite_padding=True,
            )
        return self.out(y_BTHC.reshape(x_BTD.shape)), cache, (q, k)


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020), GELU (Hendrycks and Gimpel 2016) or squared ReLU (So 2021).

    gelu is exact; gelu_tanh is its approximation in the same paper, section 2.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        """For swiglu one matrix makes gate and value: [D, 2 F]."""
        self.kind = cfg.mlp
        inner = 2 * cfg.d_ff if cfg.mlp == "swiglu" else cfg.d_ff
        self.up = Linear(cfg.d_model, inner, matrix_std(cfg, cfg.d_model), cfg.bias, rngs)
        self.down = Linear(cfg.d_ff, cfg.d_model, residual_std(cfg, cfg.d_ff), cfg.bias, rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Apply position by position."""
        y = self.up(x_BTD)
        if self.kind == "swiglu":
            return self.down(swiglu(y))
        if self.kind == "relu2":
            return self.down(jnp.square(jax.nn.relu(y)))
        return self.down(jax.nn.gelu(y, approximate=self.kind == "gelu_tanh"))


class Block(nnx.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, cfg: ModelConfig, impl: str, rngs: nnx.Rngs):
        """Build one layer."""
        self.rate = cfg.dropout
        self.attention_norm = Norm(cfg.d_model, cfg.norm, cfg.bias, cfg.norm_eps)
        self.attention = Attention(cfg, impl, rngs)
        self.mlp_norm = Norm(cfg.d_model, cfg.norm, cfg.bias, cfg.norm_eps)
        self.mlp = MLP(cfg, rngs)

    def __call__(self, x_BTD, segment_ids_BT, positions_BT, key) -> jax.Array:
        """Apply the layer; `key` switches dropout on."""
        return self.with_cache(x_BTD, segment_ids_BT, positions_BT, key, None)[0]

    def with_cache(
        self, x_BTD, segment_ids_BT, positions_BT, key, cache
    ) -> tuple[jax.Array, Cache | None, tuple[jax.Array, jax.Array]]:
        """Apply the layer to tokens that continue what is in the cache, if there is one.

        Returns queries and keys besides.
        """
        probs, branch, mlp = (None,) * 3 if key is None else jax.random.split(key, 3)
        y, cache, seen = self.attention(
            self.attention_norm(x_BTD), segment_ids_BT, positions_BT, probs, cache
        )
        x_BTD = x_BTD + dropout(y, self.rate, branch)
        return x_BTD + dropout(self.mlp(self.mlp_norm(x_BTD)), self.rate, mlp), cache, seen


class Observed(NamedTuple):
    """What a layer computes, with a leading axis of layers."""

    x_LBTD: jax.Array  # the residual stream after it
    q_LBTHC: jax.Array
    k_LBTKC: jax.Array


class Transformer(nnx.Module):
    """Tokens to final hidden states; the head is applied by `logits` or inside the loss."""

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
            segmented: whether a row may hold several documents, or padding before the text. If
                not, attention needs no mask but the causal one: padding comes last, where no other
                position sees it.
        """
        self.cfg, self.segmented = cfg, segmented
        D = cfg.d_model
        table_std = normal(cfg.init_std)
        rank = cfg.embedding_rank
        self.embedding = nnx.Param(table_std(rngs.params(), (vocab_size, rank or D)))
        if rank:  # Lan et al. 2020 (ALBERT), section 3.1
            self.projection = nnx.Param(normal(rank**-0.5)(rngs.params(), (rank, D)))
        if cfg.positions == "learned":
            self.position_embedding = nnx.Param(table_std(rngs.params(), (max_len, D)))
        # One module whose parameters have a leading axis of layers, scanned or not: the optimiser
        # sees one leaf where it would see one a layer.
        make = nnx.vmap(lambda key: Block(cfg, impl, nnx.Rngs(params=key)))
        self.blocks: Any = make(jax.random.split(rngs.params(), cfg.layers))
        self.final_norm = Norm(D, cfg.norm, cfg.bias, cfg.norm_eps)
        if not cfg.tied:
            self.head = Linear(D, vocab_size, matrix_std(cfg, D), False, rngs)

    def __call__(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array,
        positions_BT: jax.Array,
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states after the final norm, [B, T, D] in `dtype`.

        With a tied head and factorised embeddings they are projected to the rank of the table.

        Args:
            tokens_BT: ids in [0, V); checked on the host, not here.
            segment_ids_BT: document per position, 0 for padding.
            positions_BT: position inside the document.
            dtype: compute dtype.
            key: random key that switches dropout on; None in evaluation.
        """
        ids_BT = segment_ids_BT if self.segmented else None
        return self._forward(tokens_BT, ids_BT, positions_BT, dtype, key, None)[0]

    def observed(
        self, tokens_BT, segment_ids_BT, positions_BT, *, dtype=jnp.float32, key=None
    ) -> tuple[jax.Array, Observed]:
        """The hidden states and what each layer computes."""
        ids_BT = segment_ids_BT if self.segmented else None
        x_BTD, _, seen = self._forward(
            tokens_BT, ids_BT, positions_BT, dtype, key, None, observe=True
        )
        return x_BTD, seen

    def extend(
        self, tokens_BT: jax.Array, cache: Cache, *, dtype: jnp.dtype
    ) -> tuple[jax.Array, Cache]:
        """The same hidden states for tokens that continue one document, and the longer cache.

        Args:
            tokens_BT: the next T tokens; the cache has free slots for them.
            cache: what went before, as returned by `empty_cache` or by this method.
            dtype: compute dtype, that of the cache.
        """
        T = tokens_BT.shape[1]
        positions_1T = cache.length + jnp.arange(T, dtype=jnp.int32)[None]
        cache = cache._replace(layer=jnp.zeros((), jnp.int32))
        x_BTD, cache, _ = self._forward(tokens_BT, None, positions_1T, dtype, None, cache)
        return x_BTD, cache._replace(length=cache.length + T)

    def empty_cache(self, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
        """A cache for `slots` tokens in each of `rows` rows."""
        cfg = self.cfg
        width = cfg.d_model // cfg.heads
        return zero_cache((cfg.layers, rows, slots, cfg.kv_heads, width), dtype)

    def _forward(self, tokens_BT, segment_ids_BT, positions_BT, dtype, key, cache, observe=False):
        cfg = self.cfg
        keys: Any = [None] * (cfg.layers + 1)
        if key is not None:
            keys = jax.random.split(key, cfg.layers + 1)
        # Gather, then cast: the gradient of a table is summed in the table's float32.
        x_BTD = self.embedding[...][tokens_BT].astype(dtype)
        if cfg.embedding_rank:
            x_BTD = linear(x_BTD, self.projection[...], dtype)
        if cfg.positions == "learned":
            x_BTD = x_BTD + self.position_embedding[...][positions_BT].astype(dtype)
        x_BTD = dropout(x_BTD, cfg.embedding_dropout, keys[-1])

        def apply(block, x_BTD, key, cache):
            x_BTD, cache, (q, k) = block.with_cache(x_BTD, segment_ids_BT, positions_BT, key, cache)
            return x_BTD, cache, Observed(x_BTD, q, k) if observe else None

        x_BTD, cache, seen = through_layers(self.blocks, cfg, x_BTD, keys[:-1], cache, apply)
        x_BTD = self.final_norm(x_BTD)
        if cfg.embedding_rank and cfg.tied:
            x_BTD = linear(x_BTD, self.projection[...].T, dtype)
        return x_BTD, cache, seen

    def head_VD(self) -> jax.Array:
        """The matrix that turns hidden states into logits, one row per vocabulary entry."""
        return self.embedding[...] if self.cfg.tied else self.head.kernel[...].T

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, V] in float32 or wider from hidden states."""
        return head_logits(x_BTD, self.head_VD(), self.cfg.logit_softcap)


def through_layers(
    blocks: Any, cfg: ModelConfig, x_BTD: jax.Array, keys: Any, cache: Any, apply: Callable
) -> tuple[jax.Array, Any, Any]:
    """Apply the layers in turn, scanned and rematerialised as the config says.

    Args:
        blocks: the layers as one module whose parameters have a leading axis of layers.
        cfg: a resolved model config.
        x_BTD: hidden states.
        keys: one random key a layer, or None for each.
        cache: what decoding carries from layer to layer, or None.
        apply: `(layer, x_BTD, key, cache) -> (x_BTD, cache, seen)`.

    Returns:
        Hidden states, cache, and what was `seen` with a leading axis of layers.
    """
    graphdef, stacked = nnx.split(blocks)

    def layer(params, x_BTD, key, cache):
        return apply(nnx.merge(graphdef, params), x_BTD, key, cache)

    layer = jax.checkpoint(layer) if cfg.remat else layer
    if cfg.scan_layers:

        def body(carry, of_layer):
            params, key = of_layer
            x_BTD, cache, seen = layer(params, carry[0], key, carry[1])
            return (x_BTD, cache), seen

        layer_keys = None if keys[0] is None else keys
        (x_BTD, cache), seen = jax.lax.scan(body, (x_BTD, cache), (stacked, layer_keys))
        return x_BTD, cache, seen
    seen = []
    for params, key in zip(unstack(stacked, cfg.layers), keys, strict=True):
        x_BTD, cache, here = layer(params, x_BTD, key, cache)
        seen.append(here)
    return x_BTD, cache, jax.tree.map(lambda *layers: jnp.stack(layers), *seen)


def unstack(stacked: Any, layers: int) -> list[Any]:
    """The parameters of each layer from those of all, which have a leading axis of layers.

    By `split`, whose gradient is one concatenation; that of an index would be a sum of as many
    padded arrays as there are layers.
    """

    def split(x: jax.Array) -> list[jax.Array]:
        return [part[0] for part in jax.lax.split(x, (1,) * layers)]

    leaves, structure = jax.tree.flatten(stacked)
    parts_by_layer = zip(*map(split, leaves), strict=True)
    return [jax.tree.unflatten(structure, parts) for parts in parts_by_layer]


def head_logits(x_BTD: jax.Array, head_VD: jax.Array, softcap: float) -> jax.Array:
    """x head' in float32 or wider, then c tanh(logits / c) where a cap c is set."""
    logits_BTV = linear(x_BTD, head_VD.T, jnp.promote_types(x_BTD.dtype, jnp.float32))
    return softcap * jnp.tanh(logits_BTV / softcap) if softcap else logits_BTV


def matrix_std(cfg: ModelConfig, inputs: int) -> float:
    """Standard deviation of a matrix at the start."""
    return inputs**-0.5 if cfg.init == "fan_in" else cfg.init_std


def residual_std(cfg: ModelConfig, inputs: int) -> float:
    """The same for a matrix that writes to the residual stream: less by sqrt(2 L) (GPT-2)."""
    return matrix_std(cfg, inputs) * (2 * cfg.layers) ** -0.5
