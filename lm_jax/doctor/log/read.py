"""Logs of any trainer as records with the names of metrics that the checks know."""

import codecs
import contextlib
import pathlib
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from lm_jax.doctor.facts import require
from lm_jax.doctor.log import formats, names
from lm_jax.doctor.log.formats import Problem, Row, Table
from lm_jax.doctor.log.names import METRICS, PREFIXES, number

_SUFFIXES = {".jsonl", ".json", ".csv", ".tsv", ".txt", ".log", ".out", ".err", ""}
_LARGEST, _MOST = 2**28, 300  # bytes of a file of a folder, and files
_NAME_THEM = "name its columns with --map=loss=COLUMN,step=COLUMN"
_HELP = f"give a CSV, JSON or JSONL file, or {_NAME_THEM}"
_ONE_METRIC = {"Wall time", "Step", "Value"}  # in a file, as TensorBoard and MLflow write it
_WRAPPED = re.compile(  # "tensor(3.2, device='cuda:0')", "np.float32(3.2)"
    r"(?:(?:np|jnp|numpy)\.)?(?:tensor|Array|float\d\d)\(\[*([-+.\w]+)\]*(?:,[^()\n]*)?\)"
)


class LogFile(NamedTuple):
    """What was read."""

    records: list[Row]  # in the order of the file, each with the metrics that it holds
    problems: list[Problem]  # the lines that could not be used
    columns: dict[str, str]  # of the file -> metric; a loss that is none keeps its name
    ignored: list[str]  # columns that were not used
    kind: str  # of file: "CSV", "console text", ...
    notes: list[str]  # what was chosen where there was a choice

    @property
    def summary(self) -> str:
        """What was read, in one line."""
        taken = [a if a == b else f"{a} -> {b}" for a, b in self.columns.items()]
        parts = [f"read {len(self.records)} rows of {self.kind}: {', '.join(taken)}", *self.notes]
        return "; ".join(parts + ["ignored: " + ", ".join(self.ignored)] * bool(self.ignored))


def read_log(
    path: str | pathlib.Path, mapping: Mapping[str, str] | None = None, *, null_is_nan: bool = False
) -> LogFile:
    """Read a log of any trainer, or a folder, of which the log with most training rows counts.

    Args:
        path: tables (CSV, TSV), JSON of any nesting, JSON lines, what trainers print, or event
            files of TensorBoard. A row without a step has that of the row before it.
        mapping: metric -> column, like {"loss": "train_loss"}, for columns whose names say too
            little. A metric is named as in `METRICS`, in full, with "_" or by its last part.
        null_is_nan: every null is a non-finite value, as this trainer writes it. Otherwise nulls
            in most rows of a column, or just where another is logged, mean "not logged".

    Raises:
        ValueError: if there are no rows with a metric, or if `mapping` does not fit.
        OSError: if the file cannot be opened.
    """
    given: dict[str, str] = {}
    for name, column in (mapping or {}).items():
        metric = names.metric_name(name)
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
    events = {formats.run_of(p, folder): None for p in files if p.match(formats.EVENTS)}
    for path in [*events, *texts[:_MOST]]:
        try:
            found[str(path.relative_to(folder))] = _read_file(path, given, null_is_nan)
        except (ValueError, OSError) as error:
            refusal = str(error) if path in events else refusal
    if not found:
        raise ValueError(refusal)
    found = _joined(found)
    best = max(found, key=lambda name: sum("train/loss" in row for row in found[name].records))
    others = ", ".join(name for name in found if name != best)
    note = f"taken of {folder}: {best}" + f", not {others}" * bool(others)
    return found[best]._replace(notes=[note] * (best != ".") + found[best].notes)


