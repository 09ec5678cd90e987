"""The tables of a comparison, and all of it as Markdown; see `lm_jax.compare.compare`."""

from collections.abc import Mapping, Sequence
from typing import Any

Table = tuple[list[str], list[list[str]]]  # headings, rows
Values = Mapping[str, Any]

BRACKETS = "Brackets: 95 % intervals over seeds."


def markdown(c: Values) -> str:
    """The whole comparison; of the pairs, those of the best arm."""
    parts = [f"# {title(c)}", ranking_sentence(c)]
    for heading, table in all_tables(c, best_only=True).items():
        parts += [f"## {heading}", _markdown_table(table)]
        if heading == "Results":
            parts.append(BRACKETS)
    if c["notes"]:
        parts += ["## Notes", "\n".join(f"- {note}" for note in c["notes"])]
    return "\n\n".join(parts) + "\n"


def all_tables(c: Values, *, best_only: bool = False) -> dict[str, Table]:
    """Every table by its heading, in order; `best_only` leaves out pairs without the best arm."""
    tables = {
        "Results": _result_table(c),
        "Size and cost": _size_table(c),
        "Reference lines": _reference_table(c),
    }
    if c["pairs"]:
        best = c["arms"][0]["name"]
        pairs = [pair for pair in c["pairs"] if not best_only or pair["better"] == best]
        tables[f"Against {best}" if best_only else "Pairs"] = _pair_table(pairs)
    return tables


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


def _result_table(c: Values) -> Table:
    headings = ["arm", "bits per byte", "word perplexity", "token perplexity", "seeds", "tokenizer"]
    rows = []
    for arm in c["arms"]:
        row = [arm["name"], _interval(arm["bits_per_byte"], 4)]
        row += [_interval(arm[f"{key}_perplexity"], 2) for key in ("word", "token")]
        rows.append([*row, str(len(arm["seeds"])), arm["tokenizer"]])
    return _without_token_perplexity(c, headings, rows)


def _size_table(c: Values) -> Table:
    columns = {
        "parameters": "parameters_total",
        "table": "parameters_table",
        "positions": "parameters_positions",
        "blocks": "parameters_blocks",
        "FLOPs per token": "flops_per_token",
        "tokens seen": "tokens_seen",
        "tokens/s": "tokens_per_second",
    }
    rows = [[arm["name"], *(short(arm[key]) for key in columns.values())] for arm in c["arms"]]
    return ["arm", *columns], rows


def _reference_table(c: Values) -> Table:
    headings = ["predictor", "bits per byte", "word perplexity", "token perplexity", "tokenizer"]
    rows = []
    for row in c["references"]:
        perplexities = (row[f"{key}_perplexity"] for key in ("word", "token"))
        cells = ["-" if x is None else f"{x:,.2f}" for x in perplexities]
        rows.append([row["name"], f"{row['bits_per_byte']:.4f}", *cells, row["tokenizer"]])
    return _without_token_perplexity(c, headings, rows)


def _without_token_perplexity(c: Values, headings: list[str], rows: list[list[str]]) -> Table:
    """Drop the column of token perplexities where the tokenizers differ."""
    lines = [headings, *rows]
    if not c["one_tokenizer"]:
        at = headings.index("token perplexity")
        lines = [[*line[:at], *line[at + 1 :]] for line in lines]
    return lines[0], lines[1:]


def _pair_table(pairs: Sequence[Values]) -> Table:
    headings = ["better", "worse", "verdict", "gap, bits per byte", "95 % interval", "SE, seeds"]
    headings += ["SE, documents", "SE", "reason"]
    rows = []
    for pair in pairs:
        bounds = pair["gap_low95"], pair["gap_high95"]
        interval = "-" if None in bounds else "[{:.4f}, {:.4f}]".format(*bounds)
        errors = ("standard_error_seeds", "standard_error_documents", "standard_error")
        row = [pair["better"], pair["worse"], pair["verdict"], f"{pair['gap_bits_per_byte']:.4f}"]
        row += [interval, *("-" if pair[key] is None else f"{pair[key]:.4f}" for key in errors)]
        rows.append([*row, pair["reason"]])
    return headings, rows


def _interval(value: Values | None, digits: int) -> str:
    if value is None or value["mean"] is None:
        return "-"
    mean = f"{value['mean']:,.{digits}f}"
    if value["low95"] is None:
        return f"{mean} (one seed)"
    return f"{mean} [{value['low95']:,.{digits}f}, {value['high95']:,.{digits}f}]"


def short(value: float) -> str:
    """A number with four figures and a unit prefix."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def _markdown_table(table: Table) -> str:
    headings, rows = table
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )
