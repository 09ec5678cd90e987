"""Divergences of a student's next-token distribution from a teacher's, token by token.

A divergence is taken over classes: all ids of the vocabulary, a few ids and one class for the rest,
ids that either model finds likely, or groups of ids. All of it is in float32 or wider and in
logarithms, with no epsilon and no clamp.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Kind = Literal["forward", "reverse", "jsd", "skew"]
Support = Literal["full", "top_k", "union"]
# Logarithm of the probability of what is excluded. Its exponential is 0 in every dtype and its
# difference from itself is finite, which that of -inf is not.
EXCLUDED = -1e30


class Kept(NamedTuple):
    """A teacher's distribution at one temperature, cut down to its k most likely ids."""

    ids_BTk: jax.Array  # int32, each once
    log_p_BTj: jax.Array  # of the k ids, then of all others together; j = k + 1


def over(
    taught: jax.Array | Kept, log_q: jax.Array, kind: Kind, beta: float, support: Support, k: int
) -> jax.Array:
    """Divergence over a support, see `linear_divergence`; what is kept decides on its own."""
    if not isinstance(taught, Kept) and support == "top_k":
        taught = most_likely(taught, k)
    if isinstance(taught, Kept):
        log_p, log_q = taught.log_p_BTj, with_rest(log_q, taught.ids_BTk)
    elif support == "union":
        log_p, log_q = union(taught, log_q, k)
    else:
        log_p = taught
    return between(log_p, log_q, kind, beta)


def between(log_p: jax.Array, log_q: jax.Array, kind: Kind, beta: float) -> jax.Array:
    """Divergence of the student q from the teacher p in nats, over the last axis.

    forward  KL(p || q) (Hinton et al. 2015, section 2)
    reverse  KL(q || p) (Gu et al. 2024, MiniLLM, section 2.1)
    jsd      beta KL(p || m) + (1 - beta) KL(q || m) (Agarwal et al. 2024, section 2)
    skew     KL(p || m) (Ko et al. 2024, DistiLLM, section 3.1)

    where m = beta p + (1 - beta) q.
    """
    if kind == "forward":
        return _kl(log_p, log_q)
    if kind == "reverse":
        return _kl(log_q, log_p)
    log_m = jnp.logaddexp(math.log(beta) + log_p, math.log1p(-beta) + log_q)
    if kind == "skew":
        return _kl(log_p, log_m)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _kl(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    return (jnp.exp(log_a) * (log_a - log_b)).sum(-1)


def mean_log_p(logits: Sequence[jax.Array], temperature: jax.typing.ArrayLike) -> jax.Array:
    """Logarithm of the mean of softmax(z / temperature) over the members of a teacher."""
    each = [jax.nn.log_softmax(z / temperature) for z in logits]
    if len(each) == 1:
        return each[0]
    return jax.nn.logsumexp(jnp.stack(each), axis=0) - math.log(len(each))


def most_likely(log_p: jax.Array, k: int) -> Kept:
    """The k most likely ids of a distribution and, exactly, what remains."""
    _, ids = jax.lax.top_k(log_p, k)
    return Kept(ids, with_rest(log_p, ids))


def with_rest(log_p: jax.Array, ids: jax.Array) -> jax.Array:
    """Log-probabilities of some ids, each given once, and of all others together."""
    others = jnp.put_along_axis(log_p, ids, EXCLUDED, axis=-1, inplace=False)
    picked = jnp.take_along_axis(log_p, ids, axis=-1)
    return jnp.append(picked, jax.nn.logsumexp(others, axis=-1, keepdims=True), axis=-1)


def softened(log_p: jax.Array, temperature: jax.typing.ArrayLike) -> jax.Array:
    """Logarithm of p^(1 / temperature), normalised; what is excluded stays so."""
    return jax.nn.log_softmax(jnp.where(log_p > EXCLUDED / 2, log_p / temperature, EXCLUDED))


def union(log_p: jax.Array, log_q: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Both distributions, given that an id is among the k most likely of one of the two.

    Ids as likely as the k-th belong to them.
    """

    def likely(log_a: jax.Array) -> jax.Array:
        return log_a >= jax.lax.top_k(log_a, k)[0][..., -1:]

    kept = likely(log_p) | likely(log_q)
    a, b = (jax.nn.log_softmax(jnp.where(kept, x, EXCLUDED)) for x in (log_p, log_q))
    return a, b


def grouped(log_p_NV: jax.Array, group_V: jax.Array, groups: int) -> jax.Array:
    """Log-probability of each group of ids, [N, groups], given that the id is in some group.

    Args:
        log_p_NV: distributions.
        group_V: int32, the group of each id; `groups` for an id that is in none.
        groups: number of groups.
    """

    def by_group(log_p_V: jax.Array) -> jax.Array:
        top = jax.ops.segment_max(jax.lax.stop_gradient(log_p_V), group_V, groups + 1)
        top = jnp.maximum(top, EXCLUDED)  # a group without ids
        total = jax.ops.segment_sum(jnp.exp(log_p_V - top[group_V]), group_V, groups + 1)
        there = total > 0
        return jnp.where(there, top + jnp.log(jnp.where(there, total, 1)), EXCLUDED)[:groups]

    return jax.nn.log_softmax(jax.vmap(by_group)(log_p_NV))
