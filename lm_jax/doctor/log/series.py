"""Columns of a log as time series, and what their noise is."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import scipy.ndimage
import scipy.stats

from lm_jax.doctor import numbers
from lm_jax.doctor.facts import Skip, require
from lm_jax.doctor.log.read import METRICS, number

_HUGE = 1e100  # counts as infinite, so that squares and sums of the rest are finite
STRIDES = (1, 2, 4, 8, 16, 32)  # for rows that may be alike because they are running means


class Series(NamedTuple):
    """One column over the run; values that are not finite are NaN or infinite."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.steps)

    def where(self, keep: Any) -> "Series":
        """The rows of a mask or a slice."""
        return Series(self.steps[keep], self.values[keep])

    def finite(self) -> "Series":
        """The rows with a finite value."""
        return self.where(np.isfinite(self.values))

    def tail(self, share: float) -> "Series":
        """The last rows, at least one."""
        return self.where(slice(min(len(self) - 1, round(len(self) * (1 - share))), None))


EMPTY = Series(np.zeros(0), np.zeros(0))


class Records:
    """Rows of a log, by column; rows may be added while the run goes on.

    A step that comes again replaces what its column had logged from it on: a run that was killed
    goes on from an older checkpoint and appends to its log.

    With `most`, no column holds more rows: the older half is then thinned, evenly in steps from
    its first row on, so that whoever watches a long run has bounded memory, all that is new and the
    course since the start. A row that is not finite outlives its neighbours.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = (), *, most: int | None = None):
        """Begin with some rows, see `extend`."""
        self.count = 0
        self.odd: set[str] = set()  # metrics with something in them that is no number
        self.back: dict[str, list[int]] = {}  # by column: steps to which it went back
        self._columns: dict[str, Series] = {}
        self._most = most
        self.extend(rows)

    def __len__(self) -> int:
        """Number of rows that were added."""
        return self.count

    @property
    def names(self) -> list[str]:
        """Names of the columns that hold numbers."""
        return list(self._columns)

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows in the order of the log.

        Raises:
            ValueError: if a row is no mapping of names to values.
        """
        rows = _checked(rows)
        steps = []
        for index, row in enumerate(rows, self.count):
            at = number(row.get("step", index))
            steps.append(float(index) if at is None or not math.isfinite(at) else at)
        self.count += len(rows)
        for name in dict.fromkeys(key for row in rows for key in row):
            here = [(step, r[name]) for step, r in zip(steps, rows, strict=True) if name in r]
            places, raws = zip(*here, strict=True)
            values, is_number = _floats(raws)
            if name in METRICS and not is_number.all():
                self.odd.add(name)
            if name != "step" and is_number.any():
                self._append(name, np.array(places)[is_number], values[is_number])

    def _append(self, name: str, steps: np.ndarray, values: np.ndarray) -> None:
        if not name.endswith("ppl"):
            values = np.where(np.abs(values) > _HUGE, np.copysign(np.inf, values), values)
        kept = self._columns.get(name, EMPTY)
        course = np.concatenate([kept.steps[-1:], steps])
        went_back = course[1:][np.diff(course) < 0]
        self.back.setdefault(name, []).extend(int(step) - 1 for step in went_back)
        later = np.append(np.minimum.accumulate(steps[::-1])[::-1][1:], np.inf)
        new = Series(steps, values).where(steps < later)
        old = kept.where(slice(int(np.searchsorted(kept.steps, steps.min()))))
        rows = np.concatenate([old, new], axis=1)
        if self._most and rows.shape[1] > self._most:
            cut = rows.shape[1] - self._most // 2
            thin = _thin(rows[:, :cut], self._most // 4, name)
            rows = np.concatenate([thin, rows[:, cut:]], axis=1)
        self._columns[name] = Series(*rows)

    def series(self, name: str) -> Series:
        """The rows of a column; KeyError if there is none of that name."""
        return self._columns[name]


def _thin(rows: np.ndarray, most: int, name: str) -> np.ndarray:
    """Up to `most` of the rows [2, n], one of each stretch of steps: the worst, else the first."""
    steps, values = rows
    good = np.isfinite(values)
    badness = np.where(good, values if name == "optim/skipped_updates" else 0, np.inf)
    stretch = np.digitize(steps, np.linspace(steps[0], steps[-1], most))
    order = np.lexsort((-badness, stretch))
    return rows[:, order[np.unique(stretch[order], return_index=True)[1]]]


def _checked(rows: Any) -> list[Mapping[str, Any]]:
    """The rows as a list; ValueError if they are none."""
    iterable = isinstance(rows, Iterable) and not isinstance(rows, Mapping | str | bytes)
    found = list(rows) if iterable else [rows]
    mappings = iterable and all(isinstance(row, Mapping) for row in found)
    like = 'rows like {"step": 1, "train/loss": 9.7}'
    require(mappings, "records", f"give a list of {like}, or use read_log")
    require(all(isinstance(key, str) for row in found for key in row), "records", f"give {like}")
    return found


def _floats(raws: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The values as floats, and which of them are numbers."""
    found = [number(raw) for raw in raws]
    is_number = np.array([x is not None for x in found])
    return np.array([0.0 if x is None else x for x in found]), is_number


def pairs(a: Series, b: Series) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps that both have, and the values of either at them."""
    steps, i, j = np.intersect1d(a.steps, b.steps, assume_unique=True, return_indices=True)
    return steps, a.values[i], b.values[j]


def noise(values: np.ndarray, strides: Iterable[int] = (1,)) -> float:
    """Standard deviation of one row about its neighbours, robust and blind to a trend.

    What neighbours share, rows further apart do not: the largest over all strides counts.
    """
    n, found = len(values), []
    if n < 4:
        raise Skip(f"{n} rows are too few to estimate their noise.")
    for k in strides:
        if k == 1 or n >= 8 * k:
            # These have 6 times the variance of the noise.
            second = values[: -2 * k] - 2 * values[k:-k] + values[2 * k :]
            middle = 1.4826 * float(np.median(np.abs(second)))
            found.append((middle or float(np.std(second))) / math.sqrt(6))
    return max(found)


def mean_error(values: np.ndarray, count: int) -> float:
    """Standard error of the mean of `count` rows; that of blocks counts where rows are alike."""
    error = noise(values) / math.sqrt(count)
    means = blocks(values, 40)
    if 8 <= len(means) < len(values):
        error = max(error, noise(means) / math.sqrt(max(1, count * len(means) / len(values))))
    return error


def falls_at_once(values: np.ndarray) -> bool:
    """Whether later rows lie further below the first one than noise explains."""
    fell = values[0] - np.median(values[1:])
    return bool(fell > max(6 * noise(values), 0.05 * abs(values[0])))


def blocks(values: np.ndarray, most: int) -> np.ndarray:
    """Means of at most `most` consecutive blocks of nearly equal length."""
    edges = np.linspace(0, len(values), min(most, len(values)) + 1).astype(int)
    return np.add.reduceat(values, edges[:-1]) / np.diff(edges)


class Echo(NamedTuple):
    """How far a series repeats itself: the distance in rows at which it does so most."""

    lag: int
    correlation: float  # of ranks
    z: float  # in standard deviations of this correlation at other distances
    allowed: float
    rows: int


def echo(values: np.ndarray, lags: np.ndarray) -> Echo:
    """The lag of `lags` at which the noise about a running median repeats itself most.

    Its correlation is held against those at all other distances. Skip where most values are their
    median: a smooth curve leaves no noise that could repeat.
    """
    left = values - scipy.ndimage.median_filter(values, 9, mode="nearest")
    if np.mean(left == 0) > 0.5:
        raise Skip("The loss is too smooth or printed with too few digits to tell batches apart.")
    n = len(left)
    ranks = scipy.stats.rankdata(left)
    ranks -= ranks.mean()
    power = np.abs(np.fft.rfft(ranks, 2 ** math.ceil(math.log2(2 * n)))) ** 2
    rows, energy = n - np.arange(n), np.cumsum(ranks**2)
    # Of the first and of the last rows that overlap, where the noise may be larger.
    overlap = np.sqrt(energy[::-1] * (energy[-1] - energy + ranks**2))
    overlap = np.maximum(overlap, rows / n * energy[-1])
    # Fisher's z: near a correlation of 1 the root of the rows times it would say too little.
    correlation = np.clip(np.fft.irfft(power)[:n] / overlap, -0.99, 0.99)
    scores = np.arctanh(correlation) * np.sqrt(np.maximum(rows - 3, 1))
    scores /= max(1.0, 1.4826 * float(np.median(np.abs(scores[10 : n - 10]))))
    best = int(lags[np.argmax(scores[lags])])
    # A mean over a window is alike and unlike at distances of about its length.
    allowed = max(numbers.threshold(len(lags)), -float(scores[lags].min()))
    return Echo(best, float(correlation[best]), float(scores[best]), allowed, int(rows[best]))
