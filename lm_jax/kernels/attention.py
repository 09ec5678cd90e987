"""Attention behind one function with named implementations.

Letters: B batch, T query positions, S key positions, H query heads, K key/value heads,
G = H / K query heads per key/value head, C head width.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lm_jax.kernels import device as devices
from lm_jax.kernels import dropout, measured
from lm_jax.kernels.blockwise import MASKED, blockwise
from lm_jax.kernels.mosaic import unavailable


def choose(
    impl: str,
    *,
    seq_len: int,
    head_dim: int,
    dtype: Any,
    segments: bool,
    attention_dropout: float = 0.0,
) -> tuple[str, str]:
    """The implementation that `impl` stands for on `device.target()`, and the reason.

    Args:
        impl: auto, or the name of an implementation of `attend`.
        seq_len: positions T of a row.
        head_dim: C.
        dtype: of queries, keys and values.
        segments: whether `attend` will be given segment ids.
        attention_dropout: rate on the probabilities.
    """
    if impl != "auto":
        return impl, "named in the config"
    device = devices.target()
    if device.platform == "cpu":
        if seq_len < 512:
            return "reference", f"faster than blockwise on a cpu at {seq_len} positions"
        if seq_len < 1024:
            return "blockwise", f"about as fast as reference on a cpu at {seq_len}, and leaner"
        return "blockwise", f"trains faster than reference on a cpu at {seq_len}, and is leaner"
    dtype = jnp.dtype(dtype)
    facts = f"{devices.describe(device)}, {dtype}, head width {head_dim}"
    sizes = seq_len, head_dim, dtype, attention_dropout
    refused = {name: refusal(name, *sizes) for name in ("cudnn", "pallas")}
    if not refused["cudnn"]:
        times = measured.times_of(device.device_kind, dtype, head_dim, seq_len, segments)
        if times is None:
            return "cudnn", facts
        faster = "cudnn" if refused["pallas"] or times.cudnn <= times.pallas else "pallas"
        return faster, f"measured: cudnn {times.cudnn} ms, pallas {times.pallas} ms; {facts}"
    why = f"cudnn {refused['cudnn'].split(';')[0]}; {facts}"
    if seq_len > 1024:
        return "blockwise", f"keeps no scores of {seq_len} x {seq_len}; {why}"
    if attention_dropout:
        return "reference", f"the one with dropout for short rows; {why}"
    return "xla", why


def refusal(impl: str, seq_len: int, head_dim: int, dtype: Any, dropout: float) -> str | None:
    """Why the causal self-attention of a model cannot run on the device, and what to do about it.

    The arguments are those of `choose`, with a name in `impl`.
    """
    q_BTHC = jax.ShapeDtypeStruct((1, seq_len, 1, head_dim), jnp.dtype(dtype))
    options = dict(softcap=0.0, dropout_rate=dropout, window=None, causal=True)
    return _refusal(impl, q_BTHC, options, False)


def attend(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    *,
    impl: str,
    causal: bool = True,
    segment_ids_BT: jax.Array | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    draw: dropout.Draw | None = None,
    return_lse: bool = False,
    finite_padding: bool = False,
) -> Any:
    """Self-attention softmax(scale q k') v as [B, T, H, C] in the dtype of the queries.

    Position t attends to s where all of these hold: s <= t, if `causal`; t - s < `window`, if there
    is one; both are in the same non-zero segment, if there are segments. Padding (segment 0) may
    hold anything, NaN too: there the output and all gradients are 0. Query head h reads key/value
    head h // G. With `return_lse` the result is the pair of the output and the log-sum-exp of the
    scores, [B, T, H] in float32 or wider, -inf in padding; it may be differentiated.

    Dropout drops the same probabilities in every implementation (see `kernels.dropout`); the
    log-sum-exp is that without dropout.

    Args:
        q_BTHC: queries.
        k_BTKC: keys; H must be a multiple of K.
        v_BTKC: values.
        impl: reference (plain JAX), xla or cudnn (`jax.nn.dot_product_attention`), blockwise (plain
            JAX, memory linear in T), pallas (flash attention for Hopper GPUs), or
            pallas_deterministic, whose gradient has the same bits in every run.
        causal: whether a position sees only itself and what is before it.
        segment_ids_BT: document number per position, 0 for padding; None for one document.
        window: number of positions seen, itself included, counted to the left; None for all.
        softcap: c > 0 turns scores z into c tanh(z / c).
        scale: factor on the products of queries and keys; C^-0.5 if None.
        dropout_rate: share of probabilities set to 0.
        draw: what is random in it; None switches dropout off.
        return_lse: whether to return the log-sum-exp as well.
        finite_padding: promises that padding holds finite numbers, and that nobody reads what comes
            out there; saves the passes over queries, keys, values and output that see to it.

    Raises:
        ValueError: for arguments that mean nothing, and where this implementation cannot do what is
            asked, with the reason.
    """
    _check(q_BTHC, k_BTKC, v_BTKC, window, softcap, dropout_rate)
    scale = q_BTHC.shape[-1] ** -0.5 if scale is None else scale
    if scale < 0:  # so that the largest product is the largest score
        q_BTHC, scale = -q_BTHC, -scale
    words_2BH = None
    if draw is not None and dropout_rate > 0:
        words_2BH = dropout.head_words(draw, q_BTHC.shape[0], q_BTHC.shape[2])
    options: dict[str, Any] = dict(
        causal=causal,
        window=window,
        softcap=softcap,
        scale=scale,
        dropout_rate=0.0 if words_2BH is None else dropout_rate,
    )
    reason = _refusal(impl, q_BTHC, options, return_lse)
    mesh = jax.sharding.get_abstract_mesh()
    if impl.startswith("pallas") and mesh.size > 1 and not mesh.manual_axes:
        reason = f"is not split over {mesh.size} devices; call it inside jax.shard_map"
    if reason:
        raise ValueError(f"attention.impl {impl} {reason}.")
    real_BT11 = None
    if segment_ids_BT is not None and not finite_padding:
        real_BT11 = segment_ids_BT[:, :, None, None] > 0
        q_BTHC, k_BTKC, v_BTKC = (jnp.where(real_BT11, x, 0) for x in (q_BTHC, k_BTKC, v_BTKC))
    inputs = (q_BTHC, k_BTKC, v_BTKC, segment_ids_BT)
    out_BTHC, lse_BTH = IMPLEMENTATIONS[impl](*inputs, words_2BH, **options)
    if real_BT11 is not None:
        out_BTHC = jnp.where(real_BT11, out_BTHC, 0)
    if lse_BTH is None or not return_lse:
        return out_BTHC
    if real_BT11 is not None:
        lse_BTH = jnp.where(real_BT11[..., 0], lse_BTH, -jnp.inf)
    return out_BTHC, lse_BTH


def attend_cache(
    q_BTHC: jax.Array, k_BKSC: jax.Array, v_BKSC: jax.Array, *, mask_BTS: jax.Array
) -> jax.Array:
    """Attention of queries to the slots of a cache that the mask leaves: [B, T, H, C].

    In plain JAX on every device. Keys and values lie head by head, so that the products read them
    as they are.
    """
    B, T, H, C = q_BTHC.shape
    K = k_BKSC.shape[1]
    wide = jnp.promote_types(q_BTHC.dtype, jnp.float32)
    q_BKNC = q_BTHC.reshape(B, T, K, H // K, C).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, C)
    scores_BKNS = jnp.einsum("bknc,bksc->bkns", q_BKNC, k_BKSC, preferred_element_type=wide)
    mask_B1NS = jnp.tile(mask_BTS, (1, H // K, 1))[:, None]
    scores_BKNS = jnp.where(mask_B1NS, scores_BKNS * C**-0.5, MASKED)
    probs_BKNS = jax.nn.softmax(scores_BKNS, axis=-1).astype(v_BKSC.dtype)
    out_BKNC = jnp.einsum("bkns,bksc->bknc", probs_BKNS, v_BKSC)
    return out_BKNC.reshape(B, K, H // K, T, C).transpose(0, 3, 1, 2, 4).reshape(q_BTHC.shape)


def _check(q_BTHC, k_BTKC, v_BTKC, window, softcap: float, dropout_rate: float) -> None:
    """Refuse arguments that no implementation can give a meaning."""
    q, k, v = q_BTHC.shape, k_BTKC.shape, v_BTKC.shape
    if k != v or (q[:2], q[3]) != (k[:2], k[3]):
        raise ValueError(
            f"q, k and v are {q}, {k} and {v}; give [B, T, H, C] and twice [B, T, K, C]."
        )
    if not q_BTHC.size:
        raise ValueError(f"q is {q}, which is empty; give at least one position.")
    if q[2] % k[2]:
        raise ValueError(
            f"{q[2]} query heads are no multiple of {k[2]} key/value heads; change kv_heads."
        )
    dtypes = q_BTHC.dtype, k_BTKC.dtype, v_BTKC.dtype
    if len(set(dtypes)) > 1:
        raise ValueError(f"q, k and v are {', '.join(map(str, dtypes))}; give all the same dtype.")
    if window is not None and window < 1:
        raise ValueError(f"A window of {window} sees nothing; choose at least 1, or None for all.")
    if softcap < 0:
        raise ValueError(f"A softcap of {softcap} turns scores around; give 0 for none, or more.")
    if not 0 <= dropout_rate < 1:
        raise ValueError(
            f"A dropout rate of {dropout_rate} is not in [0, 1); give a share below 1."
        )


def _refusal(impl: str, q_BTHC: Any, options: dict[str, Any], return_lse: bool) -> str | None:
    """Why this implementation cannot run on the device, and what to do about it."""
    if impl in ("reference", "blockwise"):
        return None
    if impl in ("pallas", "pallas_deterministic"):
        reason = unavailable(q_BTHC.dtype, q_BTHC.shape[-1])
        return reason and f"cannot run: {reason}; use blockwise"
    anything = "use reference or blockwise"
    if impl not in IMPLEMENTATIONS:
        return f"does not exist; {anything}"
    if options["softcap"]:
        return f"has no softcap; {anything}"
    if options["dropout_rate"]:
        return f"has no dropout; {anything}, or set attention_dropout to 0"
    if return_lse:
        return f"has no log-sum-exp that can be differentiated; {anything}"
    if impl == "cudnn":
        return _cudnn_refusal(q_BTHC, options)
    if q_BTHC.dtype == jnp.float64:
        return f"rounds float64 scores to float32; {anything}"
    if q_BTHC.dtype == jnp.float16 and devices.target().platform == "cpu":
        return f"cannot compute in float16 on a cpu; {anything}, or bfloat16"
    return None


def _cudnn_refusal(q_BTHC: Any, options: dict[str, Any]) -> str | None:
    C = q_BTHC.shape[-1]
    capability = devices.compute_capability(devices.target())
    if capability is None or capability < (8, 0):
        has = "" if capability is None else ", not {}.{}".format(*capability)
        return f"needs a GPU of compute capability 8.0 or more{has}; use xla or blockwise"
    if q_BTHC.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cannot compute in {q_BTHC.dtype}; use xla, or compute in bfloat16"
    if C % 8 or C > 128:
        return f"needs a head width that is a multiple of 8 up to 128, not {C}; use xla"
    if options["window"] is not None and not options["causal"]:
        return "has a window only where it is causal; use xla"
    return None


def _from_jax(impl: Any, q_BTHC, k_BTKC, v_BTKC, segment_ids_BT, _, **options):
    """Output of JAX's attention, which has neither dropout nor a log-sum-exp: None."""
    T = q_BTHC.shape[1]
    same_B1TS = sides = None
    if segment_ids_BT is not None:
        if impl == "cudnn" and T % 2:  # its gradient takes masks of even length only
            q_BTHC, k_BTKC, v_BTKC, segment_ids_BT = (
                jnp.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2))
                for x in (q_BTHC, k_BTKC, v_BTKC, segment_ids_BT)
            )
        # Padding sees padding here, so that no row is empty; `attend` discards the result.
        same_B1TS = segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :]
    if options["window"] is not None:
        sides = (options["window"] - 1, 0 if options["causal"] else T)
    out_BTHC = jax.nn.dot_product_attention(
        q_BTHC,
        k_BTKC,
        v_BTKC,
        mask=same_B1TS,
        is_causal=options["causal"],
        local_window_size=sides,
        scale=options["scale"],
        implementation=impl,
    )
    return out_BTHC[:, :T], None


