"""Pages of one file each, which need neither network nor JavaScript: style, tables, figures."""

import html
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# Okabe and Ito's colours, which colour-blind readers can tell apart, and lighter ones for a dark
# page. Figures are drawn in the light colours, which then become CSS variables.
COLOURS = ("#0072b2", "#d55e00", "#007a5a", "#a8518a", "#8a6500", "#2f2f2f")
_DARK = ("#56b4e9", "#ff8c3f", "#2fc79b", "#e3a0c8", "#e6b31e", "#dddddd")
MARKERS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚", "X": "✖"}
SIZE = (4.8, 3.0)  # of a figure, inches
INK, SOFT, RULE = "#010203", "#505152", "#b0b1b2"  # stand for the page's text, notes and rules


def _variables(palette: Sequence[str]) -> str:
    return " ".join(f"--c{i}: {colour};" for i, colour in enumerate(palette))


_PAGE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1f2328; --soft: #5b636d; --rule: #d9dce1;
  --panel: #f6f7f8; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --ink: #e4e6e9; --soft: #9ba3ad; --rule: #383d44; --panel: #1e2125;
    DARK } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem 1rem 4rem; background: var(--page);
  color: var(--ink); font: .9375rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .75rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--rule); }
h3 { font-size: .9375rem; margin: 1rem 0 .3rem; }
""".replace("LIGHT", _variables(COLOURS)).replace("DARK", _variables(_DARK))
_PARTS = """
p, ul { max-width: 46rem; margin: .6rem 0; }
.soft, figcaption { color: var(--soft); font-size: .875rem; }
.panel { background: var(--panel); border-left: 3px solid var(--c0); border-radius: 3px;
  padding: .7rem 1rem; margin: .75rem 0; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: separate; border-spacing: 0; font-size: .875rem;
  font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--rule); text-align: right;
  white-space: nowrap; font-weight: 400; vertical-align: top; }
thead th { color: var(--soft); vertical-align: bottom; white-space: normal; min-width: 3.2em; }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0;
  background: var(--page) padding-box; }
