"""Checks of gradients: against central differences in float64, and against themselves."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from lm_jax.doctor.gradient import differences
from lm_jax.doctor.gradient.subject import Comparison, Gradients
from lm_jax.doctor.old import Finding, Report, Skip, Verdict, check, run_all, verdict, whole

COORDINATES = 12  # of each leaf


@check(
    "gradient.finite",
    remedy="Find the first operation that divides by zero or takes log, sqrt or a power of zero, "
    "or an id outside its table; make the argument safe before the operation, not only its result.",
)
def finite(g: Gradients) -> Verdict:
    """The loss is a finite scalar and so is every entry of its gradient."""
    try:
        centre, grads = g.centre, g.gradient(g.leaves)
    except Skip as reason:
        return verdict(False, f"{reason}.")
    bad = {n: int((~np.isfinite(x)).sum()) for n, x in zip(g.names, grads, strict=True)}
    bad = {name: count for name, count in bad.items() if count}
    size = sum(x.size for x in grads)
    evidence = f"Loss {centre:.6g}; {sum(bad.values())} of {size} gradient entries are not finite"
    if bad:
        name = next(iter(bad))
        array = grads[g.names.index(name)]
        first = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        evidence += f", in {len(bad)} of {len(grads)} leaves, first {name}{list(first)}"
    return verdict(np.isfinite(centre) and not bad, f"{evidence}.", loss=centre, not_finite=bad)


def _fill_memory(leaves: list[np.ndarray]) -> None:
    """Write over freed memory of the sizes of the leaves, which new buffers are likely to get."""
    junk = [np.full(leaf.shape, 1e30) for leaf in leaves for _ in range(2)]
    del junk


@check(
    "gradient.repeated",
    remedy="Zero every buffer before adding to it, write all of it, and keep nothing from an "
    "earlier call; fix the random key.",
)
def repeated(g: Gradients) -> Verdict:
    """The same parameters give the same bits, also after other parameters were differentiated."""
    values = [g.value(g.leaves, as_given=True)]
    first = g.gradient(g.leaves)
    changed: dict[str, float] = {}
    for scale in (1.1, 0.7):
        g.gradient([scale * leaf for leaf in g.leaves])
        _fill_memory(g.leaves)
        again = g.gradient(g.leaves)
        values.append(g.value(g.leaves, as_given=True))
        for name, a, b in zip(g.names, first, again, strict=True):
            if not np.array_equal(a, b, equal_nan=True):
                with np.errstate(invalid="ignore"):
                    changed[name] = max(changed.get(name, 0.0), float(np.abs(a - b).max()))
    same = np.array_equal(values, values[:1] * len(values), equal_nan=True)
    evidence = f"Three evaluations at the same parameters: loss {'the same' if same else values}"
    if changed:
        name = max(changed, key=lambda n: changed[n])
        evidence += f", {len(changed)} leaves differ, most {name} by {changed[name]:.3g}"
    else:
        evidence += ", all gradients bit-identical"
    return verdict(same and not changed, f"{evidence}.", changed=changed, losses=values)


@check(
    "gradient.precision",
    remedy="Let the loss keep float64 when its parameters are float64. In float32 use steps near "
    "1e-2 and judge whole directions: errors at smaller steps are rounding, not a wrong gradient.",
)
def precision(g: Gradients) -> Verdict:
    """What differences can decide at all: rounding of the loss and the best step."""
    c = max(g.sweeps, key=lambda c: c.bound)
    errors = (
        np.abs(c.slope.values - c.given) / c.scale if c.scale else np.zeros(len(differences.STEPS))
    )
    curve = ", ".join(
        f"{step:.0e}: {error:.1e}"
        for step, error in zip(differences.STEPS[::2], errors[::2], strict=True)
    )
    return verdict(
        g.relative_noise < 1e-12,
        f"Rounding of the loss is {g.relative_noise:.1e} of its value (float64 about 1e-16, "
        f"float32 6e-8, bfloat16 4e-3; threshold 1e-12). Relative error over the step: {curve}; "
        f"best step {c.slope.step:.1e}, which decides down to {c.bound:.1e}.",
        otherwise="warn",
        relative_noise=g.relative_noise,
        steps=differences.STEPS.tolist(),
        errors=errors.tolist(),
        best_step=c.slope.step,
        attainable=c.bound,
    )


@check(
    "gradient.directional",
    remedy="The gradient is that of another function: check hand-written backward passes and what "
    "they saved; gradient.leaves names the leaf.",
)
def directional(g: Gradients) -> Verdict:
    """Derivatives of the whole loss along random directions."""
    return g.judged(g.sweeps, "random directions")


@check(
    "gradient.leaves",
    remedy="Check the backward pass of the operation that the named leaf feeds.",
)
def leaves(g: Gradients) -> Verdict:
    """Two directions inside each leaf: a random one, and the gradient, where the signal is most."""
    found = []
    for i, leaf in enumerate(g.leaves):
        direction = g.random(100 + i, g.only(i, np.ones(leaf.shape)))
        typical = g.typical_of(i)
        found.append(g.compare(g.names[i], direction, typical, g.steps))
        length = float(np.sqrt((g.grads[i] ** 2).sum()))
        if length and leaf.size > 1:
            direction = g.only(i, g.grads[i] / length)
            found.append(g.compare(f"{g.names[i]}, steepest", direction, typical, g.steps))
    return g.judged(found, f"directions in {len(g.leaves)} leaves")


def _sample(g: Gradients, leaf: int, candidates: np.ndarray) -> Iterator[Comparison]:
    """Coordinates of a leaf: some of the candidates, the first and the last among them."""
    rng = np.random.default_rng((g.seed, leaf, 7))
    chosen = candidates
    if len(candidates) > COORDINATES:
        inner = rng.choice(candidates[1:-1], COORDINATES - 2, replace=False)
        chosen = np.sort(np.concatenate([candidates[[0, -1]], inner]))
    for index in chosen:
        yield g.coordinate(leaf, int(index))


@check(
    "gradient.coordinates",
    remedy="Check the backward pass of the operation that the named leaf feeds, at that index.",
)
def coordinates(g: Gradients) -> Verdict:
    """Single coordinates of every leaf."""
    found = [c for i, x in enumerate(g.leaves) for c in _sample(g, i, np.arange(x.size))]
    return g.judged(found, f"coordinates of {len(g.leaves)} leaves")


@check(
    "gradient.partly_written",
    remedy="Write all of the gradient buffer: cover the last block and every row.",
)
def partly_written(g: Gradients) -> Verdict:
    """Where a leaf's gradient is exactly zero in part, the loss does not depend on that part."""
    found = []
    for i, (name, grad) in enumerate(zip(g.names, g.grads, strict=True)):
        zeros = np.flatnonzero(grad == 0)
        if not 0 < len(zeros) < grad.size:
            continue
        direction = g.random(200 + i, g.only(i, (grad == 0).astype(np.float64)))
        label = f"the {len(zeros)} zeros of {name}"
        whole = g.compare(label, direction, g.typical_of(i), g.steps)
        found += [whole, *(_sample(g, i, zeros) if whole.wrong else ())]
    if not found:
        return verdict(True, "No leaf has a gradient that is exactly zero in part.")
    return g.judged(found, "groups and coordinates of zero gradient")


