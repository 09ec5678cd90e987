"""What the course of the training loss says: divergence, standstill, spikes."""

import math
from typing import NamedTuple

import numpy as np
import scipy.ndimage

from lm_jax.doctor.checks import check, fixture
from lm_jax.doctor.facts import Skip
from lm_jax.doctor.findings import Measure, at_least, holds, none, note
from lm_jax.doctor.log.series import STRIDES, blocks, falls_at_once, noise
from lm_jax.doctor.log.subject import Subject

_FEW = 16  # rows
_UNLEARNT = 5.0  # nats; a trained model of words or their parts has less
_FREQUENCIES = 6.5  # nats; whoever knows only how often each of many ids occurs has 7 to 8


class Rise(NamedTuple):
    """The end of the objective against the lowest that it had reached, medians of blocks."""

    start: float
    least: float
    end: float
    step: int  # of the lowest block
    allowed: float
    where: str  # the last row before the rise, and the next one

    @property
    def diverged(self) -> bool:
        """Whether it lost more than noise explains."""
        return self.end - self.least > self.allowed

    @property
    def certain(self) -> bool:
        """Whether it ends where no learning rate schedule would leave it."""
        return self.end > self.start / 2


@fixture
def rise(subject: Subject) -> Rise:
    """How far the objective ends above the lowest that it had reached.

    The lowest of 40 blocks lies 2.2 SE below their mean by chance, so that 6 SE of a difference
    leave more than 4. Of few rows, means of two are compared; their noise is badly known, so that
    a quarter of the first row must be lost, and more where they are fewer than 8.
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
    return Rise(float(x[0]), least, end, int(loss.steps[parts[low][-1]]), allowed, where)


@fixture
def steady(rise: Rise | None = None) -> bool:
    """The run did not diverge after it had learned; one cause is named, not all that follows."""
    if rise and rise.diverged and rise.certain and rise.least < 0.95 * rise.start:
        raise Skip("The run diverges; log.divergence says when.")
    return True


@check(
    "The run diverges. Lower the peak learning rate or lengthen the warm-up, and look at the "
    "batches and the gradient norm at the step named; parameters from before it are still good. "
    "If the data change there, log the losses of both apart."
)
def divergence(subject: Subject, rise: Rise) -> Measure:
    """The loss does not end far above the lowest that it had reached."""
    certain = rise.certain and len(subject.finite(subject.objective)) >= 8
    return holds(
        not rise.diverged,
        f"{subject.objective} began at {rise.start:.4g}, was lowest with {rise.least:.4g} by step "
        f"{rise.step} and ends at {rise.end:.4g}, {rise.end - rise.least:.4g} nats above that",
        {"start": rise.start, "lowest": rise.least, "step": rise.step, "end": rise.end},
        limit=f"noise explains {rise.allowed:.3g}",
        otherwise="fail" if certain else "warn",
        where=rise.where,
        key="course",
    )


@check(
    "The course is that of a frozen model, so differences between rows are differences between "
    "batches: explain none of them by a hyper-parameter. Run examine_training "
    "(training.updates): the parameters must move, and two evaluations must differ. Where the loss "
    "falls to 7 or 8 nats and stays, only the frequencies of ids are learned: the context does not "
    "get through (examine_model: model.context_use)."
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
        what = f"z of the Mann-Kendall test for a fall of {name}"
        status = "fail" if tiny and uniform else "warn"
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


@check(
    "Look at the batches of these updates; if they are ordinary, lower the peak learning rate or "
    "lengthen the warm-up."
)
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
    if not len(starts):
        return found
    found.append(note(f"height of the first, at step {steps[0]:.10g}", float(above[starts[0]])))
    if subject.has("optim/grad_norm"):
        norms = subject.finite("optim/grad_norm")
        near = (norms.steps >= loss.steps[starts[0]]) & (norms.steps <= steps[0])
        if near.any() and np.median(norms.values[near]):
            times = float(norms.values[near].max() / np.median(norms.values[near]))
            found.append(note("gradient norm there, times its median before", times))
    return found


def _median_before(values: np.ndarray, width: int) -> np.ndarray:
    """The median of as many rows before each row from `width` on."""
    medians = scipy.ndimage.median_filter(values, width, mode="nearest")
    return medians[width // 2 : -width + width // 2]  # type: ignore[no-any-return]
