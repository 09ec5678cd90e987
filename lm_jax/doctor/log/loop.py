"""What learning rate, norms, scale, speed and budgets in a log say about the loop."""

import functools
import math
from typing import Any

import numpy as np

from lm_jax.doctor import numbers
from lm_jax.doctor.checks import check, fixture
from lm_jax.doctor.facts import Skip, give
from lm_jax.doctor.findings import Measure, at_least, at_most, holds, none, note
from lm_jax.doctor.log.series import Series, falls_at_once
from lm_jax.doctor.log.subject import Subject
from lm_jax.doctor.numbers import half_unit

_MAX_MFU = 0.75  # no training of a language model is known to reach more
_WARMUP = 0.3  # of the run; a one-cycle schedule rises for as much
_MOST = 200  # rows whose printed digits are looked at


@fixture
def rates(subject: Subject) -> Series:
    """The learning rates, not all 0."""
    lr = subject.finite("optim/lr", 3)
    if lr.values.max() <= 0:
        raise Skip("The learning rate is always 0 (log.updates).")
    return lr


@fixture
def schedule(subject: Subject, rates: Series) -> Series:
    """The learning rates of a run that has come to its end."""
    # Steps may be counted from 0, and not every one is logged.
    gap = max(1.0, float(np.median(np.diff(rates.steps))))
    if subject.steps is not None and rates.steps[-1] < subject.steps - gap:
        raise Skip(f"The log ends at step {rates.steps[-1]:.10g} of {subject.steps}.")
    return rates


@check(
    "The optimiser does not step, or steps a copy. Look at the counter of accumulation and at "
    "skipped updates, and run training.updates or optimiser.update_count."
)
def updates(subject: Subject) -> list[Measure]:
    """The learning rate is not always 0, and norms are neither constant nor 0."""
    found = []
    lr, loss = subject.logged("optim/lr"), subject.logged("train/loss").values
    if len(lr) > 1:
        above = int(np.sum(lr.values > 0))
        found.append(holds(above > 0, "rows with a learning rate above 0", above))
    for name in ("optim/param_norm", "optim/update_norm", "optim/grad_norm"):
        norm = _while_learning(subject, name, lr)
        if len(norm) < 3:
            continue
        if name == "optim/param_norm":
            if half_unit(norm[0]) < 1e-6 * abs(norm[0]):
                spread = float(np.ptp(norm))
                found.append(holds(spread > 0, f"spread of {name}", spread, limit="above 0"))
        elif name == "optim/grad_norm" and not norm.any() and len(loss) > 3 and falls_at_once(loss):
            found.append(note("gradient norm not measured: 0 in all rows while the loss falls"))
        else:
            zero = float(np.mean(norm == 0))
            found.append(at_most(f"share of rows where {name} is 0", zero, 0.5))
            found += _stale(norm) if name == "optim/grad_norm" else []
    if not found:
        raise Skip("No learning rate, parameter norm, update norm or gradient norm is logged.")
    return found


def _while_learning(subject: Subject, name: str, lr: Series) -> np.ndarray:
    """A norm where the learning rate is above 0.001 of its peak, and no update was skipped.

    Nor where the loss is 0: there is nothing left to learn, as in a text of one symbol.
    """
    series, skipped = subject.logged(name), subject.logged("optim/skipped_updates")
    loss = subject.logged("train/loss")
    idle = [*skipped.steps[skipped.values > 0], *loss.steps[loss.values == 0]]
    use = ~np.isin(series.steps, idle)
    if len(lr):
        use &= np.isin(series.steps, lr.steps[lr.values > 1e-3 * lr.values.max()])
    return series.values[use]


def _stale(norm: np.ndarray) -> list[Measure]:
    """Whether one gradient norm comes more often than printed digits explain."""
    kinds, counts = np.unique(norm[norm > 0], return_counts=True)
    if len(norm) < 20 or not len(kinds):
        return []
    often, share = float(kinds[np.argmax(counts)]), float(np.max(counts)) / len(norm)
    # A norm that was clipped is a round number in many rows, and none is above it.
    if abs(often - float(f"{often:.2g}")) < 1e-5 * often and often > 0.9999 * kinds[-1]:
        return []
    unit = 2 * min(half_unit(x) for x in kinds[:_MOST])
    # Norms of a healthy run differ from row to row by 5 % at the least.
    chance = min(1.0, max(unit / (0.05 * often), 0.02))
    what = f"share of rows with a gradient norm of exactly {often:g}"
    return [at_most(what, share, numbers.share_limit(chance, len(norm)))]


