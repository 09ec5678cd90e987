"""Checks of the objective of a distillation, its schedule and its log."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lm_jax.doctor import trees
from lm_jax.doctor.checks import check, fixture
from lm_jax.doctor.distill.subject import Objective, Subject, gradients, numbers, scalar
from lm_jax.doctor.facts import Broken, Skip, call, pair
from lm_jax.doctor.findings import Measure, at_least, at_most, holds, listed, none
from lm_jax.doctor.log.read import number
from lm_jax.doctor.numbers import FLOAT32_EPS, excess_of_sum, gap, half_unit

CLOCK_LIMIT = 1e-3


@check("Put stop_gradient on the teacher's output, and on every projection of it.")
def teacher_gradient(subject: Subject, objective: Objective) -> list[Measure]:
    """The gradient of the objective by every teacher-side leaf is exactly 0."""
    params = subject.student_params, subject.teacher_params
    name = "objective_fn" if subject.whole_fn is None else "whole_fn"

    def total(student: Any, teacher: Any) -> Any:
        if subject.whole_fn is not None:
            return subject.whole_fn(student, teacher, subject.batch)
        made = subject.objective_fn(student, teacher, subject.batch, 0.5)  # type: ignore[misc]
        return pair(name, made, "(total, parts)")[0]

    torch = any(hasattr(leaf, "backward") for leaf in jax.tree.leaves(params[0]))
    try:
        made = (_by_torch if torch else gradients)(name, total, *params)
    except Skip:
        # It may raise, or return no number, without a gradient as well.
        call(f"the total of {name}", scalar, call(name, total, *params))
        raise
    student, teacher = (
        {n: trees.norm([g]) for n, g in trees.float_leaves(tree).items()} for tree in made
    )
    leaking = [n for n, norm in teacher.items() if norm != 0]
    what = "teacher-side leaves with a gradient that is not 0"
    size, ok = math.hypot(*student.values()), "finite and above 0"
    return [
        none(what, leaking, of=len(teacher), key="leaking"),
        holds(math.isfinite(size) and size > 0, "norm of the student's gradient", size, limit=ok),
    ]


def _by_torch(name: str, total: Callable[..., Any], *params: Any) -> Any:
    """PyTorch's gradients by all leaves that need one, 0 for the others."""
    params = trees.copies(params)
    if not any(getattr(leaf, "requires_grad", False) for leaf in jax.tree.leaves(params[0])):
        raise Skip("No leaf of student_params needs a gradient: give parameters, no state_dict.")
    call(f"the gradient of {name}", lambda: total(*params).backward())
    return jax.tree.map(lambda x: 0 * x if getattr(x, "grad", None) is None else x.grad, params)


@check("Feed the teacher's logits to the divergence; let total be alpha kd + (1 - alpha) lm.")
def present(subject: Subject, objective: Objective) -> list[Measure]:
    """Other teacher weights change the distillation, and alpha = 0, 1 are the pure losses."""
    perturbed, found = trees.nudge(subject.teacher_params, 0.5, subject.seed), []
    what = "total changes by other teacher weights at alpha"
    for name, alpha in (("kd_kl_t2", 1.0), ("lm_ce", 0.0)):
        total, parts = objective(subject.teacher_params, alpha)
        change, size = gap(objective(perturbed, alpha)[0], total), 32 * max(1.0, abs(total))
        if alpha:  # the sum is in float32, whatever it is made of
            found.append(at_least(f"{what} = 1", change, 2 * size * FLOAT32_EPS, key="moved"))
        else:
            found.append(at_most(f"{what} = 0", change, size * subject.eps, key="kept"))
        if name in parts:
            off, sides = gap(total, parts[name]), f"total differs from {name} at alpha = {alpha:g}"
            found.append(at_most(sides, off, size * subject.eps, key=name))
    return found


@fixture
def log(records: Any) -> list[dict[str, float]]:
    """The numbers of every record, without `distill/` in their names."""
    rows = [{n.removeprefix("distill/"): number(x) for n, x in r.items()} for r in records]
    return [{n: x for n, x in row.items() if x is not None} for row in rows]


@check("Log raw terms as distill/NAME, weighted ones as distill/weighted/NAME, T^2 as kd_kl_t2.")
def terms(log: list[dict[str, float]]) -> Measure:
    """Weighted terms add up to the objective, and names mean what they say."""
    wrong, seen = [], 0
    for i, row in enumerate(log, 1):
        weighted = [x for name, x in row.items() if name.startswith("weighted/")]
        if not weighted or "objective" not in row:
            continue
        total, at, seen = row["objective"], f"step {row.get('step', i):g}", seen + 1
        if not excess_of_sum(weighted, total) <= 1:
            wrong.append(f"{at}: terms add up to {sum(weighted):.6g}, objective {total:.6g}")
        if {"kd_kl", "kd_kl_t2", "temperature"} <= row.keys():
            scaled, raw, T = row["kd_kl_t2"], row["kd_kl"], row["temperature"]
            right = T**2 * raw
            most = (T + half_unit(T)) ** 2 * (abs(raw) + half_unit(raw))  # as they are printed
            digits = half_unit(scaled) + most - abs(right)
            if not gap(scaled, right) <= 1e-4 * abs(right) + digits:
                wrong.append(f"{at}: kd_kl_t2 {scaled:.6g}, T^2 kd_kl is {right:.6g}")
    if not seen:
        raise Skip("No record has distill/weighted/ terms and distill/objective.")
    return none(f"wrong values in {seen} records", wrong, key="wrong")


