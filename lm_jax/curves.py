"""The figures of a run: what it logged, against its updates."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm_jax import page
from lm_jax.config import Config
from lm_jax.page import Drawn

Rows = Sequence[Mapping[str, Any]]

_MOST = 300  # points of a line
_SHARES = 40  # of a share, which is 0 or 1 in a single update
_LAYERS = 6  # lines of a figure with one for every layer
_TRAIN, _SECOND = page.COLOURS[:2]
_LINE: dict[str, Any] = {"color": page.SOFT, "linestyle": "--"}
_BAND = {"linestyle": "band"}


class Course(NamedTuple):
    """One metric over a run: the middle of each stretch of updates, its mean, lowest, highest."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def course(rows: Rows, name: str, most: int = _MOST) -> Course:
    """The course of a metric in at most so many stretches, without what is no finite number."""
    found = [(row.get("step"), row.get(name)) for row in rows if name in row]
    numbers = [pair for pair in found if all(isinstance(x, int | float) for x in pair)]
    points_N2 = np.array(numbers, float).reshape(-1, 2)
    points_N2 = points_N2[np.isfinite(points_N2).all(1)]
    if not len(points_N2):
        return Course(*np.zeros((4, 0)))
    edges = np.linspace(0, len(points_N2), min(len(points_N2), most) + 1).astype(int)
    sums_P2 = np.add.reduceat(points_N2, edges[:-1])
    steps, mean = (sums_P2 / np.diff(edges)[:, None]).T
    values = points_N2[:, 1]
    low, high = (f.reduceat(values, edges[:-1]) for f in (np.minimum, np.maximum))
    return Course(steps, mean, low, high)


def figures(rows: Rows, cfg: Config, lines: Mapping[str, float]) -> str:
    """All figures for which something was logged, as HTML.

    Args:
        rows: of `metrics.jsonl`.
        cfg: the config of the run.
        lines: nats per token of the reference predictors, by the names that are shown.
    """
    train, valid = course(rows, "train/loss"), course(rows, "valid/loss")
    band = "The band spans the lowest and the highest update of each stretch. "
    band *= len(train.steps) == _MOST
    made = [("Loss.", f"Nats per token. {band}", functools.partial(_loss, train, valid, lines, 0))]
    if len(train.steps) > 20:
        close = functools.partial(_loss, train, valid, lines, 0.2)
        made.append(("Loss, close up.", "The same without the first fifth of the run.", close))
    clip = cfg.optim.clip_norm
    rate = course(rows, "optim/clip_rate", _SHARES)
    if len(rate.mean):
        told = f"{_mean(rows, 'optim/clip_rate'):.1%} of all updates were cut to {clip:g}."
        told = told if clip else "Gradients are not clipped."
        draw = functools.partial(_gradient, course(rows, "optim/grad_norm"), rate, clip)
        made.append(("Gradient norm.", f"Before clipping. {band}{told}", draw))
    rates = course(rows, "optim/lr")
    if len(rates.mean):
        made.append(("Learning rate.", "Of each update.", functools.partial(_rate, rates)))
    speed, wait = course(rows, "perf/tokens_per_second"), course(rows, "perf/input_wait", _SHARES)
    if len(speed.mean) and len(wait.mean):
        told = f"{_mean(rows, 'perf/input_wait'):.1%} of the time was spent waiting for data."
        made.append(("Speed.", told, functools.partial(_speed, speed, wait)))
    if layers := _layers(rows):
        chosen = np.linspace(0, len(layers) - 1, min(len(layers), _LAYERS)).round().astype(int)
        named = list(layers.items())
        some = f"{len(chosen)} of {len(layers)} layers. " if len(chosen) < len(layers) else ""
        draw = functools.partial(_by_layer, dict(named[i] for i in chosen))
        made.append(("Gradient norm by layer.", f"{some}Before clipping.", draw))
    return "".join(page.figure(*figure) for figure in made if len(train.mean))


def _mean(rows: Rows, name: str) -> float:
    return float(np.mean([row[name] for row in rows if isinstance(row.get(name), int | float)]))


def _axis(axes: Any, label: str) -> None:
    axes.set_xlabel("update")
    axes.set_ylabel(label)


def _plot(axes: Any, line: Course, **look: Any) -> None:
    axes.plot(line.steps, line.mean, **{"linewidth": 1.3} | look)


def _shade(axes: Any, line: Course) -> None:
    axes.fill_between(line.steps, line.low, line.high, color=_TRAIN, alpha=0.2, linewidth=0)


def _loss(
    train: Course, valid: Course, lines: Mapping[str, float], begin: float, axes: Any
) -> Drawn:
    """Both losses from a share of the run on, with the reference lines that are in reach."""
    first = begin * train.steps[-1]
    shown = [line.mean[line.steps >= first] for line in (train, valid)]
    values = np.concatenate(shown)
    reach = (0.2 if begin else np.inf) * (np.ptp(values) or 1)
    near = {k: y for k, y in lines.items() if values.min() - reach <= y <= values.max() + reach}
    values = np.append(values, list(near.values()))
    margin = 0.1 * (np.ptp(values) or 1)
    axes.set_ylim(values.min() - margin, values.max() + margin)
    axes.set_xlim(first, train.steps[-1] * 1.01 + 1)
    _shade(axes, train)
    _plot(axes, train, color=_TRAIN)
    look = {"color": _SECOND, "marker": "o" if len(valid.steps) < 40 else ""}
    _plot(axes, valid, markersize=3.5, **look)
    _name_lines(axes, near, final=shown[0][-1])
    _axis(axes, "nats per token")
    words = f"train ends at {train.mean[-1]:.3f}"
    if len(valid.mean):
        words += f", valid at {valid.mean[-1]:.3f}"
    words += "".join(f"; {name} {nats:.3f}" for name, nats in lines.items())
    legend = {"train": {"color": _TRAIN}}
    if len(valid.mean):
        legend["valid"] = look
    if near:
        legend["reference lines"] = _LINE
    return words, legend


