"""What models of every family share; letters as in `models.transformer`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax import collectives
from lm_jax.config import ModelConfig
from lm_jax.kernels.dropout import Draw
from lm_jax.kernels.linear import linear
from lm_jax.kernels.rowwise import along_last, normalise


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> jax.Array:
    """N(0, std^2) in float32."""
    return std * jax.random.normal(rngs.params(), shape, jnp.float32)


class Linear(nnx.Module):
    """y = x w + b, computed in the dtype of x."""

    def __init__(self, inputs: int, outputs: int, std: float, bias: bool, rngs: nnx.Rngs):
        """Draw w from N(0, std^2); b starts at 0."""
        self.inputs = inputs
        self.kernel = nnx.Param(normal(rngs, (inputs, outputs), std))
        self.bias = nnx.Param(jnp.zeros((outputs,))) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map the last axis from `inputs` to `outputs`."""
        w = collectives.gathered(self.kernel[...], 0, self.inputs, x.dtype)
        return self._biased(linear(x, w, x.dtype))

    def gather(self, dtype: jnp.dtype) -> None:
        """Make w whole, for a use outside of this layer."""
        gather(self.kernel, 0, self.inputs, dtype)

    def apart(self, x: jax.Array, *lengths: int) -> jax.Array:
        """The same, but each device of the axis `tensor` computes only its part of the outputs.

        `lengths` are those of the vectors that lie side by side in y; it computes a part of each.
        """
        w = collectives.columns(self.kernel[...], self.inputs, lengths, x.dtype)
        y = linear(collectives.enter_parts(x), w, x.dtype)
        return self._biased(
            y, lambda b: collectives.own_of_each(collectives.enter_parts(b), lengths)
        )

    def together(self, x: jax.Array) -> jax.Array:
        """The same, from inputs of which each device of the axis `tensor` has its part."""
        w = collectives.rows(self.kernel[...], self.inputs, x.dtype)
        return self._biased(collectives.leave_parts(linear(x, w, x.dtype)))

    def _biased(self, y: jax.Array, part: Callable[[jax.Array], jax.Array] = lambda b: b) -> Any:
        return y if self.bias is None else add_bias(y, along_last(part(self.bias[...]), y))


def gather(param: nnx.Param, axis: int, length: int, dtype: jnp.dtype) -> None:
    """Make a parameter whole; see `collectives.gathered`."""
    part = param[...]
    whole = collectives.gathered(part, axis, length, dtype)
    if whole is not part:
        param.set_value(whole)


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """y + bias in the dtype of y; the bias's gradient, a sum over all positions, in float32."""
    wide = jnp.promote_types(y.dtype, jnp.float32)
    return (y.astype(wide) + bias).astype(y.dtype)


def scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    """x times a float32 number, in the dtype of x; the number's gradient is summed in float32."""
    return (x.astype(jnp.promote_types(x.dtype, jnp.float32)) * factor).astype(x.dtype)


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm (Ba et al. 2016), in float32 or wider."""

    def __init__(self, size: int, kind: str, bias: bool, eps: float = 1e-6, by_head: bool = False):
        """Scale starts at 1, the bias of layernorm at 0; `eps` is added to the mean square.

        `by_head`: whether it normalises heads, which devices of the axis `tensor` have apart.
        """
        self.kind, self.eps, self.by_head = kind, eps, by_head
        self.scale = nnx.Param(jnp.ones((size,)))
        self.bias = nnx.Param(jnp.zeros((size,))) if bias and kind == "layernorm" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise over the last axis."""
        bias = None if self.bias is None else self.bias[...]
        scale = collectives.enter_parts(self.scale[...]) if self.by_head else self.scale[...]
        return normalise(x, scale, bias, self.kind == "layernorm", self.eps)


class Cache(NamedTuple):
    """Keys and values of the tokens read so far, slot by slot; for decoding.

    Every attention of the model has an array of each, in the order in which they are filled: that
    in front is the next, and goes to the back.
    """

    k_BKSC: tuple[jax.Array, ...]
    v_BKSC: tuple[jax.Array, ...]
    length: jax.Array  # int32, slots filled in every array
    first_B: jax.Array  # int32, the first slot of each row's text, after padding

    def append(self, k_BTKC: jax.Array, v_BTKC: jax.Array) -> tuple["Cache", jax.Array, jax.Array]:
        """Fill the next T slots of the attention whose turn it is.

        Returns the longer cache, and all keys and values [B, K, S, C] of the attention.
        """

        def filled(x_BKSC: jax.Array, new_BTKC: jax.Array) -> jax.Array:
            new_BKTC = new_BTKC.swapaxes(1, 2)
            return jax.lax.dynamic_update_slice_in_dim(x_BKSC, new_BKTC, self.length, axis=2)

        k, v = filled(self.k_BKSC[0], k_BTKC), filled(self.v_BKSC[0], v_BTKC)
        longer = self._replace(k_BKSC=(*self.k_BKSC[1:], k), v_BKSC=(*self.v_BKSC[1:], v))
        return longer, k, v

    def positions(self) -> jax.Array:
        """The position [B, S] in the text that each slot has, 0 in padding."""
        slots_1S = jnp.arange(self.k_BKSC[0].shape[2])[None]
        return jnp.maximum(slots_1S - self.first_B[:, None], 0)

    def mask(self, T: int, window: int = 0) -> jax.Array:
        """The slots [B, T, S] that the next T tokens attend to; one of padding sees padding.

        Of a window above 0 they are the last so many, the token's own included.
        """
        slots_11S = jnp.arange(self.k_BKSC[0].shape[2])[None, None]
        own_1T1 = self.length + jnp.arange(T)[None, :, None]
        first_B11 = self.first_B[:, None, None]
        seen_BTS = (slots_11S <= own_1T1) & ((slots_11S >= first_B11) | (own_1T1 < first_B11))
        return seen_BTS & (own_1T1 - slots_11S < window) if window else seen_BTS


def zero_cache(shapes: Sequence[tuple[int, int, int, int]], dtype: jnp.dtype) -> Cache:
    """An empty cache; `shapes` are those of each attention's keys, [B, K, S, C]."""
    k, v = (tuple(jnp.zeros(shape, dtype) for shape in shapes) for _ in range(2))
    return Cache(k, v, jnp.zeros((), jnp.int32), jnp.zeros(shapes[0][0], jnp.int32))


class Read(NamedTuple):
    """What every layer may read beside the states of the layer before it."""

    tokens_BT: jax.Array
    segment_ids_BT: jax.Array | None  # None: each row is one text
    positions_BT: jax.Array
    embedded_BTD: jax.Array  # the states before the first layer


