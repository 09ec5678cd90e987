"""Layers that models of every family share; letters as in `models.transformer`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax.config import ModelConfig
from lm_jax.kernels.linear import linear
from lm_jax.kernels.rowwise import along_last, normalise

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
