"""Checks of what changes over a run: learning rate, weight decay, averaged weights."""

import jax.numpy as jnp
import numpy as np

from lm_jax.doctor.old import Skip, Status, Verdict, check, verdict
from lm_jax.doctor.optimiser.subject import (
    FLOAT32_EPS,
    UPDATES,
    Given,
    Point,
    flat,
    is_floating,
    listed,
    named,
    same,
)

_SAMPLE = 1_000_000  # elements that tell the weights of an average


@check(
    "optimiser.first_lr",
    remedy="Give update i of the warm-up (i + 1) / warmup of the peak, so that update 0 is not "
    "lost.",
)
def first_lr(given: Given) -> Verdict:
    """The first update has a learning rate above 0."""
    given.need("learning_rate")
    lr = given.lr(0)
    return verdict(lr > 0, f"The first update has learning rate {lr:.3g}.", lr=lr)


@check(
    "optimiser.last_lr",
    remedy="Size the schedule in updates, not in micro-batches, and step it once per update.",
)
def last_lr(given: Given) -> Verdict:
    """The last update has the declared learning rate, and it was not reached long before."""
    given.need("learning_rate", "steps", "end_lr")
    at, lrs = _schedule(given)
    end, last, peak = float(given.end_lr), lrs[-1], lrs.max()
    # One update's change beside 5 %: schedules differ on whether the end is reached at the last
    # update or would be at the one after it.
    limit = 0.05 * end + (abs(last - lrs[-2]) if len(lrs) > 1 else 0.0) + 1e-6 * peak
    off = not abs(last - end) <= limit
    above = at[np.abs(lrs - end) > limit]
    idle = 1 - (above[-1] + 1) / given.steps if len(above) else 0.0
    evidence = (
        f"Update {given.steps - 1}, the last, has learning rate {last:.3g}, {last / peak:.2f} of "
        f"the peak, declared is {end:.3g} (limit of the difference {limit:.1g})."
    )
    early = idle > 0.2
    if early:
        evidence += f" The end is reached with {idle:.0%} of the run to go."
    # At 0 nothing is learned from there on; a floor above 0 may be meant.
    otherwise: Status = "fail" if off or end == 0 else "warn"
    return verdict(
        not (off or early), evidence, otherwise=otherwise, last=last, declared=end, idle=idle
    )


@check(
    "optimiser.warmup",
    remedy="Shorten the warm-up, or count it in the same unit as the run, so that the peak comes "
    "within its first fifth.",
)
def warmup(given: Given) -> Verdict:
    """The learning rate peaks within the first fifth of the run."""
    at, lrs = _schedule(given)
    peak = int(at[np.argmax(lrs >= lrs.max() * (1 - 1e-6))])
    share = peak / given.steps
    rising = given.steps > 2 and peak == at[-1]
    evidence = f"The learning rate peaks at update {peak} of {given.steps}, {share:.0%} of the run"
    evidence += ": it is still rising at the end." if rising else " (a fifth is usual at most)."
    return verdict(share <= 0.2, evidence, otherwise="fail" if rising else "warn", peak=peak)


@check(
    "optimiser.executed_lr",
    remedy="Feed the schedule the counter of updates, the same that the run's length is given in.",
)
def executed_lr(given: Given) -> Verdict:
    """The logged learning rates are the schedule's at the updates made."""
    given.need("learning_rate")
    logged = given.logged("optim/lr")
    planned = given.first_lrs()
    ok = np.allclose(logged, planned, rtol=1e-4, atol=0)
    evidence = (
        f"The first {UPDATES} updates logged learning rates {_numbers(logged)}, the schedule has "
        f"{_numbers(planned)} (relative limit 1e-4)."
    )
    return verdict(bool(ok), evidence, logged=logged, planned=planned)


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def _schedule(given: Given) -> tuple[np.ndarray, np.ndarray]:
    """About 200 updates of the run, the last two among them, and their learning rates."""
    given.need("learning_rate", "steps")
    at = np.linspace(0, given.steps - 1, 200).astype(int)
    at = np.unique(np.append(at, max(0, given.steps - 2)))
    lrs = np.array([given.lr(int(i)) for i in at])
    if not np.isfinite(lrs).all():
        raise Skip(f"learning_rate({at[~np.isfinite(lrs)][0]}) is not finite.")
    return at, lrs


