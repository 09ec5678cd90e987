"""Distillation and cross-entropy of next-token logits that never exist as a whole."""

from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp

from lm_jax.kernels import chunks, divergences
from lm_jax.kernels.divergences import Kept, Kind, Support
from lm_jax.kernels.linear_loss import pick


class Member(NamedTuple):
    """A model whose logits x head' teach; `softcap` caps them, 0 for none."""

    x_BTE: jax.Array
    head_UE: jax.Array
    softcap: float = 0.0


class Groups(NamedTuple):
    """Ids of two vocabularies by what they have in common, see `divergences.grouped`."""

    student_V: jax.Array
    teacher_U: jax.Array
    number: int
    aligned_BT: jax.Array  # factor of each position's divergence


class Diverged(NamedTuple):
    """Sums over weighted tokens; float32 (float64 for float64 inputs)."""

    objective: jax.Array  # what to minimise; the only differentiable one
    divergence: jax.Array  # of the softened distributions, not multiplied by temperature^2
    nats: jax.Array  # plain negative log likelihood of the targets; 0 without targets
    count: jax.Array  # type: ignore[assignment]  # sum of the weights
    correct: jax.Array  # weight of the positions where no token is more likely than the target


def linear_divergence(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    teacher: Sequence[Member] | Kept,
    weights_BT: jax.Array,
    targets_BT: jax.Array | None = None,
    *,
    kind: Kind,
    temperature: jax.typing.ArrayLike = 1.0,
    beta: float = 0.5,
    kd: jax.typing.ArrayLike = 1.0,
    lm: jax.typing.ArrayLike = 0.0,
    support: Support = "full",
    top_k: int = 0,
    groups: Groups | None = None,
    softcap: float = 0.0,
    chunk_rows: int | None = None,
) -> Diverged:
    """Summed divergence of a student from its teacher, and cross-entropy, of the same logits.

        objective = sum_bt w (kd T^2 divergence + lm nats)

    where the divergence is between softmax(z / T) of both, see `divergences.between`. T^2 keeps the
    size of its gradient whatever the temperature (Hinton et al. 2015, section 2). Several members
    teach by the mean of their probabilities. Only x and head get a gradient. Dtypes as in
    `linear_cross_entropy`. Per chunk this is one product for each member and one for the student,
    and two more for the gradient.

    Args:
        x_BTD: hidden states of the student.
        head_VD: head matrix of the student.
        teacher: members over one vocabulary, the student's unless there are groups, or what is kept
            of a distribution at the given temperature.
        weights_BT: factor of each position; where it is 0, all other arrays may hold anything.
        targets_BT: next tokens, as in `linear_cross_entropy`.
        kind: which divergence.
        temperature: T, divides both logits.
        beta: the teacher's share of the mixture in `jsd` and `skew`, inside (0, 1).
        kd: factor of the divergence times T^2.
        lm: factor of the cross-entropy.
        support: full, over all ids; top_k, over the teacher's k most likely ids and one class of
            all others; union, over the ids among the k most likely of either, as if there were no
            others.
        top_k: k.
        groups: compare the probabilities of groups of ids, where the vocabularies differ. The
            temperature is then that of the groups: p and q are softmax(log P(group) / T).
        softcap: cap of the student's logits, 0 for none.
        chunk_rows: as in `linear_cross_entropy`.

    Raises:
        ValueError: the vocabularies differ, or an option is outside its range.
    """
    _check(head_VD.shape[0], teacher, kind, temperature, beta, support, top_k, groups)
    members = () if isinstance(teacher, Kept) else tuple(teacher)
    taught: Any = tuple(m.x_BTE for m in members) or teacher
    heads = tuple(chunks.head_operand(m.head_UE, m.x_BTE.dtype) for m in members)
    usual = len(members) == 1 and kind == "forward" and support == "full" and groups is None

    def score(z_NV: jax.Array, weights_N: jax.Array, rows, shared):
        taught, target_N, aligned_N = rows
        temperature, kd, lm, heads, (of_student_V, of_teacher_U) = shared

        def log_probabilities(logits: list[jax.Array], group_of_ids: jax.Array) -> jax.Array:
            if groups is None:
                return divergences.mean_log_p(logits, temperature)
            log_p = divergences.mean_log_p(logits, 1.0)
            log_p = divergences.grouped(log_p, group_of_ids, groups.number)
            return divergences.softened(log_p, temperature)

        if isinstance(taught, Kept):
            log_p: Any = taught._replace(log_p_BTj=chunks.scored(taught.log_p_BTj, weights_N))
        else:
            logits = []
            for x_NE, head, m in zip(taught, heads, members, strict=True):
                x_NE = chunks.scored(x_NE, weights_N)
                y_NU, _ = chunks.logits(x_NE, head, m.head_UE.shape[0], m.softcap)
                logits.append(y_NU.astype(z_NV.dtype))
            log_p = None if usual else log_probabilities(logits, of_teacher_U)

        def divergence(z_NV: jax.Array) -> jax.Array:
            log_q = log_probabilities([z_NV], of_student_V)
            divergence_N = divergences.over(log_p, log_q, kind, beta, support, top_k)
            return divergence_N if aligned_N is None else divergence_N * aligned_N

        if usual:
            divergence_N, dz_NV = _forward_kl(z_NV, logits[0], temperature, weights_N * kd)
        else:
            divergence_N, pull = jax.vjp(divergence, z_NV)
            (dz_NV,) = pull(weights_N * kd * temperature**2)
        objective_N = kd * temperature**2 * divergence_N
        nats_N = correct_N = jnp.zeros_like(divergence_N)
        if target_N is not None:
            nats_N, correct_N, dz_NV = _with_cross_entropy(dz_NV, z_NV, target_N, weights_N, lm)
            objective_N += lm * nats_N
        values = objective_N, divergence_N, nats_N, jnp.ones_like(nats_N), correct_N
        return tuple(weights_N * value_N for value_N in values), dz_NV

    wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
    scalars = [jnp.asarray(value, wide) for value in (temperature, kd, lm)]
    aligned_BT = None if groups is None else groups.aligned_BT
    of_ids = (None, None) if groups is None else (groups.student_V, groups.teacher_U)
    return Diverged(
        *chunks.sums(
            chunks.How(score, softcap, chunk_rows),
            x_BTD,
            head_VD,
            weights_BT,
            (taught, targets_BT, aligned_BT),
            (*scalars, heads, of_ids),
        )
    )


