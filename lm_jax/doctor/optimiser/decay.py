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

    log: float  # of the factor
    rest: float  # what moved otherwise, as a share
    eps: float
    moved: bool
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
        factor = (a @ b) / (a @ a)
        rest = float(np.linalg.norm(b - factor * a) / np.linalg.norm(a))
        log = float(np.log(factor)) if factor > 0 else -np.inf
        eps = float(jnp.finfo(leaf.dtype).eps)
        rows[name] = Shrunk(log, rest, eps, not trees.same(leaf, end), leaf)
    return rows


@fixture
def declared(subject: Subject) -> dict[str, bool] | None:
    """The leaves that are said to decay."""
    if subject.decayed is None:
        return None
    return {name: bool(x) for name, x in trees.named(subject.decayed).items()}


def _resolved(subject: Subject, rates: list[float]) -> list[float]:
    """Relative decay of each update; `Skip` if float32 rounds it away whatever the loop does."""
    decay = [rate * (subject.weight_decay or 0.0) for rate in rates]
    if subject.weight_decay and min(decay) < 4 * FLOAT32_EPS:
        raise Skip(
            f"Learning rate times decay is {min(decay):.1g} at update {subject.first_update}, "
            "which float32 rounds away: let init_fn start past the warm-up and name first_update."
        )
    return decay


@check(
    "Mask the decay by leaf name, so that it reaches the matrices only; optax.adamw decays every "
    "leaf unless it is given a mask."
)
def decay_mask(
    subject: Subject,
    shrunk: Leaves,
    declared: dict[str, bool] | None,
    first_rates: list[float] | None = None,
) -> list[Measure]:
    """With zero gradients the leaves declared to decay shrink and no other one moves."""
    coupled = {name: x.rest for name, x in shrunk.items() if not x.rest <= UPDATES * x.eps}
    shrink = [name for name, x in shrunk.items() if x.moved and name not in coupled]
    missing: list[str] = []
    if declared is None:
        wrong = [name for name in shrink if shrunk[name].leaf.ndim < 2]
        judged = "leaves of fewer than two axes that shrink, none being declared"
    else:
        wrong = [name for name in shrink if not declared.get(name)]
        judged = "leaves that shrink though declared not to"
        if subject.weight_decay != 0:
            missing = [name for name, x in shrunk.items() if declared.get(name) and not x.moved]
    if missing and not (wrong or coupled) and first_rates and subject.weight_decay is not None:
        _resolved(subject, first_rates)
    size = f"by {max(coupled.values(), default=0):.1e} of their size"
    other = "leaves that move other than by shrinking, with zero gradients"
    return [
        none(other, coupled, of=len(shrunk), where=size, key="coupled"),
        none(judged, wrong, key="wrong"),
        none("leaves declared to shrink that do not", missing, key="missing"),
        note(f"leaves that shrink: {len(shrink)} of {len(shrunk)}", shrink, key="shrink"),
    ]


@check(
    "Keep the parameters in float32 and apply the decay as params -= lr * weight_decay * params "
    "beside the update, not through the gradient."
)
def decay_amount(
    subject: Subject,
    weight_decay: float,
    first_rates: list[float],
    shrunk: Leaves,
    declared: dict[str, bool] | None,
) -> list[Measure]:
    """With zero gradients what decays shrinks by the product of (1 - lr weight_decay)."""
    expected = float(np.log1p(np.negative(_resolved(subject, first_rates))).sum())
    if declared is None:
        declared = {name: x.leaf.ndim >= 2 and x.log != 0 for name, x in shrunk.items()}
    judged = {name: x for name, x in shrunk.items() if declared.get(name)}
    if not judged:
        raise Skip("No leaf decays.")
    wrong, where = [], ""
    for name, x in judged.items():
        # Each update rounds every element to half an eps, independently: 6 SE of the projection;
        # float32 arithmetic of the schedule: 1e-4 of the decay itself.
        allowed = 3 * x.eps * (UPDATES / x.leaf.size) ** 0.5 + 1e-4 * abs(expected)
        lost = expected != 0 and x.log == 0
        if lost or not abs(x.log - expected) <= allowed:
            wrong.append(name)
            why = f", since that is below its dtype's steps ({x.leaf.dtype})" if lost else ""
            where = where or f"{name} by {np.exp(x.log):.8f}{why}"
    factor = float(np.exp(expected))
    what = f"leaves that do not shrink by {factor:.8f}, the product of (1 - lr weight_decay)"
    return [
        none(what, wrong, of=len(judged), where=where, key="wrong"),
        note("expected factor", factor, key="expected"),
    ]


@check(
    "Warm the decay up, min(decay, (1 + t) / (10 + t)), or start from zero and divide by "
    "1 - decay^t."
)
def ema(subject: Subject, ema_of: Any, good: list[Point]) -> list[Measure]:
    """The average's weights sum to 1, and the start has next to none at the first evaluation."""
    totals, shares = zip(*(_weights(good[: t + 1]) for t in range(1, len(good))), strict=True)
    # Of constants the average must be that constant.
    constant = abs(totals[-1] - 1) <= 1e-3
    ratio = float(np.clip(shares[-1] / shares[-2], 0, 1)) if shares[-2] > 0 else 0.0
    left = max(shares[-1], 0.0) * ratio ** max(0, subject.first_eval - UPDATES)
    what = f"sum of the average's weights after {UPDATES} updates"
    first = f"the start's weight at update {subject.first_eval}, the first evaluation"
    return [
        holds(constant, what, totals[-1], limit="expected 1", key="total"),
        note("weight of the start then", shares[-1], key="share"),
        at_most(first, left, 0.01, key="left"),
    ]


def _weights(points: list[Point]) -> tuple[float, float]:
    """Sum of the weights in the last average, and the start's weight.

    Least squares of the average in the parameters so far, written as the start and the moves.
    """
    average = points[-1].average
    every = max(1, sum(x.size for x in average.values()) // _SAMPLE)
    y, *visited = (
        trees.flat({name: x.ravel()[::every] for name, x in arrays.items()})
        for arrays in (average, *(point.params for point in points))
    )
    if not np.isfinite([y, *visited]).all():
        raise Skip("Parameters or their average are not finite.")
    X = np.stack([visited[0], *np.diff(visited, axis=0)], axis=1)
    scale = np.linalg.norm(X, axis=0)
    X = X / np.maximum(scale, 1e-300)
    solution, _, rank, _ = np.linalg.lstsq(X, y, rcond=None)
    error = np.inf
    if rank == X.shape[1]:
        residual = y - X @ solution
        variance = residual @ residual / max(1, len(y) - len(solution))
        error = (variance * np.linalg.inv(X.T @ X)[1, 1]) ** 0.5 / scale[1]
    if not error < 0.05:
        raise Skip(f"The parameters moved too little to tell the average's weights ({error:.2g}).")
    total, rest = solution[:2] / scale[:2]
    return float(total), float(total - rest)