def _name_lines(axes: Any, lines: Mapping[str, float], final: float) -> None:
    """Draw the reference lines; those that lie close together share one label.

    A loss falls from the upper left, so what is above its end is named at the right and what is
    below at the left.
    """
    bottom, top = axes.get_ylim()
    groups: list[list[tuple[str, float]]] = []
    for name, nats in sorted(lines.items(), key=lambda item: -item[1]):
        axes.axhline(nats, linewidth=0.8, zorder=1, **_LINE)
        close = groups and groups[-1][-1][1] - nats < 0.075 * (top - bottom)
        if close and (groups[-1][-1][1] > final) == (nats > final):
            groups[-1].append((name, nats))
        else:
            groups.append([(name, nats)])
    for group in groups:
        above = group[0][1] > final
        axes.annotate(
            ", ".join(name for name, _ in group),
            (1, group[0][1]) if above else (0, group[-1][1]),
            (-2, 2) if above else (2, -2),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            ha="right" if above else "left",
            va="bottom" if above else "top",
            fontsize=8.5,
            color=page.SOFT,
        )


def _beside(axes: Any, share: Course, label: str, most: float) -> None:
    """A share of the updates or of the time, shaded, with its axis at the right."""
    from matplotlib.ticker import PercentFormatter

    left, bottom, width, height = axes.get_position().bounds
    axes.set_position((left, bottom, width - 0.12, height))
    right = axes.twinx()
    right.grid(visible=False)
    right.fill_between(share.steps, share.mean, color=_SECOND, alpha=0.25, linewidth=0)
    right.set_ylim(0, most)
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    right.set_ylabel(label)
    right.set_zorder(0)
    axes.set_zorder(1)
    axes.patch.set_visible(False)


def _gradient(norm: Course, rate: Course, clip: float, axes: Any) -> Drawn:
    _shade(axes, norm)
    _plot(axes, norm, color=_TRAIN)
    axes.set_ylim(0, 1.15 * max(norm.mean.max(), clip))
    _axis(axes, "norm")
    legend = {"gradient norm": {"color": _TRAIN}}
    if clip:
        axes.axhline(clip, linewidth=1, **_LINE)
        _beside(axes, rate, "updates clipped", 1)
        legend["clip threshold"] = _LINE
        legend["updates clipped"] = {"color": _SECOND, **_BAND}
    return f"ends at {norm.mean[-1]:.3f}; clip threshold {clip:g}", legend


def _rate(rates: Course, axes: Any) -> Drawn:
    _plot(axes, rates, color=_TRAIN)
    axes.set_ylim(0, 1.1 * rates.high.max() or 1)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.2g}")
    _axis(axes, "learning rate")
    words = f"highest {rates.high.max():.3g}, now {rates.mean[-1]:.3g}"
    return words, {"learning rate": {"color": _TRAIN}}


def _speed(speed: Course, wait: Course, axes: Any) -> Drawn:
    from matplotlib.ticker import EngFormatter

    _plot(axes, speed, color=_TRAIN)
    axes.set_ylim(0, 1.15 * speed.mean.max())
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    _axis(axes, "tokens per second")
    _beside(axes, wait, "time waiting for data", max(0.05, 1.2 * wait.mean.max()))
    words = f"median {np.median(speed.mean):,.0f} tokens per second"
    waiting = {"color": _SECOND, **_BAND}
    return words, {"tokens per second": {"color": _TRAIN}, "waiting for data": waiting}


def _layers(rows: Rows) -> dict[str, Course]:
    """Gradient norms by layer: the root of the sum of squares of its parameters.

    `grad_norm/blocks/3/mlp/up/kernel` belongs to the layer `blocks/3`, others to their first word.
    """
    members: dict[str, list[str]] = {}
    for name in next((row for row in rows if any(k.startswith("grad_norm/") for k in row)), {}):
        if name.startswith("grad_norm/"):
            path = name.split("/")[1:]
            layer = "/".join(path[: 2 if path[1:2] and path[1].isdigit() else 1])
            members.setdefault(layer, []).append(name)

    def norm(row: Mapping[str, Any], names: list[str]) -> float:
        return float(np.linalg.norm([row[name] or np.nan for name in names if name in row]))

    logged = [row for row in rows if all(names[0] in row for names in members.values())]
    courses = {
        layer: course([{"step": row["step"], layer: norm(row, names)} for row in logged], layer)
        for layer, names in members.items()
    }
    return {layer: line for layer, line in courses.items() if len(line.mean)}


def _by_layer(layers: Mapping[str, Course], axes: Any) -> Drawn:
    from matplotlib.ticker import LogLocator, NullLocator

    legend = {}
    for (layer, line), colour in zip(layers.items(), page.COLOURS, strict=False):
        legend[layer] = {"color": colour}
        _plot(axes, line, color=colour, linewidth=1.0)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    _axis(axes, "norm")
    return "; ".join(f"{name} ends at {x.mean[-1]:.3g}" for name, x in layers.items()), legend
