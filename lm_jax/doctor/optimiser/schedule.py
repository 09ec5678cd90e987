"""Checks of the learning rate over a run."""

from collections.abc import Callable

import numpy as np

from lm_jax.doctor.checks import check, fixture
from lm_jax.doctor.facts import Broken, call
from lm_jax.doctor.findings import Measure, at_most, holds, listed, note, shown
from lm_jax.doctor.numbers import gap
from lm_jax.doctor.optimiser.subject import UPDATES, Point, Subject, logged

Plan = tuple[np.ndarray, np.ndarray]  # updates of the run and their learning rates
_LOOKS = 200  # updates of a run whose learning rate is asked for


@fixture
def rate(learning_rate: Callable[..., float]) -> Callable[[int], float]:
    """The learning rate of an update; one that cannot be called is told here, once."""

    def asked(update: int) -> float:
        return call("learning_rate", lambda: float(learning_rate(update)))

    asked(0)
    return asked


@fixture
def first_rates(subject: Subject, rate: Callable[[int], float]) -> list[float]:
    """Learning rates of the updates that a fresh state makes first."""
    return [rate(subject.first_update + i) for i in range(UPDATES)]


@fixture
def plan(rate: Callable[[int], float], steps: int) -> Plan:
    """The learning rate all along the run, at the last two updates as well."""
    at = np.unique([*np.linspace(0, steps - 1, _LOOKS).astype(int), max(0, steps - 2)])
    rates = np.array([rate(int(i)) for i in at])
    if not np.isfinite(rates).all():
        raise Broken(f"learning_rate({at[~np.isfinite(rates)][0]}) is not finite")
    return at, rates


@check("Give update i of the warm-up (i + 1) / warmup of the peak, so that update 0 is not lost.")
def first_lr(rate: Callable[[int], float]) -> Measure:
    """The first update has a learning rate above 0."""
    first = rate(0)
    return holds(first > 0, "learning rate of update 0", first, limit="above 0", key="lr")


@check("Size the schedule in updates, not in micro-batches, and step it once per update.")
def last_lr(plan: Plan, steps: int, end_lr: float) -> list[Measure]:
    """The last update has the declared learning rate, and it was not reached long before."""
    at, rates = plan
    last, peak = float(rates[-1]), float(rates.max())
    # One update's change beside 5 %: some schedules would reach their end one update later.
    limit = 0.05 * end_lr + float(np.abs(np.diff(rates[-2:])).sum()) + 1e-6 * peak
    above = at[np.abs(rates - end_lr) > limit]
    idle = float(1 - (above[-1] + 1) / steps) if len(above) else 0.0
    off = f"distance of the last learning rate from {end_lr:.3g}"
    # At 0 nothing is learned from there on; a floor above 0 may be meant.
    early = "warn" if end_lr else "fail"
    return [
        at_most(off, abs(last - end_lr), limit, key="off"),
        note(f"peak {peak:.3g}, last", last, key="last"),
        at_most("share of the run left when it is reached", idle, 0.2, otherwise=early, key="idle"),
    ]


@check("Shorten the warm-up, or count it in the same unit as the run.")
def warmup(plan: Plan, steps: int) -> Measure:
    """The learning rate peaks within the first fifth of the run."""
    at, rates = plan
    peak = int(at[np.argmax(rates >= rates.max() * (1 - 1e-6))])
    rising = steps > 2 and peak == at[-1]
    where = "still rising at the end" if rising else f"at update {peak} of {steps}"
    what, status = "share of the run before the peak", "fail" if rising else "warn"
    return at_most(what, peak / steps, 0.2, otherwise=status, where=where, key="share")


@check("Feed the schedule the counter of updates, the same that the run's length is given in.")
def executed_lr(first_rates: list[float], good: list[Point]) -> Measure:
    """The logged learning rates are the schedule's at the updates made."""
    made = logged(good, "optim/lr")
    scale = np.maximum(np.abs(first_rates), 1e-30)
    pairs = f"logged {listed(map(shown, made))}, scheduled {listed(map(shown, first_rates))}"
    what = "relative difference of logged and scheduled learning rates"
    return at_most(what, gap(made / scale, first_rates / scale), 1e-4, where=pairs, key="gap")
