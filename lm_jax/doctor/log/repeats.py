"""Noise of the loss that comes again: at a resume, and with every epoch."""

import contextlib
import math

import numpy as np

from lm_jax.doctor.checks import check, fixture
from lm_jax.doctor.facts import Skip
from lm_jax.doctor.findings import Measure, at_most, note
from lm_jax.doctor.log.series import STRIDES, echo, noise
from lm_jax.doctor.log.subject import Subject

_ROWS = 30  # that must come again
_LEAST = 20  # rows of an epoch
_SLACK = 0.1  # by how much the length of an epoch may be stated wrong


@fixture
def restarts(subject: Subject) -> list[int]:
    """Updates after which the run was resumed: declared, logged, or seen by steps that go back."""
    logged = subject.finite("resumed").values.astype(int) if subject.has("resumed") else ()
    return sorted({*subject.resumes, *logged, *subject.rows.back.get("train/loss", ())})


@check(
    "A fall, or the noise of the start of the run over again: the data were read from the "
    "beginning, so save the reader's position. A rise: optimiser state, schedule or averages were "
    "not restored. Compare N updates with N/2, resume, N/2 (examine_data: data.resume)."
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
        near = range(max(size, split // 2), min(len(loss) - size, 2 * split) + 1, size // 2)
        near = near[:: len(near) // 200 + 1]
        null = [_jump(loss.values, p, size) for p in near if abs(p - split) >= size]
        error = spread * math.sqrt(8 / size)  # of a step beside a common slope
        if null:
            error = max(error, 1.4826 * float(np.median(np.abs(null))))
        change = f"change of the loss after step {at}, nats"
        found.append(
            at_most(change, abs(jump), 4.5 * error, where=f"{jump:+.3g}", key=f"jump {at}")
        )
        if min(len(loss) - split, split) >= _ROWS:
            with contextlib.suppress(Skip):  # a smooth curve
                again = echo(loss.values[: 2 * split], np.array([split]))
                what = f"likeness of the noise after step {at} to that of the first rows, sd"
                where = f"the {again.rows} rows repeat the noise"
                found.append(at_most(what, again.z, again.allowed, where=where))
    if not found:
        raise Skip("Fewer than 4 rows stand before or after every resume.")
    return [*found, note("resumes judged", judged)]


@check(
    "Every epoch visits the same batches in the same order. Draw the order from (seed, epoch); "
    "examine_data (data.epoch_order) shows it."
)
def epoch_order(subject: Subject, restarts: list[int], steady: bool) -> list[Measure]:
    """The noise of the loss does not repeat with the period of an epoch.

    The period need not be known exactly: the lags around it are searched, or all of them if it is
    not known or the log does not reach it.
    """
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
        note("rows of an epoch", period or "not known"),
    ]


def _jump(values: np.ndarray, split: int, size: int) -> float:
    """The step at `split` in a fit of a slope and a step to `size` rows on either side."""
    place = np.arange(-size, size) + 0.5
    design = np.stack([np.ones_like(place), place, (place > 0).astype(float)], axis=1)
    rows = values[split - size : split + size]
    return float(np.linalg.lstsq(design, rows, rcond=None)[0][2])
