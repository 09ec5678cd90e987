"""The rows of a file, under its own names: tables, JSON, events, what trainers print."""

import contextlib
import csv
import importlib.util
import json
import logging
import pathlib
import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from lm_jax.doctor.facts import require
from lm_jax.doctor.log.names import FACTORS, is_result, meaning, metric_of, number, split_of, words

EVENTS = "*tfevents*"
_MISSING = {"", "null", "none", "na", "n/a", "-", "no log"}
_RULER = re.compile(r"\W*|sep=.")  # a line of a table without a value
_PYTHON = {"'": '"', "None": "null", "True": "true", "False": "false", "nan": "NaN"}
_SPLIT_COLUMNS = {"split", "phase", "mode", "stage", "set", "subset", "type", "event"}
_NAME_COLUMNS = {"name", "metric", "metricname", "key", "tag"}
_GROUPED = re.compile(r"[-+]?\d{1,3}([.,])\d{3}(\1\d{3})*")
# Of what trainers print:
_NUMBER = (
    r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?"
    r"|[-+]?(?:nan|inf(?:inity)?)"
)
_APART = r"(?:info|debug|warning|error|at|after|end of|(?<=end )of)\b"  # words between names
_WORD = rf"(?:(?!{_APART})[^\W\d][\w/.\-]*|\(\w+\))"
# "train loss 3.2", "lr: 1e-4", "iteration   10/ 500", "time=135.2ms"
_PAIR = re.compile(
    rf"(?i)(?<![\w/.\-])({_WORD}(?: {_WORD}){{0,5}})(?:\s*[:=]\s*|\s+)({_NUMBER})(?:\s*/\s*\d+)?"
    r"(\s?%|[a-z]{1,3}(?:/[a-z]+)?)?(?![\w%]|[.,:/\-]\d)"
)
# "415k tok/s"
_BEHIND = re.compile(
    rf"(?i)(?<![\d.])({_NUMBER})\s?(%|[kmg])?\s+(?:bf16 |fp16 )?(mfu|(?:tok|tokens)/s(?:ec)?)\b"
)
_POSITION = re.compile(r"(?<![\d/.:])(\d{1,12})\s*/\s*(\d{1,12})(?![\d/.:])")  # in an epoch
_SPLIT = re.compile(
    r"(?i)(?<![\w./-])(train|val|eval|test|dev)(?:id|(?:id|u)at(?:e|ion|ing)|ing)?(?![\w./-])"
)
_PLACE = re.compile(r"\b[a-z_][\w.]*:[a-z_<][\w<>.]*:\d+ -", re.I)  # "__main__:train:12 -"
_FIRST = re.compile(rf"^(\d+)(?:\s*[|:]\s+| (?=[a-z]+ (?:{_NUMBER})$))", re.I)  # "250 val 6.1"
_STEP = re.compile(r"\[(\d+)\] (?!step|iter|epoch)(?=\w+=)", re.IGNORECASE)  # "[10] loss=3.2"
_NOISE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|['\"]")  # colours and quotes
_FEW = 4  # rows that are no accident, though no step stands in them
_RESULTS, _PLACES = ("train/", "valid/", "test/"), {"step", "data/epoch", "data/tokens"}
_LONGEST = 5000  # characters of a line
Row = dict[str, Any]
_Line = tuple[Row, tuple[int, int] | None]  # with its (batch, batches) of the epoch


class Problem(NamedTuple):
    """A line of a log that could not be used."""

    line: int
    what: str
    last: bool  # it is the last line, which a killed process may leave cut off


class Table(NamedTuple):
    """Rows as a file has them, under its own names."""

    kind: str
    rows: list[Row]
    problems: list[Problem]


def read_table(text: str) -> Table | None:
    """The rows below a header, or None if the text is no table of numbers."""
    lines = re.sub("[│┃]", "|", text).splitlines()
    lines = ["" if _RULER.fullmatch(line) else line.strip(" |") for line in lines]
    first = next(filter(None, lines), "")
    mark = next((mark for mark in "\t;,|" if mark in first), " ")
    reader = csv.reader(lines, delimiter=mark, skipinitialspace=mark == " ")
    header = ["Wall time", "Value", "Step"] if re.match(r"\d{13} \S+ \d+$", first) else []  # MLflow
    rows: list[Row] = []
    problems = []
    try:
        for row in reader:
            fields = [field.strip() for field in row]
            if not any(fields):
                continue
            if not header or (fields[0] == header[0] and not any(map(_is_number, fields))):
                header = fields  # a resumed run may write another one
                if any(map(_is_number, header)):
                    return None
                if mark == " ":  # as a notebook shows it
                    header = re.sub(r"(?i)\b((?:train|val)\w*) (loss)", r"\1_\2", first).split()
                continue
            while len(fields) > len(header) and not fields[-1]:
                fields.pop()
            if mark == " " and not rows and len(fields) == len(header) + 1:
                header.insert(0, "")  # pandas prints its index without a name
            if len(fields) == len(header):
                rows.append(dict(zip(header, fields, strict=True)))
            else:
                what, at = f"not {len(header)} fields as the header has", reader.line_num
                problems.append(Problem(at, what, at == len(lines)))
    except csv.Error:
        return None
    values = [x for row in rows for x in row.values()]
    points = any("." in x and _is_number(x) and not _GROUPED.fullmatch(x) for x in values)
    commas = any("," in x and _is_number(x.replace(",", ".")) for x in values)
    comma = mark != "," and commas and not points  # 3,25; points stand between groups
    rows = [{n: _value(x, comma) for n, x in r.items() if x.lower() not in _MISSING} for r in rows]
    if not any(_is_number(x) for row in rows for x in row.values()):
        return None
    return Table({"\t": "TSV", " ": "a table"}.get(mark, "CSV"), rows, problems)


def _is_number(text: str) -> bool:
    return number(text) is not None


def _value(text: str, comma: bool) -> str:
    """A number as Python reads it, and other text as it is."""
    if comma and ("," in text or _GROUPED.fullmatch(text)):
        return text.replace(".", "").replace(",", ".")
    if (factor := FACTORS.get(text[-1].lower())) and _is_number(text[:-1]):
        return f"{float(text[:-1]) * factor:.10g}"
    return text.replace(",", "") if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text) else text


