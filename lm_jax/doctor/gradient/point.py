"""A gradient at the given parameters: against central differences, and against itself."""

from collections.abc import Iterator

import numpy as np

from lm_jax.doctor import trees
from lm_jax.doctor.checks import check
from lm_jax.doctor.findings import Measure, at_most, equals, holds, none, note
from lm_jax.doctor.gradient.differences import STEPS
from lm_jax.doctor.gradient.subject import Comparison, Point, Subject

COORDINATES = 12  # of each leaf


@check("Make arguments of divisions, logs, roots and look-ups safe beforehand.", gate=True)
def finite(point: Point) -> list[Measure]:
    """The loss is a finite scalar and so is every entry of its gradient."""
    loss, places = point.centre, {n: np.argwhere(~np.isfinite(x)) for n, x in point.grads.items()}
    bad = {name: found[0].tolist() for name, found in places.items() if len(found)}
    where = next((f"first {name}{place}" for name, place in bad.items()), "")
    what = "leaves whose gradient is not finite"
    return [
        holds(bool(np.isfinite(loss)), "loss", loss),
        none(what, bad, of=len(places), where=where, key="not_finite"),
    ]


@check("Zero every buffer and write all of it; keep nothing from earlier calls; fix the key.")
def repeated(subject: Subject, point: Point) -> list[Measure]:
    """The same parameters give the same bits, also after other parameters were differentiated."""
    losses = [subject.value(point.leaves, as_given=True)]
    first = subject.gradient(point.leaves)
    changed: set[str] = set()
    for scale in (1.1, 0.7):
        subject.gradient({name: scale * leaf for name, leaf in point.leaves.items()})
        junk = [np.full(leaf.shape, 1e30) for leaf in [*point.leaves.values()] * 2]
        del junk  # free memory, which new buffers of these sizes are likely to get
        again = subject.gradient(point.leaves)
        losses.append(subject.value(point.leaves, as_given=True))
        changed |= {n for n, x in first.items() if not np.array_equal(x, again[n], equal_nan=True)}
    return [
        equals("largest difference of three losses", np.ptp(losses), 0, key="loss"),
        none("leaves whose gradients differ", sorted(changed), of=len(first), key="changed"),
    ]


@check("Let the loss keep float64; in float32 trust no steps much below 1e-2.")
def precision(point: Point) -> list[Measure]:
    """Rounding of the loss leaves differences of a float64 function enough to decide."""
    c = max(point.sweeps, key=lambda c: c.bound)
    errors = np.abs(c.slope.values - c.given) / c.scale
    curve = ", ".join(f"{step:.0e}: {x:.1e}" for step, x in zip(STEPS, errors, strict=True))
    what, share = "rounding of the loss, of its value", point.relative_noise
    return [
        at_most(what, share, 1e-12, otherwise="warn", key="relative_noise"),
        note(f"relative error by step: {curve}", errors.tolist(), key="errors"),
        note("best step", c.slope.step, key="best_step"),
        note("there differences decide down to", c.bound, key="attainable"),
    ]


@check("Check hand-written backward passes and what they saved; gradient.leaves names the leaf.")
def directional(point: Point) -> list[Measure]:
    """Derivatives along random directions in all parameters are right."""
    return point.judged(point.sweeps, "random directions")


@check("Check the backward pass of what the named leaf feeds, and that no stop_gradient cuts it.")
def leaves(point: Point) -> list[Measure]:
    """Derivatives inside each leaf, along a random direction and the gradient, are right."""
    found = []
    for i, (name, leaf) in enumerate(point.leaves.items()):
        found.append(point.compare(name, point.random(100 + i, {name: np.ones(leaf.shape)})))
        if leaf.size > 1 and (length := trees.norm([point.grads[name]])):
            # The signal is largest along the gradient.
            steepest = {name: point.grads[name] / length}
            found.append(point.compare(f"{name}, steepest", steepest))
    return point.judged(found, f"directions in {len(point.leaves)} leaves")


def _sample(point: Point, leaf: str, candidates: np.ndarray) -> Iterator[Comparison]:
    """Coordinates of a leaf: some of the candidates, the first and the last among them."""
    if len(candidates) > COORDINATES:
        rng = point.subject.rng(list(point.leaves).index(leaf), 7)
        inner = rng.choice(candidates[1:-1], COORDINATES - 2, replace=False)
        candidates = np.sort(np.concatenate([candidates[[0, -1]], inner]))
    for index in candidates:
        unit = np.zeros(point.leaves[leaf].shape)
        unit.flat[index] = 1.0
        place = ",".join(str(i) for i in np.unravel_index(index, unit.shape))
        yield point.compare(f"{leaf}[{place}]" if place else leaf, {leaf: unit})


@check("Write all of the gradient's buffer, the last block and every row, at that index as well.")
def coordinates(point: Point) -> list[Measure]:
    """Derivatives by single coordinates, and by all whose gradient is 0, are right."""
    found: list[Comparison] = []
    for i, (name, grad) in enumerate(point.grads.items()):
        found += _sample(point, name, np.arange(grad.size))
        zeros = np.flatnonzero(grad == 0)
        if 0 < len(zeros) < grad.size:
            direction = point.random(200 + i, {name: (grad == 0).astype(np.float64)})
            found.append(point.compare(f"the {len(zeros)} zeros of {name}", direction))
            found += _sample(point, name, zeros) if found[-1].wrong else ()
    return point.judged(found, f"coordinates of {len(point.leaves)} leaves")


@check("Connect the parameter to the loss, drop it, or declare it with unused=.")
def zero_leaves(subject: Subject, point: Point) -> Measure:
    """Every leaf has a gradient."""
    zero = [name for name, grad in point.grads.items() if not grad.any()]
    zero = [n for n in zero if not any(f"{n}/".startswith(f"{u}/") for u in subject.unused)]
    what = "leaves of gradient 0 that are not declared unused"
    return none(what, zero, of=len(point.grads), otherwise="warn", key="zero")
