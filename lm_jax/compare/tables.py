"""A comparison as Markdown; what is in it stands in `lm_jax.compare.compare`."""

from collections.abc import Mapping
from typing import Any

Table = tuple[list[str], list[list[str]]]  # headings, rows
Values = Mapping[str, Any]

BRACKETS = "Brackets: 95 % intervals over seeds."


def markdown(c: Values) -> str:
    """Tables, ranking and notes."""
    parts = [f"# {title(c)}", ranking_sentence(c), _markdown_table(result_table(c)), BRACKETS]
    parts += ["## Size and cost", _markdown_table(size_table(c))]
    parts += ["## Reference lines", _markdown_table(reference_table(c))]
    if c["pairs"]:
        best = c["arms"][0]["name"]
        parts += [f"## Against {best}", _markdown_table(pair_table(c, only=best))]
    if c["notes"]:
        parts += ["## Notes", "\n".join(f"- {note}" for note in c["notes"])]
    return "\n\n".join(parts) + "\n"


def title(c: Values) -> str:
    """What was scored."""
    return (
        f"{c['corpus']}, {c['split']} split: {c['split_bytes']:,} bytes, "
        f"{c['documents']:,} document{'s' if c['documents'] != 1 else ''}"
    )


def ranking_sentence(c: Values) -> str:
    """The chain of what is separated, as a sentence."""
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


def result_table(c: Values) -> Table:
    """Bits per byte and perplexities of every arm."""
    headings = ["arm", "bits per byte", "word perplexity", "token perplexity", "seeds", "tokenizer"]
    rows = []
    for arm in c["arms"]:
        row = [arm["name"], _interval(arm["bits_per_byte"], 4)]
        row += [_interval(arm[f"{key}_perplexity"], 2) for key in ("word", "token")]
        rows.append([*row, str(len(arm["seeds"])), arm["tokenizer"]])
    return _without_token_perplexity(c, headings, rows)


def size_table(c: Values) -> Table:
    """Parameters, FLOPs, tokens and time of every arm."""
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


def reference_table(c: Values) -> Table:
    """The simple predictors, for each tokenizer."""
    headings = ["predictor", "bits per byte", "word perplexity", "token perplexity", "tokenizer"]
    rows = []
    for row in c["references"]:
        perplexities = (row[f"{key}_perplexity"] for key in ("word", "token"))
        cells = ["-" if x is None else f"{x:,.2f}" for x in perplexities]
        rows.append([row["name"], f"{row['bits_per_byte']:.4f}", *cells, row["tokenizer"]])
    return _without_token_perplexity(c, headings, rows)


def _without_token_perplexity(c: Values, headings: list[str], rows: list[list[str]]) -> Table:
    """Drop the column where the tokenizers differ."""
    lines = [headings, *rows]
    if not c["one_tokenizer"]:
        at = headings.index("token perplexity")
        lines = [[*line[:at], *line[at + 1 :]] for line in lines]
    return lines[0], lines[1:]


def pair_table(c: Values, only: str | None = None) -> Table:
    """Every pair of arms, or those with the arm `only`."""
    headings = ["better", "worse", "verdict", "gap, bits per byte", "95 % interval", "SE, seeds"]
    headings += ["SE, documents", "SE", "reason"]
    rows = []
    for pair in c["pairs"]:
        if only not in (None, pair["better"]):
            continue
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
    """Four figures and a unit."""
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
