"""Attention behind one function with named implementations.

Letters: B batch, T query positions, S key positions, H query heads, K key/value heads,
G = H / K query heads per key/value head, C head width.
"""

import jax
import jax.numpy as jnp

_MASKED = -1e30  # finite, so that a fully masked row gives no NaN; representable in bfloat16


def choose(impl: str, *, attention_dropout: float) -> tuple[str, str]:
    """The implementation that `impl` stands for on this device, and the reason.

    Args:
        impl: auto, reference or xla.
        attention_dropout: rate on the probabilities, which xla cannot do.
    """
    if impl != "auto":
        return impl, "named in the config"
    if attention_dropout:
        return "reference", "the only one with attention dropout"
    if jax.default_backend() == "cpu":
        return "reference", "as fast as xla on a cpu"
    return "xla", "fused by the compiler"


def attend(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    segment_ids_BT: jax.Array,
    impl: str,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Causal self-attention inside segments: softmax(q k' / sqrt(C)) v, as [B, T, H, C].

    Position t attends to s <= t of the same non-zero segment; where there is none (padding,
    segment 0) the output and its gradients are 0.

    Args:
        q_BTHC: queries.
        k_BSKC: keys, S = T; H must be a multiple of K.
        v_BSKC: values.
        segment_ids_BT: document number per position, 0 for padding.
        impl: reference or xla (see `choose`).
        dropout_rate: share of probabilities set to 0 (reference only).
        dropout_key: random key; None switches dropout off.
    """
    T = q_BTHC.shape[1]
    same_B1TS = segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :]
    real_B1TS = segment_ids_BT[:, None, :, None] > 0
    causal_TS = jnp.tril(jnp.ones((T, T), bool))
    mask_B1TS = same_B1TS & real_B1TS & causal_TS[None, None]
    if impl == "reference":
        out_BTHC = _reference(q_BTHC, k_BSKC, v_BSKC, mask_B1TS, dropout_rate, dropout_key)
    else:
        out_BTHC = jax.nn.dot_product_attention(
            q_BTHC, k_BSKC, v_BSKC, mask=mask_B1TS, implementation="xla"
        )
    return jnp.where(segment_ids_BT[:, :, None, None] > 0, out_BTHC, 0)


def attend_cache(
    q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, *, start: jax.Array
) -> jax.Array:
    """Causal attention of the queries of slots start, start + 1, ... to a cache: [B, T, H, C].

    The query in slot n attends to the slots up to n, in plain JAX on every device.
    """
    slots_TS = jnp.arange(k_BSKC.shape[1])[None]
    mask_TS = slots_TS <= start + jnp.arange(q_BTHC.shape[1])[:, None]
    return _reference(q_BTHC, k_BSKC, v_BSKC, mask_TS[None, None], 0.0, None)


def _reference(q_BTHC, k_BSKC, v_BSKC, mask_B1TS, dropout_rate, dropout_key) -> jax.Array:
    B, T, H, C = q_BTHC.shape
    K = k_BSKC.shape[2]
    precision = jnp.promote_types(q_BTHC.dtype, jnp.float32)
    q_BTKGC = q_BTHC.reshape(B, T, K, H // K, C) * jnp.asarray(C**-0.5, q_BTHC.dtype)
    scores_BKGTS = jnp.einsum(
        "btkgc,bskc->bkgts", q_BTKGC, k_BSKC, preferred_element_type=precision
    )
    scores_BKGTS = jnp.where(mask_B1TS[:, :, None], scores_BKGTS, _MASKED)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKC.dtype)
    probs_BKGTS = dropout(probs_BKGTS, dropout_rate, dropout_key)
    out_BTKGC = jnp.einsum("bkgts,bskc->btkgc", probs_BKGTS, v_BSKC)
    return out_BTKGC.reshape(B, T, H, C)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero each element with probability `rate` and scale the rest by 1 / (1 - rate).

    Without a key, as in evaluation, `x` is returned as it is.
    """
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)
