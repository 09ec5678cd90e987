"""Logs of any trainer as records with the names of metrics that the checks know."""

import codecs
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lm_jax.doctor.facts import require
from lm_jax.doctor.log.console import read_console
from lm_jax.doctor.log.documents import read_json
from lm_jax.doctor.log.events import PATTERN, read_events
from lm_jax.doctor.log.names import METRICS, PREFIXES, meaning, metric_name, name_columns, number
from lm_jax.doctor.log.tables import Problem, Table, read_table

__all__ = ["METRICS", "PREFIXES", "LogFile", "Problem", "metric_name", "number", "read_log"]

_SUFFIXES = {".jsonl", ".json", ".csv", ".tsv", ".txt", ".log", ".out", ".err", ""}
_MOST_FILES = 300  # of a folder
_TENSORBOARD_CSV = {"Wall time", "Step", "Value"}


class LogFile(NamedTuple):
    """What was read.

    Attributes:
        records: the rows in the order of the file, each with the metrics that it holds.
        problems: the lines that could not be used.
        columns: column of the file -> metric; a loss that is no metric here keeps its name.
        ignored: the columns that were not used.
        kind: what the file is: "CSV", "console text", ...
        notes: what was chosen where there was a choice.
    """

    records: list[dict[str, Any]]
    problems: list[Problem]
    columns: dict[str, str]
    ignored: list[str]
    kind: str
    notes: list[str]

    @property
    def summary(self) -> str:
        """What was read, in one line."""
        taken = [a if a == b else f"{a} -> {b}" for a, b in self.columns.items()]
        parts = [f"read {len(self.records)} rows of {self.kind}: {', '.join(taken)}", *self.notes]
        if self.ignored:
            parts.append(f"ignored: {', '.join(self.ignored)}")
        return "; ".join(parts)


def read_log(
    path: str | pathlib.Path,
    mapping: Mapping[str, str] | None = None,
    *,
    null_is_nan: bool = False,
) -> LogFile:
    """Read a log of any trainer.

    Tables (CSV, TSV), JSON of any nesting, JSON lines, what trainers print, event files of
    TensorBoard, or a folder with such files, of which the one with most training rows counts.

    Args:
        path: the file or folder.
        mapping: name of a metric -> name of the file's column, like {"loss": "train_loss"}, for
            columns whose names say too little. A metric is named as in `METRICS`, with "_" for
            "/" (`valid_loss`) or by its last part (`loss` is `train/loss`).
        null_is_nan: every null is a non-finite value, as this trainer writes it. Otherwise nulls
            of a column that is logged in fewer than half of its rows, or just where another is
            not, mean "not logged", as pandas and wandb write them.

    Raises:
        ValueError: if there are no rows with a metric, if `mapping` names an unknown metric or one
            twice, or a column that no record has.
        OSError: if the file cannot be opened.
    """
    given: dict[str, str] = {}
    for name, column in (mapping or {}).items():
        metric = metric_name(name)
        require(metric not in given.values(), f"mapping: {metric}", "give it one column")
        require(column not in given, f"mapping: column {column!r}", "give it one metric")
        given[column] = metric
    path = pathlib.Path(path)
    return (_read_folder if path.is_dir() else _read_file)(path, given, null_is_nan)


def _read_folder(folder: pathlib.Path, given: dict[str, str], null_is_nan: bool) -> LogFile:
    """The log of a folder that has most training rows."""
    files = (p for p in sorted(folder.rglob("*")) if p.suffix in _SUFFIXES and p.is_file())
    names = [p for p in files if not p.match(PATTERN) and not p.name.startswith(".")]
    events = [folder] if next(folder.rglob(PATTERN), None) else []
    found: dict[str, LogFile] = {}
    missing = ""
    for path in [*events, *names[:_MOST_FILES]]:
        try:
            found[str(path.relative_to(folder))] = _read_file(path, given, null_is_nan)
        except (ValueError, OSError) as error:
            missing = str(error) if path in events else missing
    require(
        bool(found),
        missing or f"{folder} holds no log that can be read",
        "give the file with the steps and losses of the run",
    )

    def rows(name: str) -> tuple[int, int]:
        records = found[name].records
        return sum("train/loss" in row for row in records), len(records)

    best = max(found, key=rows)
    others = [name for name in found if name != best]
    note = f"taken of {folder}: {best}" + (f", not {', '.join(others)}" if others else "")
    return found[best]._replace(notes=[note, *found[best].notes])


def _read_file(path: pathlib.Path, given: dict[str, str], null_is_nan: bool) -> LogFile:
    """The rows of the first reader that finds metrics in the file."""
    readers: list[Callable[[], Table | None]]
    if path.is_dir() or path.match(PATTERN):
        readers = [lambda: read_events(path)]
        looks = "events of TensorBoard without a scalar"
    else:
        text = _text(path)
        readers = [lambda: read_table(text), lambda: read_console(text)]
        looks = "console text without a step and a loss in any line"
        if text.lstrip()[:1] in ("{", "["):
            readers = [lambda: read_json(text), *readers]
            looks = (
                "JSON without a list of steps and losses" if text.lstrip()[1:2] != "'" else looks
            )
    refusal = ValueError(
        f"{path} looks like {looks}; give a CSV, JSON or JSONL file, or what the trainer printed."
    )
    for reader in readers:
        table = reader()
        if table is None or len(table.problems) > 3 * len(table.rows) + 3:
            continue
        rows = table.rows if null_is_nan else _without_gaps(table.rows)
        rows = [{name: _share(x) for name, x in row.items()} for row in rows]
        known = dict(given)
        if rows and set(rows[0]) == _TENSORBOARD_CSV and not given:
            tag = meaning(path.stem.removeprefix("run-").replace("-tag-", "/"))
            known = {"Step": "step", "Value": tag.metric if tag else "train/loss"}
        try:
            named = name_columns(rows, known, what=str(path))
        except ValueError as error:
            refusal = error
            continue
        return LogFile(
            named.records, table.problems, named.columns, named.ignored, table.kind, named.notes
        )
    raise refusal


def _text(path: pathlib.Path) -> str:
    """The text of a file with a line for every redrawn progress bar and without comments.

    Raises:
        ValueError: if it is empty or no text.
    """
    raw = path.read_bytes()
    utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = raw.decode("utf-16" if utf16 else "utf-8-sig", errors="replace")
    require(bool(text.strip()), f"{path} is empty", "give the log of a run that has begun")
    strange = sum(c == "\ufffd" or (c < " " and c not in "\t\n\r\f\x1b\b") for c in text[:4096])
    require(
        strange <= len(text[:4096]) / 50 and "\0" not in text[:4096],
        f"{path} is a binary file",
        "give a CSV, JSON or JSONL file, what the trainer printed, or a folder of events",
    )
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"(?m)^[ \t]*#.*$", "", text)


def _share(value: Any) -> Any:
    """36.1% as 0.361."""
    if isinstance(value, str) and value.endswith("%") and number(value[:-1]) is not None:
        return f"{float(value[:-1]) / 100:.10g}"
    return value


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