def read_json(text: str) -> Table | None:
    """The rows of a JSON document or of JSON lines, or None if there are none."""
    python = re.compile(r"'|\b(?:None|True|False|nan)\b")
    document = _parsed(text) or _parsed(python.sub(lambda m: _PYTHON[m[0]], text))
    if document is not None:
        rows = [row for table in _tables(document) if _tells(table) for row in table]
        if not rows and isinstance(document, dict):
            rows = [_flat(document)]
        return Table("JSON", rows, []) if any(rows) else None
    rows, problems, lines = [], [], text.splitlines()
    for at, line in enumerate(lines, 1):
        if isinstance(record := _parsed(line), dict):
            rows.append(_flat(record))
        elif line.strip():
            problems.append(Problem(at, "no JSON object", at == len(lines)))
    return Table("JSON lines", rows, problems) if rows else None


def _tells(rows: list[Row]) -> bool:
    """Whether a list of rows holds more than steps."""
    return any(is_result(n) or metric_of(n) not in ("", "step") for row in rows for n in row)


def _parsed(text: str) -> Any:
    """A JSON document, or None; of digits or brackets there can be too many."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    return None


def _flat(record: Row, prefix: str = "") -> Row:
    """The scalars of nested objects, named by their path."""
    found: Row = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}/")
        elif not isinstance(value, list):
            found[prefix + name] = value
        elif len(value) == 1 or (value and metric_of(name) == "optim/lr"):  # one for each group
            found |= _flat({name: value[0]}, prefix)
    return found


def _tables(document: Any) -> Iterator[list[Row]]:
    """Lists of rows, and lists of equal length under several names as columns."""
    columns: dict[int, dict[str, list[Any]]] = {}
    for path, values in _lists(document, ()):
        splits = [part for part in path[:-1] if split_of(part)]
        name = "/".join([*splits, *path[-1:]])
        if all(isinstance(x, dict) for x in values):
            yield [_of_split(_flat(row), path) for row in values]
        elif all(isinstance(x, list) and len(x) in (2, 3) for x in values):
            yield [dict(zip(("step", name), x[-2:], strict=True)) for x in values]
        elif all(number(x) is not None for x in values):
            columns.setdefault(len(values), {})[name] = values
    longest = max(columns, key=lambda n: (any(map(is_result, columns[n])), n), default=0)
    for length, group in columns.items():
        if length == longest or "step" in map(metric_of, group):  # others cannot be placed
            yield [dict(zip(group, row, strict=True)) for row in zip(*group.values(), strict=True)]


def _of_split(row: Row, path: tuple[str, ...]) -> Row:
    """The row with the split that its list is named after."""
    prefix = next((f"{part}/" for part in reversed(path) if split_of(part)), "")
    kept = {name for name in row if split_of(name) or metric_of(name) in ("step", "data/epoch")}
    return {(name if name in kept else prefix + name): x for name, x in row.items()}


def tidy(rows: list[Row]) -> list[Row]:
    """The rows with the name or the split in their columns' names that stood in a column."""
    names = sorted(set().union(*rows))
    of_split = [name for name in names if re.split("[./]", name.lower())[-1] in _SPLIT_COLUMNS]
    of_name = next((name for name in names if name.lower() in _NAME_COLUMNS), "")
    if of_name and "value" in names:
        rows = [r | {str(r[of_name]): r["value"]} for r in rows if {of_name, "value"} <= r.keys()]
    if of_split:
        rows = [_of_split(row, tuple(str(row.get(n, "")) for n in of_split)) for row in rows]
    return rows


