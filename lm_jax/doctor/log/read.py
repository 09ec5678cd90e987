"""Logs of any trainer as records with the names of metrics that the checks know."""

import codecs
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lm_jax.doctor.facts import require
from lm_jax.doctor.log.console import read_console
from lm_jax.doctor.log.documents import read_json
from lm_jax.doctor.log.events import PATTERN, read_events
from lm_jax.doctor.log.names import (
    METRICS,
    PREFIXES,
    is_result,
    looks_like_a_loss,
    meaning,
    metric_name,
    number,
)
from lm_jax.doctor.log.tables import Problem, Table, read_table

__all__ = ["METRICS", "PREFIXES", "LogFile", "Problem", "number", "read_log"]

_SUFFIXES = {".jsonl", ".json", ".csv", ".tsv", ".txt", ".log", ".out", ".err", ""}
_LARGEST, _MOST = 2**28, 300  # bytes of a file of a folder, and files
_NAME_THEM = "name its columns with --map=loss=COLUMN,step=COLUMN"
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
        return "; ".join(parts + ["ignored: " + ", ".join(self.ignored)] * bool(self.ignored))


def read_log(
    path: str | pathlib.Path,
    mapping: Mapping[str, str] | None = None,
    *,
    null_is_nan: bool = False,
) -> LogFile:
    """Read a log of any trainer.

    Tables (CSV, TSV), JSON of any nesting, JSON lines, what trainers print, event files of
    TensorBoard, or a folder with such files, of which the one with most training rows counts. A
    row without a step has that of the row before it.

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
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name[0] != "."]
    texts = [p for p in files if p.suffix in _SUFFIXES and p.stat().st_size < _LARGEST]
    found: dict[str, LogFile] = {}
    refusal = f"{folder} holds no log; give the file with the steps and losses of the run."
    for path in [folder] * any(p.match(PATTERN) for p in files) + texts[:_MOST]:
        try:
            found[str(path.relative_to(folder))] = _read_file(path, given, null_is_nan)
        except (ValueError, OSError) as error:
            refusal = str(error) if path == folder else refusal
    if not found:
        raise ValueError(refusal)
    best = max(found, key=lambda name: sum("train/loss" in row for row in found[name].records))
    others = [name for name in found if name != best]
    note = f"taken of {folder}: {best}" + (f", not {', '.join(others)}" if others else "")
    return found[best]._replace(notes=[note, *found[best].notes])


def _read_file(path: pathlib.Path, given: dict[str, str], null_is_nan: bool) -> LogFile:
    """The rows of the first reader that finds metrics in the file."""
    readers: list[Callable[[], Table | None]] = [lambda: read_events(path)]
    looks = "events of TensorBoard without a scalar"
    if not (path.is_dir() or path.match(PATTERN)):
        text = _text(path)
        readers = [lambda: read_table(text), lambda: read_console(text, given)]
        looks = "console text without a step and a loss in any line"
        if re.match(r"\s*[{\[]", text):
            readers.insert(0, lambda: read_json(text))
            looks = "JSON without a list of steps and losses"
    refusal = f"{path} looks like {looks}; give a CSV, JSON or JSONL file, or {_NAME_THEM}."
    for reader in readers:
        table = reader()
        if table is None or len(table.problems) > 3 * len(table.rows) + 3:
            continue
        if not null_is_nan:
            table = table._replace(rows=_without_gaps(table.rows))
        known = given
        if set(table.rows[0]) == _TENSORBOARD_CSV and not given:
            tag = meaning(path.stem.removeprefix("run-").replace("-tag-", "/"))
            known = {"Step": "step", "Value": tag.metric if tag else "train/loss"}
        try:
            return _named(table, known, path)
        except ValueError as error:
            refusal = str(error)
    raise ValueError(refusal)


def _text(path: pathlib.Path) -> str:
    """The text of a file with a line for every redrawn progress bar and without comments.

    Raises:
        ValueError: if it is empty or no text.
    """
    raw = path.read_bytes()
    utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = raw.decode("utf-16" if utf16 else "utf-8-sig", errors="replace")
    require(bool(text.strip()), f"{path} is empty", "give the log of a run that has begun")
    strange = len(re.findall("[\0-\x07\x0e-\x1a\ufffd]", text[:4096]))
    require(
        strange <= len(text[:4096]) / 50 and "\0" not in text[:4096],
        f"{path} is a binary file",
        "give a CSV, JSON or JSONL file, what the trainer printed, or a folder of events",
    )
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"(?m)^[ \t]*#.*$", "", text)


def _named(table: Table, given: Mapping[str, str], path: pathlib.Path) -> LogFile:
    """The table with its columns renamed, as the user says or as their names say.

    Raises:
        ValueError: if a given column is missing, or if no column is a metric.
    """
    rows = table.rows
    count = Counter(key for row in rows for key, x in row.items() if number(x) is not None)
    present = list(dict.fromkeys(key for row in rows for key in row))
    for column in given:
        if column not in present:
            choice = ", ".join(sorted(present))
            raise ValueError(f"mapping: no row of {path} has {column!r}; choose from {choice}.")
    found = {n: m for n in present if count[n] and n not in given and (m := meaning(n))}
    taken = {*given.values(), *(m.metric for m in found.values())}
    candidates: dict[str, list[tuple[int, int, str]]] = {}
    for name, (metric, rank, implied) in found.items():
        if metric not in given.values() and ("train/loss" in taken or not implied):
            candidates.setdefault(metric, []).append((rank, -count[name], name))
    columns, notes = dict(given), []
    for metric, ranked in candidates.items():
        names = [name for *_, name in sorted(ranked)]
        if metric == "step":  # rows may name it differently; _step counts calls of wandb
            names = [n for n in names if n[0] != "_"] or names
            first = {next((n for n in names if n in row), "") for row in rows}
            columns |= dict.fromkeys((n for n in names if n in first), metric)
            continue
        longest = max(names, key=lambda name: count[name])
        rivals = {name for row in rows if longest in row for name in names if name in row}
        best = next(name for name in names if name in rivals)
        columns[best] = metric
        if others := [name for name in names if name != best]:
            notes.append(f"{best} was taken for {metric}, not {', '.join(others)}")
    columns |= {
        name: name
        for name in present
        if count[name] and name not in columns and name not in METRICS
        if name.startswith(PREFIXES) or name == "resumed" or looks_like_a_loss(name)
    }
    known = set(columns.values()) - {"step", "data/epoch"}
    if not known or (len(rows) == 1 and not any(map(is_result, columns))):
        raise ValueError(
            f"{path} names no loss among its columns ({', '.join(present[:8])}); {_NAME_THEM}."
        )
    records = _renamed(rows, columns)
    ignored = [name for name in present if name not in columns]
    return LogFile(records, table.problems, columns, ignored, table.kind, notes)


def _renamed(rows: list[dict[str, Any]], columns: dict[str, str]) -> list[dict[str, Any]]:
    """The rows with metrics for columns, and with steps in all of them if any has one."""
    records = []
    for row in rows:
        source = {m: n for n, m in reversed(columns.items()) if n in row}  # of steps the surest
        records.append({m: row[n] for n, m in columns.items() if source.get(m) == n})
    _count_on(records)
    step: Any = 0
    for record in records if "step" in columns.values() else ():
        step = record.setdefault("step", step)
    return records


def _count_on(records: list[dict[str, Any]]) -> None:
    """Let steps that begin anew in every epoch count on."""
    rows = [record for record in records if {"step", "data/epoch"} <= record.keys()]
    epochs, steps = (
        np.array([number(row[name]) for row in rows], float) for name in ("data/epoch", "step")
    )
    rise, move = np.diff(epochs), np.diff(steps)
    if not ((rise > 0) & (move <= 0) | (rise == 0) & (move >= 0)).all() or not rise.any():
        return
    every = np.median(move[move > 0]) if (move > 0).any() else steps[0]
    on = np.where(rise > 0, every, move)
    for row, step in zip(rows, steps[0] + np.concatenate([[0], on.cumsum()]), strict=True):
        row["step"] = step


def _without_gaps(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records without the nulls that stand for "not logged"."""
    null: dict[str, set[int]] = {}
    logged: dict[str, set[int]] = {}
    unsure = {name for record in records for name, x in record.items() if x is None}
    for i, record in enumerate(records):
        for name in unsure & record.keys():
            (null if record[name] is None else logged).setdefault(name, set()).add(i)
    others = {frozenset(logged[name]) for name in null if name in logged}
    gaps = {
        name
        for name, rows in null.items()
        if name in logged
        and (len(rows) > len(logged[name]) and min(rows) < max(logged[name]) or rows in others)
    }
    return [{k: x for k, x in r.items() if x is not None or k not in gaps} for r in records]
