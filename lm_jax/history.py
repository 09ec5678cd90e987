"""The metrics of a run as tables."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm_jax import page
from lm_jax.workdir import METRICS, whole_rows

_ENDS = 5  # rows that are shown of both ends of a table
_COLUMNS = 6  # that are shown
_AT_ONCE = 1 << 20  # bytes read at once
_STRETCHES = 1200  # of a metric, at most; half of it in a long run
_PLAIN = {int, float, type(None)}


@dataclasses.dataclass(frozen=True)
class History:
    """What a run logged, training and evaluations apart.

    `history.train["loss"]` and `history.valid["loss"]` are losses in nats per token, with the
    updates after which they were taken in `["step"]`. Other metrics have the names that they have
    in `metrics.jsonl`. A number that was not finite, or is not there, is NaN.

    Attributes:
        rows: those of `metrics.jsonl` in order; a number that was not finite is None.
    """

    rows: Sequence[Mapping[str, Any]]

    @functools.cached_property
    def train(self) -> Any:
        """A row for each update: a DataFrame of pandas if it is installed, else a `Table`."""
        return _table(self.rows, "train/")

    @functools.cached_property
    def valid(self) -> Any:
        """A row for each evaluation of the valid split; see `train`."""
        return _table(self.rows, "valid/")

    def __repr__(self) -> str:
        """Both tables."""
        return f"train\n{self.train}\n\nvalid\n{self.valid}"

    def _repr_html_(self) -> str:
        """Both tables."""
        tables = {"train": self.train, "valid": self.valid}
        return "".join(f"<p><b>{k}</b></p>{one._repr_html_()}" for k, one in tables.items())


class Table(dict[str, np.ndarray]):
    """Columns of one length by name, where pandas is not installed; what is here reads as there."""

    @property
    def columns(self) -> list[str]:
        """Their names."""
        return [*self]

    def __len__(self) -> int:
        """Number of rows."""
        return len(next(iter(self.values()), ()))

    def _shown(self) -> list[dict[str, str]]:
        """The first and the last rows of the first columns, as text."""
        count = len(self)
        chosen = [n for n in range(count) if not _ENDS <= n < count - _ENDS]
        forms = {k: "d" if self[k].dtype.kind == "i" else ".6g" for k in self.columns[:_COLUMNS]}
        rows = [{k: format(self[k][n], form) for k, form in forms.items()} for n in chosen]
        if count > 2 * _ENDS:
            rows.insert(_ENDS, dict.fromkeys(forms, "..."))
        return rows

    def _size(self) -> str:
        more = self.columns[_COLUMNS:]
        return f"{len(self):,} rows" + (f"; also {', '.join(more)}" if more else "")

    def __repr__(self) -> str:
        """Its ends, and how much there is."""
        names = self.columns[:_COLUMNS]
        lines = [dict(zip(names, names, strict=True)), *self._shown()]
        widths = {name: max(len(line[name]) for line in lines) for name in names}
        text = ["  ".join(line[name].rjust(widths[name]) for name in names) for line in lines]
        return "\n".join([*text, self._size()])

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        shown = self._shown()
        told = page.table(shown, "Metrics") if shown else ""
        return page.fragment(f'{told}<p class="soft">{self._size()}</p>')


class Course(NamedTuple):
    """One metric over a run: the middle of each stretch of updates, its mean, lowest, highest."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return len(self.steps) > 0


class Stretches:
    """One metric in stretches of equally many rows, which widen as the run grows.

    Of each are kept the number of its rows, the sums of their updates and values, and the lowest
    and the highest value: nothing that a figure shows is lost.
    """

    def __init__(self) -> None:
        """Begin without rows."""
        self._width = 1
        self._whole_5P = np.zeros((5, 0))
        self._rest_5N = np.zeros((5, 0))  # fewer rows than a stretch has

    def extend(self, steps_N: np.ndarray, values_N: np.ndarray) -> None:
        """Add rows: their updates and values, in order."""
        new_5N = np.stack([np.ones_like(steps_N), steps_N, *[values_N] * 3])
        new_5N = np.concatenate([self._rest_5N, new_5N], axis=1)
        whole = new_5N.shape[1] // self._width * self._width
        new_5P = _merged(new_5N[:, :whole], np.arange(0, whole, self._width))
        self._whole_5P = np.concatenate([self._whole_5P, new_5P], axis=1)
        self._rest_5N = new_5N[:, whole:]
        while (count := self._whole_5P.shape[1]) > _STRETCHES:
            self._whole_5P = _merged(self._whole_5P, np.arange(0, count, 2))
            self._width *= 2

    def _all(self, most: int) -> np.ndarray:
        """At most so many stretches, [5, P]."""
        rest_5P = _merged(self._rest_5N, np.arange(min(1, self._rest_5N.shape[1])))
        all_5P = np.concatenate([self._whole_5P, rest_5P], axis=1)
        count = all_5P.shape[1]
        return _merged(all_5P, np.linspace(0, count, min(count, most) + 1).astype(int)[:-1])

    def course(self, most: int) -> Course:
        """The course of the metric in at most so many stretches."""
        rows_P, steps_P, sums_P, low_P, high_P = self._all(most)
        return Course(steps_P / rows_P, sums_P / rows_P, low_P, high_P)

    @property
    def total(self) -> float:
        """The sum over all rows."""
        return float(self._all(1)[2].sum())


