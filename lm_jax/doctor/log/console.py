"""Logs that are what a trainer prints: lines with a step and values behind their names."""

import re
from collections.abc import Collection

from lm_jax.doctor.log.formats import Row, Table
from lm_jax.doctor.log.names import FACTORS, is_result, meaning, metric_of, split_of, words

_NUMBER = (
    r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?"
    r"|[-+]?(?:nan|inf(?:inity)?)"
)
_APART = r"(?:info|debug|warning|error|at|after|end of|(?<=end )of)\b"  # words between names
_WORD = rf"(?:(?!{_APART})[^\W\d][\w/.\-]*|\(\w+\))"
# "train loss 3.2", "lr: 1e-4", "iteration   10/ 500", "time=135.2ms"
_PAIR = re.compile(
    rf"(?<![\w/.\-])({_WORD}(?: {_WORD}){{0,5}})(?:\s*[:=]\s*|\s+)({_NUMBER})(?:\s*/\s*\d+)?"
    r"(\s?%|[a-z]{1,3}(?:/[a-z]+)?)?(?![\w%]|[.,:/\-]\d)",
    re.IGNORECASE,
)
# "415k tok/s"
_BEHIND = re.compile(
    rf"(?<![\d.])({_NUMBER})\s?(%|[kmg])?\s+(?:bf16 |fp16 )?(mfu|(?:tok|tokens)/s(?:ec)?)\b",
    re.IGNORECASE,
)
_POSITION = re.compile(r"(?<![\d/.:])(\d{1,12})\s*/\s*(\d{1,12})(?![\d/.:])")  # in an epoch
_SPLIT = re.compile(
    r"(?<![\w./-])(train|val|eval|test|dev)(?:id|idat(?:e|ion|ing)|uat(?:e|ion|ing)|ing)?(?![\w./-])",
    re.IGNORECASE,
)
_PLACE = re.compile(r"\b[a-z_][\w.]*:[a-z_<][\w<>.]*:\d+ -", re.I)  # "__main__:train:12 -"
_FIRST = re.compile(rf"^(\d+)(?:\s*[|:]\s+| (?=[a-z]+ (?:{_NUMBER})$))", re.I)  # "250 val 6.1"
_STEP = re.compile(r"\[(\d+)\] (?!step|iter|epoch)(?=\w+=)", re.IGNORECASE)  # "[10] loss=3.2"
_NOISE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|['\"]")  # colours and quotes
_FEW = 4  # rows that are no accident, though no step stands in them
_RESULTS = ("train/", "valid/", "test/")
_LONGEST = 5000  # characters of a line
_Line = tuple[Row, tuple[int, int] | None]


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
    """The names and values of a line, and its (batch, batches) of the epoch."""
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
        kept = any(is_result(name) if at else metric_of(name).startswith(_RESULTS) for name in row)
        kept = kept or set(given) & row.keys()
        if (kept or (step and told - {"step", "data/epoch", "data/tokens"})) and rows[-1:] != [row]:
            rows.append(row)
    return rows