def _pallas(*inputs, **options):
    from lm_jax.kernels.flash import flash  # needs a newer JAX than the rest

    return flash(*inputs, **options)


def _reference(
    q_BTHC,
    k_BTKC,
    v_BTKC,
    segment_ids_BT,
    words_2BH,
    *,
    causal,
    window,
    softcap,
    scale,
    dropout_rate,
):
    at_T = jnp.arange(q_BTHC.shape[1])
    t, s = at_T[None, None, :, None], at_T[None, None, None]
    mask_B1TS = jnp.ones((1, 1, t.size, s.size), bool)
    if causal:
        mask_B1TS &= s <= t
    if window is not None:
        mask_B1TS &= t - s < window
    if segment_ids_BT is not None:
        mask_B1TS &= segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :]
    return _masked(q_BTHC, k_BTKC, v_BTKC, mask_B1TS, words_2BH, softcap, scale, dropout_rate)


def _masked(q_BTHC, k_BSKC, v_BSKC, mask_B1TS, words_2BH, softcap, scale, dropout_rate):
    """Output and log-sum-exp under a mask that leaves every row at least one key."""
    T, H = q_BTHC.shape[1:3]
    wide = jnp.promote_types(q_BTHC.dtype, jnp.float32)
    groups = H // k_BSKC.shape[2]
    k_BSHC, v_BSHC = (x if groups == 1 else jnp.repeat(x, groups, axis=2) for x in (k_BSKC, v_BSKC))
    scores_BHTS = jnp.einsum("bthc,bshc->bhts", q_BTHC, k_BSHC, preferred_element_type=wide)
    scores_BHTS *= scale
    if softcap:
        scores_BHTS = softcap * jnp.tanh(scores_BHTS / softcap)
    scores_BHTS = jnp.where(mask_B1TS, scores_BHTS, MASKED)
    probs_BHTS = jax.nn.softmax(scores_BHTS, axis=-1).astype(v_BSHC.dtype)
    if dropout_rate:
        t_11T1 = jnp.arange(T)[None, None, :, None]
        words = dropout.query_words(words_2BH[..., None, None], t_11T1)
        keep_BHTS = dropout.keep(words, jnp.arange(T)[None, None, None], dropout_rate)
        probs_BHTS = jnp.where(keep_BHTS, probs_BHTS / (1 - dropout_rate), 0)
    out_BTHC = jnp.einsum("bhts,bshc->bthc", probs_BHTS, v_BSHC)
    return out_BTHC, jax.nn.logsumexp(scores_BHTS, axis=-1).swapaxes(1, 2)


# Functions of queries, keys, values, segment ids, words of dropout and options; output and
# log-sum-exp.
IMPLEMENTATIONS: dict[str, Callable] = {
    "reference": _reference,
    "xla": functools.partial(_from_jax, "xla"),
    "cudnn": functools.partial(_from_jax, "cudnn"),
    "blockwise": blockwise,
    "pallas": functools.partial(_pallas, deterministic=False),
    "pallas_deterministic": functools.partial(_pallas, deterministic=True),
}
