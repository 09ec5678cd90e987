"""A comparison as one HTML page."""

import html as escapes
import io
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

from lm_jax.compare import tables
from lm_jax.compare.tables import Table, Values

Drawn = tuple[str, dict[str, Any]]  # the content in words; what the legend shows of each arm

# Okabe and Ito's colours, which colour-blind readers can tell apart, and lighter ones for a dark
# page; markers differ as well. Figures are drawn in the light colours, which then become CSS
# variables.
_LIGHT = ("#0072b2", "#d55e00", "#007a5a", "#a8518a", "#8a6500", "#2f2f2f")
_DARK = ("#56b4e9", "#ff8c3f", "#2fc79b", "#e3a0c8", "#e6b31e", "#dddddd")
_MARKERS = "osD^vPX"
_INK, _RULE = "#010203", "#b0b1b2"  # stand for the page's colours of text and of rules


def _variables(palette: Sequence[str]) -> str:
    return " ".join(f"--c{i}: {colour};" for i, colour in enumerate(palette))


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
""".replace("LIGHT", _variables(_LIGHT)).replace("DARK", _variables(_DARK))


def html(c: Values) -> str:
    """The whole comparison as one file that needs no network; matplotlib draws the figures.

    Args:
        c: the values of `compare.json`.
    """
    text = escapes.escape
    title, ranking = text(tables.title(c)), text(tables.ranking_sentence(c))
    sections = [f"<h1>{title}</h1>", f'<p class="ranking">{ranking}</p>']
    for heading, table in tables.all_tables(c).items():
        sections.append(f"<h2>{heading}</h2>" + _html_table(table, heading))
        if heading == "Results":
            sections.append(f"<p>{tables.BRACKETS}</p>")
        if heading == "Size and cost":
            sections.append(f'<h2>Figures</h2><div class="figures">{_figures(c)}</div>')
    if c["notes"]:
        items = "".join(f"<li>{text(note)}</li>" for note in c["notes"])
        sections.append(f"<h2>Notes</h2><ul>{items}</ul>")
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style></head>\n"
        f"<body>\n{chr(10).join(sections)}\n</body>\n</html>\n"
    )


def _figures(c: Values) -> str:
    loss = "{} loss against training tokens, one line a seed."
    bits = (
        "Bits per byte against {}, with 95 % intervals over seeds. The line joins the arms that no "
        "other beats in both, by their means alone."
    )
    return (
        _figure(c, loss.format("Valid"), _curves, "valid")
        + _figure(c, loss.format("Training"), _curves, "train")
        + _figure(c, bits.format("parameters"), _pareto, "parameters_total")
        + _figure(c, bits.format("training FLOPs per token"), _pareto, "flops_per_token")
    )


def _html_table(table: Table, name: str) -> str:
    head = "".join(f'<th scope="col">{escapes.escape(x)}</th>' for x in table[0])
    body = ""
    for row in table:
        first, *others = map(escapes.escape, row.values())
        cells = "".join(f"<td>{x}</td>" for x in others)
        body += f'<tr><th scope="row">{first}</th>{cells}</tr>'
    return (
        f'<div class="scroll" role="region" aria-label="{name}" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _figure(c: Values, caption: str, draw: Callable[[Values, str, Any], Drawn], key: str) -> str:
    """A captioned SVG that `draw` fills with values of that key."""
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
        words, handles = draw(c, key, axes)
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False
        )
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
    """Every arm with its colour and marker."""
    looks = zip(c["arms"], itertools.cycle(_LIGHT), itertools.cycle(_MARKERS), strict=False)
    return [(arm, {"color": colour, "marker": marker}) for arm, colour, marker in looks]


def _curves(c: Values, kind: str, axes: Any) -> Drawn:
    words, late = [], []
    handles: dict[str, Any] = {}
    for arm, look in _looks(c):
        for curve in arm["curves"]:
            tokens, bits = curve[f"{kind}_tokens"], curve[f"{kind}_bits_per_byte"]
            every = max(1, len(tokens) // 8)
            (line,) = axes.plot(tokens, bits, **look, linewidth=1.2, markersize=4, markevery=every)
            handles.setdefault(arm["name"], line)
            late += [b for t, b in zip(tokens, bits, strict=True) if t > 0.2 * tokens[-1]]
        if bits:
            words.append(f"{arm['name']} ends at {bits[-1]:.3f}")
    if late:  # the fall from chance would leave no room for what differs
        margin = 0.05 * (max(late) - min(late)) or 0.05
        axes.set_ylim(min(late) - margin, max(late) + margin)
    axes.set_xlabel("training tokens seen")
    axes.set_ylabel("bits per byte")
    return "; ".join(words), handles


def _pareto(c: Values, key: str, axes: Any) -> Drawn:
    points, words, handles = [], [], {}
    for arm, look in _looks(c):
        bits, error = arm["bits_per_byte"], None
        if bits["low95"] is not None:
            error = [[bits["mean"] - bits["low95"]], [bits["high95"] - bits["mean"]]]
        points.append((arm[key], bits["mean"]))
        handles[arm["name"]] = axes.errorbar(
            *points[-1], error, **look, linestyle="none", capsize=3
        )
        words.append(f"{arm['name']}: {tables.short(arm[key])}, {bits['mean']:.4f}")
    axes.plot(*zip(*_front(points), strict=True), color=_RULE, linewidth=1, zorder=0)
    axes.set_xlabel(key.replace("_total", "").replace("_", " ").replace("flops", "FLOPs"))
    axes.set_ylabel("bits per byte")
    return "; ".join(words), handles


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto front, by rising x: the points that no other one dominates."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front
