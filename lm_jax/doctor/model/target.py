"""What calls return: finite logits that repeat themselves, of the next token; attention."""

from typing import Any

import numpy as np
from scipy.special import logsumexp

from lm_jax.doctor import numbers, trees
from lm_jax.doctor.checks import check
from lm_jax.doctor.facts import Broken, Skip, call
from lm_jax.doctor.findings import Finding, Measure, at_most, equals, holds, note
from lm_jax.doctor.model.subject import CAUSAL, Function, Subject, Variant, Variants, change, moves

OFFSETS = (-2, -1, 0, 1, 2, 3)


@check(
    "Hand in a function of NumPy's int32 ids [B, T] that returns finite float logits [B, T, V]; "
    "a PyTorch module goes through doctor.torch_model. Nothing else was examined.",
    gate=True,
)
def output(subject: Subject) -> list[Measure]:
    """The function returns finite logits of the right shape."""
    given = subject.given
    return [
        note("largest logit", given.scale, key="scale"),
        note("dtype of the logits", str(given.dtype)),
        note("arithmetic", subject.precision.how),
    ]


@check(
    "Switch dropout and every other source of randomness off in evaluation (train=False, "
    "model.eval(), no key), and keep nothing between calls."
)
def eval_repeats(subject: Subject, output: Finding, noisy: Variant | None = None) -> Measure:
    """Without dropout, two calls of the same input give the same logits, bit by bit."""
    found = [(v.change(subject.tokens).max(), v) for v in (subject.given, noisy) if v is not None]
    gap, variant = max(found, key=lambda pair: pair[0] / pair[1].same_shape)
    # Kernels that add in random order differ by roundings; dropout by far more.
    grave, where = "fail" if gap > variant.same_shape else "warn", "as dropout left on makes it"
    what = "difference of two calls of the same input"
    return equals(what, float(gap), 0, otherwise=grave, where=where, key="change")


@check(
    "The function takes params and computes with others, of a closure or a module, so that its "
    "checks with noise are worth nothing. Use what is handed in (torch.func.functional_call)."
)
def randomised(subject: Subject, noisy: Variant) -> Measure:
    """Noise in place of all parameters, with which every check is repeated, changes the logits."""
    moved = change(noisy.base, subject.given.base).max()
    what, ignored = "change of a logit by noise for parameters", "the function ignores parameters"
    return moves(what, moved, 0, otherwise="warn", where=ignored, key="change")


@check(
    "Hand the dropout key (or train=True) down to every layer. Draw it from the seed and the "
    "number of the update alone, and the mask for the whole batch, not for one row."
)
def dropout(subject: Subject, train_fn: Function, noisy: Variant | None = None) -> list[Measure]:
    """Masks of dropout change the logits, differ by update and row, and come again when rerun."""
    # A head or a branch that starts at zero hides what is dropped before it.
    variant, tokens = noisy or subject.given, np.tile(subject.tokens[:1], (subject.rows, 1))
    off = variant.logits(tokens)
    first, again, second = (variant.logits(tokens, train_fn, i) for i in (0, 0, 1))
    updates, rows = change(first, second).max(), change(first[1:], first[:-1]).max()
    return [
        moves("change of a logit by dropout", change(first, off).max(), variant.same_shape),
        moves("difference of updates 0 and 1", updates, variant.same_shape),
        moves("difference of equal rows", rows, max(variant.same_shape, float(updates) / 4)),
        at_most("difference of update 0 run twice", float(change(first, again).max()), 0),
    ]


def nats_by_offset(subject: Subject, sample: np.ndarray) -> np.ndarray:
    """Mean nats of token[t + offset] under logits[t] of every row [N, offsets]."""
    found, t = [], np.arange(sample.shape[1])
    places = [t[max(0, -k) : len(t) - max(0, k)] for k in OFFSETS]
    for first in range(0, len(sample), subject.rows):
        rows = sample[first : first + subject.rows]
        for row, z in zip(rows, subject.given.all_logits(rows), strict=True):
            norm = logsumexp(z, axis=-1).astype(np.float64)
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
    best, second = sorted(OFFSETS, key=means.__getitem__)[:2]
    # Rows are independent, so the error of a difference comes from its spread over rows.
    rival = best if best != 1 else second
    margin = numbers.mean(nats[:, OFFSETS.index(rival)] - nats[:, OFFSETS.index(1)])
    clear = abs(margin.value) >= numbers.threshold() * margin.error
    grave = "fail" if clear else "warn"
    return [
        equals("offset that is predicted best", best, 1, otherwise=grave, key="best"),
        holds(clear, f"nats more at {rival:+d} than at +1", str(margin), otherwise="warn"),
        *(note(f"nats of token t{k:+d}", value, key=f"t{k:+d}") for k, value in means.items()),
    ]


@check(
    "Return the probabilities of one softmax, before dropout: after it they no longer sum to 1, "
    "and a softmax of probabilities is nearly flat."
)
def attention_softmax(subject: Subject, attention: Function, variants: Variants) -> list[Measure]:
    """Attention probabilities are those of one softmax over the visible keys.

    Of n numbers in [0, 1] a second softmax gives at most e / (e + n - 1).
    """
    T, causal = subject.seq_len, subject.objective == CAUSAL
    visible = np.arange(1, T + 1) if causal else T
    error, future, excess = 0.0, 0.0, -1.0
    for variant in variants:
        raw = variant.ask("attention", attention, subject.tokens)
        probs = call("numpy.asarray of attention", trees.as_array, raw).astype(np.float64)
        if probs.shape[-2:] != (T, T):
            raise Broken(f"attention returned shape {list(probs.shape)}, expected [..., {T}, {T}]")
        error = max(error, numbers.gap(probs.sum(-1), 1))
        future = max(future, numbers.gap(np.triu(probs, 1))) if causal else 0.0
        excess = max(excess, float((probs.max(-1) - np.e / (np.e + visible - 1))[..., 1:].max()))
    # Flat scores look like a second softmax; noise for parameters makes them steep.
    grave = "warn" if len(variants) == 1 else "fail"
    what = "largest probability, above what a second softmax could give"
    return [
        # Each of T probabilities is rounded once, and they sum to 1.
        at_most("a sum over keys less 1", error, 4 * subject.precision.unit, key="error"),
        at_most("largest probability of a later position", future, 0, key="future"),
        moves(what, excess, 0, key="excess", otherwise=grave),
    ]
