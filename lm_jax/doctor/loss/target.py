"""Checks of a loss function: which tokens it scores and counts."""

import math
from collections.abc import Callable

import numpy as np

from lm_jax.doctor.loss.subject import (
    EPS,
    MARGIN,
    Loss,
    copy,
    definition,
    gap,
    judge,
    oracle,
    padded,
)
from lm_jax.doctor.old import Finding, Skip, Verdict, check, verdict


@check(
    "target.oracle",
    remedy="Shift exactly once: logits[:, :-1] against tokens[:, 1:], in the loss alone.",
)
def known_token(loss: Loss) -> Verdict:
    """Logits that know one token exactly: only those that know the next one may lose nothing."""
    # With a tiny vocabulary many neighbours are equal and only numbers tell them apart.
    batch = loss.batch(loss.rows if loss.vocab_size > 4 else 64)
    batch.weights[:, 0] = 0
    means, expected = {}, {}
    for k in (-1, 0, 1, 2, 3):
        known = oracle(loss, batch, k, MARGIN)
        total, count = loss(known)
        nats, weights = definition(known, loss.ahead)
        means[k] = total / count if count else math.nan
        expected[k] = (nats * weights).sum() / weights.sum()
    wrong = [k for k in means if k != loss.ahead and not means[k] > expected[k] / 2]
    ok = not wrong and means[loss.ahead] < MARGIN / 4
    table = ", ".join(f"{k:+d}: {mean:.3g}" for k, mean in means.items())
    return verdict(
        ok,
        f"Nats per token of logits that prefer token[t + k] by {MARGIN:.0f} are {table}; only "
        f"k = {loss.ahead:+d} may be below {MARGIN / 4:.3g}, and the others must exceed half of "
        "what the definition gives.",
        means=means,
        expected=expected,
    )


@check(
    "target.edges",
    remedy="Drop the last logits and the first token of every row; do not roll tokens around.",
)
def edges(loss: Loss) -> Verdict:
    """Nothing predicts the first token, and the last logits predict nothing."""
    if loss.ahead == 0:
        raise Skip("the objective is bidirectional: every position has its own target")
    batch = loss.batch()
    batch.weights[:, -1] = 1
    before = loss(batch)
    changes = {}
    for name in ("weight of the first token", "id of the first token", "last logits"):
        changed = copy(batch)
        if name.startswith("weight"):
            changed.weights[:, 0] = 1 - changed.weights[:, 0]
        elif name.startswith("id"):
            changed.tokens[:, 0] = (changed.tokens[:, 0] + 1) % loss.vocab_size
        else:
            changed.logits[:, -1] = -changed.logits[:, -1]
        changes[name] = gap(loss(changed), before)
    threshold = loss.rounding(batch)
    return judge(
        {name: (change, threshold) for name, change in changes.items()},
        "Change of sum or count with what lies outside all (position, next token) pairs",
    )


@check(
    "target.row_crossing",
    remedy="Shift along the time axis before flattening, so that the last position of a row is "
    "never scored on the first token of the next.",
)
def row_crossing(loss: Loss) -> Verdict:
    """Rows do not see each other's labels: neither in the gradient nor in the value."""
    batch = loss.batch()
    batch.weights[:, [0, -1]] = 1
    row = loss.rows // 2
    others = np.arange(loss.rows) != row
    changed = copy(batch)
    changed.tokens[others] = (changed.tokens[others] + 1) % loss.vocab_size
    alone = [copy(b) for b in (batch, changed)]
    for b in alone:
        b.weights[others] = 0
    alone[1].logits[others] *= -1
    results = {"sum": (gap(loss(alone[0]), loss(alone[1])), loss.rounding(alone[0]))}
    _, t, v = loss.places(batch)
    t[::4], v[::8] = loss.length - 1, batch.tokens[(row + 1) % loss.rows, 0]
    places = np.full_like(t, row), t, v
    (before, rounding), (after, _) = (loss.slopes(b, places) for b in (batch, changed))
    # The same program on other labels: JAX rounds alike, so nothing at all may change.
    slack = 0.0 if loss.traceable else rounding
    results["gradient"] = (gap(before, after), slack)
    return judge(results, f"Other rows relabelled: change of the gradient and the sum of row {row}")


@check("loss.count", remedy="Return the sum of the weights of the targets, tokens[:, 1:].")
def count(loss: Loss) -> Verdict:
    """The count is the sum of the targets' weights."""
    batch = loss.batch()
    fraction = np.random.default_rng(loss.seed).random(batch.weights.shape).astype(np.float32)
    cases = {
        "all scored": np.ones_like(batch.weights),
        "ragged": batch.weights,
        "fractional": batch.weights * fraction,
    }
    results, counts = {}, {}
    for name, weights in cases.items():
        counts[name] = float(loss(batch._replace(weights=weights))[1])
        expected = float(weights[:, loss.ahead :].sum(dtype=np.float64))
        results[name] = (gap(counts[name], expected), EPS * weights.size / 2 * expected)
    return judge(results, "Count against the weights of all targets", counts=counts)


