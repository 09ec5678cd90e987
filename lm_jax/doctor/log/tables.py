"""Logs that are tables: CSV with commas, semicolons, tabs or blanks."""

import csv
import re
from typing import Any, NamedTuple

from lm_jax.doctor.log.names import number

_MISSING = {"", "null", "none", "na", "n/a", "-"}
_GROUPED = re.compile(r"[-+]?\d{1,3}([.,])\d{3}(\1\d{3})*")


class Problem(NamedTuple):
    """A line of a log that could not be used."""

    line: int
    what: str
    last: bool  # it is the last line, which a killed process may leave cut off


class Table(NamedTuple):
    """Rows as a file has them, under its own names."""

    kind: str
    rows: list[dict[str, Any]]
    problems: list[Problem]


def read_table(text: str) -> Table | None:
    """The rows below a header, or None if the text is no table of numbers."""
    lines = text.splitlines()
    first = next((line for line in lines if line.strip()), "")
    rows: list[dict[str, str]] = []
    problems: list[Problem] = []
    try:
        headers = {mark: next(csv.reader([first], delimiter=mark), []) for mark in "\t;,"}
        mark = next((mark for mark in headers if len(headers[mark]) > 1), " ")
        header = [field.strip() for field in headers.get(mark, first.split())]
        if any(map(_is_number, header)):
            return None
        reader = csv.reader(lines, delimiter=mark, skipinitialspace=mark == " ")
        for row in reader:
            fields = [field.strip() for field in row]
            if not any(fields):
                continue
            if fields[0] == header[0] and not any(map(_is_number, fields)):
                header = fields  # a resumed run may write another one
            elif len(fields) != len(header):
                what = f"not {len(header)} fields as the header has"
                problems.append(Problem(reader.line_num, what, reader.line_num == len(lines)))
            else:
                rows.append(dict(zip(header, fields, strict=True)))
    except csv.Error:
        return None
    comma = mark != "," and _decimal_comma([x for row in rows for x in row.values()])
    present = ([(name, x) for name, x in row.items() if x.lower() not in _MISSING] for row in rows)
    rows = [{name: _value(x, comma) for name, x in row} for row in present]
    if not any(_is_number(x) for row in rows for x in row.values()):
        return None
    return Table({"\t": "TSV", " ": "a table"}.get(mark, "CSV"), rows, problems)


def _is_number(text: str) -> bool:
    return number(text) is not None


def _decimal_comma(fields: list[str]) -> bool:
    """Whether the numbers are written 3,25: some have a comma, and none a point but in groups."""
    fields = [x for x in fields if "." in x or "," in x]
    points = any("." in x and _is_number(x) and not _GROUPED.fullmatch(x) for x in fields)
    return not points and any("," in x and _is_number(x.replace(",", ".")) for x in fields)


def _value(text: str, comma: bool) -> str:
    """A number as Python reads it, and other text as it is."""
    if comma and ("," in text or _GROUPED.fullmatch(text)):
        return text.replace(".", "").replace(",", ".")
    if text[-1] == "%" and _is_number(text[:-1]):
        return f"{float(text[:-1]) / 100:.10g}"
    if "," in text and re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        return text.replace(",", "")
    return text