def _merged(stretches_5N: np.ndarray, begins_P: np.ndarray) -> np.ndarray:
    """Neighbouring stretches as one, each from one place to the next."""
    if not len(begins_P):
        return stretches_5N[:, :0]
    parts = [stretches_5N[:3], stretches_5N[3:4], stretches_5N[4:]]
    ways = [np.add, np.minimum, np.maximum]
    return np.concatenate(
        [way.reduceat(part, begins_P, axis=1) for way, part in zip(ways, parts, strict=True)]
    )


class NewRows:
    """The rows of a log that were written since they were last asked for, in blocks.

    So a look in the middle of a long run is quick.
    """

    def __init__(self, path: pathlib.Path):
        """Nothing is read yet."""
        self._path, self._read = path, 0

    def __iter__(self) -> Iterator[Sequence[dict[str, Any]]]:
        """Go on where it stopped."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            while lines := file.readlines(_AT_ONCE):
                whole = [line for line in lines if line.endswith(b"\n")]  # a row may come late
                self._read += sum(map(len, whole))
                yield _parsed(whole)


class Log:
    """What a run has logged so far, in memory that grows with its evaluations alone.

    Attributes:
        done: updates that are finished.
        events: the rows of evaluations, and of updates after which the run was taken up again.
    """

    def __init__(self, folder: pathlib.Path):
        """The log of the run in a folder; nothing is read yet."""
        self.done = 0
        self.events: list[Mapping[str, Any]] = []
        self._new = NewRows(folder / METRICS)
        self._metrics: dict[str, Stretches] = {}
        self._layers: dict[str, Stretches] = {}

    def read(self) -> "Log":
        """Read what was written since; returns itself."""
        for rows in self._new:
            self._add([row for row in rows if finite(row.get("step"))])
        return self

    def _add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        steps_N = np.array([row["step"] for row in rows], float)
        squares: dict[str, Any] = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            values_N = _numbers([row.get(name) for row in rows])
            if layer := _layer(name):
                squares[layer] = squares.get(layer, 0) + values_N**2
            else:
                _extend(self._metrics, name, steps_N, values_N)
        for layer, squares_N in squares.items():
            _extend(self._layers, layer, steps_N, np.sqrt(squares_N))
        self.done = max([self.done, *(row["step"] for row in rows if "train/loss" in row)])
        self.events += [row for row in rows if "train/loss" not in row or "resumed" in row]

    def layers(self, most: int) -> dict[str, Course]:
        """The norm of the gradient of each layer for which it was logged, as in `course`."""
        return {layer: line.course(most) for layer, line in self._layers.items()}

    def course(self, name: str, most: int) -> Course:
        """The course of a metric, without what is no finite number; see `Stretches.course`."""
        return self._metrics.get(name, Stretches()).course(most)

    def total(self, name: str) -> float:
        """The sum of a metric over all updates."""
        return self._metrics.get(name, Stretches()).total


def _numbers(values: Sequence[Any]) -> np.ndarray:
    """As float64, with NaN for what is no finite number."""
    with contextlib.suppress(OverflowError):  # of a whole number that no float holds
        if {*map(type, values)} <= _PLAIN:
            return np.array(values, float)
    return np.array([value if finite(value) else None for value in values], float)


def _extend(
    known: dict[str, Stretches], name: str, steps_N: np.ndarray, values_N: np.ndarray
) -> None:
    good = np.isfinite(values_N)
    if good.any():
        known.setdefault(name, Stretches()).extend(steps_N[good], values_N[good])


def _parsed(lines: Sequence[bytes]) -> Sequence[dict[str, Any]]:
    """The rows in lines; all at once, which takes half the time, if every line is a row."""
    with contextlib.suppress(ValueError, RecursionError):
        rows = json.loads(b"[" + b",".join(lines) + b"]")
        if len(rows) == len(lines) and all(isinstance(row, dict) for row in rows):
            return rows  # type: ignore[no-any-return]
    return list(whole_rows(lines))


def _layer(name: str) -> str:
    """The layer of a gradient norm: blocks/3 of grad_norm/blocks/3/mlp/up/kernel; else nothing."""
    kind, layer, rest, *_ = [*name.split("/"), "", ""]
    if kind != "grad_norm":
        return ""
    return f"{layer}/{rest}" if rest.isdigit() else layer


def finite(value: Any) -> bool:
    """Whether a value of a row is a finite number."""
    # Of whole numbers those that a float can hold.
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _table(rows: Sequence[Mapping[str, Any]], kind: str) -> Any:
    """The rows that have the loss of a kind, "train/" or "valid/", whose names lose that prefix."""
    found = [row for row in rows if f"{kind}loss" in row]
    names = dict.fromkeys(["step", f"{kind}loss", *(name for row in found for name in row)])
    columns = {
        name.removeprefix(kind): np.array([row.get(name) for row in found], float) for name in names
    }
    columns["step"] = columns["step"].astype(int)
    if importlib.util.find_spec("pandas"):
        import pandas

        return pandas.DataFrame(columns)
    return Table(columns)