@check(
    "Gradients overflow at any scale: look at batch and activations of the first step at which the "
    "scale fell, and train in bfloat16."
)
def loss_scale(subject: Subject) -> Measure:
    """The loss scale of float16 does not collapse."""
    scale = subject.finite("optim/loss_scale").values
    low, high = float(scale.min()), float(scale.max())
    if high < 1024:
        raise Skip("The loss scale is that of no float16 run.")
    # It starts at 2^15 to 2^32, finds its place above 2^7, and halves with each overflow.
    status = "fail" if low <= 8 else "warn"
    return at_least(f"lowest loss scale, after {high:g}", low, 128, otherwise=status, key="low")


@check(
    "Let warm-up give the first update peak / warm-up, and size the schedule in updates, the unit "
    "in which it is stepped, so that it ends with the run."
)
def lr_zero(rates: Series) -> list[Measure]:
    """The learning rate is not 0 at the first update or over a last part of the run."""
    peak = float(rates.values.max())
    if half_unit(float(rates.values[rates.values > 0].min())) > 0.01 * peak:
        raise Skip("The learning rate is printed with too few digits.")
    zero = rates.values <= 1e-9 * peak
    idle = np.flatnonzero(zero[1:]) + 1
    share = len(idle) / len(rates) if len(idle) > 1 else 0.0
    where = f"from step {rates.steps[idle[0]]:.10g} on" if len(idle) else ""
    first = bool(zero[0]) and rates.steps[0] <= 1
    return [
        at_most("share of later rows with a rate of 0", share, 0.05, where=where, key="idle"),
        holds(not first, "first learning rate", rates.values[0], limit="above 0", otherwise="warn"),
    ]


@check("Shorten the warm-up to at most a tenth of the run, counted in updates.")
def warmup(subject: Subject, schedule: Series) -> Measure:
    """The learning rate reaches its peak within the first three tenths of the run."""
    steps, lr = schedule
    place = int(np.argmax(lr))
    # The peak may have been reached at any time after the row before.
    share = float((steps[max(0, place - 1)] - steps[0]) / (steps[-1] - steps[0]))
    rises = place == len(lr) - 1 and lr[-1] > lr[-2]
    if subject.steps is None and share > _WARMUP and lr[-1] > 0.5 * lr[place]:
        raise Skip("The log ends near the peak rate and steps is not given.", "steps")
    what = f"share of the run before the peak rate of {lr[place]:.3g}, at step {steps[place]:.10g}"
    return at_most(what, share, _WARMUP, otherwise="fail" if rises else "warn", key="share")


@check(
    "Size the schedule in updates if it is stepped once per update; a schedule sized in "
    "micro-batches never comes to its end. examine_optimiser (optimiser.executed_lr) decides."
)
def lr_end(subject: Subject, schedule: Series, lr_end: float) -> list[Measure]:
    """The last learning rate is the configured one, to 5 % and 1 % of the peak."""
    steps, lr = schedule
    known, peak, last = subject.steps is not None, subject.lr_peak or lr.max(), float(lr[-1])
    # What the rate still falls by after the last row, which may not be the last update.
    gap = steps[-1] - steps[-2]
    missing = gap if subject.steps is None else max(0, subject.steps - steps[-1])
    slack = 0.05 * lr_end + 0.01 * peak + float(abs(last - lr[-2]) / gap * missing)
    ok, falls = abs(last - lr_end) <= slack, last < lr.max()
    if not (ok or known or falls):
        raise Skip("The log ends at the peak of the learning rate and steps is not given.", "steps")
    more: dict[str, Any] = dict(limit=f"configured {lr_end:.4g} ± {slack:.2g}")
    if not known:
        more |= dict(otherwise="warn", where="unless the run ended early: steps is not given")
    found = [holds(ok, "last rate", last, **more)]
    many = _accumulation(schedule, last / peak) if not ok and falls and last > lr_end else None
    if many:
        text = f"micro-batches to an update if the {many[1]} schedule was sized in them"
        found.append(note(text, many[0], key="accumulation"))
    return found


