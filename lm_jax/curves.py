"""The figures of a run: what it logged, against its updates."""

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lm_jax import page
from lm_jax.config import Config
from lm_jax.history import Course, Log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST = 300  # points of a line
_SHARES = 40  # of a share, which is 0 or 1 in a single update
_LAYERS = 6  # lines of a figure with one for every layer
_TRAIN, _SECOND = page.COLOURS[:2]
_LINE: dict[str, Any] = {"color": page.SOFT, "linestyle": "--"}


class Drawing(NamedTuple):
    """One figure: its name, what stands below it, and what draws it into matplotlib's axes."""

    title: str
    caption: str
    draw: Callable[[Any], str]


def plot(drawings: Sequence[Drawing]) -> "Figure":
    """All of them in one figure of matplotlib, two in a row; as an image in a notebook."""
    from matplotlib.figure import Figure

    width, height = page.SIZE
    count = -(-len(drawings) // 2)
    with page.drawn_plainly():
        whole = Figure(figsize=(2 * width, count * (height + 0.5)))
        parts = whole.subfigures(count, 2, squeeze=False).flat
        for drawing, part in zip(drawings, parts, strict=False):
            _, legend = page.panel(part, drawing.draw, height=0.65)
            part.text(0.145, 0.93, drawing.title.rstrip("."), weight="bold")
            place = {"loc": "lower left", "bbox_to_anchor": (0.13, 0.8), "ncols": 3}
            part.legend(legend.values(), legend, frameon=False, fontsize=8.5, **place)
    # A backend that was not chosen yet would show no figure.
    whole._repr_png_ = functools.partial(_png, whole)  # type: ignore[attr-defined]
    return whole


def _png(figure: "Figure") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def drawings(log: Log, cfg: Config, lines: Mapping[str, float]) -> list[Drawing]:
    """All figures for which something was logged.

    Args:
        log: what the run has logged, read already.
        cfg: the config of the run.
        lines: nats per token of the reference predictors, by the names that are shown.
    """
    course = functools.partial(log.course, most=_MOST)
    train, valid = course("train/loss"), course("valid/loss")
    if not train:
        return []
    band = "The band spans the lowest and the highest update of each stretch. "
    band *= len(train.steps) == _MOST
    made = [("Loss.", f"Nats per token. {band}", functools.partial(_loss, train, valid, lines, 0))]
    if len(train.steps) > 20:
        close = functools.partial(_loss, train, valid, lines, 0.2)
        made.append(("Loss, close up.", "The same without the first fifth of the run.", close))
    clip, clipped = cfg.optim.clip_norm, log.course("optim/clip_rate", _SHARES)
    if norm := course("optim/grad_norm"):
        told = f"{_mean(log, 'optim/clip_rate')} of all updates were clipped."
        told = told if clip else "Gradients are not clipped."
        draw = functools.partial(_gradient, norm, clipped, clip)
        made.append(("Gradient norm.", f"Before clipping. {band}{told}", draw))
    if rates := course("optim/lr"):
        made.append(("Learning rate.", "Of each update.", functools.partial(_rate, rates)))
    if speed := course("perf/tokens_per_second"):
        told = f"{_mean(log, 'perf/input_wait')} of the time was spent waiting for data."
        draw = functools.partial(_speed, speed, log.course("perf/input_wait", _SHARES))
        made.append(("Speed.", told, draw))
    if layers := log.layers(_MOST):
        chosen = np.linspace(0, len(layers) - 1, min(len(layers), _LAYERS)).round().astype(int)
        some = f"{len(chosen)} of {len(layers)} layers. " if len(chosen) < len(layers) else ""
        named = list(layers.items())
        draw = functools.partial(_by_layer, dict(named[i] for i in chosen))
        made.append(("Gradient norm by layer.", f"{some}Before clipping.", draw))
    return [Drawing(*one) for one in made]


def _mean(log: Log, name: str) -> str:
    return f"{log.course(name, 1).mean[0]:.1%}"


def _axis(axes: Any, label: str) -> None:
    axes.set_xlabel("update")
    axes.set_ylabel(label)


def _plot(axes: Any, line: Course, name: str, colour: str, marker: str = "") -> None:
    """The means of the stretches, and a band from the lowest to the highest."""
    marker = marker or "o" * (len(line.steps) == 1)
    look = {"color": colour, "marker": marker, "markersize": 3.5, "linewidth": 1.3}
    axes.plot(line.steps, line.mean, label=name, **look)
    axes.set_xlim(left=0)
    axes.fill_between(line.steps, line.low, line.high, color=colour, alpha=0.2, linewidth=0)


def _loss(train: Course, valid: Course, lines: Mapping[str, float], begin: float, axes: Any) -> str:
    """Both losses from a share of the run on, with the reference lines that are in reach."""
    first = begin * train.steps[-1]
    shown = [line.mean[line.steps >= first] for line in (train, valid)]
    # What rises far above the beginning, as a run that diverges, leaves the figure.
    values = np.minimum(np.concatenate(shown), 2 * max(train.mean[0], *lines.values(), 1))
    reach = (0.2 if begin else np.inf) * (np.ptp(values) or 1)
    near = {k: y for k, y in lines.items() if values.min() - reach <= y <= values.max() + reach}
    values = np.append(values, list(near.values()))
    margin = 0.1 * (np.ptp(values) or 1)
    axes.set_ylim(values.min() - margin, values.max() + margin)
    _plot(axes, train, "train", _TRAIN)
    words = f"train ends at {train.mean[-1]:.3f}"
    if valid:
        _plot(axes, valid, "valid", _SECOND, "o" * (len(valid.steps) < 40))
        words += f", valid at {valid.mean[-1]:.3f}"
    axes.set_xlim(first, train.steps[-1] * 1.01 + 1)
    _name_lines(axes, near, final=shown[0][-1])
    _axis(axes, "nats per token")
    return words + "".join(f"; {name} {nats:.3f}" for name, nats in lines.items())


def _name_lines(axes: Any, lines: Mapping[str, float], final: float) -> None:
    """Draw the reference lines; those that lie close together share one label.

    A loss falls from the upper left, so what is above its end is named at the right and what is
    below at the left.
    """
    bottom, top = axes.get_ylim()
    groups: list[list[tuple[str, float]]] = []
    for name, nats in sorted(lines.items(), key=lambda item: -item[1]):
        axes.axhline(nats, linewidth=0.8, zorder=1, label="reference lines", **_LINE)
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


def _beside(axes: Any, share: Course, name: str, label: str, most: float) -> None:
    """A share of the updates or of the time, shaded, with its axis at the right."""
    from matplotlib.ticker import PercentFormatter

    left, bottom, width, height = axes.get_position().bounds
    axes.set_position((left, bottom, width - 0.12, height))
    right = axes.twinx()
    right.grid(visible=False)
    look: dict[str, Any] = {"color": _SECOND, "alpha": 0.25, "linewidth": 0}
    right.fill_between(share.steps, share.mean, label=name, **look)
    right.set_ylim(0, most)
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    right.set_ylabel(label)
    right.set_zorder(0)
    axes.set_zorder(1)
    axes.patch.set_visible(False)


def _gradient(norm: Course, clipped: Course, clip: float, axes: Any) -> str:
    _plot(axes, norm, "gradient norm", _TRAIN)
    axes.set_ylim(0, 1.15 * max(norm.mean.max(), clip))
    axes.yaxis.set_major_formatter("{x:.3g}")
    _axis(axes, "norm")
    if clip:
        axes.axhline(clip, linewidth=1, label="clip threshold", **_LINE)
        _beside(axes, clipped, "updates clipped", "updates clipped", 1)
    return f"ends at {norm.mean[-1]:.3f}; clip threshold {clip:g}"


def _rate(rates: Course, axes: Any) -> str:
    _plot(axes, rates, "learning rate", _TRAIN)
    axes.set_ylim(0, 1.1 * rates.high.max() or 1)
    axes.yaxis.set_major_formatter("{x:.2g}")
    axes.set_xlabel("update")
    return f"highest {rates.high.max():.3g}, now {rates.mean[-1]:.3g}"


def _speed(speed: Course, wait: Course, axes: Any) -> str:
    from matplotlib.ticker import EngFormatter

    _plot(axes, speed, "tokens per second", _TRAIN)
    axes.set_ylim(0, 1.15 * speed.mean.max())
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    _axis(axes, "tokens per second")
    most = max(0.05, 1.2 * wait.mean.max())
    _beside(axes, wait, "waiting for data", "time waiting for data", most)
    return f"median {np.median(speed.mean):,.0f} tokens per second"


def _by_layer(layers: Mapping[str, Course], axes: Any) -> str:
    from matplotlib.ticker import LogLocator, NullLocator

    for (layer, line), colour in zip(layers.items(), page.COLOURS, strict=False):
        axes.plot(line.steps, line.mean, color=colour, linewidth=1.0, label=layer)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    _axis(axes, "norm")
    return "; ".join(f"{name} ends at {x.mean[-1]:.3g}" for name, x in layers.items())
