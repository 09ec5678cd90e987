"""What the course of the training loss says: divergence, standstill, spikes, repetition."""

import contextlib
import math
from typing import Any, NamedTuple

import numpy as np
import scipy.ndimage

from lm_jax.doctor.checks import check, fixture
from lm_jax.doctor.facts import Skip
from lm_jax.doctor.findings import Measure, at_least, at_most, holds, none, note
from lm_jax.doctor.log.series import STRIDES, blocks, echo, falls_at_once, noise
from lm_jax.doctor.log.subject import Subject

_FEW = 16  # rows
_UNLEARNT = 5.0  # nats; a trained model of words or their parts has less
_ROWS = 30  # that must come again
_LEAST = 20  # rows of an epoch
_SLACK = 0.1  # by how much the length of an epoch may be stated wrong
_FREQUENCIES = 6.5  # nats; whoever knows only how often each of many ids occurs has 7 to 8


class Rise(NamedTuple):
    """The end of the objective against the lowest that it had reached, medians of blocks."""

    start: float
    least: float
    end: float
    step: int  # of the lowest block
    allowed: float
    where: str  # the last row before the rise, and the next one
    diverged: bool  # it lost more than noise explains
    certain: bool  # it ends where no learning rate schedule would leave it


@fixture
def rise(subject: Subject) -> Rise:
    """How far the objective ends above the lowest that it had reached.

    The lowest of 40 blocks lies 2.2 SE below their mean by chance: 6 SE leave 4. Of few rows, means
    of two are compared, and a quarter of the first row must be lost: their noise is badly known.
    """
    loss = subject.finite(subject.objective, 3)
    x, n, start = loss.values, len(loss), abs(float(loss.values[0]))
    if np.median(x) < 0:
        raise Skip(f"{subject.objective} is below 0 (log.negative).")
    if n < _FEW:
        parts = [np.array([i, i + 1]) for i in range(n - 1)]
        level = np.array([x[part].mean() for part in parts])
        before = x[: int(np.argmin(level)) + 2]  # the rise itself is no noise
        sd = noise(x) if n >= 8 else before.std() if len(before) >= 4 else 0.05 * before.mean()
        allowed = max(4 * math.sqrt(2) * float(sd), (0.25 if n >= 8 else 0.4) * start)
    else:
        parts = np.array_split(np.arange(n), min(40, n // 4))
        level = np.array([np.median(x[part]) for part in parts])
        # The variance of a median is pi / 2 times that of a mean; that of blocks is larger where
        # batches that follow each other are alike.
        alone = noise(x) * math.sqrt(math.pi / 2 / len(parts[-1]))
        error = math.sqrt(2) * max(alone, noise(level) if len(level) >= 8 else 0)
        allowed = max(6 * error, 0.05 * start)
    allowed = min(allowed, max(start, 1.0))  # twice the first row is no noise
    low = int(np.argmin(level))
    least, end = float(level[low]), float(level[-1])
    smooth = scipy.ndimage.median_filter(x, 9, mode="nearest") if n >= 60 else x
    good = int(np.flatnonzero(smooth <= max((least + end) / 2, smooth.min()))[-1])
    where = f"the last good row is step {loss.steps[good]:.10g} with {x[good]:.4g}"
    if good + 1 < n:
        where += f" and step {loss.steps[good + 1]:.10g} has {x[good + 1]:.4g}"
    step, diverged, certain = int(loss.steps[parts[low][-1]]), end - least > allowed, end > x[0] / 2
    return Rise(float(x[0]), least, end, step, allowed, where, diverged, bool(certain))


@fixture
def steady(rise: Rise | None = None) -> bool:
    """The run did not diverge after it had learned; one cause is named, not all that follows."""
    if rise and rise.diverged and rise.certain and rise.least < 0.95 * rise.start:
        raise Skip("The run diverges; log.divergence says when.")
    return True


@check(
    "Lower the peak learning rate or lengthen the warm-up, and look at batches and gradient norm "
    "at the step named. If the data change there, log the losses of both apart."
)
def divergence(subject: Subject, rise: Rise) -> Measure:
    """The loss does not end far above the lowest that it had reached."""
    certain = rise.certain and len(subject.finite(subject.objective)) >= 8
    text = f"{subject.objective} began at {rise.start:.4g}, was lowest with {rise.least:.4g} by "
    text += f"step {rise.step} and ends at {rise.end:.4g}, {rise.end - rise.least:.4g} nats above"
    course = {"start": rise.start, "lowest": rise.least, "step": rise.step, "end": rise.end}
    limit, status = f"noise explains {rise.allowed:.3g}", "fail" if certain else "warn"
    more: dict[str, Any] = dict(limit=limit, otherwise=status, where=rise.where, key="course")
    return holds(not rise.diverged, text, course, **more)


@check(
    "Explain no row by a hyper-parameter: this is a frozen model (training.updates) or, where the "
    "loss stays at 7 or 8 nats, one that learns only frequencies of ids (model.context_use)."
)
def trend(subject: Subject, steady: bool, uniform: float | None = None) -> list[Measure]:
    """From a random start the loss falls at all: at once, or by the Mann-Kendall test."""
    name = subject.objective
    loss = subject.finite(name, 6)
    start, last_step = float(loss.values[0]), float(loss.steps[-1])
    if last_step < (99 if uniform else 1000):
        raise Skip(f"The log ends at step {last_step:.10g}, too early for this check.")
    if start < (min(0.7 * uniform, _FREQUENCIES) if uniform else _UNLEARNT):
        raise Skip("The log does not begin with an untrained model.")
    at_once, found = falls_at_once(loss.values), []
    if at_once:
        found = [note(f"{name} falls from {start:.4g} at once")]
        loss = loss.where(loss.steps > 0.1 * last_step)
        if len(loss) < 6 or np.median(loss.values) < _FREQUENCIES:
            return found
    x = loss.values
    third = len(x) // 3
    drop = float(x[:third].mean() - x[-third:].mean())
    error = float(np.std(x, ddof=1)) * math.sqrt(2 / third)
    if drop + 3 * error < 0 and -drop > 0.05 * start:
        raise Skip(f"{name} rises from {start:.4g}; log.divergence judges that.")
    tiny = drop + 3 * error < 0.05 * x[0]
    if not at_once:
        what, status = (
            f"Mann-Kendall z for a fall of {name}",
            "fail" if tiny and uniform else "warn",
        )
        # A frozen model falls by this much once in a hundred logs.
        found.append(at_least(what, _mann_kendall(x), 2.33, otherwise=status, key="z"))
    if last_step >= 1000:
        text = f"share of {x[0]:.4g} nats gained after step {loss.steps[0]:.10g} (at least 0.05)"
        found.append(holds(not tiny, text, drop / x[0], otherwise="warn", key="fell"))
    return [*found, note(f"{name} of the last third is {drop:.3g} ± {error:.2g} below the first")]


def _mann_kendall(values: np.ndarray) -> float:
    """Standard errors by which the signs of all differences say that the values fall."""
    x = blocks(values, 200)
    n = len(x)
    falls = np.sign(x[:, None] - x[None, :])[np.triu_indices(n, 1)].sum()
    return float((falls - np.sign(falls)) / math.sqrt(n * (n - 1) * (2 * n + 5) / 18))


@check("Look at these batches; if they are ordinary, lower the peak rate or lengthen the warm-up.")
def spikes(subject: Subject, rise: Rise, steady: bool) -> list[Measure]:
    """The loss does not jump above its recent past and stay there for several updates.

    Three rows in a row must lie 6 sd and a twentieth above the median of the rows before; where
    there are fewer than 60, one row that is 10 sd and a quarter above it is enough.
    """
    loss = subject.finite("train/loss", 8)
    few = len(loss) < 60
    width = 3 if few else 50
    x, sd = loss.values, noise(loss.values, STRIDES)
    if not sd:
        raise Skip("The loss has no noise.")
    past = _median_before(x, width)
    above = x[width:] - past
    if few:
        starts = np.flatnonzero((above > 10 * sd) & (above > 0.25 * np.abs(past)))
    else:
        # The noise of the rows before may be larger than that of the whole run.
        own = _median_before(np.abs(x - scipy.ndimage.median_filter(x, 9, mode="nearest")), width)
        over = above > np.maximum(6 * np.maximum(sd, 1.4826 * own), 0.05 * np.abs(past))
        starts = np.flatnonzero(over[2:] & over[1:-1] & over[:-2])
        starts = starts[np.diff(starts, prepend=-2) > 1]
    steps = loss.steps[starts + width]
    limit = "rows 10 sd" if few else "runs of 3 rows over 6 sd"
    what = f"{limit} above the median of {width} before (sd {sd:.3g} nats)"
    places = [f"step {step:.10g}" for step in steps]
    found = [none(what, places, otherwise="warn", key="places")]
    norms = subject.logged("optim/grad_norm")
    if len(starts) and len(norms):
        near = (norms.steps >= loss.steps[starts[0]]) & (norms.steps <= steps[0])
        if near.any() and np.median(norms.values[near]):
            times = float(norms.values[near].max() / np.median(norms.values[near]))
            found.append(note("gradient norm there, times its median before", times))
    return found


def _median_before(values: np.ndarray, width: int) -> np.ndarray:
    """The median of as many rows before each row from `width` on."""
    medians = scipy.ndimage.median_filter(values, width, mode="nearest")
    return medians[width // 2 : -width + width // 2]  # type: ignore[no-any-return]


# ---- Noise that comes again, at a resume and with every epoch --------------------------------


@fixture
def restarts(subject: Subject) -> list[int]:
    """Updates after which the run was resumed: declared, logged, or seen by steps that go back."""
    logged = subject.logged("resumed").values.astype(int)
    return sorted({*subject.resumes, *logged, *subject.rows.back.get("train/loss", ())})


@check(
    "After a fall or repeated noise the data were read from the beginning: save the reader's place "
    "(data.resume). After a rise optimiser state, schedule or averages were not restored."
)
def resume(subject: Subject, restarts: list[int]) -> list[Measure]:
    """The loss does not jump, and batches do not repeat, where the run was resumed."""
    if not restarts:
        raise Skip("No resume is declared or seen.", "resumes")
    loss = subject.finite("train/loss")
    spread, found, judged = noise(loss.values, STRIDES), [], 0
    for at in restarts:
        split = int(np.searchsorted(loss.steps, at, side="right"))
        size = min(32, split // 6, len(loss) - split)
        if size < 4:
            continue
        judged += 1
        jump = _jump(loss.values, split, size)
        # Where nothing was resumed the same fit shows what curvature and drift amount to.
        last, every = min(len(loss) - size, 2 * split), max(size // 2, split // 100)
        near = range(max(size, split // 2), last + 1, every)
        null = [_jump(loss.values, p, size) for p in near if abs(p - split) >= size]
        error = spread * math.sqrt(8 / size)  # of a step beside a common slope
        if null:
            error = max(error, 1.4826 * float(np.median(np.abs(null))))
        what, key = f"change of the loss after step {at}, nats", f"jump {at}"
        found.append(at_most(what, abs(jump), 4.5 * error, where=f"{jump:+.3g}", key=key))
        if min(len(loss) - split, split) >= _ROWS:
            with contextlib.suppress(Skip):  # a smooth curve
                again = echo(loss.values[: 2 * split], np.array([split]))
                what = f"likeness of the noise after step {at} to that of the first rows, sd"
                where = f"the {again.rows} rows repeat the noise"
                found.append(at_most(what, again.z, again.allowed, where=where))
    if not found:
        raise Skip("Fewer than 4 rows stand before or after every resume.")
    return [*found, note("resumes judged", judged)]


@check("Draw the order of the batches from (seed, epoch); data.epoch_order shows the fault.")
def epoch_order(subject: Subject, restarts: list[int], steady: bool) -> list[Measure]:
    """The noise of the loss does not repeat with the period of an epoch."""
    subject.skip_if_overfit()
    loss = subject.finite("train/loss", 2 * _ROWS)
    n, period = len(loss), 0
    epochs = subject.epochs(loss.steps)
    if epochs is not None and epochs[-1] > epochs[0]:
        period = round((n - 1) / (epochs[-1] - epochs[0]))
        if period < _LEAST:
            raise Skip(f"An epoch has {period} rows and this check needs {_LEAST}.")
    # The first rows that come again after a resume are not an epoch.
    splits = np.searchsorted(loss.steps, restarts, side="right")
    lags = np.setdiff1d(np.arange(_LEAST, n - _ROWS), splits)
    implied = lags[np.abs(lags - period) <= max(2, _SLACK * period)]
    found = echo(loss.values, implied if len(implied) else lags)
    what = f"likeness of the noise of {found.rows} pairs of rows {found.lag} apart, sd"
    status = "fail" if len(implied) else "warn"
    return [
        at_most(what, found.z, found.allowed, otherwise=status, key="z"),
        note("correlation of their ranks", found.correlation, key="correlation"),
    ]


def _jump(values: np.ndarray, split: int, size: int) -> float:
    """The step at `split` in a fit of a slope and a step to `size` rows on either side."""
    place = np.arange(-size, size) + 0.5
    design = np.stack([np.ones_like(place), place, (place > 0).astype(float)], axis=1)
    rows = values[split - size : split + size]
    return float(np.linalg.lstsq(design, rows, rcond=None)[0][2])
