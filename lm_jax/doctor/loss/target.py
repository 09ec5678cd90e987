"""Which tokens a loss scores and counts."""

import math

import numpy as np

from lm_jax.doctor.checks import check
from lm_jax.doctor.facts import Broken
from lm_jax.doctor.findings import Measure, at_least, at_most, equals, holds, note
from lm_jax.doctor.loss.subject import Batch, Errors, Subject
from lm_jax.doctor.numbers import gap

MARGIN = 20.0  # nats by which an oracle prefers its token: more than ln V


@check("Shift exactly once: logits[:, :-1] against tokens[:, 1:], in the loss alone.")
def oracle(subject: Subject) -> list[Measure]:
    """Of logits that know one token exactly, only those that know the target lose nothing."""
    # With a tiny vocabulary many neighbours are equal and only numbers tell them apart.
    batch = subject.batch(subject.rows if subject.vocab_size > 4 else 64)
    batch.weights[:, 0] = 0
    costs = {k: subject.mean(subject.oracle(batch, k, MARGIN)) for k in (-1, 0, 1, 2, 3)}
    # Against what the loss itself says of equal logits, so that no wrong scale looks like a shift.
    limit = (subject.mean(subject.oracle(batch, 0, 0.0)) + costs[subject.ahead]) / 2
    return [
        (at_most if k == subject.ahead else at_least)(
            f"nats a token of logits that know token[t{k:+d}]", cost, limit, key=f"{k:+d}"
        )
        for k, cost in costs.items()
    ]


@check("Shift labels and weights before flattening, and do not roll tokens around.")
def row_crossing(subject: Subject) -> list[Measure]:
    """The last logits of a row predict nothing: no label of another row, and not its own first."""
    batch, off = subject.batch(), Errors()
    if subject.ahead:
        batch.weights[:, -1] = 1
        changed = batch.copy()
        changed.weights[:, 0] = 1 - changed.weights[:, 0]
        changed.tokens[:, 0] = (changed.tokens[:, 0] + 1) % subject.vocab_size
        changed.logits[:, -1] *= -1
        names = dict(weights="first weight", tokens="first token", logits="last logits")
        for field, name in names.items():
            case = batch._replace(**{field: getattr(changed, field)})
            what, limit = f"change of sum or count with the {name}", subject.rounding(batch)
            off.add(what, subject(case), subject(batch), limit)
    batch.weights[:, [0, -1]] = 1
    row = subject.rows // 2
    others = np.arange(subject.rows) != row
    relabelled = batch.copy()
    relabelled.tokens[others] = (relabelled.tokens[others] + 1) % subject.vocab_size
    _, t, v = subject.places(batch)
    t[::4], v[::8] = subject.length - 1, batch.tokens[(row + 1) % subject.rows, 0]
    places = np.full_like(t, row), t, v
    (before, rounding), (after, _) = (subject.slopes(b, places) for b in (batch, relabelled))
    # The same program on other labels: JAX rounds alike, so nothing at all may change.
    limit = 0 if subject.by_jax else rounding
    off.add("change of the gradient with the labels of other rows", before, after, limit)
    return off.measures()


@check("Mask padding in the sum and in the count by the same weights.")
def padding(subject: Subject) -> list[Measure]:
    """Further columns and rows of weight 0 change neither the value nor the gradient."""
    batch, off = subject.batch(), Errors()
    for name, pad in {"1 column": ((0, 0), (0, 1)), "7 columns, 1 row": ((0, 1), (0, 7))}.items():
        logits = np.pad(batch.logits, (*pad, (0, 0)), mode="reflect")
        larger = Batch(logits, np.pad(batch.tokens, pad), np.pad(batch.weights, pad))
        off.change(subject, f"{name} more", batch, larger, subject.places(batch))
        b, t, v = subject.places(larger, draw=1)
        # The column before the padding would predict its first token.
        outside = (b >= subject.rows) | (t >= subject.length - subject.ahead)
        pushed, rounding = subject.slopes(larger, (b[outside], t[outside], v[outside]))
        off.add(f"gradient of the padding, {name}", pushed, 0, 0 if subject.by_jax else rounding)
    return off.measures()


