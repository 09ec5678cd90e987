"""Distillation of what is inside a model: states, attention maps, whole rows.

Every term is a sum over weighted tokens (or rows), in float32. Teacher arrays get no gradient. E is
the width of the teacher. Where a weight is 0, the arrays may hold anything.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lm_jax import collectives
from lm_jax.kernels.chunks import scored
from lm_jax.kernels.divergences import EXCLUDED, between

CONTRAST_TEMPERATURE = 0.07  # of cosines (van den Oord et al. 2018; value of He et al. 2020)


def normalised(x: jax.Array) -> jax.Array:
    """A teacher's states in float32 with mean square 1 over the last axis, and no gradient."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def squared_error(y_BTE: jax.Array, target_BTE: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """Mean square over E of the difference; 1 for y = 0 and a normalised target.

    Of projected student states this is the hint loss (Romero et al. 2015, section 2.2).
    """
    error_BTE = scored(y_BTE.astype(jnp.float32) - target_BTE, weights_BT)
    return (jnp.square(error_BTE).mean(-1) * weights_BT).sum()


def as_deep(layers: int, teacher_layers: int) -> list[int]:
    """The teacher's layer as deep as each of so many evenly spaced ones; the last for the last."""
    return [-(-(i + 1) * teacher_layers // layers) - 1 for i in range(layers)]


def layers(
    y_LBTE: Sequence[jax.Array],
    target_LBTE: Sequence[jax.Array],
    share_L: jax.Array,
    weights_BT: jax.Array,
) -> jax.Array:
    """Squared errors of several layers, layer l with the weight softmax(share)_l.

    The weights are learned, so they move to the layers that are easiest to match.
    """
    pairs = zip(y_LBTE, target_LBTE, strict=True)
    errors = [squared_error(y, target, weights_BT) for y, target in pairs]
    return (jax.nn.softmax(share_L) * jnp.stack(errors)).sum()


def log_map(
    q_BTHC: jax.Array, k_BTKC: jax.Array, segment_ids_BT: jax.Array, window: int = 0
) -> jax.Array:
    """Logarithm of the attention of position t to s, mean over heads, [B, T, T] in float32.

    Causal, inside segments and inside a window above 0, computed with all scores; what is masked
    has about -1e30.
    """
    T, groups = q_BTHC.shape[1], q_BTHC.shape[2] // k_BTKC.shape[2]
    k_BTHC = jnp.repeat(k_BTKC, groups, axis=2)
    scores_BHTS = jnp.einsum("bthc,bshc->bhts", q_BTHC, k_BTHC, preferred_element_type=jnp.float32)
    same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None]
    mask_BTS = same_BTS & jnp.tri(T, dtype=bool)[None]
    if window:
        mask_BTS &= ~jnp.tri(T, k=-window, dtype=bool)[None]
    scores_BHTS = jnp.where(mask_BTS[:, None], scores_BHTS * q_BTHC.shape[-1] ** -0.5, EXCLUDED)
    log_BHTS = jax.nn.log_softmax(scores_BHTS)
    return jax.nn.logsumexp(log_BHTS, axis=1) - jnp.log(q_BTHC.shape[2])


def attention(student_BTS: jax.Array, teacher_BTS: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """KL(teacher || student) of two `log_map` over the keys of each query, in nats.

    As Jiao et al. 2020 (TinyBERT), section 3.1, but on probabilities and averaged over heads, so
    that the models may have different numbers of them.
    """
    teacher_BTS = scored(jax.lax.stop_gradient(teacher_BTS), weights_BT)
    student_BTS = scored(student_BTS, weights_BT)
    return (between(teacher_BTS, student_BTS, "forward", 0.5) * weights_BT).sum()


def contrastive(
    y_BTE: jax.Array, target_BTE: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """InfoNCE between the mean states of a student's and a teacher's rows, in nats per row.

    Each row of the student must find its own among the teacher's rows with a token; guessing costs
    the logarithm of their number. (Tian et al. 2020, section 3; in-batch negatives.)

    Returns:
        Summed nats, and the number of rows that are found.
    """

    def pooled(x_BTE: jax.Array) -> jax.Array:
        x_BTE = scored(x_BTE.astype(jnp.float32), weights_BT)
        x_BE = jnp.einsum("bt,bte->be", weights_BT, x_BTE)
        # A row without a token is 0 and has no direction.
        return x_BE * jax.lax.rsqrt(jnp.square(x_BE).sum(-1, keepdims=True) + 1e-12)

    there_B = weights_BT.sum(-1) > 0
    # The candidates R are the rows of all devices.
    there_R = collectives.all_rows(there_B)
    target_RE = collectives.all_rows(pooled(jax.lax.stop_gradient(target_BTE)))
    scores_BR = pooled(y_BTE) @ target_RE.T / CONTRAST_TEMPERATURE
    scores_BR = jnp.where(there_R[None], scores_BR, EXCLUDED)
    B = len(there_B)
    own_B1 = (collectives.axis_index(*collectives.ROWS) * B + jnp.arange(B))[:, None]
    own_B = jnp.take_along_axis(scores_BR, own_B1, axis=1)[:, 0]
    nats_B = jax.nn.logsumexp(scores_BR, axis=-1) - own_B
    found_B = there_B & (own_B >= scores_BR.max(-1))
    return jnp.where(there_B, nats_B, 0).sum(), found_B.sum()
