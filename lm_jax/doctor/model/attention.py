"""Attention probabilities, where the model returns them: are they what a softmax gives, once?"""

from collections.abc import Iterator

import numpy as np

from lm_jax.doctor.model.subject import CAUSAL, Model, Variant
from lm_jax.doctor.old import Skip, Status, Verdict, call, check, verdict


def maps(model: Model) -> Iterator[tuple[Variant, np.ndarray]]:
    """Probabilities [..., T, T] of every variant."""
    if model.attention is None:
        raise Skip("no function that returns attention probabilities was given (attention)")
    T = model.seq_len
    for variant in model.variants:
        raw = call("attention", model.attention, *variant.leading, model.tokens.copy())
        probs = call("numpy.asarray of what attention returned", np.asarray, raw)
        if probs.shape[-2:] != (T, T):
            raise Skip(f"attention returned shape {list(probs.shape)}, expected [..., {T}, {T}]")
        yield variant, probs.astype(np.float64)


@check(
    "causality.attention_sums",
    remedy="Return the probabilities before dropout: after it they no longer sum to 1 and an "
    "entropy or a transfer loss of them is noise.",
)
def attention_sums(model: Model) -> Verdict:
    """Every query's probabilities must sum to 1, and none may lie on a later position."""
    eps = model.precision[0]
    error, future = 0.0, 0.0
    for _, probs in maps(model):
        error = max(error, float(np.abs(probs.sum(-1) - 1).max()))
        if model.objective == CAUSAL:
            future = max(future, float(np.abs(np.triu(probs, 1)).max()))
    # Each of T probabilities is rounded once, and they sum to 1.
    allowed = 4 * eps
    evidence = (
        f"Sums over keys differ from 1 by up to {error:.3g}, allowed {allowed:.2g} (rounding of "
        f"{model.precision[1]}); largest probability of a later position {future:.3g}."
    )
    return verdict(error <= allowed and future == 0, evidence, error=error, future=future)


@check(
    "causality.attention_softmax",
    remedy="The probabilities look as if they went through a softmax twice. Apply it once, and "
    "hand scores, not probabilities, to functions that apply it themselves.",
)
def attention_softmax(model: Model) -> Verdict:
    """With sharp scores some probability must exceed what a softmax of probabilities can give.

    Of n numbers in [0, 1] a softmax gives at most e / (e + n - 1).
    """
    T = model.seq_len
    excess, name = -1.0, ""
    visible = np.arange(1, T + 1) if model.objective == CAUSAL else np.full(T, T)
    for variant, probs in maps(model):
        bound = np.e / (np.e + visible - 1)
        gap = float((probs.max(-1) - bound)[..., 1:].max())
        if gap > excess:
            excess, name = gap, variant.name
    evidence = (
        f"The largest probability exceeds e / (e + n - 1) of its n visible keys by {excess:.3g} "
        f"at most ({name} parameters); after a second softmax none can exceed it."
    )
    flat: Status = "fail" if model.params is not None and not model.dropped else "warn"
    if excess <= 0 and flat == "warn":
        evidence += " Flat scores look the same; give params to tell."
    return verdict(excess > 0, evidence, otherwise=flat, excess=excess)


CHECKS = (attention_sums, attention_softmax)