@check(
    "optimiser.decay_mask",
    remedy="Mask the decay by leaf name, so that it reaches the matrices only; optax.adamw decays "
    "every leaf unless it is given a mask.",
)
def decay_mask(given: Given) -> Verdict:
    """With zero gradients the leaves declared to decay shrink and no other one moves."""
    start, *_, end = given.loop.still
    moved = {}
    for name, (log, rest, _) in _shrinkage(start, end).items():
        moved[name] = not same(start.params[name], end.params[name])
        if not rest <= UPDATES * float(jnp.finfo(start.params[name].dtype).eps):
            evidence = f"With zero gradients {name} moves other than by shrinking ({rest:.1e})."
            return verdict(False, evidence, leaf=name, rest=rest, log_factor=log)
    declared = _declared(given)
    if declared is None:
        wrong = [n for n, x in moved.items() if x and end.params[n].ndim < 2]
        missing = []
    else:
        wrong = [n for n, x in moved.items() if x and not declared.get(n, False)]
        expected = given.weight_decay != 0
        missing = [n for n, x in moved.items() if expected and declared.get(n) and not x]
    if missing and not wrong:
        _resolved(given)
    count = sum(moved.values())
    evidence = f"With zero gradients {count} of {len(moved)} leaves shrink"
    evidence += f"; not to decay but do: {listed(wrong)}" if wrong else ""
    evidence += f"; to decay but do not: {listed(missing)}" if missing else ""
    evidence += "." if declared else "; none was declared, so only those of one axis are judged."
    shrink = [name for name, x in moved.items() if x]
    return verdict(not (wrong or missing), evidence, wrong=wrong, missing=missing, shrink=shrink)


def _declared(given: Given) -> dict[str, bool] | None:
    if given.decayed is None:
        return None
    return {name: bool(x) for name, x in named(given.decayed).items()}


def _shrinkage(start: Point, end: Point) -> dict[str, tuple[float, float, float]]:
    """Per floating leaf: ln of the factor it shrank by, what moved otherwise, and the noise.

    Each update rounds every element to within half an eps of its dtype, in directions that are
    independent from element to element: 6 SE of the projection and of one element's path.
    """
    rows = {}
    for name, leaf in start.params.items():
        if not (is_floating(leaf) and leaf.size):
            continue
        a, b = (x.astype(np.float64).ravel() for x in (leaf, end.params[name]))
        factor = (a @ b) / (a @ a)
        rest = np.linalg.norm(b - factor * a) / np.linalg.norm(a)
        eps = float(jnp.finfo(leaf.dtype).eps)
        noise = 6 * eps / 2 * np.sqrt(UPDATES / a.size)
        rows[name] = (float(np.log(factor)) if factor > 0 else -np.inf, float(rest), float(noise))
    return rows


def _resolved(given: Given) -> float | None:
    """Relative decay of the first updates, where learning rate and decay are given.

    Raises:
        Skip: if float32 rounds it away whatever the loop does.
    """
    if given.learning_rate is None or given.weight_decay is None:
        return None
    each = [lr * given.weight_decay for lr in given.first_lrs()]
    if given.weight_decay and min(each) < 4 * FLOAT32_EPS:
        raise Skip(
            f"Learning rate times decay is {min(each):.1g} at update {given.first_update}, below "
            f"what float32 resolves: let init_fn start past the warm-up and name first_update."
        )
    return float(np.log1p(-np.array(each)).sum())