.text { text-align: left; } td.text { white-space: normal; }
td:last-child, th:last-child { padding-right: 0; } td:last-child { white-space: normal; }
tr.own > * { font-weight: 650; }
td.long { white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
.figures { display: grid; gap: 2rem 2.5rem; align-items: start; margin-top: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.tables { display: flex; flex-wrap: wrap; gap: 0 2.5rem; } .tables > * { min-width: 0; }
figure { margin: 0; min-width: 0; max-width: 36rem; display: grid; grid-row: span 3; gap: 0;
  grid-template-rows: subgrid; align-content: start; }
figcaption { line-height: 1.45; margin-bottom: .4rem; align-self: end; }
figcaption b { color: var(--ink); font-weight: 600; }
svg { display: block; width: 100%; height: auto; } svg text { font-family: inherit !important; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; margin: .25rem 0 0; padding: 0;
  list-style: none; font-size: .8125rem; }
.legend i { display: inline-block; position: relative; width: 1.5rem; margin-right: .4rem;
  vertical-align: .28em; border-top: 2px solid; font: .75rem/0 sans-serif; text-align: center; }
.legend i.dashed { border-top-style: dashed; } .legend i.none { border-top-color: transparent; }
.legend i.band { border-top-width: .6rem; opacity: .3; vertical-align: .05em; }
.legend i span { position: absolute; inset: -1px 0 auto; }
@media (max-width: 40rem) { table { font-size: .8rem; } th, td { padding: .3rem; }
  tbody th { white-space: normal; min-width: 5.5rem; } }
summary { cursor: pointer; color: var(--soft); padding: .3rem 0; }
.finding { border-left-color: var(--c1); max-width: 52rem; } .finding p { margin: .3rem 0 0; }
.good { border-left-color: var(--c2); max-width: 52rem; }
.sample { white-space: pre-wrap; max-width: 52rem; } .sample b { font-weight: 650; }
"""
# What stands in a notebook takes the colours of its theme, of which a page is not told.
_FRAGMENT = f""".lm-jax {{ --soft: color-mix(in srgb, currentColor 65%, transparent);
  --rule: rgb(128 128 128 / .35); --panel: rgb(128 128 128 / .12); --page: transparent;
  {_variables(COLOURS)} color: inherit; font-size: .875rem; line-height: 1.5; {_PARTS} }}
.lm-jax :is(h1, h2, h3) {{ font-size: 1rem; margin: 1rem 0 .3rem; }}
.lm-jax th:first-child {{ position: static; }}"""


def document(title: str, body: str, *, style: str = "", head: str = "") -> str:
    """A whole page; `body` is HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{head}'
        f"<title>{html.escape(title)}</title>\n<style>{_PAGE}{_PARTS}{style}</style></head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def fragment(body: str) -> str:
    """What a notebook shows under a cell; `body` is HTML."""
    return f'<div class="lm-jax"><style>{_FRAGMENT}</style>{body}</div>'


def table(rows: Sequence[Mapping[str, str]], label: str, *, own: str = "") -> str:
    """Rows as HTML, in a box of their own that scrolls where they are wider than the page.

    Args:
        rows: cells by their headings; the first one names the row.
        label: name of the table for those who hear the page.
        own: name of the row that stands out.
    """
    kinds = [_kind([row[heading] for row in rows]) for heading in list(rows[0])[1:]]

    def line(cells: Iterable[str], scope: str, tag: str) -> str:
        first, *others = map(html.escape, cells)
        start = '<tr class="own">' if first == own else "<tr>"
        pairs = zip(others, kinds, strict=True)
        rest = "".join(f'<{tag} class="{kind}">{x}</{tag[:2]}>' for x, kind in pairs)
        return f'{start}<th scope="{scope}">{first}</th>{rest}</tr>'

    head = line(rows[0], "col", 'th scope="col"')
    body = "".join(line(row.values(), "row", "td") for row in rows)
    return (
        f'<div class="scroll" role="region" aria-label="{html.escape(label)}" tabindex="0"><table>'
        f"<thead>{head}</thead><tbody>{body}</tbody></table></div>"
    )


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows, cells by their headings, in Markdown."""
    headings = list(rows[0])
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *(row.values() for row in rows)]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def _kind(cells: Sequence[str]) -> str:
    """How a column is set: words to the left, numbers to the right; what is long is wrapped."""
    if any(len(x) > 40 for x in cells):
        return "text long"
    return "number" if any(x.startswith((*"-[0123456789", "nan")) for x in cells) else "text"


def figure(title: str, caption: str, draw: Callable[[Any], str]) -> str:
    """A captioned SVG with a legend; see `panel` for `draw`."""
    from matplotlib.figure import Figure

    with drawn_plainly():
        whole = Figure(figsize=SIZE)
        words, legend = panel(whole, draw)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        whole.savefig(file, format="svg", transparent=True, metadata=nothing)
    label = html.escape(f"{title}. {words}")
    svg = _themed(file.getvalue()).replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    entries = "".join(_entry(name, handle) for name, handle in legend.items())
    told = f"<b>{html.escape(title)}</b> {html.escape(caption)}"
    return (
        f'<figure><figcaption>{told}</figcaption>{svg}<ul class="legend">{entries}</ul></figure>\n'
    )


def panel(
    figure: Any, draw: Callable[[Any], str], *, height: float = 0.815
) -> tuple[str, dict[str, Any]]:
    """Let `draw` fill axes in matplotlib's figure, or a part of one, and tell what they show.

    Args:
        figure: where the axes are added.
        draw: is called with them.
        height: of the axes, as a share of the figure.

    Returns:
        Its words; and the handles of what has a label there, by the labels.
    """
    from matplotlib.ticker import EngFormatter

    # Margins of one width let the figures of a page stand in line.
    axes = figure.add_axes((0.145, 0.155, 0.835, height))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.locator_params(axis="x", nbins=5, integer=True)
    words = draw(axes)
    return words, {
        name: handle
        for some in figure.axes
        for handle, name in zip(*some.get_legend_handles_labels(), strict=True)
    }


def drawn_plainly() -> Any:
    """The context in which matplotlib draws as a page has it."""
    import matplotlib

    inked = "text.color axes.labelcolor xtick.labelcolor ytick.labelcolor".split()
    style: dict[Any, Any] = {
        **dict.fromkeys(inked, INK),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), RULE),
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.linewidth": 0.5,
        "font.size": 10,
        "svg.fonttype": "none",
        "text.parse_math": False,
        "svg.hashsalt": "lm_jax",  # else the page would differ from one time to the next
    }
    return matplotlib.rc_context(style)


def _themed(svg: str) -> str:
    """matplotlib's SVG without what a page has no use for, in the colours of the page."""
    svg = svg[svg.index("<svg") :]
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", svg)
    svg = re.sub(' (width|height)="[^"]*"', "", svg, count=2)  # the page decides
    return _coloured(svg)


def _coloured(text: str) -> str:
    for i, colour in enumerate(COLOURS):
        text = text.replace(colour, f"var(--c{i})")
    text = text.replace(INK, "currentColor").replace(SOFT, "var(--soft)")
    return text.replace(RULE, "var(--rule)")


def _entry(name: str, handle: Any) -> str:
    """One line of a legend, for a line, an area or points with their intervals."""
    from matplotlib.colors import rgb2hex

    line = handle[0] if isinstance(handle, tuple) else handle
    if hasattr(line, "get_marker"):
        kind = {"--": "dashed", "None": "none"}.get(line.get_linestyle(), "line")
        colour, marker = line.get_color(), MARKERS.get(line.get_marker(), "")
    else:
        kind, colour, marker = "band", rgb2hex(line.get_facecolor()[0]), ""
    return (
        f'<li><i class="{kind}" style="color: {_coloured(colour)}">'
        f"<span>{marker}</span></i>{html.escape(name)}</li>"
    )
