"""Logs in JSON: an object a line, or a document of any nesting."""

import json
from collections.abc import Iterator
from typing import Any

from lm_jax.doctor.log.names import is_result, looks_like_a_loss, meaning, number, split_of
from lm_jax.doctor.log.tables import Problem, Table

Row = dict[str, Any]


def read_json(text: str) -> Table | None:
    """The rows of a JSON document or of JSON lines, or None if there are none."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return _read_lines(text)
    rows = [row for rows in _tables(document) if _known(rows) for row in rows]
    if not rows and isinstance(document, dict):
        rows = [flat(document)]
    return Table("JSON", rows, []) if any(rows) else None


def _known(rows: list[Row]) -> bool:
    """Whether a list of rows holds more than steps."""
    names = set().union(*rows)
    return any(looks_like_a_loss(n) or ((m := meaning(n)) and m.metric != "step") for n in names)


def _read_lines(text: str) -> Table | None:
    rows, problems = [], []
    lines = text.splitlines()
    for number_, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # of digits or brackets there can be too many
            what = getattr(error, "msg", str(error))
            problems.append(Problem(number_, f"no JSON ({what})", number_ == len(lines)))
            continue
        if isinstance(record, dict):
            rows.append(flat(record))
        else:
            problems.append(Problem(number_, "no JSON object", number_ == len(lines)))
    return Table("JSON lines", rows, problems) if rows else None


def flat(record: Row, prefix: str = "") -> Row:
    """The scalars of nested objects, named by their path."""
    found: Row = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}/")
        elif not isinstance(value, list):
            found[prefix + name] = value
    return found


def _tables(document: Any) -> Iterator[list[Row]]:
    """Lists of rows, and lists of equal length under several names as columns."""
    columns: dict[int, dict[str, list[Any]]] = {}
    for path, values in _lists(document, ()):
        *outer, last = path or ("",)
        name = "/".join([*(part for part in outer if split_of(part)), last])
        if all(isinstance(x, dict) for x in values):
            yield [_of_split(flat(row), path) for row in values]
        elif all(isinstance(x, list) and len(x) in (2, 3) for x in values):
            yield [dict(zip(("step", name), x[-2:], strict=True)) for x in values]
        elif all(number(x) is not None for x in values):
            columns.setdefault(len(values), {})[name] = values
    longest = sorted(columns, key=lambda n: (any(map(is_result, columns[n])), n))[-1:]
    for length, group in columns.items():
        steps = any((known := meaning(name)) and known.metric == "step" for name in group)
        if [length] == longest or steps:  # others cannot be placed
            yield [dict(zip(group, row, strict=True)) for row in zip(*group.values(), strict=True)]


def _of_split(row: Row, path: tuple[str, ...]) -> Row:
    """The row with the split that its list is named after."""
    prefix = next((f"{part}/" for part in reversed(path) if split_of(part)), "")
    return {(name if split_of(name) else prefix + name): x for name, x in row.items()}


def _lists(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], list[Any]]]:
    """All lists with their paths; objects whose keys are numbers are lists."""
    if isinstance(node, dict) and node and all(key.isdigit() for key in node):
        node = [{"step": key} | x if isinstance(x, dict) else x for key, x in node.items()]
    if isinstance(node, list) and node:
        yield path, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _lists(value, (*path, key))