def _forward_kl(z_NV, y_NV, temperature, factor_N):
    """KL(p || q) and the gradient of factor T^2 times it: factor T (q - p).

    With p and q the softmax of y / T and of z / T. By hand: in three quarters of the time.
    """
    # What every logit of a row needs is computed once a row: XLA would do it for each of them.
    top_y_N, top_z_N = jax.lax.optimization_barrier((y_NV.max(1), z_NV.max(1)))
    p_NV = jnp.exp((y_NV - top_y_N[:, None]) * (1 / temperature))
    q_NV = jnp.exp((z_NV - top_z_N[:, None]) * (1 / temperature))
    sum_p_N, sum_q_N = p_NV.sum(1), q_NV.sum(1)
    apart_N = (p_NV * (y_NV - z_NV)).sum(1) / sum_p_N - (top_y_N - top_z_N)
    divergence_N = apart_N / temperature + jnp.log(sum_q_N) - jnp.log(sum_p_N)
    scale_N = factor_N * temperature
    of_q_N, of_p_N = jax.lax.optimization_barrier((scale_N / sum_q_N, scale_N / sum_p_N))
    return divergence_N, q_NV * of_q_N[:, None] - p_NV * of_p_N[:, None]


def _with_cross_entropy(dz_NV, z_NV, target_N, weights_N, lm):
    """Nats of the targets, where none is likelier, and dz with the gradient of lm nats added.

    By hand, since JAX cannot differentiate the reduction of `pick`.
    """
    target_N1, picked_N, top_N, lse_N = pick(z_NV, target_N, weights_N)
    nats_N = lse_N - picked_N
    lse_N, share_N = jax.lax.optimization_barrier((lse_N, weights_N * lm))
    is_target_NV = jnp.arange(z_NV.shape[1])[None] == target_N1
    dz_NV += jnp.exp(z_NV - lse_N[:, None]) * share_N[:, None]
    dz_NV -= jnp.where(is_target_NV, share_N[:, None], 0)
    return nats_N, picked_N >= top_N, dz_NV


def _check(V, teacher, kind, temperature, beta, support, top_k, groups) -> None:
    """Raise the errors of `linear_divergence`."""
    if kind not in get_args(Kind):
        raise ValueError(f"kind: {kind!r} is none of {', '.join(get_args(Kind))}.")
    if not 0 < beta < 1:
        raise ValueError(
            f"beta: {beta} must lie inside (0, 1); for a bound use forward or reverse."
        )
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature: {temperature} must be above 0.")
    kept = isinstance(teacher, Kept)
    for member in () if kept or groups is not None else teacher:
        if member.head_UE.shape[0] != V:
            raise ValueError(
                f"teacher: {member.head_UE.shape[0]} tokens, but the student has {V}; they must "
                "share a tokenizer or be aligned."
            )
    if not kept and support != "full" and not 0 < top_k <= V:
        raise ValueError(f"top_k: {top_k} is not between 1 and the {V} ids of the student.")
