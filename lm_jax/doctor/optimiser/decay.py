"""Checks of weight decay and of averaged weights."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lm_jax.doctor import trees
from lm_jax.doctor.checks import check, fixture
from lm_jax.doctor.facts import Skip
from lm_jax.doctor.findings import Measure, at_most, holds, none, note
from lm_jax.doctor.numbers import FLOAT32_EPS
from lm_jax.doctor.optimiser.loop import Point
from lm_jax.doctor.optimiser.subject import UPDATES, Subject

_SAMPLE = 1_000_000  # elements that tell the weights of an average


class Shrunk(NamedTuple):
    """How a leaf changed without a gradient."""

    log: float  # of the factor; 0 if no bit has changed
    rest: float  # what moved otherwise, as a share
    eps: float
    leaf: np.ndarray


Leaves = dict[str, Shrunk]


@fixture
def shrunk(still: list[Point]) -> Leaves:
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


@fixture
def declared(shrunk: Leaves, decayed: Any = None) -> dict[str, bool]:
    """The leaves that are said to decay; if none are, any but vectors and scalars may."""
    if decayed is None:
        return {name: x.leaf.ndim >= 2 and x.log != 0 for name, x in shrunk.items()}
    return {name: bool(x) for name, x in trees.named(decayed).items()}


@fixture
def decays(weight_decay: float, first_rates: list[float]) -> list[float]:
    """Relative decay that is due at each update."""
    return [rate * weight_decay for rate in first_rates]


@check(
    "Mask the decay by leaf name, so that it reaches the matrices only: optax.adamw decays every "
    "leaf unless it is given a mask. Apply it as params -= lr * weight_decay * params to float32 "
    "parameters, beside the update and not through the gradient."
)
def decay(
    subject: Subject, shrunk: Leaves, declared: dict[str, bool], decays: list[float] | None = None
) -> list[Measure]:
    """Without gradients leaves declared to decay shrink as they should, and no other one moves."""
    coupled = {name: x.rest for name, x in shrunk.items() if not x.rest <= UPDATES * x.eps}
    shrink = [name for name, x in shrunk.items() if x.log != 0 and name not in coupled]
    due = {name: x for name, x in shrunk.items() if declared.get(name)}
    size = f"by {max(coupled.values(), default=0):.1e} of their size"
    other = "leaves that move other than by shrinking, with zero gradients"
    undue = [name for name in shrink if name not in due]
    found = [
        none(other, coupled, of=len(shrunk), where=size, key="coupled"),
        none("leaves that shrink though not declared to", undue, key="wrong"),
    ]
    if decays is None:
        missing = [name for name, x in due.items() if x.log == 0 and subject.weight_decay != 0]
        return [*found, none("leaves declared to shrink that do not", missing, key="amount")]
    if small := [x for x in decays if 0 < x < 4 * FLOAT32_EPS]:
        lost = f"a decay of {small[0]:.1g} at update {subject.first_update} is lost in float32"
        return [*found, note(f"{lost}: let init_fn start past the warm-up and name first_update")]
    expected = float(np.log1p(np.negative(decays)).sum())
    amounts = {}
    for name, x in due.items():
        # Each update rounds every element to half an eps, independently: 6 SE of the projection;
        # float32 arithmetic of the schedule: 1e-4 of the decay itself.
        allowed = 3 * x.eps * (UPDATES / x.leaf.size) ** 0.5 + 1e-4 * abs(expected)
        if x.log == 0 != expected:
            amounts[name] = f"{name} not at all, in {x.leaf.dtype}"
        elif not abs(x.log - expected) <= allowed:
            amounts[name] = f"{name} by {np.exp(x.log):.8f}"
    where = next(iter(amounts.values()), "")
    what = f"leaves that do not shrink by {np.exp(expected):.8f}, the product of (1 - lr decay)"
    return [*found, none(what, amounts, of=len(due), where=where, key="amount")]


@check(
    "Warm the decay up, min(decay, (1 + t) / (10 + t)), or start from zero and divide by "
    "1 - decay^t."
)
def ema(subject: Subject, ema_of: Any, good: list[Point]) -> list[Measure]:
    """The average's weights sum to 1, and the start has next to none at the first evaluation."""
    totals, shares = zip(*(_weights(good[: t + 1]) for t in range(1, len(good))), strict=True)
    ratio = float(np.clip(shares[-1] / shares[-2], 0, 1)) if shares[-2] > 0 else 0.0
    left = max(shares[-1], 0.0) * ratio ** max(0, subject.first_eval - UPDATES)
    what = f"sum of the average's weights after {UPDATES} updates"
    total, unit = totals[-1], abs(totals[-1] - 1) <= 1e-3  # the average of constants is their value
    first = f"the start's weight at update {subject.first_eval}, the first evaluation"
    return [
        holds(unit, what, total, limit="expected 1", key="total"),
        at_most(first, left, 0.01, key="left"),
    ]


def _weights(points: list[Point]) -> tuple[float, float]:
    """Sum of the weights in the last average, and the start's weight.

    Least squares of the average in the parameters so far, written as the start and the moves.
    """
    averaged = points[-1].average
    every = max(1, sum(x.size for x in averaged.values()) // _SAMPLE)
    trail = [averaged, *(point.params for point in points)]
    y, *visited = (trees.flat({n: x.ravel()[::every] for n, x in at.items()}) for at in trail)
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
