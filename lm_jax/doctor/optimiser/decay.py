"""Checks of weight decay and of averaged weights."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lm_jax.doctor import trees
from lm_jax.doctor.checks import check, fixture
from lm_jax.doctor.facts import Skip
from lm_jax.doctor.findings import Measure, at_most, holds, none, note
from lm_jax.doctor.numbers import FLOAT32_EPS
from lm_jax.doctor.optimiser.subject import UPDATES, Point, Subject


class Shrunk(NamedTuple):
    """How a leaf changed without a gradient."""

    log: float  # of the factor; 0 if no bit has changed
    rest: float  # what moved otherwise, as a share
    eps: float
    leaf: np.ndarray


@fixture
def shrunk(still: list[Point]) -> dict[str, Shrunk]:
    """How every floating leaf changed over the updates without a gradient."""
    rows = {}
    for name, leaf in still[0].params.items():
        if not (trees.is_floating(leaf.dtype) and leaf.any()):
            continue
        end = still[-1].params[name]
        a, b = (x.astype(np.float64).ravel() for x in (leaf, end))
        factor = 1.0 if trees.same(leaf, end) else (a @ b) / (a @ a)
        rest = float(np.linalg.norm(b - factor * a) / np.linalg.norm(a))
        log = float(np.log(factor)) if factor > 0 else -np.inf
        rows[name] = Shrunk(log, rest, float(jnp.finfo(leaf.dtype).eps), leaf)
    return rows


@check(
    "Mask the decay, so that it reaches the matrices only (optax.adamw decays every leaf), and "
    "apply it beside the update, params -= lr * weight_decay * params, to float32 parameters."
)
def decay(
    subject: Subject, shrunk: dict[str, Shrunk], first_rates: list[float] | None = None
) -> list[Measure]:
    """Without gradients leaves declared to decay shrink as they should, and no other one moves."""
    coupled = [name for name, x in shrunk.items() if not x.rest <= UPDATES * x.eps]
    due = {name: x for name, x in shrunk.items() if x.leaf.ndim >= 2 and x.log != 0}
    if subject.decayed is not None:
        declared = trees.named(subject.decayed)
        due = {name: x for name, x in shrunk.items() if declared.get(name)}
    undue = [n for n, x in shrunk.items() if x.log != 0 and n not in coupled and n not in due]
    other = "leaves that move other than by shrinking, with zero gradients"
    found = [
        none(other, coupled, key="coupled"),
        none("leaves that shrink though not declared to", undue, key="wrong"),
    ]
    if first_rates is None or subject.weight_decay is None:
        missing = [name for name, x in due.items() if x.log == 0 and subject.weight_decay != 0]
        return [*found, none("leaves declared to shrink that do not", missing, key="amount")]
    decays = subject.weight_decay * np.array(first_rates)
    if small := [x for x in decays if 0 < x < 4 * FLOAT32_EPS]:
        lost = f"a decay of {small[0]:.1g} is lost in float32"
        return [*found, note(f"{lost}: let init_fn start past the warm-up and name first_update")]
    expected = float(np.log1p(-decays).sum())
    amounts = {}
    for name, x in due.items():
        # Each update rounds every element to half an eps, independently: 6 SE of the projection;
        # float32 arithmetic of the schedule: 1e-4 of the decay itself.
        allowed = 3 * x.eps * (UPDATES / x.leaf.size) ** 0.5 + 1e-4 * abs(expected)
        if x.log == 0 != expected or not abs(x.log - expected) <= allowed:
            by = f"by {np.exp(x.log):.8f}" if x.log else "not at all"
            amounts[name] = f"{name} {by}, in {x.leaf.dtype}"
    where = next(iter(amounts.values()), "")
    what = f"leaves that do not shrink by {np.exp(expected):.8f}, the product of (1 - lr decay)"
    return [*found, none(what, amounts, where=where, key="amount")]


@check("Warm the decay up, min(decay, (1 + t) / (10 + t)), or divide by 1 - decay^t.")
def ema(subject: Subject, ema_of: Any, good: list[Point]) -> list[Measure]:
    """The average's weights sum to 1, and the start has next to none at the first evaluation."""
    totals, shares = zip(*(_weights(good[: t + 1]) for t in range(1, len(good))), strict=True)
    ratio = float(np.clip(shares[-1] / shares[-2], 0, 1)) if shares[-2] > 0 else 0.0
    left = max(shares[-1], 0.0) * ratio ** max(0, subject.first_eval - UPDATES)
    unit = abs(totals[-1] - 1) <= 1e-3  # the average of constants is their value
    first = f"the start's weight at update {subject.first_eval}, the first evaluation"
    return [
        holds(unit, "sum of the average's weights", totals[-1], limit="expected 1", key="total"),
        at_most(first, left, 0.01, key="left"),
    ]


def _weights(points: list[Point]) -> tuple[float, float]:
    """Sum of the weights in the last average, and the start's weight.

    Least squares of the average in the parameters so far, written as the start and the moves.
    """
    y, *visited = map(trees.flat, (points[-1].average, *(point.params for point in points)))
    if not np.isfinite([y, *visited]).all():
        raise Skip("Parameters or their average are not finite.")
    X = np.stack([visited[0], *np.diff(visited, axis=0)], axis=1)
    scale = np.maximum(np.linalg.norm(X, axis=0), 1e-300)
    X = X / scale
    solution, _, rank, _ = np.linalg.lstsq(X, y, rcond=None)
    error = np.inf
    if rank == X.shape[1]:
        variance = np.square(y - X @ solution).sum() / max(1, len(y) - rank)
        error = (variance * np.linalg.inv(X.T @ X)[1, 1]) ** 0.5 / scale[1]
    if not error < 0.05:
        raise Skip(f"The parameters moved too little to tell the average's weights ({error:.2g}).")
    total, rest = solution[:2] / scale[:2]
    return float(total), float(total - rest)
