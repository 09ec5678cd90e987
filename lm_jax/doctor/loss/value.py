"""The numbers that a loss returns, and their gradients."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from lm_jax.doctor.checks import check
from lm_jax.doctor.facts import Broken, Skip
from lm_jax.doctor.findings import Measure, none, note
from lm_jax.doctor.loss.subject import NUMBERS, Batch, Errors, Subject
from lm_jax.doctor.numbers import FLOAT32_EPS, nats

EXTREME = 8192.0  # a logit far outside what exp can hold, exact in bfloat16
ROWS = 8  # that are scored at once and in parts


@check(
    "Return the sum of weight x (logsumexp(logits) - logit of the target) in nats and that of the "
    "weights; keep smoothing, class weights and auxiliary terms in another value."
)
def definition(subject: Subject) -> list[Measure]:
    """Mean nats, count and gradient are those of the definition, however rows are padded."""
    batch, (rows, length) = subject.batch(), (subject.rows, subject.length)
    index, lengths = np.arange(length), np.linspace(2, length, rows).astype(int)[:, None]
    patterns = {
        "no padding": np.ones_like(batch.weights),
        "padding on the right": index < lengths,
        "padding on the left": index >= length - lengths,
        "holes": batch.weights,
        "one token": (np.arange(rows)[:, None] == 0) & (index == 1),
    }
    flat = np.zeros_like(batch.logits)
    cases = {
        f"equal logits, {name}": Batch(flat, batch.tokens, weights.astype(np.float32))
        for name, weights in patterns.items()
    }
    for margin in (20.0, 50.0):
        known = subject.oracle(batch, subject.ahead, margin)
        cases[f"target preferred by {margin:.0f} nats"] = known
    cases["random logits"] = random = subject.weighted(subject.batch(draw=1), 1)
    row = subject.batch(1, draw=2, length=subject.full_length)
    row.weights[:] = 1
    cases[f"one row of {subject.full_length} tokens"] = row
    off = Errors()
    for name, case in cases.items():
        (_, count), (exact, scored) = subject(case), subject.expected(case)
        mean, right = subject.mean(case), exact / scored
        of = f"of {name} ({mean:.6g} for {right:.6g})"
        off.add(f"error of the mean {of}", mean, right, subject.rounding(case) / scored)
        limit = FLOAT32_EPS * case.weights.size / 2 * scored
        of = f"of {name} ({count:.6g} for {scored:.6g})"
        off.add(f"error of the count {of}", count, scored, limit)
    b, t, v = subject.places(random)
    b, t, v = (x[t < length - subject.ahead] for x in (b, t, v))
    slopes, rounding = subject.slopes(random, (b, t, v))
    target, weights = (a[b, t + subject.ahead] for a in (random.tokens, random.weights))
    exact_slopes = weights * (np.exp(-nats(random.logits[b, t], v)) - (v == target))
    off.add("error of the gradient of random logits", slopes, exact_slopes, rounding)
    return off.measures()


@check("Multiply nats by weights and count the weights, or give it no weights but 0 and 1.")
def fractional_weights(subject: Subject) -> list[Measure]:
    """Sum and count are linear in the weights; a loss of masks is not, and does no harm so far."""
    batch = subject.batch()
    part = subject.rng(5).choice(np.array([0.25, 0.5, 0.75], np.float32), batch.weights.shape)
    try:
        shares = [subject(batch._replace(weights=batch.weights * x)) for x in (part, 1 - part)]
    except Broken as refusal:
        return [note(f"weights between 0 and 1 are refused: {refusal}")]
    off = Errors()
    what = "error of sum or count with weights in two shares"
    off.add(what, sum(shares), subject(batch), 2 * subject.rounding(batch))
    return off.measures(otherwise="warn")


@check("Return plain sums, never means; divide by the count only where the update is made.")
def split(subject: Subject) -> list[Measure]:
    """Sums and counts of parts of any size add up to those of the whole."""
    batch, off = subject.batch(rows=ROWS), Errors()
    for size in (1, 7):
        parts = [subject(Batch(*(a[i : i + size] for a in batch))) for i in range(0, ROWS, size)]
        what = f"error of sum or count of {ROWS} rows, {size} at a time"
        off.add(what, np.sum(parts, axis=0), subject(batch), 3 * subject.rounding(batch))
    return off.measures()


def _draws(subject: Subject, name: str, kind: Any, rows: int, length: int) -> list[Measure]:
    """Sum and count with logits of that type, against the float64 definition."""
    off, short = Errors(), set()
    for draw in range(4):
        batch = subject.weighted(subject.batch(rows, draw=draw, length=length), draw)
        pair = subject.raw(batch._replace(logits=batch.logits.astype(kind)))
        exact = subject.expected(batch)
        limits = subject.rounding(batch), FLOAT32_EPS * (batch.weights.size / 2 + 8) * exact[1]
        for what, value, right, limit in zip(("sum", "count"), pair, exact, limits, strict=True):
            off.add(f"error of the {what}, {name}, draw {draw}", float(value), right, limit)
            short |= {str(value.dtype)} & {"bfloat16", "float16"}
    otherwise = "fail" if kind is np.float32 else "warn"
    types = none(f"short types, {name}", sorted(short), otherwise=otherwise)
    return [*off.measures(otherwise=otherwise), types]


@check("Cast logits to float32 before the log-softmax; add up nats and weights in float32.")
def dtype(subject: Subject) -> list[Measure]:
    """Sum and count are as exact as float32; of bfloat16 logits, which few meet, a warning."""
    for case in (subject.batch(1, length=4), subject.oracle(subject.batch(), subject.ahead, 20.0)):
        exact, scored = subject.expected(case)
        if not abs(subject.mean(case) - exact / scored) <= 0.1 + 0.02 * exact / scored:
            raise Skip("Waits for loss.definition: the value is wrong by more than rounding.")
    rows = max(subject.rows, min(64, NUMBERS // (16 * subject.vocab_size)))
    found = _draws(subject, "many tokens", np.float32, rows, max(16, subject.length))
    try:
        return found + _draws(subject, "bfloat16", jnp.bfloat16, subject.rows, subject.length)
    except Broken as refusal:
        return [*found, note(f"bfloat16 logits are refused: {refusal}")]


@check("Use logsumexp, not log(softmax), and make the argument of a log safe inside a where().")
def extreme_logits(subject: Subject) -> list[Measure]:
    """Logits of +-8192 give the exact sum and finite gradients, where a weight is 0 as well."""
    batch = subject.batch()
    weights = batch.weights.copy()
    weights[0, subject.ahead + 1] = 0
    # Scored positions put the target on top; those of weight 0 put another token there.
    wrong = (batch.tokens + 1) % subject.vocab_size
    right = np.where(weights > 0, batch.tokens, wrong)
    off, broken = Errors(), []
    for name, tops in {"target on top": right, "another token on top": wrong}.items():
        known = subject.oracle(batch._replace(tokens=tops), subject.ahead, 2 * EXTREME)
        case = Batch(known.logits - np.float32(EXTREME), batch.tokens, weights)
        missed = (weights * (tops != batch.tokens))[:, subject.ahead :].sum()
        limit = FLOAT32_EPS * 8 * EXTREME * float(weights.sum())
        off.add(f"error of the sum, {name}", subject(case)[0], 2 * EXTREME * missed, limit)
        if subject.functions[1]:
            slopes, _ = subject.slopes(case, subject.places(case))
            broken += [] if np.isfinite(slopes).all() else [name]
    return [*off.measures(), none("gradients with NaN or inf", broken)]