@check(
    "loss.padding",
    remedy="Mask padding in the sum and in the count by the same weights.",
)
def padding(loss: Loss) -> Verdict:
    """Further columns and rows of weight 0 change neither the value nor the gradient."""
    batch = loss.batch()
    places = loss.places(batch)
    before, (slopes, rounding) = loss(batch), loss.slopes(batch, places)
    results = {}
    for name, (columns, rows) in {"1 column": (1, 0), "7 columns and 1 row": (7, 1)}.items():
        larger = padded(loss, batch, columns, rows)
        results[f"sum or count, {name}"] = (gap(loss(larger), before), loss.rounding(batch))
        b, t, v = loss.places(larger, draw=1)
        # The column before the padding would predict its first token.
        outside = (b >= loss.rows) | (t >= loss.length - loss.ahead)
        pads = b[outside], t[outside], v[outside]
        results[f"gradient, {name}"] = (gap(loss.slopes(larger, places)[0], slopes), rounding)
        pushed = gap(loss.slopes(larger, pads)[0])
        results[f"gradient of the padding, {name}"] = (pushed, 0 if loss.traceable else rounding)
    return judge(results, "Columns and rows of weight 0 appended: change")


def _masked(loss: Loss, junk: dict[str, tuple[float, int]]) -> Verdict:
    """Sum, count and gradient with junk (logit, label) in all places of weight 0."""
    batch = loss.batch()
    keep = batch.weights[:, loss.ahead :] > 0
    scored = np.pad(keep, ((0, 0), (0, loss.ahead)))
    b, t, v = loss.places(batch)
    places = tuple(p[scored[b, t]] for p in (b, t, v))
    before, (slopes, rounding) = loss(batch), loss.slopes(batch, places)
    results = {}
    for name, (logit, label) in junk.items():
        changed = copy(batch)
        if label:
            changed.tokens[:, loss.ahead :][~keep] = label
        else:
            changed.logits[~scored] = logit
        results[f"sum or count, {name}"] = (gap(loss(changed), before), loss.rounding(batch))
        results[f"gradient, {name}"] = (gap(loss.slopes(changed, places)[0], slopes), rounding)
    return judge(results, f"Junk at the {int((~keep).sum())} places of weight 0: change")


@check(
    "loss.masked_logits",
    remedy="Replace logits and nats of weight 0 by a constant with where() before and after the "
    "arithmetic: 0 x NaN is NaN.",
)
def masked_logits(loss: Loss) -> Verdict:
    """Logits of weight 0 may be anything."""
    return _masked(loss, {"NaN": (math.nan, 0), "inf": (math.inf, 0), "1e30": (1e30, 0)})


@check(
    "loss.masked_labels",
    remedy="Replace labels of weight 0 by a valid id with where() before they index the logits.",
)
def masked_labels(loss: Loss) -> Verdict:
    """Labels of weight 0 may be anything."""
    return _masked(loss, {"-100": (0, -100), "V": (0, loss.vocab_size)})


@check(
    "loss.nothing_scored",
    remedy="Return (0, 0) and leave the division to one place that guards it; do not divide by a "
    "count inside.",
)
def nothing_scored(loss: Loss) -> Verdict:
    """No scored token: sum 0, count 0 and a gradient of zeros; an empty row does no harm."""
    batch = loss.batch()
    none = batch._replace(weights=np.zeros_like(batch.weights))
    total, count = loss(none)
    slopes, _ = loss.slopes(none, loss.places(none))
    largest = gap(slopes)
    row = copy(batch)
    row.weights[0] = 0
    nats, weights = definition(row, loss.ahead)
    off = gap(loss(row), ((nats * weights).sum(), weights.sum()))
    ok = total == 0 and count == 0 and largest == 0 and off <= loss.rounding(row)
    return verdict(
        ok,
        f"All weights 0: sum {total:.3g}, count {count:.3g}, largest gradient {largest:.3g} (all "
        f"must be 0); with one row of zeros sum or count is off by {off:.3g} (rounding "
        f"{loss.rounding(row):.1g}).",
        total=float(total),
        count=float(count),
        gradient=largest,
    )


@check(
    "loss.label_range",
    remedy="Refuse labels outside [0, V) wherever the weight is positive, on the host, or turn "
    "them into NaN: an index of -100 wraps to token V - 100.",
)
def label_range(loss: Loss) -> Verdict:
    """A scored label outside [0, V) is refused, gives NaN, or is left out; never another token."""
    batch = loss.batch()
    place = 1, loss.ahead + 1
    batch.weights[place] = 0
    without = loss(batch, as_given=True)
    batch.weights[place] = 1
    threshold = 2 * loss.rounding(batch)
    answers: dict[int, str] = {}
    for label in (-1, -100, loss.vocab_size, loss.vocab_size + 7):

        def scored(token: int) -> np.ndarray:
            changed = batch._replace(tokens=batch.tokens.copy())
            changed.tokens[place] = token
            # A compiled function could not look at the labels and refuse them.
            return loss(changed, as_given=True)

        try:
            result = scored(label)
        except Skip:
            answers[label] = "refused"
            continue
        if not np.isfinite(result[0]):
            answers[label] = "not a number"
        elif gap(result, without) <= threshold:
            answers[label] = "left out"
        else:
            answers[label] = "scored, but as no token"
            for token in sorted({label % loss.vocab_size, 0, loss.vocab_size - 1}):
                if gap(result, scored(token)) <= threshold:
                    answers[label] = f"scored as token {token}"
    ok = not any(answer.startswith("scored") for answer in answers.values())
    table = "; ".join(f"{label}: {answer}" for label, answer in answers.items())
    return verdict(
        ok, f"Labels outside [0, {loss.vocab_size}) with weight 1: {table}.", answers=answers
    )


CHECKS: tuple[Callable[..., Finding], ...] = (
    known_token,
    edges,
    row_crossing,
    count,
    padding,
    masked_logits,
    masked_labels,
    nothing_scored,
    label_range,
)
