"""Checks of the objective of a distillation, its schedule and its log."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from lm_jax.doctor import trees
from lm_jax.doctor.checks import check, fixture
from lm_jax.doctor.distill.subject import Objective, Subject, gradients, numbers
from lm_jax.doctor.facts import Broken, Skip, call
from lm_jax.doctor.findings import Measure, at_least, at_most, holds, listed, none, note
from lm_jax.doctor.log.read import number
from lm_jax.doctor.numbers import FLOAT32_EPS, excess_of_sum, gap, half_unit

LEAST_CANDIDATES = 16
CLOCK_LIMIT = 1e-3


@check("Put stop_gradient on the teacher's output, and on every projection of it.")
def teacher_gradient(subject: Subject, objective: Objective) -> list[Measure]:
    """The gradient of the objective by every teacher-side leaf is exactly 0."""
    whole, params = subject.whole_fn, (subject.student_params, subject.teacher_params)
    name = "whole_fn" if whole else "objective_fn"

    def total(student: Any, teacher: Any) -> Any:
        if whole:
            return whole(student, teacher, subject.batch)
        return subject.objective_fn(student, teacher, subject.batch, 0.5)[0]  # type: ignore[misc]

    torch = any(hasattr(leaf, "backward") for leaf in jax.tree.leaves(params[0]))
    try:
        made = (_by_torch if torch else gradients)(name, total, *params)
    except Skip:
        call(name, total, *params)  # it may raise without a gradient as well
        raise
    student, teacher = (
        {n: trees.norm([g]) for n, g in trees.float_leaves(tree).items()} for tree in made
    )
    leaking = [n for n, norm in teacher.items() if norm != 0]
    what = "teacher-side leaves with a gradient that is not 0"
    size, ok = math.hypot(*student.values()), "finite and above 0"
    return [
        none(what, leaking, of=len(teacher), key="leaking"),
        note("its norm", math.hypot(*teacher.values()), key="teacher_norm"),
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
    rng = subject.rng(5)

    def other(leaf: Any) -> Any:
        if not trees.is_float_leaf(leaf):
            return leaf
        values = trees.as_array(leaf).astype(np.float64)
        return trees.like(leaf, values + (0.3 + values.std()) * rng.standard_normal(values.shape))

    perturbed = jax.tree.map(other, subject.teacher_params)
    found, limits = [], (32 * FLOAT32_EPS, 32 * subject.eps)  # of the sum, and what it is made of
    for name, alpha in (("kd_kl_t2", 1.0), ("lm_ce", 0.0)):
        total, parts = objective(subject.teacher_params, alpha)
        least, limit = (x * max(1.0, abs(total)) for x in limits)
        change, what = gap(objective(perturbed, alpha)[0], total), "change by other teacher weights"
        if alpha:
            found.append(at_least(f"{what} at alpha = 1", change, 2 * least, key="moved"))
        else:
            found.append(at_most(f"{what} at alpha = 0", change, limit, key="kept"))
        if name in parts:
            off = gap(total, parts[name])
            found.append(at_most(f"|total - {name}| at alpha = {alpha:g}", off, limit, key=name))
    return found


@fixture
def log(records: Any) -> list[dict[str, float]]:
    """The numbers of every record, without `distill/` in their names."""
    rows = [{n.removeprefix("distill/"): number(x) for n, x in r.items()} for r in records]
    return [{n: x for n, x in row.items() if x is not None} for row in rows]


@check("Log raw terms as distill/NAME, weighted ones as distill/weighted/NAME, T^2 as kd_kl_t2.")
def terms(log: list[dict[str, float]]) -> list[Measure]:
    """Weighted terms add up to the objective, and names mean what they say."""
    wrong, gaps = [], []
    for i, row in enumerate(log, 1):
        weighted = [x for name, x in row.items() if name.startswith("weighted/")]
        if not weighted or "objective" not in row:
            continue
        total, at = row["objective"], f"step {row.get('step', i):g}"
        gaps.append(excess_of_sum(weighted, total))
        if not gaps[-1] <= 1:
            wrong.append(f"{at}: terms add up to {sum(weighted):.6g}, objective {total:.6g}")
        if {"kd_kl", "kd_kl_t2", "temperature"} <= row.keys():
            scaled, right = row["kd_kl_t2"], row["temperature"] ** 2 * row["kd_kl"]
            if not gap(scaled, right) <= 1e-4 * abs(right):
                wrong.append(f"{at}: kd_kl_t2 {scaled:.6g}, T^2 kd_kl is {right:.6g}")
    if not gaps:
        raise Skip("No record has distill/weighted/ terms and distill/objective.")
    return [
        none(f"wrong values in {len(gaps)} records", wrong, key="wrong"),
        note("largest gap of the sum, over what rounding allows", max(gaps), key="worst"),
    ]


class Weight(NamedTuple):
    """A weight or temperature as a record has it."""

    step: int
    name: str
    value: float
    digits: float = 0.0  # what the printed digits of weighted and raw term leave open


def _weights(row: dict[str, float]) -> Iterator[Weight]:
    for name, x in row.items() if math.isfinite(row.get("step", math.nan)) else ():
        if name == "temperature":
            yield Weight(int(row["step"]), name, x)
        raw = name.removeprefix("weighted/")
        if raw != name and abs(term := row.get(raw, 0.0)) > 1e-6:  # with digits enough
            digits = (half_unit(x) + abs(x / term) * half_unit(term)) / abs(term) if x else 0.0
            yield Weight(int(row["step"]), raw, x / term, digits)


@check("Drive weights and temperature by the counter of updates, not of micro-batches or epochs.")
def clock(log: list[dict[str, float]], weights_fn: Any) -> list[Measure]:
    """Logged weights and temperature are those declared for the update."""

    @functools.cache
    def declared(update: int) -> dict[str, float]:
        return numbers("weights_fn", call("weights_fn", weights_fn, max(0, update)))

    found = [w for row in log for w in _weights(row) if w.name in declared(0)]
    if not found:
        raise Skip("No record has a step and a weighted term with its raw term, of weights_fn.")
    largest = dict.fromkeys(declared(0), 1e-6)
    for w in found:
        largest[w.name] = max(largest[w.name], abs(declared(w.step)[w.name]))

    def error(w: Weight, right: float) -> float:
        # A weight near 0 is held against the largest.
        size = min(largest[w.name], max(1.0, abs(right)))
        return math.inf if math.isnan(w.value) else max(0, gap(w.value, right) - w.digits) / size

    def worst(of: list[Weight], speed: int) -> tuple[float, Weight, float]:
        """The largest relative error, and what is declared there."""
        ends = []
        for offset in (0, -1):  # a record's step may count the updates made or name the last one
            rights = [declared((w.step + offset) * speed)[w.name] for w in of]
            ends.append(max((error(w, x), w, x) for w, x in zip(of, rights, strict=True)))
        return min(ends)

    size, w, right = worst(found, 1)
    some, where = found[:: max(1, len(found) // 50)], ""
    if size > CLOCK_LIMIT:
        where = f"{w.name} at step {w.step} is {w.value:.5g}, declared is {right:.5g}"
        fast = [speed for speed in range(2, 65) if worst(some, speed)[0] <= CLOCK_LIMIT]
        where += f"; a clock {fast[0]} times as fast explains it" if fast else ""
    what = f"largest relative error of {len(found)} weights and temperatures"
    measure = at_most(what, size, CLOCK_LIMIT, where=where, key="worst")
    same = not where and worst(some, 2)[0] <= CLOCK_LIMIT
    return [measure, *[note("not judged: a clock twice as fast would give the same")] * same]


@check("Report raw components in evaluation, at a temperature that the update does not change.")
def eval_components(
    subject: Subject, eval_fn: Any, student_params: Any, teacher_params: Any, batch: Any, steps: int
) -> Measure:
    """What evaluation reports of given parameters does not depend on the update."""
    updates, args = (0, steps // 2, steps - 1), (student_params, teacher_params, batch)
    reports = [numbers("eval_fn", call("eval_fn", eval_fn, *args, u)) for u in updates]
    first, changed = reports[0], []
    if not first:
        raise Broken("eval_fn returned no components")
    for name, x in first.items():
        values = [report.get(name, math.nan) for report in reports]
        if not gap(values, x) <= 4 * subject.eps * max(1.0, abs(x)):
            changed.append(f"{name} ({', '.join(f'{value:.6g}' for value in values)})")
    what = f"components that differ between updates {listed(updates)}"
    return none(what, changed, of=len(first), key="changed")


@check("Contrast with 16 or more: a larger batch over all devices, or a queue of embeddings.")
def contrastive(contrastive_candidates: int) -> list[Measure]:
    """There are enough candidates for the contrastive term to carry a signal."""
    chance = math.log(contrastive_candidates)
    return [
        at_least("candidates of the contrastive term", contrastive_candidates, LEAST_CANDIDATES),
        note("nats of a guess among them", chance, key="chance"),
    ]
