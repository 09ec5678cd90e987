"""Logs that are what a trainer prints: lines with a step and values behind their names."""

import re
from typing import Any, NamedTuple

from lm_jax.doctor.log.names import METRICS, is_result, meaning, split_of
from lm_jax.doctor.log.tables import Table

_NUMBER = (
    r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
    r"|[-+]?(?:nan|inf(?:inity)?)"
)
_WORD = r"(?:[a-z_][\w/.\-]*|\(\w+\))"
# "train loss 3.2", "lr: 1e-4", "iteration   10/ 500", "time=135.2ms"
_PAIR = re.compile(
    rf"(?<![\w/.\-])({_WORD}(?: {_WORD}){{0,5}})(?:\s*[:=]\s*|\s+)({_NUMBER})(?:\s*/\s*\d+)?"
    r"(\s?%|[a-z]{1,3}(?:/[a-z]+)?)?(?![\w%]|[.,:/\-]\d)",
    re.IGNORECASE,
)
# "415k tok/s"
_BEHIND = re.compile(
    rf"({_NUMBER})\s?(%|[kmg])?\s+(?:bf16 |fp16 )?(mfu|(?:tok|tokens)/s(?:ec)?)\b", re.IGNORECASE
)
_POSITION = re.compile(r"(?<![\d/.:])(\d+)\s*/\s*(\d+)(?![\d/.:])")  # in an epoch
_SPLIT = re.compile(r"(?<![\w./-])(valid|validation|val|eval|evaluation|test)(?![\w./-])", re.I)
_THREE = re.compile(rf"(\d+) ([a-z]+) ({_NUMBER})", re.IGNORECASE)  # "250 val 6.1"
_NOISE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|['\"]")
_SEPARATOR = re.compile(r"[\[\]{}<>]|\b(?:INFO|DEBUG|WARNING|ERROR|at|end of)\b")
_FACTORS = {"%": 0.01, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}
_LONGEST = 5000  # characters of a line
_RESULTS = [name for name in METRICS if name.startswith(("train/", "valid/", "test/"))]


class _Line(NamedTuple):
    row: dict[str, Any]
    position: tuple[int, int] | None  # batch and batches of the epoch


def read_console(text: str) -> Table | None:
    """The lines that say how good the model is, or None if no line does.

    A line without a step has that of the line before it. Batches are counted on over the epochs.
    """
    lines = []
    for line in text.splitlines():
        read = _line(line[:_LONGEST])
        if any(map(is_result, read.row)):
            lines.append(read)
    rows = _placed(lines)
    known = [m.metric for name in dict.fromkeys(n for r in rows for n in r) if (m := meaning(name))]
    placed = "step" in known or "data/epoch" in known
    return Table("console text", rows, []) if placed else None


def _line(line: str) -> _Line:
    """The names and values of a line."""
    line = _SEPARATOR.sub("  ", _NOISE.sub("", line)).strip()
    if three := _THREE.fullmatch(line):
        line = "step {} | {} {}".format(*three.groups())
    rest = _PAIR.sub(" | ", line)
    found = [(name, value, unit) for name, value, unit in _PAIR.findall(line)]
    found += [(name, value, unit) for value, unit, name in _BEHIND.findall(rest)]
    split = _SPLIT.search(rest)
    row = {}
    for name, value, unit in found:
        known = meaning(name)
        if split and known and known.implied:
            name = f"{split[1]} {name}"
        value = value.replace(",", "")
        if factor := _FACTORS.get(unit.strip().lower()):
            value = f"{float(value) * factor:.10g}"
        if not (known and known.metric == "perf/mfu" and float(value) < 0):  # not measured yet
            row[name] = value
    position = next(
        ((int(a), int(b)) for a, b in _POSITION.findall(rest) if int(a) <= int(b)), None
    )
    return _Line(row, position)


def _placed(lines: list[_Line]) -> list[dict[str, Any]]:
    """The rows with steps where any can be known."""
    epochs = {row[name] for row, _ in lines for name in row if name.lower() == "epoch"}
    first = 0 if any(re.fullmatch("0+", epoch) for epoch in epochs) else 1
    within = any(position for _, position in lines)
    rows: list[dict[str, Any]] = []
    batches = 0
    for row, position in lines:
        row = dict(row)
        at = _of(row, "step")
        name = _of(row, "data/epoch")
        whole = name and row[name].isdigit()
        batches = position[1] if position else batches
        if whole and batches:
            batch = position[0] if position else batches
            passed = int(row[name]) - first + batch / batches
            row[name] = passed
            if not at:
                row["step"] = round(passed * batches)
        elif position and not at:
            row["step"] = position[0]
        if whole and within and not position:  # means over the epoch beside rows of it
            row = {(f"whole {n}" if _implied(n) else n): x for n, x in row.items()}
        told = at or any((m := meaning(name)) and m.metric in _RESULTS for name in row)
        if told and row != (rows[-1] if rows else None):
            rows.append(row)
    return rows


def _of(row: dict[str, Any], metric: str) -> str:
    """The column of a row that is this metric."""
    return next((name for name in row if (m := meaning(name)) and m.metric == metric), "")


def _implied(name: str) -> bool:
    return (known := meaning(name)) is not None and known.implied and split_of(name) is None
