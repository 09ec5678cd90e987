"""A comparison as Markdown and as one HTML page; what is in it stands in `lm_jax.compare`."""

import html as escapes
import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Table = tuple[list[str], list[list[str]]]  # headings, rows
Values = Mapping[str, Any]

_BRACKETS = "Brackets: 95 % intervals over seeds."

# Okabe and Ito's colours, which colour-blind readers can tell apart, and lighter ones for a dark
# page; markers differ as well. Figures are drawn in the first and name them by CSS variables.
_LIGHT = ("#0072b2", "#d55e00", "#007a5a", "#a8518a", "#8a6500", "#2f2f2f")
_DARK = ("#56b4e9", "#ff8c3f", "#2fc79b", "#e3a0c8", "#e6b31e", "#dddddd")
_MARKERS = "osD^vPX"
_INK, _RULE = "#010203", "#b0b1b2"  # become the colours of text and of rules
_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1b1b; --rule: #bbb; --soft: #f3f3f1;
  LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --page: #161616; --ink: #e8e8e8; --rule: #555; --soft: #242424; DARK } }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.ranking { background: var(--soft); border-left: .3rem solid var(--c0); padding: .7rem 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; border-bottom: 1px solid var(--rule); text-align: right;
  white-space: nowrap; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
.figures { display: grid; gap: 1.5rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; } figcaption { font-size: .9rem; margin-bottom: .3rem; }
svg { width: 100%; height: auto; } svg text { font-family: inherit !important; }
"""


def markdown(c: Values) -> str:
    """Tables, ranking and notes."""
    parts = [f"# {_title(c)}", _ranking(c), _markdown_table(_result_table(c)), _BRACKETS]
    parts += ["## Size and cost", _markdown_table(_size_table(c))]
    parts += ["## Reference lines", _markdown_table(_reference_table(c))]
    if c["pairs"]:
        best = c["arms"][0]["name"]
        parts += [f"## Against {best}", _markdown_table(_pair_table(c, only=best))]
    if c["notes"]:
        parts += ["## Notes", "\n".join(f"- {note}" for note in c["notes"])]
    return "\n\n".join(parts) + "\n"


def html(c: Values) -> str:
    """One page that needs no network; the figures are drawn by matplotlib."""
    text = escapes.escape
    colours = (
        " ".join(f"--c{i}: {colour};" for i, colour in enumerate(palette))
        for palette in (_LIGHT, _DARK)
    )
    style = _STYLE.replace("LIGHT", next(colours)).replace("DARK", next(colours))
    figures = [
        _figure(f"{name} against training tokens, one line a seed.", _curves(c, kind), c)
        for name, kind in (("Valid loss", "valid"), ("Training loss", "train"))
    ]
    figures += [
        _figure(
            f"Bits per byte against {name}, with 95 % intervals over seeds. "
            "The line joins the arms that no other beats in both, by their means alone.",
            _pareto(c, key),
            c,
        )
        for name, key in (
            ("parameters", "parameters_total"),
            ("training FLOPs per token", "flops_per_token"),
        )
    ]
    sections = [
        f"<h1>{text(_title(c))}</h1>",
        f'<p class="ranking">{text(_ranking(c))}</p>',
        "<h2>Results</h2>" + _html_table(_result_table(c), "Results"),
        f"<p>{_BRACKETS}</p>",
        "<h2>Size and cost</h2>" + _html_table(_size_table(c), "Size and cost"),
        f'<h2>Figures</h2><div class="figures">{"".join(figures)}</div>',
        "<h2>Reference lines</h2>" + _html_table(_reference_table(c), "Reference lines"),
    ]
    if c["pairs"]:
        sections.append("<h2>Pairs</h2>" + _html_table(_pair_table(c), "Pairs"))
    if c["notes"]:
        items = "".join(f"<li>{text(note)}</li>" for note in c["notes"])
        sections.append(f"<h2>Notes</h2><ul>{items}</ul>")
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(_title(c))}</title>\n<style>{style}</style></head>\n"
        f"<body>\n{chr(10).join(sections)}\n</body>\n</html>\n"
    )


def _title(c: Values) -> str:
    return (
        f"{c['corpus']}, {c['split']} split: {c['split_bytes']:,} bytes, "
        f"{c['documents']:,} document{'s' if c['documents'] != 1 else ''}"
    )


def _ranking(c: Values) -> str:
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
    rows = [[arm["name"], *(_short(arm[key]) for key in columns.values())] for arm in c["arms"]]
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
    """Drop the column where the tokenizers differ."""
    lines = [headings, *rows]
    if not c["one_tokenizer"]:
        at = headings.index("token perplexity")
        lines = [[*line[:at], *line[at + 1 :]] for line in lines]
    return lines[0], lines[1:]


def _pair_table(c: Values, only: str | None = None) -> Table:
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


def _short(value: float) -> str:
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


def _html_table(table: Table, name: str) -> str:
    headings, rows = table
    head = "".join(f'<th scope="col">{escapes.escape(x)}</th>' for x in headings)
    body = "".join(
        f'<tr><th scope="row">{escapes.escape(row[0])}</th>'
        + "".join(f"<td>{escapes.escape(x)}</td>" for x in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{name}" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _figure(caption: str, draw: Callable[[Any], str], c: Values) -> str:
    """A captioned SVG; `draw` fills the axes and returns its content in words."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    inked = "text.color axes.labelcolor axes.edgecolor xtick.color ytick.color".split()
    style: dict[Any, Any] = {
        **dict.fromkeys(inked, _INK),
        "grid.color": _RULE,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "text.parse_math": False,
        "svg.hashsalt": "lm_jax",  # else the page would differ from one time to the next
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.8, 3.3 + 0.22 * -(-len(c["arms"]) // 2)), layout="constrained")
        axes = figure.subplots()
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.locator_params(axis="x", nbins=5)
        words = draw(axes)
        # Given labels: of itself the legend leaves out those that begin with "_".
        names = {arm["name"] for arm in c["arms"]}
        drawn = {str(artist.get_label()): artist for artist in axes.get_children()}
        labels = [name for name in drawn if name in names]
        handles = [drawn[name] for name in labels]
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", svg)
    svg = re.sub(' (width|height)="[^"]*"', "", svg, count=2)  # the page decides
    for i, colour in enumerate(_LIGHT):
        svg = svg.replace(colour, f"var(--c{i})")
    svg = svg.replace(_INK, "currentColor").replace(_RULE, "var(--rule)")
    label = escapes.escape(f"{caption} {words}")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return f"<figure><figcaption>{escapes.escape(caption)}</figcaption>{svg}</figure>"


def _looks(c: Values) -> list[tuple[Values, dict[str, str]]]:
    """Every arm with a colour and a marker of its own."""
    looks = zip(c["arms"], itertools.cycle(_LIGHT), itertools.cycle(_MARKERS), strict=False)
    return [(arm, {"color": colour, "marker": marker}) for arm, colour, marker in looks]


def _curves(c: Values, kind: str) -> Callable[[Any], str]:
    def draw(axes: Any) -> str:
        words, late = [], []
        for arm, look in _looks(c):
            for i, curve in enumerate(arm["curves"]):
                tokens, bits = curve[f"{kind}_tokens"], curve[f"{kind}_bits_per_byte"]
                axes.plot(
                    tokens,
                    bits,
                    **look,
                    linewidth=1.2,
                    markersize=4,
                    markevery=max(1, len(tokens) // 8),
                    label=None if i else arm["name"],
                )
                late += [b for t, b in zip(tokens, bits, strict=True) if t > 0.2 * tokens[-1]]
            if bits:
                words.append(f"{arm['name']} ends at {bits[-1]:.3f}")
        if late:  # the fall from chance would leave no room for what differs
            margin = 0.05 * (max(late) - min(late)) or 0.05
            axes.set_ylim(min(late) - margin, max(late) + margin)
        axes.set_xlabel("training tokens seen")
        axes.set_ylabel("bits per byte")
        return "; ".join(words)

    return draw


def _pareto(c: Values, key: str) -> Callable[[Any], str]:
    def draw(axes: Any) -> str:
        points, words = [], []
        for arm, look in _looks(c):
            bits = arm["bits_per_byte"]
            error = None
            if bits["low95"] is not None:
                error = [[bits["mean"] - bits["low95"]], [bits["high95"] - bits["mean"]]]
            axes.errorbar(
                arm[key],
                bits["mean"],
                error,
                **look,
                linestyle="none",
                capsize=3,
                label=arm["name"],
            )
            points.append((arm[key], bits["mean"]))
            words.append(f"{arm['name']}: {_short(arm[key])}, {bits['mean']:.4f}")
        front = _front(points)
        axes.plot(*zip(*front, strict=True), color=_RULE, linewidth=1, zorder=0)
        axes.set_xlabel(key.replace("_total", "").replace("_", " ").replace("flops", "FLOPs"))
        axes.set_ylabel("bits per byte")
        return "; ".join(words)

    return draw


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other is below in one coordinate and not above in the other."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front
