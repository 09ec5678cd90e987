"""Next-token loss. The only place that shifts; everything returns (sum, count)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm_jax.kernels.linear_loss import linear_cross_entropy
from lm_jax.kernels.rowwise import along_last
from lm_jax.models.layers import head_logits

Batch = dict[str, jax.Array]


class Shifted(NamedTuple):
    """A batch cut into what the model reads and what it must predict, all [B, T]."""

    inputs: jax.Array
    targets: jax.Array
    weights: jax.Array
    segment_ids: jax.Array
    positions: jax.Array


def shift(batch: Batch) -> Shifted:
    """Cut windows of T + 1 tokens into T inputs and the T tokens that follow them.

    Args:
        batch: `tokens` int32, `segment_ids` int32 and `weights` float32, all [B, T + 1];
            a weight of 0 marks a token that is never a target (a separator, padding).

    The positions restart at 0 with every segment.
    """
    segment_ids_BT = batch["segment_ids"][:, :-1]
    index_1T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)[None]
    first_BT = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (1, 0)))
    start_BT = jax.lax.cummax(jnp.where(first_BT, index_1T, 0), axis=1)
    return Shifted(
        inputs=batch["tokens"][:, :-1],
        targets=batch["tokens"][:, 1:],
        weights=batch["weights"][:, 1:],
        segment_ids=segment_ids_BT,
        positions=index_1T - start_BT,
    )


class Scored(NamedTuple):
    """Sums over scored tokens, or their terms [B, T]; float32 or wider."""

    objective: jax.Array  # what training minimises: nats, smoothed if asked for
    nats: jax.Array
    count: jax.Array  # type: ignore[assignment]
    correct: jax.Array  # where no token is more likely than the target


def choose_impl(impl: str, *, tokens: int, vocab_size: int) -> tuple[str, str]:
    """The implementation that `impl` stands for on this device, and the reason.

    Args:
        impl: auto, materialised or fused.
        tokens: targets of a micro-batch.
        vocab_size: V.
    """
    if impl != "auto":
        return impl, "named in the config"
    mebibytes = 4 * tokens * vocab_size / 2**20
    if mebibytes > 64:
        return "fused", f"{mebibytes:,.0f} MiB of logits never exist at once"
    return "materialised", f"the logits of a micro-batch take at most {math.ceil(mebibytes)} MiB"


def from_hidden(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    b: Shifted,
    *,
    softcap: float,
    impl: str,
    label_smoothing: float = 0.0,
    summed: bool = True,
) -> Scored:
    """Next-token loss of hidden states under a head matrix; `objective` can be differentiated.

    Args:
        x_BTD: final hidden states.
        head_VD: one row per vocabulary entry.
        b: what to predict.
        softcap: cap on the logits, 0 for none.
        impl: see `choose_impl`.
        label_smoothing: e in the objective -sum_v ((1 - e) [v = target] + e / V) log p_v (Szegedy
            et al. 2016, section 7); `nats` stay those of the target.
        summed: else the terms of the sums are returned, for evaluation.
    """
    impl, _ = choose_impl(impl, tokens=b.targets.size, vocab_size=head_VD.shape[0])
    if impl == "fused":
        return Scored(
            *linear_cross_entropy(
                x_BTD,
                head_VD,
                b.targets,
                b.weights,
                softcap=softcap,
                label_smoothing=label_smoothing,
                summed=summed,
            )
        )
    logits_BTV = head_logits(x_BTD, head_VD, softcap)
    nats_BT, count_BT = token_nats(logits_BTV, b.targets, b.weights)
    objective_BT = nats_BT
    if label_smoothing:
        evenly_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - logits_BTV.mean(-1)
        evenly_BT = jnp.where(b.weights > 0, evenly_BT, 0) * b.weights
        objective_BT = (1 - label_smoothing) * nats_BT + label_smoothing * evenly_BT
    right_BT = correct(logits_BTV, b.targets, b.weights)
    terms = Scored(objective_BT, nats_BT, count_BT, right_BT)
    return jax.tree.map(jnp.sum, terms) if summed else terms


def cross_entropy(
    logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Summed next-token nats and the number of scored tokens.

    sum_bt w_bt (log sum_v exp z_btv - z_bt,target) and sum_bt w_bt, in float32 or wider.

    Args:
        logits_BTV: scores, any float dtype.
        targets_BT: ids in [0, V); where the weight is 0 any id is allowed and ignored. A scored id
            outside gives NaN.
        weights_BT: 1 where the target is scored, else 0.
    """
    nats_BT, count_BT = token_nats(logits_BTV, targets_BT, weights_BT)
    return nats_BT.sum(), count_BT.sum()


def token_nats(
    logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The terms of the two sums of `cross_entropy`, [B, T]."""
    logits_BTV = logits_BTV.astype(jnp.promote_types(logits_BTV.dtype, jnp.float32))
    scored_BT = weights_BT > 0
    nats_BT = _nats(logits_BTV, jnp.where(scored_BT, targets_BT, 0))
    # `where` and not the product alone: a padded row may hold anything, 0 * inf included.
    nats_BT = jnp.where(scored_BT, nats_BT, 0)
    return nats_BT * weights_BT, weights_BT.astype(nats_BT.dtype)


@jax.custom_vjp
def _nats(logits_BTV: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """log sum_v exp z_v - z_id, with a gradient of its own: one pass where autodiff takes three."""
    return _nats_forward(logits_BTV, ids_BT)[0]


def _nats_forward(logits_BTV: jax.Array, ids_BT: jax.Array):
    highest_BT = logits_BTV.max(-1)
    exp_BTV = jnp.exp(logits_BTV - highest_BT[..., None])
    sum_BT = exp_BTV.sum(-1)
    nats_BT = jnp.log(sum_BT) + (highest_BT - _pick(logits_BTV, ids_BT))
    return nats_BT, (exp_BTV, sum_BT, ids_BT)


def _nats_backward(residuals: tuple[jax.Array, jax.Array, jax.Array], g_BT: jax.Array):
    exp_BTV, sum_BT, ids_BT = residuals
    # Otherwise XLA computes them again for each logit.
    g_BT, share_BT = jax.lax.optimization_barrier((g_BT, g_BT / sum_BT))
    dlogits_BTV = exp_BTV * share_BT[..., None]
    target_BTV = along_last(jnp.arange(exp_BTV.shape[-1]), exp_BTV) == ids_BT[..., None]
    return jnp.where(target_BTV, dlogits_BTV - g_BT[..., None], dlogits_BTV), None


_nats.defvjp(_nats_forward, _nats_backward)


def correct(logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """The weight where no token is more likely than the target, else 0, [B, T].

    The maximum is one that the loss needs anyway; an argmax would be another pass.
    """
    picked_BT = _pick(logits_BTV, jnp.where(weights_BT > 0, targets_BT, 0))
    return (picked_BT >= logits_BTV.max(-1)) * weights_BT


def _pick(logits_BTV: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """The logit of an id per position; NaN for an id outside [0, V)."""
    # A negative index would be counted from the end.
    index_BT1 = jnp.where(ids_BT < 0, logits_BTV.shape[-1], ids_BT)[..., None]
    return jnp.take_along_axis(logits_BTV, index_BT1, axis=-1, mode="fill")[..., 0]
