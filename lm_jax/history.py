"""The metrics of a run as tables."""

import dataclasses
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm_jax import page

_ENDS = 5  # rows that are shown of both ends of a table
_COLUMNS = 6  # that are shown


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