class Decoder(nnx.Module):
    """Tokens to final hidden states; the head is applied by `logits` or inside the loss.

    A family sets and defines what is declared here. `blocks` is one module whose parameters have a
    leading axis of layers, scanned or not: the optimiser sees one leaf where it would see one a
    layer. A layer takes (x_BTD, a `Read`, draw, cache) and returns hidden states, the longer cache,
    and what `observed` tells of it.
    """

    cfg: ModelConfig
    # Whether a row may hold several documents, or padding before the text. If not, attention needs
    # no mask but the causal one: padding comes last, where no other position sees it.
    segmented: bool
    blocks: Any
    gather: Callable[[Any], None]  # makes the parameters outside of blocks whole, for a dtype
    embed: Callable[..., jax.Array]  # of (tokens_BT, positions_BT, dtype, draw) the first states
    finish: Callable[[jax.Array], jax.Array]  # of the last layer's states those for the head
    head_VD: Callable[[], jax.Array]
    empty_cache: Callable[[int, int, jnp.dtype], Cache]

    def __call__(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array,
        positions_BT: jax.Array,
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        draw: Draw | None = None,
    ) -> jax.Array:
        """Hidden states after the final norm, [B, T, D] in `dtype`.

        Args:
            tokens_BT: ids in [0, V); checked on the host, not here.
            segment_ids_BT: document per position, 0 for padding.
            positions_BT: position inside the document.
            dtype: compute dtype.
            draw: switches dropout on; None in evaluation.
        """
        return self._forward(tokens_BT, segment_ids_BT, positions_BT, dtype, draw)[0]

    def observed(
        self, tokens_BT, segment_ids_BT, positions_BT, *, dtype=jnp.float32, draw=None
    ) -> tuple[jax.Array, Any]:
        """The hidden states, and what each layer computes with a leading axis of layers."""
        x_BTD, _, seen = self._forward(
            tokens_BT, segment_ids_BT, positions_BT, dtype, draw, observe=True
        )
        return x_BTD, seen

    def by_layer(self) -> list[Any]:
        """The parameters of each layer, for `extend`."""
        return unstack(nnx.split(self.blocks)[1], self.cfg.layers)

    def extend(
        self, tokens_BT: jax.Array, cache: Cache, *, dtype: jnp.dtype, layers: Any = None
    ) -> tuple[jax.Array, Cache]:
        """Hidden states of tokens that continue one document, and the longer cache.

        Args:
            tokens_BT: the next T tokens; the cache has free slots for them.
            cache: what went before, as returned by `empty_cache` or by this method.
            dtype: compute dtype, that of the cache.
            layers: `by_layer()`, made once where it is called often; None: made here.
        """
        T = tokens_BT.shape[1]
        slots_1T = cache.length + jnp.arange(T, dtype=jnp.int32)[None]
        positions_BT = jnp.maximum(slots_1T - cache.first_B[:, None], 0)
        layers = layers or self.by_layer()
        x_BTD, cache, _ = self._forward(tokens_BT, None, positions_BT, dtype, None, cache, layers)
        return x_BTD, cache._replace(length=cache.length + T)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, V] in float32 or wider from hidden states."""
        return head_logits(x_BTD, self.head_VD(), self.cfg.logit_softcap)

    def _forward(
        self,
        tokens_BT,
        segment_ids_BT,
        positions_BT,
        dtype,
        draw,
        cache=None,
        layers=None,
        observe=False,
    ) -> tuple[jax.Array, Any, Any]:
        """Hidden states, the longer cache, and what was seen with a leading axis of layers.

        Layers that are given one by one are not scanned.
        """
        cfg = self.cfg
        segment_ids_BT = segment_ids_BT if self.segmented else None
        keys: Any = [None] * (cfg.layers + 1)
        if draw is not None:
            keys = jax.random.split(draw.key, cfg.layers + 1)
        graphdef, stacked = nnx.split(self.blocks)

        def layer(carry, of_layer):
            (x_BTD, cache), (params, key) = carry, of_layer
            block = nnx.merge(graphdef, params)
            here = draw and draw._replace(key=key)
            x_BTD, cache, seen = block(x_BTD, read, here, cache)
            return (x_BTD, cache), (seen if observe else None)

        if cfg.remat:
            layer = jax.checkpoint(layer)
        elif collectives.axis_size(*collectives.PARTS) > 1:
            layer = jax.checkpoint(layer, policy=collectives.kept)
        self.gather(dtype)  # once for all uses: the table may be the head too
        first = draw and draw._replace(key=keys[-1])
        x_BTD = self.embed(tokens_BT, positions_BT, dtype, first)
        read, carry = Read(tokens_BT, segment_ids_BT, positions_BT, x_BTD), (x_BTD, cache)
        if cfg.scan_layers and layers is None:
            carry, seen = jax.lax.scan(layer, carry, (stacked, None if draw is None else keys[:-1]))
        else:
            each = []
            for of_layer in zip(layers or unstack(stacked, cfg.layers), keys[:-1], strict=True):
                carry, here = layer(carry, of_layer)
                each.append(here)
            seen = jax.tree.map(lambda *layers: jnp.stack(layers), *each)
        x_BTD, cache = carry
        return self.finish(x_BTD), cache, seen


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