def _lists(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], list[Any]]]:
    """All lists with their paths; objects whose keys are numbers are lists."""
    if isinstance(node, dict) and node and all(key.isdigit() for key in node):
        node = [{"step": key} | x if isinstance(x, dict) else x for key, x in node.items()]
    if isinstance(node, list) and node:
        yield path, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _lists(value, (*path, key))


def run_of(file: pathlib.Path, top: pathlib.Path) -> pathlib.Path:
    """The folder of the run that an event file belongs to; its splits may lie below it."""
    folder = file.parent
    return folder.parent if folder != top and split_of(folder.name) else folder


def read_events(path: pathlib.Path) -> Table | None:
    """The scalars of an event file, or of the folder of a run, in order of time."""
    there = importlib.util.find_spec("tensorboard") is not None
    remedy = "install tensorboard to read them, or export the scalars as CSV"
    require(there, f"{path} holds events of TensorBoard", remedy)
    from tensorboard.backend.event_processing import event_file_loader
    from tensorboard.util import tensor_util

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    scalars: list[tuple[float, int, Row]] = []
    files = sorted(f for f in path.rglob(EVENTS) if run_of(f, path) == path)
    for file in files or [path]:
        folder = "" if path in (file, file.parent) else file.parent.name
        for event in event_file_loader.EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                x = tensor_util.make_ndarray(value.tensor)
                if x.size == 1 and x.dtype.kind == "f":
                    scalar = _of_split({value.tag: float(x.item())}, (folder,))
                    scalars.append((event.wall_time, event.step, scalar))
    rows: list[Row] = []
    for _, step, scalar in sorted(scalars, key=lambda found: found[0]):
        if not rows or rows[-1]["step"] != step or scalar.keys() & rows[-1].keys():
            rows.append({"step": step})
        rows[-1] |= scalar
    return Table("TensorBoard events", rows, []) if rows else None