def _accumulation(lr: Series, ratio: float) -> tuple[int, str] | None:
    """How many micro-batches, in which the schedule was sized, explain the last rate."""
    ends, warm = lr.steps[-1], lr.steps[int(np.argmax(lr.values))]
    for count in (2, 3, 4, 6, 8, 12, 16, 24, 32, 64):
        done = (ends - warm) / (count * ends - warm)
        kinds = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}
        for name, left in kinds.items():
            if abs(left - ratio) < 0.01:
                return count, name
    return None


@check("")
def clipping(subject: Subject) -> list[Measure]:
    """How often gradients were clipped; a fact, not a fault."""
    late = float(subject.finite("optim/clip_rate").tail(0.5).values.mean())
    text = "this explains no bad loss; a loss summed over tokens does it (loss.split)"
    rate = note("share of updates clipped in the second half", late, key="rate")
    return [rate, note(text)] if late > 0.9 else [rate]


@check(
    "Count each token once (not per device, micro-batch or padding slot), wait for the device "
    "before stopping the clock, and check the parameter count."
)
def throughput(subject: Subject) -> Measure:
    """6 N FLOPs for each token, at the rate logged, fit into the device's peak."""
    N, peak = subject.parameters, subject.peak_flops
    if subject.has("perf/tokens_per_second") and N and peak:
        rate = float(np.median(subject.finite("perf/tokens_per_second").values))
        what = f"6 x {N:.4g} parameters x {rate:.4g} tokens/s, share of {peak:.3g} FLOP/s"
        return at_most(what, 6 * N * rate / peak, _MAX_MFU, key="mfu")
    if not subject.has("perf/mfu"):
        raise give("parameters", "peak_flops")
    logged = subject.finite("perf/mfu").values
    measured = logged[logged >= 0]  # nanoGPT has -1, or -100 in percent, until it is measured
    if not len(measured):
        raise Skip("perf/mfu is negative: not measured.")
    mfu = float(np.median(measured))
    if mfu > 1 or logged.min() < -1:
        return at_most("logged percent of the peak", mfu / 100, _MAX_MFU, key="mfu")
    unless = dict(otherwise="warn", where="unless it is a percent")  # of a small model
    return at_most("logged share of the peak", mfu, _MAX_MFU, key="mfu", **unless)


@check("State tokens as updates x sequences x length as executed; find the factor that differs.")
def budget(subject: Subject) -> Measure:
    """Stated amounts are the products of their factors; tokens logged fit the steps."""
    wrong, seen = numbers.products(subject.budgets), len(subject.budgets)
    if subject.tokens_per_step and subject.has("data/tokens"):
        tokens = subject.finite("data/tokens")
        seen += 1
        expected = float(tokens.steps[-1] * subject.tokens_per_step)
        # Fewer: padding is not counted. One more step: they are counted from 0.
        if tokens.values[-1] > 1.005 * expected + subject.tokens_per_step:
            text = f"{tokens.steps[-1]:.10g} steps x {subject.tokens_per_step:g} tokens"
            wrong.append(f"{text} = {expected:.4g}, but data/tokens is {tokens.values[-1]:.4g}")
    if not seen:
        raise give("budgets", "tokens_per_step")
    return none("amounts off by over 0.5 %", wrong, of=seen, key="wrong")


@check("Log raw and weighted values under names of their own; the objective is the weighted sum.")
def components(subject: Subject) -> Measure:
    """Weighted terms add up to the objective, to 1e-5 and the digits printed."""
    parts = [name for name in subject.rows.names if name.startswith("distill/weighted/")]
    if not parts:
        raise Skip("The log has no distill/weighted/ terms.")
    columns = [subject.finite(name) for name in ("distill/objective", *parts)]
    steps = functools.reduce(np.intersect1d, [column.steps for column in columns])
    if not len(steps):
        raise Skip("No row has all weighted terms and the objective.")
    x = np.stack([c.values[np.searchsorted(c.steps, steps)] for c in columns])
    sums = [(numbers.excess_of_sum(row[1:], row[0]), row) for row in x.T.tolist()]
    step, (excess, row) = max(zip(steps, sums, strict=True), key=lambda pair: pair[1][0])
    text = f"objective {row[0]:.6g} and sum {sum(row[1:]):.6g} of {len(parts)} terms at step"
    what = f"{text} {step:.10g}, difference over what digits and rounding allow"
    return at_most(what, excess, 1, key="excess")