def _joined(found: dict[str, LogFile]) -> dict[str, LogFile]:
    """The logs, of which those that hold one metric each are put together for every run."""
    runs: dict[str, LogFile] = {}
    for name, log in sorted(found.items(), key=lambda item: -len(item[1].records)):
        if not (metric := log.columns.get("Value")):
            runs[name] = log
            continue
        run = names.words(_run_and_tag(pathlib.Path(name))[0])
        of_run = pathlib.Path(name).parent / " ".join(w for w in run if not names.split_of(w))
        known = runs.get(str(of_run), log._replace(records=[], columns={"Step": "step"}))
        if metric not in known.columns.values():
            columns = known.columns | {name: metric}
            runs[str(of_run)] = known._replace(records=known.records + log.records, columns=columns)
    return runs


def _run_and_tag(path: pathlib.Path) -> tuple[str, str]:
    """The run and the metric that a file of TensorBoard is named after."""
    run, _, tag = path.stem.removeprefix("run-").replace("_tag-", "-tag-").rpartition("-tag-")
    return run, f"{run}/{tag}" if names.split_of(run) and not names.split_of(tag) else tag


def _read_file(path: pathlib.Path, given: dict[str, str], null_is_nan: bool) -> LogFile:
    """The rows of the first reader that finds metrics in the file."""
    refusal = ""
    for looks, table in _tables(path, given):
        refusal = refusal or f"{path} looks like {looks}."
        if table is None or len(table.problems) > 3 * len(table.rows) + 3:
            continue
        rows, known = table.rows, given
        if set(rows[0]) == _ONE_METRIC and not given:
            run, tag = _run_and_tag(path)
            metric = names.metric_of(tag) or ("" if run else "train/loss")
            known = {"Step": "step"} | ({"Value": metric} if metric else {})
        table = table._replace(rows=rows if null_is_nan else _without_gaps(formats.tidy(rows)))
        try:
            return _named(table, known, path)
        except ValueError as error:
            refusal = str(error)
    raise ValueError(refusal)


def _tables(path: pathlib.Path, given: dict[str, str]) -> Iterator[tuple[str, Table | None]]:
    """What a file looks like, and its rows if it is that."""
    if path.is_dir() or path.match(formats.EVENTS):
        looks = "events of TensorBoard without a scalar; give the folder of another run"
        yield looks, formats.read_events(path)
        return
    text = _text(path)
    if re.match(r"\s*[{\[]\s*([\"'{}\[]|[-+.e\d]+\s*,)", text):
        yield f"JSON without a list of steps and losses; {_HELP}", formats.read_json(text)
    looks = f"console text without a step and a loss in any line; {_HELP}"
    if re.match(r"\s*([-+.,;:/e \t]*\d[-+.,;:/e\d \t]*(\n|\Z)){2}", text):
        looks = "numbers without names; name them in a first line like step,loss or in every line"
    yield looks, formats.read_table(text)
    yield looks, formats.read_console(text, given)


def _text(path: pathlib.Path) -> str:
    """The text of a file with a line for every redrawn progress bar and without comments."""
    raw = path.read_bytes()
    if raw.startswith(b"\x1f\x8b"):
        with contextlib.suppress(zlib.error):
            raw = zlib.decompressobj(31).decompress(raw)  # as far as it goes; 31 is gzip
    utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = raw.decode("utf-16" if utf16 else "utf-8-sig", errors="replace")
    require(bool(text.strip()), f"{path} is empty", "give the log of a run that has begun")
    remedy = "give a CSV, JSON or JSONL file, what the trainer printed, or a folder of events"
    require("\0" not in text[:4096], f"{path} is a binary file", remedy)
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\b", "\n")
    text = re.sub(r"\A# *(?=.*\n[-+.\d])", "", text)  # a comment above numbers is their header
    return _WRAPPED.sub(r"\1", re.sub(r"(?m)^[ \t]*#.*$", "", text))


