"""What the values of losses and norms say by themselves."""

import math

import numpy as np

from lm_jax.doctor.checks import check
from lm_jax.doctor.facts import Skip
from lm_jax.doctor.findings import Measure, holds, listed, none, note
from lm_jax.doctor.log.series import Series
from lm_jax.doctor.log.subject import Subject, is_known, listing
from lm_jax.doctor.numbers import FLOAT32_EPS, half_unit

_MAIN = ("train/loss", "valid/loss", "test/loss", "distill/lm_ce", "distill/kd_kl")
_MOST_RUNS = 1000  # of zeros that are looked at


@check(
    "Map the trainer's columns to metrics, and repair or delete the lines named here; the other "
    "checks used the rest."
)
def readable(subject: Subject) -> list[Measure]:
    """Rows can be read and hold metrics that are known."""
    rows, problems = subject.rows, subject.problems
    known = [name for name in rows.names if is_known(name)]
    cut_off = all(p.last for p in problems)  # what a kill leaves
    columns = [f"{column} -> {metric}" for column, metric in (subject.columns or {}).items()]
    found = [
        holds(len(rows) > 0, "records", len(rows)),
        holds(bool(known), f"metrics that are known: {listed(known, 20) or 'none'}"),
        listing(
            "lines that could not be used",
            {str(p.line): f"line {p.line}: {p.what}" for p in problems},
            [p.line for p in problems],
            of=len(rows) + len(problems),
            otherwise="warn" if cut_off and known else "fail",
            key="lines",
        ),
        none("metrics with something that is no number in some rows", sorted(rows.odd)),
    ]
    if columns:
        found.append(note(f"read {listed(columns, 20)}"))
    if subject.ignored:
        found.append(note(f"columns not used: {listed(subject.ignored, 20)}"))
    return found


@check(
    "An isolated value comes from one batch: 0/0 where no token is scored (examine_loss: "
    "loss.nothing_scored) or a label out of range (loss.label_range); replay that batch. Values "
    "that stay non-finite mean poisoned parameters: skip the whole update, and never put 0 in its "
    "place."
)
def finite(subject: Subject) -> Measure:
    """No loss or norm is NaN or infinite, and no update was skipped for it."""
    scaled = subject.has("optim/loss_scale")  # float16: gradients overflow while it is sought
    names = [n for n in subject.rows.names if is_known(n) or n in subject.losses]
    names = [n for n in names if not n.endswith("ppl")]
    if not names:
        raise Skip("The log has no loss and no norm.")
    texts, values = {}, {}
    for name in names:
        if scaled and name.startswith(("optim/", "grad_norm/")):
            continue
        series = subject.series(name)
        bad = ~np.isfinite(series.values)
        if name == "optim/skipped_updates":
            bad |= series.values > 0
        if not bad.any():
            continue
        first, count = int(np.argmax(bad)), int(bad.sum())
        stays = bool(bad[first:].all() and first + 1 < len(bad))
        step = int(series.steps[first])
        course = "and in every later row" if stays else f"in {count} of {len(bad)} rows"
        texts[name] = f"{name} at step {step}, {course}"
        if first and stays:
            texts[name] += f" (last good row: step {series.steps[first - 1]:g})"
        values[name] = {"first_step": step, "count": count, "stays": stays}
    what = "columns with updates skipped or values that are not finite"
    return listing(what, texts, values, of=len(names), key="found")


@check(
    "A cross-entropy or a KL divergence is a mean of -log p or of log ratios under one "
    "distribution and never below 0: look for logits used as log-probabilities, a sign, negative "
    "weights, or a term that is subtracted (examine_loss: loss.definition)."
)
def negative(subject: Subject) -> list[Measure]:
    """No cross-entropy and no KL divergence is below 0 by more than rounding."""
    if not subject.losses:
        raise Skip("The log has no loss.")
    rounding = 100 * FLOAT32_EPS  # of logits of 100
    found: dict[bool, dict[str, dict[str, float]]] = {True: {}, False: {}}
    for name in subject.losses:
        series = subject.series(name).finite()
        below = np.flatnonzero(series.values < -rounding)
        if len(below):
            found[is_known(name)][name] = {
                "first_step": int(series.steps[below[0]]),
                "count": len(below),
                "lowest": float(series.values.min()),
            }
    texts = {
        name: f"{name} in {x['count']} rows from step {x['first_step']}, {x['lowest']:.4g} at least"
        for rows in found.values()
        for name, x in rows.items()
    }
    of = len(subject.losses)
    # A column of an unknown name may be an objective that is allowed to be negative.
    others = {n: texts[n] for n in found[False]}
    known = {n: texts[n] for n in found[True]}
    return [
        listing("losses below 0", known, found[True], of=of, key="found"),
        listing("other losses below 0", others, found[False], of=of, otherwise="warn"),
    ]