class Logged(NamedTuple):
    """A weighted term and its raw one as a record has them; the temperature stands alone."""

    step: int
    name: str
    value: float
    raw: float = 1.0
    digits: float = 0.0  # that the raw term may be off for the way it is printed

    def error(self, weight: float, largest: float) -> float:
        """Distance from the declared weight beyond printed digits, relative to its size."""
        if not math.isfinite(self.value):
            return math.inf
        digits = abs(weight) * self.digits + (half_unit(self.value) if self.value else 0)
        size = min(largest, max(1.0, abs(weight)))  # a weight near 0 is held against the largest
        return max(0, gap(self.value, weight * self.raw) - digits) / abs(self.raw) / size


@fixture
def logged(log: list[dict[str, float]]) -> list[Logged]:
    """All weights and temperatures that are logged with a step."""
    found = []
    for row in log:
        step = row.get("step", math.nan)
        for name, x in row.items() if math.isfinite(step) else ():
            term = name.removeprefix("weighted/")
            if name == "temperature":
                found.append(Logged(int(step), name, x))
            elif term != name and abs(raw := row.get(term, 0.0)) > 1e-6:  # with digits enough
                found.append(Logged(int(step), term, x, raw, half_unit(raw)))
    return found


@check("Drive weights and temperature by the counter of updates, not of micro-batches or epochs.")
def clock(logged: list[Logged], weights_fn: Any) -> Measure:
    """Logged weights and temperature are those declared for the update."""

    @functools.cache
    def declared(update: int) -> dict[str, float]:
        return numbers("weights_fn", call("weights_fn", weights_fn, max(0, update)))

    found = [w for w in logged if w.name in declared(0)]
    if not found:
        raise Skip("No record has a step and a weighted term with its raw term, of weights_fn.")
    largest = dict.fromkeys(declared(0), 1e-6)
    for w in found:
        largest[w.name] = max(largest[w.name], abs(declared(w.step)[w.name]))

    def worst(of: list[Logged], speed: int) -> tuple[float, Logged, float]:
        """The largest error, and what is declared there."""
        ends = []
        for offset in (0, -1):  # a record's step may count the updates made or name the last one
            pairs = [(w, declared((w.step + offset) * speed)[w.name]) for w in of]
            ends.append(max((w.error(x, largest[w.name]), w, x) for w, x in pairs))
        return min(ends)

    size, w, right = worst(found, 1)
    where = ""
    if size > CLOCK_LIMIT:
        some = found[:: max(1, len(found) // 50)]
        where = f"{w.name} at step {w.step} is {w.value / w.raw:.5g}, declared is {right:.5g}"
        fast = [speed for speed in range(2, 65) if worst(some, speed)[0] <= CLOCK_LIMIT]
        where += f"; a clock {fast[0]} times as fast explains it" if fast else ""
    what = f"largest relative error of {len(found)} weights and temperatures"
    return at_most(what, size, CLOCK_LIMIT, where=where, key="worst")


@check("Report raw components in evaluation, at a temperature that the update does not change.")
def eval_components(
    subject: Subject, eval_fn: Any, student_params: Any, teacher_params: Any, batch: Any, steps: int
) -> Measure:
    """What evaluation reports of given parameters does not depend on the update."""
    updates, args = (0, steps // 2, steps - 1), (student_params, teacher_params, batch)
    reports = [numbers("eval_fn", call("eval_fn", eval_fn, *args, u)) for u in updates]
    if not reports[0]:
        raise Broken("eval_fn returned no components")
    changed = []
    for name, x in reports[0].items():
        values = [report.get(name, math.nan) for report in reports]
        if not gap(values, x) <= 4 * subject.eps * max(1.0, abs(x)):
            changed.append(f"{name} ({listed(f'{value:.6g}' for value in values)})")
    what = f"components that differ between updates {listed(updates)}"
    return none(what, changed, of=len(reports[0]), key="changed")


@check("Contrast with 16 or more: a larger batch over all devices, or a queue of embeddings.")
def contrastive(contrastive_candidates: int) -> Measure:
    """There are enough candidates for the contrastive term to carry a signal."""
    return at_least("candidates of the contrastive term", contrastive_candidates, 16)