@check("Replace logits and labels of weight 0 by constants with where(): 0 x NaN is NaN.")
def masked(subject: Subject) -> list[Measure]:
    """Logits and labels of weight 0 may be anything; what no healthy data hold only warns."""
    batch, junk = subject.batch(), {}
    keep = batch.weights[:, subject.ahead :] > 0
    scored = np.pad(keep, ((0, 0), (0, subject.ahead)))
    b, t, v = subject.places(batch)
    at = scored[b, t]
    for logit in (1e4, 1e30, math.inf, math.nan):
        junk[f"logits of {logit:g} at weight 0"] = changed = batch.copy()
        changed.logits[~scored] = logit
    for label in (0, -1, -100, subject.vocab_size):
        junk[f"labels of {label} at weight 0"] = changed = batch.copy()
        changed.tokens[:, subject.ahead :][~keep] = label
    ordinary, hazards, refused = Errors(), Errors(), []
    for name, changed in junk.items():
        off = ordinary if "of 10000 " in name or "of 0 " in name else hazards
        try:
            off.change(subject, name, batch, changed, (b[at], t[at], v[at]))
        except Broken as refusal:
            refused.append(note(f"{name} are refused: {refusal}"))
    return ordinary.measures() + hazards.measures(otherwise="warn") + refused


@check("Return (0, 0), and divide by the count in one place alone, which guards it.")
def nothing_scored(subject: Subject) -> list[Measure]:
    """Without a scored token sum, count and gradient are 0; an empty row does no harm."""
    row, off = subject.batch(), Errors()
    row.weights[0] = 0
    others = subject(Batch(*(a[1:] for a in row)))
    what = "change of sum or count if a row of weight 0 is left out"
    off.add(what, subject(row), others, subject.rounding(row))
    none = row._replace(weights=np.zeros_like(row.weights))
    try:
        total, count = subject(none)
        slopes, _ = subject.slopes(none, subject.places(none))
    except Broken as refusal:
        refused = holds(False, "if all weights are 0", str(refusal), otherwise="warn")
        return [*off.measures(), refused]
    amounts = {"sum": total, "count": count, "largest gradient": gap(slopes)}
    found = [equals(f"{n} if all weights are 0", x, 0, key=n) for n, x in amounts.items()]
    return found + off.measures()


@check("Refuse scored labels outside [0, V) on the host: -100 would wrap to token V - 100.")
def label_range(subject: Subject) -> list[Measure]:
    """A scored label outside [0, V) is refused, gives NaN, or is left out; never another token."""
    batch = subject.batch()
    place = 1, subject.ahead + 1
    batch.weights[place] = 0
    without = subject(batch, as_given=True)
    batch.weights[place] = 1
    limit = 2 * subject.rounding(batch)

    def scored(token: int) -> np.ndarray:
        batch.tokens[place] = token
        # A compiled function could not look at the labels and refuse them.
        return subject(batch, as_given=True)

    def answer(label: int) -> str:
        try:
            result = scored(label)
        except Broken:
            return "refused"
        if not np.isfinite(result[0]):
            return "not a number"
        if gap(result, without) <= limit:
            return "left out"
        for token in sorted({label % subject.vocab_size, 0, subject.vocab_size - 1}):
            if gap(result, scored(token)) <= limit:
                return f"scored as token {token}"
        return "counted at no cost" if gap(result[0], without[0]) <= limit else "scored as no token"

    labels = -1, -100, subject.vocab_size, subject.vocab_size + 7
    fine = "refused", "not a number", "left out"
    return [
        holds(said in fine, f"label {x} with weight 1", said, otherwise="warn", key=str(x))
        for x, said in zip(labels, map(answer, labels), strict=True)
    ]