@check(
    "A loss of exactly 0, or of one constant, between ordinary values is a non-finite value that "
    "was replaced, or a batch of which nothing is scored (loss.nothing_scored): skip the update "
    "instead and look at its batch. A loss that is 0 throughout is not computed."
)
def imputed(subject: Subject) -> list[Measure]:
    """No loss is exactly 0 beside values far above 0, and none jumps to one constant again."""
    if not subject.losses:
        raise Skip("The log has no loss.")
    steps: dict[str, list[int]] = {}
    texts: dict[bool, dict[str, str]] = {True: {}, False: {}}
    for name in subject.losses:
        series = subject.series(name).finite()
        value, at = _replaced(series, name)
        if at:
            steps[name] = at
            where = f"steps {listed(at)}" if len(at) < len(series) else f"all {len(at)} rows"
            texts[name in _MAIN][name] = f"{name} is exactly {value:g} at {where}"
    of = len(subject.losses)
    return [
        listing("losses that were replaced", texts[True], steps, of=of, key="steps"),
        listing("other losses that were replaced", texts[False], steps, of=of, otherwise="warn"),
    ]


def _replaced(series: Series, name: str) -> tuple[float, list[int]]:
    """The constant that stands for lost values, and the steps at which it does."""
    x = series.values
    if name == "train/loss" and len(x) > 1 and not x.any():
        return 0.0, [int(step) for step in series.steps]
    printed = min((half_unit(v) for v in x[x != 0][:1000]), default=0.0)
    kinds, counts = np.unique(x, return_counts=True)
    # Ordinary losses of many digits seldom meet the same value three times, and never far out.
    far = np.flatnonzero(counts >= 3)
    outer = [k for k in kinds[far[[0, -1]]] if k] if len(far) else []
    for value in (0.0, *outer):
        steps: list[int] = []
        runs = np.flatnonzero(np.diff(np.concatenate([[False], x == value, [False]]).astype(int)))
        for start, stop in runs.reshape(-1, 2)[:_MOST_RUNS].tolist():
            before, after = x[max(0, start - 5) : start], x[stop : stop + 5]
            # A term may be switched on late or off early; the loss of the model may not.
            if not len(before) or (not len(after) and (name not in _MAIN or value)):
                continue
            near = np.concatenate([before, after])
            near = near[near != value]
            gap = abs(near.mean() - value) if len(near) else 0.0
            if gap > 6 * math.hypot(near.std() if len(near) else 0.0, printed) and (
                value == 0 or gap > 0.25 * abs(near.mean())
            ):
                steps += [int(step) for step in series.steps[start:stop]]
        if len(steps) >= (1 if value == 0 else 3):
            return value, steps
    return 0.0, []


@check(
    "The loss is computed or logged in bfloat16. Compute logits, log-softmax and sums in float32 "
    "(examine_loss: loss.dtype)."
)
def quantised(subject: Subject) -> Measure:
    """The losses are not all values of bfloat16, which has 8 significant bits."""
    x = np.unique(subject.finite("train/loss", 10).values)
    x = x[x != 0][:2000]
    if subject.in_bits("train/loss"):
        x = x / math.log(2)
    step = 2.0 ** (np.floor(np.log2(np.abs(x))) - 7)
    printed = np.array([half_unit(value) for value in x])
    hits = np.abs(x - np.round(x / step) * step) <= printed
    # The logarithm of the chance that printed numbers all fall beside a bfloat16 number.
    chance = float(np.log(np.minimum(1, 2 * printed / step)).sum())
    if chance > math.log(1e-6):
        raise Skip("The losses are printed with too few digits, or too few differ.")
    return holds(
        not hits.all(),
        f"share of {len(x)} different losses that are bfloat16 numbers to their last digit",
        float(hits.mean()),
        limit="below 1",
        key="share",
    )