def read_console(text: str, given: Collection[str] = ()) -> Table | None:
    """The lines that say how good the model is, or None if few have, and no step or epoch.

    Lines with a value whose name is `given` count as well. Batches are counted on over the epochs.
    A line without a step has that of the line before it.
    """
    text = _PLACE.sub("", _NOISE.sub("", _STEP.sub(r"step=\1 ", text)))
    text = re.sub(r"[\[\]{}<>]", "  ", text)
    lines = [_line(line[:_LONGEST].strip()) for line in text.splitlines() if re.search(r"\d", line)]
    rows = _placed([line for line in lines if line[0]], given)
    placed = given or {"step", "data/epoch"} & {metric_of(name) for row in rows for name in row}
    return Table("console text", rows, []) if (rows and placed) or len(rows) >= _FEW else None


def _line(line: str) -> _Line:
    """The names and values of a line, and where in the epoch it stands."""
    parts = _PAIR.split(_FIRST.sub(r"step \1 | ", line))
    found = list(zip(parts[::4], parts[1::4], parts[2::4], parts[3::4], strict=False))
    rest = " | ".join(parts[::4])
    found += [(parts[-1], name, value, unit) for value, unit, name in _BEHIND.findall(rest)]
    said = _SPLIT.findall(rest) or [  # "Evaluating: 50%|", "validate step: 20"
        name
        for _, name, _, unit in found
        if split_of(name) and (_SPLIT.fullmatch(name) if unit == "%" else metric_of(name) == "step")
    ]
    split = said[0] if said else ""  # that of the line, until another one is said
    row = {}
    for between, name, value, unit in found:
        known = meaning(name)
        split = next(reversed(_SPLIT.findall(between)), split)
        if known.implied and split_of(split) not in (None, "train"):
            name = f"{split.lower()} {name}"
        value = value.replace(",", "")
        if unit and (factor := FACTORS.get(unit.strip().lower())):
            value = f"{float(value) * factor:.10g}"
        share = unit == "%" and known.metric.endswith(("step", "epoch", "loss", "ppl"))
        unknown = known.metric == "perf/mfu" and float(value) < 0  # not measured yet
        if not share and not unknown:
            row[name] = value
    ahead = all(split_of(name) == "train" for name in said)
    batches = [(int(batch), int(of)) for batch, of in _POSITION.findall(rest) if ahead]
    return row, next(((batch, of) for batch, of in batches if batch <= of), None)


def _placed(lines: list[_Line], given: Collection[str]) -> list[Row]:
    """The rows that hold a result, with steps where they can be known."""
    rows: list[Row] = []
    epochs = {row[name] for row, _ in lines for name in row if name.lower() == "epoch"}
    first = 0 if any(re.fullmatch("0+", epoch) for epoch in epochs) else 1
    within = any(position for _, position in lines)
    step, batches = "", 0
    heading: Row = {}
    for row, position in lines:
        names = {metric_of(name): name for name in reversed(row)}
        at, epoch = names.get("step", ""), names.get("data/epoch", "")
        if names.keys() == {"data/epoch"} and not position:
            heading = dict(row)  # "Epoch 1/6" above the lines of the epoch
        elif heading and not at and not epoch:
            row |= heading
            epoch = next(iter(heading))
        whole = epoch and re.fullmatch(r"\d{1,9}", row[epoch])
        batch, batches = position or (batches, batches)
        if whole and batches:
            row[epoch] = int(row[epoch]) - first + batch / batches
            row |= {} if at else {"step": round(row[epoch] * batches)}
        elif position and not at:
            row["step"] = batch
        if whole and within and not position:  # means over the epoch beside rows of it
            row = {(f"whole {n}" if meaning(n).implied else n): x for n, x in row.items()}
        told = {metric_of(name) for name in row} - {""}
        last = words(at)[-1] if at else ""  # no "max steps"
        if last in ("step", "iter", "iteration") or (last == "batch" and not epochs):
            step = row[at]
        elif step and "step" not in told:
            row["step"] = step
        result = any(is_result(n) if at else metric_of(n).startswith(_RESULTS) for n in row)
        result = result or bool(set(given) & row.keys())
        if (result or (step and told - _PLACES)) and rows[-1:] != [row]:
            rows.append(row)
    return rows