@check(
    "optimiser.decay_amount",
    remedy="Keep the parameters in float32 and apply the decay as params -= lr * weight_decay * "
    "params beside the update, not through the gradient.",
)
def decay_amount(given: Given) -> Verdict:
    """With zero gradients what decays shrinks by the product of (1 - lr weight_decay)."""
    given.need("learning_rate", "weight_decay")
    expected = _resolved(given)
    assert expected is not None
    start, *_, end = given.loop.still
    rows = _shrinkage(start, end)
    declared = _declared(given)
    if declared is None:
        declared = {n: end.params[n].ndim >= 2 and log != 0 for n, (log, _, _) in rows.items()}
    judged = {name: row for name, row in rows.items() if declared.get(name)}
    if not judged:
        raise Skip("No leaf decays.")
    wrong = {}
    for name, (log, _, noise) in judged.items():
        # float32 arithmetic of the schedule: 1e-4 of the decay itself.
        lost = expected != 0 and log == 0
        if lost or not abs(log - expected) <= noise + 1e-4 * abs(expected):
            wrong[name] = log
    evidence = (
        f"Over {UPDATES} updates with zero gradients {len(judged) - len(wrong)} of {len(judged)} "
        f"leaves shrink by the factor {np.exp(expected):.8f} of (1 - lr decay)"
    )
    if wrong:
        name, log = next(iter(wrong.items()))
        evidence += f"; {name} ({end.params[name].dtype}) by {np.exp(log):.8f}"
        evidence += " although that is below its dtype's steps" if log == 0 else ""
    return verdict(not wrong, evidence + ".", log_factors=wrong, expected=expected)


@check(
    "optimiser.ema",
    remedy="Warm the decay up, min(decay, (1 + t) / (10 + t)), or start from zero and divide by "
    "1 - decay^t.",
)
def ema(given: Given) -> Verdict:
    """The average's weights sum to 1, and the start has next to none at the first evaluation."""
    given.need("ema_of")
    points = given.loop.good[:: given.calls_per_update]
    shares = []
    for t in range(1, len(points)):
        total, share, error = _weights(points[: t + 1])
        if not error < 0.05:
            raise Skip(
                f"The parameters moved too little to tell the average's weights ({error:.2g})."
            )
        shares.append(share)
    # Of constants the average must be that constant.
    constant = abs(total - 1) <= 1e-3
    ratio = float(np.clip(shares[-1] / shares[-2], 0, 1)) if shares[-2] > 0 else 0.0
    left = max(shares[-1], 0.0) * ratio ** max(0, given.first_eval - UPDATES)
    evidence = (
        f"After {UPDATES} updates the average gives the start a weight of {shares[-1]:.4f} and all "
        f"points {total:.4f} together (1 is due); at update {given.first_eval}, the first "
        f"evaluation, the start keeps {left:.2g} (limit 0.01)."
    )
    return verdict(constant and left <= 0.01, evidence, total=total, shares=shares, left=left)


def _weights(points: list[Point]) -> tuple[float, float, float]:
    """Sum of the weights in the last average, the start's weight, and its standard error.

    Least squares of the average in the parameters so far, written as the start and the moves.
    """
    average = points[-1].average
    assert average is not None
    every = max(1, sum(x.size for x in average.values()) // _SAMPLE)
    y, *visited = (
        flat({name: x.ravel()[::every] for name, x in arrays.items()})
        for arrays in (average, *(point.params for point in points))
    )
    if not np.isfinite([y, *visited]).all():
        raise Skip("Parameters or their average are not finite.")
    X = np.stack([visited[0], *np.diff(visited, axis=0)], axis=1)
    scale = np.linalg.norm(X, axis=0)
    if not scale.all():
        return np.nan, np.nan, np.inf
    X = X / scale
    solution, _, rank, _ = np.linalg.lstsq(X, y, rcond=None)
    if rank < X.shape[1]:
        return np.nan, np.nan, np.inf
    residual = y - X @ solution
    variance = residual @ residual / max(1, len(y) - len(solution))
    errors = np.sqrt(variance * np.diag(np.linalg.inv(X.T @ X))) / scale
    weights = solution / scale
    return float(weights[0]), float(weights[0] - weights[1]), float(errors[1])


CHECKS = (first_lr, last_lr, warmup, executed_lr, decay_mask, decay_amount, ema)
