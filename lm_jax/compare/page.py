"""A comparison as one HTML page."""

import functools
import itertools
from collections.abc import Sequence
from html import escape
from typing import Any

from lm_jax import page
from lm_jax.compare import tables
from lm_jax.compare.tables import Values


def html(c: Values) -> str:
    """The whole comparison as one file that needs no network; matplotlib draws the figures.

    Args:
        c: the values of `compare.json`.
    """
    return page.document(tables.title(c), body(c))


def body(c: Values, *, figures: bool = True) -> str:
    """The whole comparison as a part of a page."""
    ranking = f'<p class="panel">{escape(tables.ranking_sentence(c))}</p>'
    sections = [f"<h1>{escape(tables.title(c))}</h1>", ranking]
    for heading, table in tables.all_tables(c).items():
        sections.append(f"<h2>{escape(heading)}</h2>" + page.table(table, heading))
        if heading == "Results":
            sections.append(f'<p class="soft">{tables.BRACKETS}</p>')
        if heading == "Size and cost" and figures:
            sections.append(f'<h2>Figures</h2><div class="figures">{_figures(c)}</div>')
    if c["notes"]:
        items = "".join(f"<li>{escape(note)}</li>" for note in c["notes"])
        sections.append(f"<h2>Notes</h2><ul>{items}</ul>")
    return "\n".join(sections)


def _figures(c: Values) -> str:
    seeds = "One line a seed, against training tokens."
    bits = (
        "Bits per byte with 95 % intervals over seeds. The line joins the arms that no other beats "
        "in both, by their means alone."
    )
    return "".join(
        page.figure(title, caption, functools.partial(draw, c, key))
        for title, caption, draw, key in (
            ("Valid loss.", seeds, _curves, "valid"),
            ("Training loss.", seeds, _curves, "train"),
            ("Size.", bits, _pareto, "parameters_total"),
            ("Cost.", bits, _pareto, "flops_per_token"),
        )
    )


def _looks(c: Values) -> list[tuple[Values, dict[str, str]]]:
    """Every arm with its name, colour and marker for matplotlib."""
    looks = zip(
        c["arms"], itertools.cycle(page.COLOURS), itertools.cycle(page.MARKERS), strict=False
    )
    return [
        (arm, {"label": arm["name"], "color": colour, "marker": marker})
        for arm, colour, marker in looks
    ]


def _curves(c: Values, kind: str, axes: Any) -> str:
    words, late = [], []
    for arm, look in _looks(c):
        bits: list[float] = []
        for curve in arm["curves"]:
            tokens, bits = curve[f"{kind}_tokens"], curve[f"{kind}_bits_per_byte"]
            every = max(1, len(tokens) // 8)
            axes.plot(tokens, bits, **look, linewidth=1.2, markersize=4, markevery=every)
            late += [b for t, b in zip(tokens, bits, strict=True) if t > 0.2 * tokens[-1]]
        if bits:
            words.append(f"{arm['name']} ends at {bits[-1]:.3f}")
    if late:  # the fall from chance would leave no room for what differs
        margin = 0.05 * (max(late) - min(late)) or 0.05
        axes.set_ylim(min(late) - margin, max(late) + margin)
    axes.set_xlabel("training tokens seen")
    axes.set_ylabel("bits per byte")
    return "; ".join(words)


def _pareto(c: Values, key: str, axes: Any) -> str:
    points, words = [], []
    for arm, look in _looks(c):
        bits, error = arm["bits_per_byte"], None
        if bits["low95"] is not None:
            error = [[bits["mean"] - bits["low95"]], [bits["high95"] - bits["mean"]]]
        points.append((arm[key], bits["mean"]))
        axes.errorbar(*points[-1], error, **look, linestyle="none", capsize=3)
        words.append(f"{arm['name']}: {tables.short(arm[key])}, {bits['mean']:.4f}")
    front = zip(*_front(points), strict=True)
    axes.plot(*front, color=page.SOFT, linewidth=1, zorder=0, label="not beaten in both")
    axes.set_xlabel(key.replace("_total", "").replace("_", " ").replace("flops", "FLOPs"))
    axes.set_ylabel("bits per byte")
    return "; ".join(words)


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto front, by rising x: the points that no other one dominates."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front
