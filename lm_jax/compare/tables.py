"""The tables of a comparison, and all of it as Markdown; see `lm_jax.compare.compare`."""

from collections.abc import Mapping
from typing import Any

from lm_jax.data.references import NAMES
from lm_jax.page import markdown_table

Table = list[dict[str, str]]  # rows: the cells by their headings
Values = Mapping[str, Any]

BRACKETS = "Brackets: 95 % intervals over seeds."


def markdown(c: Values) -> str:
    """The whole comparison; of the pairs, those of the best arm."""
    parts = [f"# {title(c)}", ranking_sentence(c)]
    for heading, table in all_tables(c, best_only=True).items():
        parts += [f"## {heading}", markdown_table(table)]
        if heading == "Results":
            parts.append(BRACKETS)
    if c["notes"]:
        parts += ["## Notes", "\n".join(f"- {note}" for note in c["notes"])]
    return "\n\n".join(parts) + "\n"


def all_tables(c: Values, *, best_only: bool = False) -> dict[str, Table]:
    """Every table by its heading, in order; `best_only` leaves out pairs without the best arm."""
    best = c["arms"][0]["name"]
    pairs = [pair for pair in c["pairs"] if not best_only or pair["better"] == best]
    tables = {
        "Results": [_result_row(c, arm) for arm in c["arms"]],
        "Size and cost": [_size_row(arm) for arm in c["arms"]],
        "Reference lines": [_reference_row(c, line) for line in c["references"]],
        f"Against {best}" if best_only else "Pairs": [_pair_row(pair) for pair in pairs],
    }
    return {heading: rows for heading, rows in tables.items() if rows}


def title(c: Values) -> str:
    """The corpus, the split and its size."""
    return (
        f"{c['corpus']}, {c['split']} split: {c['split_bytes']:,} bytes, "
        f"{c['documents']:,} document{'s' if c['documents'] != 1 else ''}"
    )


def ranking_sentence(c: Values) -> str:
    """One sentence that says which arms are separated."""
    if not c["pairs"]:
        return "One arm: nothing to rank."
    if not c["ranking"]:
        return "No ranking: it takes several seeds of at least two arms."
    if len(c["ranking"]) > 1:
        chain = [g[0] if len(g) == 1 else "{" + ", ".join(g) + "}" for g in c["ranking"]]
        return (
            f"Ranking: {' < '.join(chain)} (bits per byte, lower is better; every arm is separated "
            "from every arm on the other side of a sign)."
        )
    names = ", ".join(c["ranking"][0])
    if any(pair["verdict"] == "separated" for pair in c["pairs"]):
        return f"No ranking of {names} as a whole; some pairs are separated, see there."
    return f"No ranking: {names} cannot be told apart."


def _result_row(c: Values, arm: Values) -> dict[str, str]:
    number = len(arm["members"])
    seeds, alone = str(len(arm["seeds"])), " (one seed)"
    if number:
        seeds, alone = f"mean of {number}", ""
    row = {
        "arm": arm["name"],
        "bits per byte": _interval(arm["bits_per_byte"], ",.4f", alone),
        "word perplexity": _interval(arm["word_perplexity"], ",.2f", alone),
    }
    if c["one_tokenizer"]:
        row["token perplexity"] = _interval(arm["token_perplexity"], ",.2f", alone)
    return row | {"seeds": seeds, "tokenizer": arm["tokenizer"]}


def _size_row(arm: Values) -> dict[str, str]:
    columns = {
        "parameters": "parameters_total",
        "table": "parameters_table",
        "positions": "parameters_positions",
        "blocks": "parameters_blocks",
        "FLOPs per token": "flops_per_token",
        "tokens seen": "tokens_seen",
        "tokens/s": "tokens_per_second",
    }
    cells = {column: arm[key] for column, key in columns.items()}
    return {"arm": arm["name"]} | {
        column: "-" if value is None else short(value) for column, value in cells.items()
    }


def _reference_row(c: Values, line: Values) -> dict[str, str]:
    row = {
        "predictor": NAMES.get(line["name"]) or line["name"],
        "bits per byte": _cell(line["bits_per_byte"], ".4f"),
        "word perplexity": _cell(line["word_perplexity"], ",.2f"),
    }
    if c["one_tokenizer"]:
        row["token perplexity"] = _cell(line["token_perplexity"], ",.2f")
    return row | {"tokenizer": line["tokenizer"]}


def _pair_row(pair: Values) -> dict[str, str]:
    bounds = pair["gap_low95"], pair["gap_high95"]
    return {
        "better": pair["better"],
        "worse": pair["worse"],
        "verdict": pair["verdict"],
        "gap, bits per byte": _cell(pair["gap_bits_per_byte"], ".4f"),
        "95 % interval": "-" if None in bounds else "[{:.4f}, {:.4f}]".format(*bounds),
        "SE, seeds": _cell(pair["standard_error_seeds"], ".4f"),
        "SE, documents": _cell(pair["standard_error_documents"], ".4f"),
        "SE": _cell(pair["standard_error"], ".4f"),
        "reason": pair["reason"],
    }


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _interval(value: Values | None, form: str, alone: str) -> str:
    if value is None or value["mean"] is None:
        return "-"
    mean, low, high = (_cell(value[key], form) for key in ("mean", "low95", "high95"))
    return f"{mean}{alone}" if value["low95"] is None else f"{mean} [{low}, {high}]"


def short(value: float) -> str:
    """A number with four figures and a unit prefix."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"