@check(
    "gradient.zero_leaves",
    remedy="Connect the parameter to the loss (no stop_gradient, no gate at zero in front of it), "
    "drop it, or declare it with unused=.",
)
def zero_leaves(g: Gradients) -> Verdict:
    """Every leaf has a gradient."""
    zero = [i for i, grad in enumerate(g.grads) if not grad.any()]
    names = [g.names[i] for i in zero if not g.declared(g.names[i])]
    lost = []
    for i in zero:
        direction = g.random(300 + i, g.only(i, np.ones(g.leaves[i].shape)))
        found = g.compare(g.names[i], direction, g.typical_of(i), g.steps)
        if found.wrong and g.confirmed(found):
            lost.append(g.names[i])
    if lost:
        text = f"{lost[0]} has gradient 0, but the loss changes with it"
    elif names:
        text = f"the loss does not change with {', '.join(names[:5])}, nor does it say it should"
    else:
        text = f"{len(zero)} declared unused" if zero else "none"
    return verdict(
        not lost and not names,
        f"Leaves whose gradient is exactly 0: {len(zero)} of {len(g.leaves)}; {text}.",
        otherwise="fail" if lost else "warn",
        zero=[g.names[i] for i in zero],
        lost=lost,
    )


CHECKS: tuple[Callable[..., Finding], ...] = (
    finite,
    repeated,
    precision,
    directional,
    leaves,
    coordinates,
    partly_written,
    zero_leaves,
)


def examine_gradients(
    loss_fn: Callable,
    params: Any,
    *,
    grad_fn: Callable | None = None,
    seed: int = 0,
    unused: Iterable[str] = (),
) -> Report:
    """Examine the gradient of a scalar loss with respect to a pytree of parameters.

    Args:
        loss_fn: parameters -> scalar. It gets float64 parameters and must not depend on chance.
        params: pytree; its floating-point leaves are taken as float64, the others stay as they
            are. Use values without structure (not zeros or ones) to see everything.
        grad_fn: parameters -> pytree of gradients, for those that do not come from jax.grad. Both
            functions then get NumPy arrays.
        seed: of directions and coordinates.
        unused: names of leaves, or of what holds them ("block/gate"), that need no gradient.

    Raises:
        ValueError: no parameter is a floating-point array.
    """
    if not callable(loss_fn) or not (grad_fn is None or callable(grad_fn)):
        raise ValueError("loss_fn and grad_fn must be functions of the parameters.")
    if isinstance(unused, str) or not isinstance(unused, Iterable):
        raise ValueError(f"unused={unused!r}: give a list of names of leaves.")
    whole(seed, "seed", 0)
    with jax.enable_x64(True):
        gradients = Gradients(loss_fn, params, grad_fn, seed, tuple(unused))
        if not sum(leaf.size for leaf in gradients.leaves):
            raise ValueError("params has no floating-point leaf: give the arrays to differentiate.")
        return run_all(CHECKS, gradients)
