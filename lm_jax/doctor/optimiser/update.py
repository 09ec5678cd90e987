"""Checks of single updates: that they happen, are whole, and survive a bad batch."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from lm_jax.doctor import trees
from lm_jax.doctor.checks import check, fixture
from lm_jax.doctor.facts import Broken, Skip, call, give
from lm_jax.doctor.findings import Measure, at_least, at_most, equals, holds, listed, none, note
from lm_jax.doctor.numbers import FLOAT32_EPS
from lm_jax.doctor.optimiser.subject import UPDATES, Half, Loop, Point, Subject, logged
from lm_jax.doctor.training.subject import unmoved

Gradient = Callable[[int], trees.Arrays]  # of the batch in so many pieces


@check("Look for a cut gradient or leaves the optimiser lacks; declare frozen ones with unused=.")
def updates(
    good: list[Point], unused: Iterable[str], first_rates: list[float] | None = None
) -> list[Measure]:
    """Every leaf has moved after the first updates."""
    start, end = good[0].params, good[-1].params
    read = {n: x for n, x in start.items() if trees.is_floating(x.dtype) and not trees.is_mask(x)}
    read = {n: x for n, x in read.items() if not any(f"{n}/".startswith(f"{u}/") for u in unused)}
    # An early warm-up may move less than float32 resolves at a leaf's scale.
    rate = max(first_rates or [0.0]) or np.inf
    read = {n: x for n, x in read.items() if not rate < FLOAT32_EPS * np.abs(x).max(initial=0)}
    still, what = unmoved(read, end), f"leaves unchanged after {UPDATES} updates"
    return [
        none("leaves that are not finite", trees.nonfinite(end), of=len(end), key="nonfinite"),
        none(what, still, of=len(read), key="unchanged"),
    ]


@check("Count micro-batches in one place, once per batch; asking must not change the count.")
def update_count(subject: Subject, loop: Loop, calls: list[Point]) -> list[Measure]:
    """Calls that move the parameters are every calls_per_update-th, and the counter agrees."""
    per = loop.calls_per_update
    numbered = enumerate(zip(calls, calls[1:], strict=False), 1)
    moved = [i for i, (a, b) in numbered if len(unmoved(a.params, b.params)) < len(a.params)]
    due = list(range(per, len(calls), per))
    made = f"calls that moved parameters: {listed(moved) or 'none'}, due: {listed(due)}"
    found = [holds(moved == due, made, moved, key="moved")]
    if subject.updates_of:
        counted = [point.updates - calls[0].updates for point in calls]
        expected = [i // per for i in range(len(calls))]
        count = f"updates counted after each call: {listed(counted)}, made: {listed(expected)}"
        found.append(holds(counted == expected, count, counted, key="counted"))
    return found


@check("Keep parameters and moments in float32, and cast in the forward pass.")
def dtype(loop: Loop, good: list[Point]) -> list[Measure]:
    """Parameters and moments are at least float32."""

    def narrow(arrays: trees.Arrays) -> list[str]:
        return [n for n, x in arrays.items() if trees.is_floating(x.dtype) and x.itemsize < 4]

    end = good[-1]  # optimisers of PyTorch make their moments in the first update
    params, moments = narrow(end.params), narrow(end.arrays)
    # Moments in 16 bits that do decay are a choice; a master copy in 16 bits loses updates.
    found = [
        none("parameters narrower than float32", params, key="params"),
        none("leaves of the state narrower", moments, otherwise="warn", key="moments"),
    ]
    if moments and loop.empty.value is not None:
        *_, before, after = loop.play(loop.batch, loop.empty)
        live = {name: before.arrays[name] for name in moments if before.arrays[name].any()}
        stuck = unmoved(live, after.arrays)
        found.append(none("of them unchanged by zero gradients", stuck, key="stuck"))
    return found


@fixture
def gradient(params: Any, batch: Any, gradient_fn: Any) -> Gradient:
    """The gradient of the batch in so many pieces, in float64."""
    shapes = trees.shapes(trees.named(params))

    def taken(micro_batches: int) -> trees.Arrays:
        given = trees.copies(params), trees.copies(batch)
        made = call("gradient_fn", gradient_fn, *given, micro_batches)
        found = {name: x.astype(np.float64) for name, x in trees.named(made).items()}
        if trees.shapes(found) != shapes:
            raise Broken("gradient_fn returned other names or shapes than those of params")
        return found

    return taken


@fixture
def whole_gradient(gradient: Gradient) -> trees.Arrays:
    """The gradient of the batch in one piece."""
    found = gradient(1)
    norm = trees.norm(found.values())
    if not 0 < norm < np.inf:
        raise Broken(f"gradient_fn returned a gradient of norm {norm:g}")
    return found


@check("Add up nats and token counts of all micro-batches and devices, and divide once.")
def accumulation(
    subject: Subject, micro_batches: list[int], gradient: Gradient, whole_gradient: trees.Arrays
) -> list[Measure]:
    """The gradient of ragged rows does not depend on how they are split."""
    if not micro_batches:
        raise Skip("micro_batches is empty.", "micro_batches")
    try:
        weights = trees.as_array(subject.batch["weights"])
    except (TypeError, KeyError, IndexError):
        raise Skip("batch has no 'weights', so unequal token counts cannot be seen.") from None
    counts = weights.reshape(len(weights), -1).sum(1)
    if np.ptp(counts) == 0:
        raise Skip(f"Every row of batch scores {counts[0]:.0f} tokens: no split can matter.")
    norm = trees.norm(whole_gradient.values())
    errors: dict[int, float] = {}
    for n in micro_batches:
        split = gradient(n)
        errors[n] = trees.norm(split[name] - x for name, x in whole_gradient.items()) / norm
    rows = f"rows with {counts.min():.0f} to {counts.max():.0f} scored tokens"
    what = f"change of the gradient of {rows} when split, as a share of its norm"
    worst = float(np.max([*errors.values()]))
    return [
        at_most(what, worst, _rounding(subject, 1e-5), key="error"),
        note(f"micro-batches: {listed(errors)}", errors, key="errors"),
    ]


def _rounding(subject: Subject, least: float) -> float:
    """Relative rounding error of a gradient: 84 eps of float32, four of a narrower dtype."""
    return max(least, 4 * float(jnp.finfo(subject.compute_dtype).eps))


@check("Subtract the step: params - lr * direction. What optax gives is added, minus and all.")
def descent(loop: Loop, calls: list[Point], whole_gradient: trees.Arrays | None = None) -> Measure:
    """The first update that moves goes down the gradient."""
    grads = trees.named(loop.batch.value) if isinstance(loop, Half) else whole_gradient
    if grads is None:
        raise give("gradient_fn")
    start = calls[0].params
    moved = next((x.params for x in calls if len(unmoved(start, x.params)) < len(start)), start)
    step, slope = trees.flat({n: moved[n] - start[n] for n in grads}), trees.flat(grads)
    size = float(np.linalg.norm(step) * np.linalg.norm(slope)) or 1.0
    return at_most("cosine of the step and the gradient", float(step @ slope) / size, 0.1)


@check("Scale the averaged gradient by max_norm / its whole norm, before the moments.")
def clip(half: Half, good: list[Point], clip_norm: float) -> list[Measure]:
    """Gradients beyond the maximal norm act as if they had it; below, nothing is cut."""
    if not clip_norm:
        raise Skip("Not given: clip_norm, or 0.", "clip_norm")

    def effect(share: float) -> trees.Arrays:
        before, after = half.play(half.gradient("gradients", share * clip_norm))
        start, end = ((p.arrays if after.arrays else p.params) for p in (before, after))
        # Optimisers of PyTorch have no moments before the first update.
        return {n: x.astype(np.float64) - start.get(n, 0 * x) for n, x in end.items()}

    at, beyond, small, large = map(effect, (1.001, 100, 0.25, 0.5))
    leak = trees.norm(beyond[n] - x for n, x in at.items()) / trees.norm(at.values())
    # What has the norm divided out, such as the step of Adam, does not react; its moments do.
    sizes = {n: trees.norm([x]) for n, x in large.items()}
    reacts = max(trees.norm([x - small[n]]) / (sizes[n] or 1) for n, x in large.items())
    above = f"change of the moments from norm {clip_norm:.3g}, the maximum, to 100 times that"
    below = "change of the moments when a gradient below it is halved"
    return [
        at_most(above, leak, 1e-4, key="beyond"),  # float32 norms and a division, and a few eps
        at_least(below, reacts, 0.1, key="below"),
    ]


@check("Zero gradients before every update; unscale and average them, log the norm, then clip.")
def grad_norm(
    step_fn: Any, loop: Loop, good: list[Point], whole_gradient: trees.Arrays, still: Any = None
) -> list[Measure]:
    """The logged norms are those of the whole averaged gradient, without what updates left."""
    norm, subject = trees.norm(whole_gradient.values()), loop.subject
    due, found = {"grad_norm": norm}, []
    if subject.clip_norm:
        due["grad_norm_clipped"] = min(norm, subject.clip_norm)
    for name, expected in due.items():
        first = logged(good, f"optim/{name}")[0]
        what = f"relative difference of the logged {name} {first:.5g} from {expected:.5g}"
        off, limit = abs(first - expected) / expected, _rounding(subject, 1e-4)
        found.append(at_most(what, off, limit, key=f"{name}_gap"))
    if still:
        left = logged(loop.play(loop.batch, loop.empty), "optim/grad_norm")[1]
        found.append(equals("grad_norm of empty_batch after an update", left, 0, key="left"))
    return found


@check(
    "Skip the whole update if the gradient's norm or the loss is not finite; never put 0 in place "
    "of a NaN. Count skipped updates under 'optim/skipped_updates', and stop after some in a row."
)
def nonfinite(loop: Loop, good: list[Point]) -> list[Measure]:
    """A bad gradient changes no bit of the state, is counted, and training goes on or stops."""
    found: list[Measure] = []
    for bad in loop.bad:
        try:
            _, before, after, later = loop.play(loop.batch, bad, loop.batch)
        except Broken as error:
            if not _refused(error, bad.name):
                raise
            found.append(note(f"training stops by design: {error}"))
            continue
        state, now = (
            p.params | {f"state:{n}": x for n, x in p.arrays.items()} for p in (before, after)
        )
        broken = trees.nonfinite(now)
        moved = [n for n, x in now.items() if n not in state or not trees.same(state[n], x)]
        moved = [n for n in moved if n not in broken]
        goes_on = len(unmoved(after.params, later.params)) < len(after.params)
        found += [
            none(f"leaves not finite after {bad.name}", broken, of=len(now), key="nonfinite"),
            none(f"finite leaves moved by {bad.name}", moved, key="moved"),
            holds(goes_on, f"parameters move again after {bad.name}", goes_on),
        ]
        counted = after.metrics.get("optim/skipped_updates", 0) > 0 or any(
            count > before.counters.get(n, count) and later.counters.get(n, count + 1) <= count
            for n, count in after.counters.items()
        )
        if counted or after.metrics:
            what = f"skipped updates counted after {bad.name}"
            found.append(holds(counted, what, int(counted), limit="expected 1", key="counted"))
    return found


def _refused(error: Broken, batch: str) -> bool:
    """Whether the step stops at a batch because numbers are not finite: nothing is corrupted."""
    word = r"\b(FloatingPointError|(non-?|is_?|in)?finite|nans?|inf|infinity)\b"
    return bool(re.search(rf"(?is)on {batch} raised .*{word}", str(error)))
