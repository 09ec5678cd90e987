"""Records of a run as time series, read from the log of any trainer."""

import dataclasses
import decimal
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm_jax.doctor.log.read import Problem, number
from lm_jax.doctor.old import Skip

_HUGE = 1e100  # counts as infinite, so that squares and sums of the rest are finite


class Series(NamedTuple):
    """One metric over the run; non-finite values are NaN or infinite."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.steps)

    def finite(self) -> "Series":
        """The rows with a finite value."""
        keep = np.isfinite(self.values)
        return Series(self.steps[keep], self.values[keep])

    def tail(self, share: float) -> "Series":
        """The last rows, at least one."""
        start = min(len(self) - 1, round(len(self) * (1 - share)))
        return Series(self.steps[start:], self.values[start:])


@dataclasses.dataclass(frozen=True)
class Log:
    """Records with what is declared about the run; see `examine_log` for the fields."""

    records: Sequence[Mapping[str, Any]]
    problems: Sequence[Problem] = ()
    vocab_size: int | None = None
    split_tokens: Mapping[str, int] = dataclasses.field(default_factory=dict)
    train_tokens: float | None = None
    tokens_per_step: float | None = None
    parameters: float | None = None
    peak_flops: float | None = None
    lr_peak: float | None = None
    lr_end: float | None = None
    steps: int | None = None
    resumes: Sequence[int] = ()
    overfit: bool = False
    references: Mapping[str, float] = dataclasses.field(default_factory=dict)
    budgets: Sequence[Mapping[str, float]] = ()
    comparisons: Sequence[Mapping[str, Any]] = ()
    measured_on: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def _series(self) -> tuple[dict[str, Series], dict[str, list[int]]]:
        """Every metric, and the steps to which it went back.

        A step that comes again replaces what was logged from it on: a run that was killed goes on
        from an older checkpoint and appends to its log.
        """
        rows: dict[str, list[tuple[float, float]]] = {}
        back: dict[str, list[int]] = {}
        for index, record in enumerate(self.records):
            at = number(record.get("step", index))
            step = float(index) if at is None or not math.isfinite(at) else at
            for name, raw in record.items():
                value = number(raw)
                if value is None or name == "step":
                    continue
                if abs(value) > _HUGE and not name.endswith("ppl"):
                    value = math.copysign(math.inf, value)
                kept = rows.setdefault(name, [])
                if kept and step < kept[-1][0]:
                    back.setdefault(name, []).append(int(step) - 1)
                while kept and step <= kept[-1][0]:
                    kept.pop()
                kept.append((step, value))
        series = {name: Series(*np.array(kept, float).T) for name, kept in rows.items()}
        return series, back

    @property
    def names(self) -> list[str]:
        """Names of the metrics that hold numbers."""
        return list(self._series[0])

    def has(self, name: str) -> bool:
        """Whether any row holds the metric."""
        return name in self._series[0]

    def series(self, name: str) -> Series:
        """The rows of a metric; Skip if there is none."""
        if name not in self._series[0]:
            raise Skip(f"the log has no {name}.")
        return self._series[0][name]

    def finite(self, name: str, least: int = 1) -> Series:
        """The finite rows of a metric; Skip if there are fewer than `least`."""
        found = self.series(name).finite()
        if len(found) < least:
            raise Skip(f"{name} has {len(found)} finite rows and this check needs {least}.")
        return found

    def splits(self, name: str = "loss") -> list[str]:
        """Splits other than train for which a metric is logged."""
        return [key.split("/")[0] for key in self.names if key in (f"valid/{name}", f"test/{name}")]

    def objective(self) -> str:
        """The metric that training lowers: the objective of a distillation, else the loss."""
        return "distill/objective" if self.has("distill/objective") else "train/loss"

    def restarts(self) -> list[int]:
        """Updates after which the run was resumed: declared, logged or seen in the log."""
        logged = self.series("resumed").values.astype(int).tolist() if self.has("resumed") else ()
        return sorted({*self.resumes, *logged, *self._series[1].get("train/loss", ())})

    def tokens(self, steps: np.ndarray) -> np.ndarray | None:
        """Training tokens seen at the given steps, or None if it is not known."""
        if self.has("data/tokens"):
            known = self.finite("data/tokens")
            return np.interp(steps, known.steps, known.values)
        return None if self.tokens_per_step is None else steps * self.tokens_per_step

    def epochs(self, steps: np.ndarray) -> np.ndarray | None:
        """Passes over the training data at the given steps, or None if it is not known."""
        if self.has("data/epoch"):
            known = self.finite("data/epoch")
            return np.interp(steps, known.steps, known.values)
        tokens = self.tokens(steps)
        return None if tokens is None or not self.train_tokens else tokens / self.train_tokens

    def settled(self, steps: np.ndarray) -> bool:
        """Whether the run is long enough to be compared with trivial predictors."""
        epochs = self.epochs(steps[-1:])
        return steps[-1] >= 100 or (epochs is not None and epochs[0] >= 1)


def pairs(a: Series, b: Series) -> list[tuple[float, float, float]]:
    """(step, a, b) of the steps that both have."""
    _, i, j = np.intersect1d(a.steps, b.steps, return_indices=True)
    return list(zip(a.steps[i].tolist(), a.values[i].tolist(), b.values[j].tolist(), strict=True))


def noise(values: np.ndarray) -> float:
    """Standard deviation of one row about its neighbours, robust and blind to a trend.

    From second differences x_i - 2 x_(i+1) + x_(i+2), whose variance is 6 times that of the noise.
    """
    if len(values) < 4:
        raise Skip(f"{len(values)} rows are too few to estimate their noise.")
    second = np.diff(values, 2)
    middle = 1.4826 * float(np.median(np.abs(second)))
    return (middle or float(np.std(second))) / math.sqrt(6)


def residuals(values: np.ndarray, width: int = 9) -> np.ndarray:
    """What a running median over `width` rows leaves."""
    padded = np.pad(values, width // 2, mode="edge")
    return values - np.median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=1)


def blocks(values: np.ndarray, most: int) -> np.ndarray:
    """Means of at most `most` consecutive blocks of nearly equal length."""
    return np.array([part.mean() for part in np.array_split(values, min(most, len(values)))])


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of the ranks, which single outliers cannot make."""
    ranks = np.stack([np.argsort(np.argsort(x)) for x in (a, b)]).astype(float)
    return float(np.corrcoef(ranks)[0, 1])


def half_unit(value: float) -> float:
    """Half a unit of the last decimal that is needed to write a number; inf if it is not finite."""
    if not math.isfinite(value):
        return math.inf
    exponent = decimal.Decimal(repr(float(value))).as_tuple().exponent
    return 0.5 * 10.0 ** int(exponent)