def _named(table: Table, given: Mapping[str, str], path: pathlib.Path) -> LogFile:
    """The table with its columns renamed, as the user says or as their names say."""
    rows = table.rows
    present = list(dict.fromkeys(key for row in rows for key in row))
    for column in given:
        remedy = f"choose from {', '.join(sorted(present))}"
        require(column in present, f"mapping: no row of {path} has {column!r}", remedy)
    count = Counter(key for row in rows for key, x in row.items() if number(x) is not None)
    columns, notes = dict(given), []
    groups: dict[str, list[str]] = {}
    for name in count:
        if name not in given and (metric := names.metric_of(name)) not in ("", *given.values()):
            groups.setdefault(metric, []).append(name)
    for metric, group in groups.items():
        group.sort(key=lambda n: (names.meaning(n).rank, -count[n], n))  # the surest first
        if metric == "step":  # rows may name it differently; _step counts calls of wandb
            group = [n for n in group if n[0] != "_"] or group
            first = {next((n for n in group if n in row), "") for row in rows}
            columns |= dict.fromkeys((n for n in group if n in first), metric)
            continue
        longest = max(group, key=count.__getitem__)
        rivals = {name for row in rows if longest in row for name in group if name in row}
        best = next(name for name in group if name in rivals)
        columns[best] = metric
        if others := [name for name in group if name != best]:
            meant = f" for {metric}" if best != metric else ""
            notes.append(f"{best} was taken{meant}, not {', '.join(others)}")
    columns |= {
        name: name
        for name in present
        if count[name] and name not in columns and name not in METRICS
        if name.startswith(PREFIXES) or name == "resumed" or names.looks_like_a_loss(name)
    }
    known = [m for m in columns.values() if m in METRICS[1:] or m.startswith(PREFIXES)]
    configuration = len(rows) == 1 and not any(map(names.is_result, columns.values()))
    what = f"{path} names no loss among its columns ({', '.join(present[:8])})"
    require(known not in ([], ["data/epoch"]) and not configuration, what, _NAME_THEM)
    ignored = [name for name in present if name not in columns]
    return LogFile(_renamed(rows, columns), table.problems, columns, ignored, table.kind, notes)


def _renamed(rows: list[Row], columns: dict[str, str]) -> list[Row]:
    """The rows with metrics for columns, and with steps in all of them if any has one."""
    surest_last = list(reversed(columns.items()))
    records: list[Row] = [{m: row[n] for n, m in surest_last if n in row} for row in rows]
    both = [row for row in records if {"step", "data/epoch"} <= row.keys()]
    epochs = np.array([number(row["data/epoch"]) for row in both], float)
    steps = np.array([number(row["step"]) for row in both], float)
    rise, move = np.diff(epochs), np.diff(steps)
    if rise.any() and ((rise > 0) & (move <= 0) | (rise == 0) & (move >= 0)).all():
        # Steps that begin anew in every epoch count on.
        every = np.median(move[move > 0]) if (move > 0).any() else steps[0]
        on = np.cumsum([steps[0], *np.where(rise > 0, every, move)])
        for row, step in zip(both, on, strict=True):
            row["step"] = step
    step = 0
    for record in records if "step" in columns.values() else ():
        step = record.setdefault("step", step)
    return records


def _without_gaps(rows: list[Row]) -> list[Row]:
    """The rows without the nulls, and NaN of pandas, that stand for "not logged"."""
    null: dict[str, set[int]] = {}
    logged: dict[str, set[int]] = {}
    for at, row in enumerate(rows):
        for name, x in row.items():
            is_null = x is None or x in ("nan", "NaN") or x != x
            (null if is_null else logged).setdefault(name, set()).add(at)
    gaps: set[tuple[str, int]] = set()
    unsure = null.keys() & logged.keys()
    for name in unsure:
        missing, there = null[name], logged[name]
        # Of a training loss, NaN in most rows is what it says.
        sure = names.metric_of(name) != "train/loss" or rows[min(missing)][name] is None
        between = sure and len(missing) > len(there) and min(missing) < max(there)
        if between or any(missing == logged[other] for other in unsure):
            gaps |= {(name, at) for at in missing}
    return [{n: x for n, x in row.items() if (n, at) not in gaps} for at, row in enumerate(rows)]
