"""Logs of any trainer as records with the names of metrics that the checks know."""

import csv
import difflib
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from lm_jax.doctor.old import require

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
