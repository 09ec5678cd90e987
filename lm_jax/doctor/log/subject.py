"""Records of a run as time series, read from the log of any trainer."""

import csv
import dataclasses
import decimal
import difflib
import functools
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm_jax.doctor.findings import Skip, require

# Names that the checks read, in the order in which a short form ("loss", "lr") stands for one.
METRICS = (
    "step",
    "train/loss",
    "train/token_ppl",
    *(
        f"{split}/{name}"
        for split in ("valid", "test")
        for name in ("loss", "token_ppl", "accuracy", "token_count", "lm_ce")
    ),
    "optim/lr",
    "optim/grad_norm",
    "optim/clip_rate",
    "optim/update_norm",
    "optim/param_norm",
    "optim/skipped_updates",
    "optim/loss_scale",
    "data/tokens",
    "data/epoch",
    "perf/tokens_per_second",
    "perf/mfu",
    "distill/objective",
    "distill/lm_ce",
    "distill/kd_kl",
    "distill/kd_kl_t2",
)
_HUGE = 1e100  # counts as infinite, so that squares and sums of the rest are finite
PREFIXES = ("distill/", "grad_norm/")


class Problem(NamedTuple):
    """A line of a log that could not be used."""

    line: int
    what: str
    last: bool  # it is the last line, which a killed process may leave cut off


class LogFile(NamedTuple):
    """What was read from a file."""

    records: list[dict[str, Any]]
    problems: list[Problem]


def read_log(
    path: str | pathlib.Path,
    mapping: Mapping[str, str] | None = None,
    *,
    null_is_nan: bool = False,
) -> LogFile:
    """Read a JSONL or CSV log (comma or tab) of any trainer.

    Args:
        path: the file; it is JSONL if its first character is a brace. Empty lines and lines that
            begin with # may stand before the first row.
        mapping: name of a metric -> name of the file's column, like {"loss": "train_loss"}. A
            metric is named as in `METRICS`, with "_" for "/" (`valid_loss`) or by its last part
            (`loss` is `train/loss`, `token_ppl` is of the valid split).
        null_is_nan: every null is a non-finite value, as this trainer writes it. Otherwise nulls
            of a column that is logged in fewer than half of its rows, or just where another is
            not, mean "not logged", as pandas and wandb write them.

    Returns:
        The records, their columns renamed, and the lines that could not be used.

    Raises:
        ValueError: if the file is no table of rows, if `mapping` names an unknown metric or one
            twice, or a column that no record has.
    """
    columns: dict[str, str] = {}
    for name, column in (mapping or {}).items():
        metric = metric_name(name)
        require(metric not in columns.values(), f"mapping: {metric}", "give it one column")
        require(column not in columns, f"mapping: column {column!r}", "give it one metric")
        columns[column] = metric
    lines = pathlib.Path(path).read_text(encoding="utf-8-sig", errors="replace").splitlines()
    skipped = 0
    while skipped < len(lines) and lines[skipped].strip()[:1] in ("", "#"):
        skipped += 1
    lines = lines[skipped:]
    first = lines[0].lstrip()[:1] if lines else ""
    require(first != "[", f"{path} begins with '['", "write one JSON object a line, without a list")
    try:
        records, problems = (_read_json_lines if first == "{" else _read_csv)(lines)
    except csv.Error as error:
        raise ValueError(f"{path}: {error}; give a JSONL or CSV file.") from error
    problems = [p._replace(line=p.line + skipped) for p in problems]
    if not null_is_nan:
        records = _without_gaps(records)
    present = {key for record in records for key in record}
    for column in columns:
        if records and column not in present:
            raise ValueError(
                f"mapping: no record of {path} has {column!r}; "
                f"choose from {', '.join(sorted(present))}."
            )
    taken = set(columns.values())
    renamed = [
        {
            columns.get(key, key): x
            for key, x in record.items()
            if key in columns or key not in taken
        }
        for record in records
    ]
    return LogFile(renamed, problems)


def _without_gaps(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records without the nulls that stand for "not logged"."""
    null: dict[str, set[int]] = {}
    logged: dict[str, set[int]] = {}
    for i, record in enumerate(records):
        for name, x in record.items():
            (null if x is None else logged).setdefault(name, set()).add(i)
    others = {frozenset(logged[name]) for name in null if name in logged}
    gaps = {
        name
        for name, rows in null.items()
        if name in logged
        and (len(rows) > len(logged[name]) and min(rows) < max(logged[name]) or rows in others)
    }
    return [{k: x for k, x in r.items() if x is not None or k not in gaps} for r in records]


def metric_name(name: str) -> str:
    """The metric that a full or short name stands for; ValueError if there is none."""
    for candidate in METRICS:
        if name in (candidate, candidate.replace("/", "_"), candidate.split("/")[-1]):
            return candidate
    if name.startswith(PREFIXES):
        return name
    near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.0)[0]
    raise ValueError(f"mapping: {name!r} is no metric; did you mean {near!r}?")


def _read_json_lines(lines: list[str]) -> LogFile:
    records, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # of digits or brackets there can be too many
            what = getattr(error, "msg", str(error))
            problems.append(Problem(number, f"no JSON ({what})", number == len(lines)))
            continue
        if isinstance(record, dict):
            records.append(record)
        else:
            problems.append(Problem(number, "no JSON object", number == len(lines)))
    return LogFile(records, problems)


def _read_csv(lines: list[str]) -> LogFile:
    records, problems = [], []
    rows = csv.DictReader(lines, delimiter="\t" if lines and "\t" in lines[0] else ",")
    for row in rows:
        if None in row or None in row.values():
            what = f"not {len(rows.fieldnames or ())} fields as the header has"
            problems.append(Problem(rows.line_num, what, rows.line_num == len(lines)))
            continue
        records.append({key.strip(): x.strip() for key, x in row.items() if x.strip()})
    return LogFile(records, problems)


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


def products(budgets: Iterable[Mapping[str, float]]) -> list[str]:
    """The budgets whose `stated` amount is not the product of their other entries to 0.5 %."""
    wrong = []
    for budget in budgets:
        factors = {name: x for name, x in budget.items() if name != "stated"}
        product = math.prod(factors.values())
        if abs(product - budget["stated"]) > 0.005 * abs(budget["stated"]):
            terms = " x ".join(f"{x:g} {name}" for name, x in factors.items())
            wrong.append(f"{terms} = {product:.4g}, but {budget['stated']:.4g} is stated")
    return wrong


def number(raw: Any) -> float | None:
    """A float, NaN for what stands for a non-finite value, None for what is no number."""
    if raw is None:
        return math.nan
    try:
        return float(raw)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf if raw > 0 else -math.inf
    except (TypeError, ValueError):
        return None


def half_unit(value: float) -> float:
    """Half a unit of the last decimal that is needed to write a number; inf if it is not finite."""
    if not math.isfinite(value):
        return math.inf
    exponent = decimal.Decimal(repr(float(value))).as_tuple().exponent
    return 0.5 * 10.0 ** int(exponent)
