"""Which token do the logits of a position predict, and what do its attention weights sum to?"""

from typing import Any

import numpy as np
from scipy.special import logsumexp

from lm_jax.doctor import numbers, trees
from lm_jax.doctor.checks import check
from lm_jax.doctor.facts import Broken, Skip, call
from lm_jax.doctor.findings import Measure, at_most, equals, holds, note
from lm_jax.doctor.model.subject import CAUSAL, Function, Subject, Variant, moves

OFFSETS = (-2, -1, 0, 1, 2, 3)


def nats_by_offset(subject: Subject, sample: np.ndarray) -> np.ndarray:
    """Mean nats of token[t + offset] under logits[t] of every row [N, offsets]."""
    found, t = [], np.arange(sample.shape[1])
    places = [t[max(0, -k) : len(t) - max(0, k)] for k in OFFSETS]
    for first in range(0, len(sample), subject.rows):
        rows = sample[first : first + subject.rows]
        for row, z in zip(rows, subject.given.all_logits(rows), strict=True):
            # A few positions at a time: the float64 of a row with a large vocabulary is large.
            parts = np.array_split(z, 1 + (z.size >> 22))
            norm = np.concatenate([logsumexp(x.astype(np.float64), axis=-1) for x in parts])
            pairs = zip(places, OFFSETS, strict=True)
            found.append([(norm[at] - z[at, row[at + k]]).mean() for at, k in pairs])
    return np.array(found)


@check(
    "Logits of position t must be trained on token t + 1. A minimum at 0 is a missing shift, at 2 "
    "one shift too many (in the model and in the collator, say)."
)
def offset_scan(subject: Subject, sample: Any) -> list[Measure]:
    """On text of the kind it was trained on, a model predicts token t + 1 best."""
    if subject.objective != CAUSAL or not subject.trained:
        raise Skip("A scan needs a trained causal model.", "trained")
    sample = trees.as_array(sample)
    fits = sample.ndim == 2 and sample.dtype.kind in "iu" and sample.shape[1] > max(OFFSETS)
    if not fits or len(sample) < 2 or sample.min() < 0 or sample.max() >= subject.vocab_size:
        raise Broken(
            f"sample is {sample.dtype} {list(sample.shape)}; two or more rows of ids [N, T] in "
            f"[0, {subject.vocab_size}) are needed"
        )
    nats = nats_by_offset(subject, sample.astype(np.int32))
    means = dict(zip(OFFSETS, nats.mean(0).tolist(), strict=True))
    best = min(OFFSETS, key=lambda k: means[k])
    # Rows are independent, so the error of a difference comes from its spread over rows.
    rival = best if best != 1 else min((k for k in OFFSETS if k != 1), key=lambda k: means[k])
    margin = numbers.mean(nats[:, OFFSETS.index(rival)] - nats[:, OFFSETS.index(1)])
    clear = abs(margin.value) >= numbers.threshold() * margin.error
    said, grave = "offset that is predicted best", "fail" if clear else "warn"
    return [
        equals(said, best, 1, otherwise=grave, key="best"),
        holds(clear, f"nats more at {rival:+d} than at +1", str(margin), otherwise="warn"),
        *(note(f"nats of token t{k:+d}", value, key=f"t{k:+d}") for k, value in means.items()),
    ]


@check(
    "Return the probabilities of one softmax, before dropout: after it they no longer sum to 1, "
    "and a softmax of probabilities is nearly flat."
)
def attention_softmax(
    subject: Subject, attention: Function, variants: list[Variant]
) -> list[Measure]:
    """Attention probabilities are those of one softmax over the visible keys.

    Of n numbers in [0, 1] a second softmax gives at most e / (e + n - 1).
    """
    T, causal = subject.seq_len, subject.objective == CAUSAL
    visible = np.arange(1, T + 1) if causal else np.full(T, T)
    error, future, excess = 0.0, 0.0, -1.0
    for variant in variants:
        raw = variant.ask("attention", attention, subject.tokens)
        probs = call("numpy.asarray of attention", trees.as_array, raw).astype(np.float64)
        if probs.shape[-2:] != (T, T):
            raise Broken(f"attention returned shape {list(probs.shape)}, expected [..., {T}, {T}]")
        error = max(error, numbers.gap(probs.sum(-1), 1))
        future = max(future, numbers.gap(np.triu(probs, 1))) if causal else 0.0
        excess = max(excess, float((probs.max(-1) - np.e / (np.e + visible - 1))[..., 1:].max()))
    what, alone = "largest probability, above what a second softmax could give", len(variants) == 1
    flat: Any = {"otherwise": "warn", "where": "flat scores look the same"} if alone else {}
    return [
        # Each of T probabilities is rounded once, and they sum to 1.
        at_most("a sum over keys less 1", error, 4 * subject.precision.unit, key="error"),
        at_most("largest probability of a later position", future, 0, key="future"),
        moves(what, excess, 0, key="excess", **flat),
    ]
