"""What the values of losses and norms say by themselves."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lm_jax.doctor.checks import check
from lm_jax.doctor.facts import Skip
from lm_jax.doctor.findings import Measure, holds, listed, none, note
from lm_jax.doctor.log.series import Series
from lm_jax.doctor.log.subject import Subject, is_known
from lm_jax.doctor.numbers import FLOAT32_EPS, half_unit

_MAIN = ("train/loss", "valid/loss", "test/loss", "distill/lm_ce", "distill/kd_kl")
_MOST = 1000  # values whose digits are looked at, and runs of one value
_ROUNDING = 100 * FLOAT32_EPS  # of logits of 100

Told = tuple[str, Any]  # a text for the evidence, and what goes into `Finding.values`
Look = Callable[[str, Series], Told | None]


def _listing(what: str, found: Mapping[Any, Told], *, of: int, **more: Any) -> Measure:
    """Offenders with a text for each."""
    made = none(what, [text for text, _ in found.values()], of=of, **more)
    return dataclasses.replace(made, value={name: value for name, (_, value) in found.items()})


def _losses(subject: Subject, look: Look, main: Callable[[str], bool], **more: str) -> Measure:
    """What `look` finds in the losses: it fails for the main ones, and warns for the others."""
    names = sorted(subject.losses, key=main, reverse=True)
    if not names:
        raise Skip("The log has no loss.")
    found = {n: told for n in names if (told := look(n, subject.series(n).finite()))}
    status = "fail" if any(map(main, found)) else "warn"
    return _listing(found=found, of=len(names), otherwise=status, **more)


@check("Map the trainer's columns to metrics, and repair or delete the lines named here.")
def readable(subject: Subject) -> list[Measure]:
    """Rows can be read and hold metrics that are known."""
    rows, problems = subject.rows, subject.problems
    known = [name for name in rows.names if is_known(name)]
    cut_off = all(p.last for p in problems) and known  # what a kill leaves
    columns = [f"{column} -> {metric}" for column, metric in (subject.columns or {}).items()]
    told = ("read", columns), ("columns not used:", subject.ignored)
    texts, status = [f"line {p.line}: {p.what}" for p in problems], "warn" if cut_off else "fail"
    bad = none("lines that could not be used", texts, of=len(rows) + len(texts), otherwise=status)
    return [
        holds(len(rows) > 0, "records", len(rows)),
        holds(bool(known), f"metrics that are known: {listed(known, 20) or 'none'}"),
        dataclasses.replace(bad, key="lines", value=[p.line for p in problems]),
        none("metrics with something that is no number in some rows", sorted(rows.odd)),
        *(note(f"{what} {listed(names, 20)}") for what, names in told if names),
    ]


@check(
    "Replay the batch: 0/0 where no token is scored (loss.nothing_scored), or a label out of range "
    "(loss.label_range). Values that stay mean poisoned parameters: skip the whole update."
)
def finite(subject: Subject) -> Measure:
    """No loss or norm is NaN or infinite, and no update was skipped for it."""
    names = [n for n in subject.rows.names if is_known(n) or n in subject.losses]
    # Gradients of float16 overflow while the loss scale is sought.
    sought = ("optim/", "grad_norm/") if subject.has("optim/loss_scale") else ()
    names = [n for n in names if not n.endswith("ppl") and not n.startswith(sought)]
    if not names:
        raise Skip("The log has no loss and no norm.")
    found = {}
    for name in names:
        series = subject.series(name)
        bad = ~np.isfinite(series.values)
        if name == "optim/skipped_updates":
            bad |= series.values > 0
        if not bad.any():
            continue
        first, count = int(np.argmax(bad)), int(bad.sum())
        stays, step = bool(bad[first:].all() and first + 1 < len(bad)), int(series.steps[first])
        text = f"{name} in {count} of {len(bad)} rows from step {step}"
        if stays:
            good = f" (last good row: step {series.steps[first - 1]:.10g})" if first else ""
            text = f"{name} at step {step} and in every later row{good}"
        found[name] = text, {"first_step": step, "count": count, "stays": stays}
    what = "columns with values that are not finite, or with updates skipped"
    return _listing(what, found, of=len(names), key="found")


@check(
    "Look for logits used as log-probabilities, a sign, negative weights, or a term that is "
    "subtracted (examine_loss: loss.definition)."
)
def negative(subject: Subject) -> Measure:
    """No cross-entropy and no KL divergence is below 0 by more than rounding."""

    def look(name: str, series: Series) -> Told | None:
        below = series.where(series.values < -_ROUNDING)
        if not len(below):
            return None
        first, lowest = int(below.steps[0]), below.values.min()
        return f"{name} in {len(below)} rows from step {first}, down to {lowest:.4g}", first

    # A column of an unknown name may be an objective that is allowed to be negative.
    return _losses(subject, look, is_known, what="losses below 0", key="found")


@check(
    "A non-finite loss was replaced, or nothing is scored (loss.nothing_scored): skip the update "
    "instead and look at its batch. A loss that is 0 throughout is not computed."
)
def imputed(subject: Subject) -> Measure:
    """No loss is exactly 0 beside values far above 0, and none jumps to one constant again."""

    def look(name: str, series: Series) -> Told | None:
        value, at = _replaced(series, name)
        where = f"steps {listed(at)}" if len(at) < len(series) else f"all {len(at)} rows"
        return (f"{name} is exactly {value:g} at {where}", at) if at else None

    what = "losses that were replaced"
    return _losses(subject, look, _MAIN.__contains__, what=what, key="steps")


def _replaced(series: Series, name: str) -> tuple[float, list[int]]:
    """The constant that stands for lost values, and the steps at which it does."""
    x = series.values
    if name == "train/loss" and len(x) > 1 and not x.any():
        return 0.0, series.steps.astype(int).tolist()
    printed = min((half_unit(v) for v in x[x != 0][:_MOST]), default=0.0)
    kinds, counts = np.unique(x, return_counts=True)
    # Ordinary losses of many digits seldom meet the same value three times, and never far out.
    often = kinds[counts >= 3]
    for value in (0.0, *(k for k in (*often[:1], *often[-1:]) if k)):
        steps: list[int] = []
        runs = np.flatnonzero(np.diff(x == value, prepend=False, append=False))
        for start, stop in runs.reshape(-1, 2)[:_MOST].tolist():
            before, after = x[max(0, start - 5) : start], x[stop : stop + 5]
            # A term may be switched on late or off early; the loss of the model may not.
            if not len(before) or (not len(after) and (name not in _MAIN or value)):
                continue
            near = np.concatenate([before, after])
            near = near[near != value]
            gap = abs(near.mean() - value)
            far = gap > 0.25 * abs(near.mean()) and gap > 6 * math.hypot(near.std(), printed)
            if far or (value == 0 and near.min() > 1):  # amid a steep fall too
                steps += series.steps[start:stop].astype(int).tolist()
        if len(steps) >= (1 if value == 0 else 3):
            return value, steps
    return 0.0, []


@check("Compute logits, log-softmax and sums of the loss in float32 (examine_loss: loss.dtype).")
def quantised(subject: Subject) -> Measure:
    """The losses are not all values of bfloat16, which has 8 significant bits."""
    unit = math.log(2) if subject.in_bits("train/loss") else 1.0
    x = np.unique(subject.finite("train/loss", 10).values) / unit
    x = x[x != 0][:2000]
    step = 2.0 ** (np.floor(np.log2(np.abs(x))) - 7)
    printed = np.array([half_unit(value) for value in x])
    hits = np.abs(x - np.round(x / step) * step) <= printed * (1 + 1e-6)  # half a unit exactly
    # The logarithm of the chance that printed numbers all fall beside a bfloat16 number.
    chance = float(np.log(np.minimum(1, 2 * printed / step)).sum())
    if chance > math.log(1e-6):
        raise Skip("The losses are printed with too few digits, or too few differ.")
    what = f"share of {len(x)} different losses that are bfloat16 numbers to their last digit"
    return holds(not hits.all(), what, float(hits.mean()), limit="below 1", key="share")
