"""Checks of the objective of a distillation, its schedule and its log."""

import functools
import math
from collections.abc import Callable, Mapping
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


@check(
    "Put stop_gradient on the teacher's output and give the optimiser the student's leaves only; "
    "a projection of the teacher's states that is trained by the divergence is a moving target."
)
def teacher_gradient(subject: Subject, objective: Objective) -> list[Measure]:
    """The gradient of the objective by every teacher-side leaf is exactly 0."""
    whole, params = subject.whole_fn, (subject.student_params, subject.teacher_params)
    name = "whole_fn" if whole else "objective_fn"

    def total(student: Any, teacher: Any) -> Any:
        if whole:
            return whole(student, teacher, subject.batch)
        return subject.objective_fn(student, teacher, subject.batch, 0.5)[0]  # type: ignore[misc]

    objective(subject.teacher_params, 0.5)
    call(name, total, *params)
    torch = any(hasattr(leaf, "backward") for leaf in jax.tree.leaves(params[0]))
    made = (_by_torch if torch else gradients)(name, total, *params)
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


@check(
    "Feed the teacher's logits, not the student's, to the divergence, and let the total be alpha "
    "times it plus (1 - alpha) times the cross-entropy."
)
def present(subject: Subject, objective: Objective) -> list[Measure]:
    """Other teacher weights change the distillation, and alpha = 0, 1 are the pure losses."""
    rng = subject.rng(5)

    def other(leaf: Any) -> Any:
        if not trees.is_float_leaf(leaf):
            return leaf
        values = trees.as_array(leaf).astype(np.float64)
        return trees.like(leaf, values + (0.3 + values.std()) * rng.standard_normal(values.shape))

    teacher = subject.teacher_params
    perturbed = jax.tree.map(other, teacher)
    (kd, kd_parts), (lm, lm_parts) = objective(teacher, 1.0), objective(teacher, 0.0)
    size = max(1.0, abs(kd), abs(lm))
    # The total is a float32 of whatever it was computed from.
    limit, least = 32 * subject.eps * size, 32 * FLOAT32_EPS * size
    change, kept = gap(objective(perturbed, 1.0)[0], kd), gap(objective(perturbed, 0.0)[0], lm)
    ends = ("kd_kl_t2", 1, kd, kd_parts), ("lm_ce", 0, lm, lm_parts)
    return [
        at_least("change by other teacher weights at alpha = 1", change, 2 * least, key="moved"),
        at_most("at alpha = 0", kept, limit, key="kept"),
        *(
            at_most(f"|total - {name}| at alpha = {alpha}", gap(total, parts[name]), limit)
            for name, alpha, total, parts in ends
            if name in parts
        ),
    ]


class Record(NamedTuple):
    """What a record has of a distillation."""

    step: float | None
    raw: dict[str, float]
    weighted: dict[str, float]


@fixture
def log(records: Any) -> list[Record]:
    """The records, by what their numbers are."""

    def named(record: Mapping[str, Any], start: str) -> dict[str, float]:
        found = {n.removeprefix(start): number(x) for n, x in record.items() if n.startswith(start)}
        return {n: x for n, x in found.items() if x is not None and "weighted/" not in n}

    return [
        Record(number(r.get("step", "")), named(r, "distill/"), named(r, "distill/weighted/"))
        for r in records
    ]


@check(
    "Log the raw term as distill/<name>, weight times it as distill/weighted/<name>, and the "
    "divergence with T^2 under a name of its own (kd_kl_t2)."
)
def terms(log: list[Record]) -> list[Measure]:
    """Weighted terms add up to the objective, and names mean what they say."""
    wrong, gaps = [], []
    for i, (step, raw, weighted) in enumerate(log, 1):
        if not weighted or "objective" not in raw:
            continue
        total, at = raw["objective"], f"step {i if step is None else step:g}"
        gaps.append(excess_of_sum(weighted.values(), total))
        if not gaps[-1] <= 1:
            added = sum(weighted.values())
            wrong.append(f"{at}: terms add up to {added:.6g}, objective {total:.6g}")
        if all(name in raw for name in ("kd_kl", "kd_kl_t2", "temperature")):
            scaled, right = raw["kd_kl_t2"], raw["temperature"] ** 2 * raw["kd_kl"]
            if not gap(scaled, right) <= 1e-4 * abs(right):
                wrong.append(f"{at}: kd_kl_t2 {scaled:.6g}, T^2 kd_kl is {right:.6g}")
    if not gaps:
        raise Skip("No record has distill/weighted/ terms and distill/objective.")
    return [
        none(f"wrong values in {len(gaps)} records", wrong, key="wrong"),
        note("largest gap of the sum, over what rounding allows", max(gaps), key="worst"),
    ]


class Row(NamedTuple):
    """A weight or temperature as a record has it."""

    step: int
    name: str
    value: float
    digits: float = 0.0  # what the printed digits of weighted and raw term leave open


def _rows(log: list[Record]) -> list[Row]:
    rows = []
    for step, raw, weighted in log:
        if step is None or not math.isfinite(step):
            continue
        for name, x in weighted.items():
            term = raw.get(name, 0.0)
            if abs(term) > 1e-6:  # a weight shows where the raw term is large enough for its digits
                digits = (half_unit(x) + abs(x / term) * half_unit(term)) / abs(term)
                rows.append(Row(int(step), name, x / term, digits if x else 0.0))
        rows += [Row(int(step), n, x) for n, x in raw.items() if n == "temperature"]
    return rows


@check("Drive weights and temperature by the counter of updates, not of micro-batches or epochs.")
def clock(log: list[Record], weights_fn: Any) -> list[Measure]:
    """Logged weights and temperature are those declared for the update."""

    @functools.cache
    def declared(update: int) -> dict[str, float]:
        return numbers("weights_fn", call("weights_fn", weights_fn, max(0, update)))

    rows = [row for row in _rows(log) if row.name in declared(0)]
    if not rows:
        raise Skip("No record has a step and a weighted term with its raw term, of weights_fn.")
    largest = dict.fromkeys(declared(0), 1e-6)
    for row in rows:
        largest[row.name] = max(largest[row.name], abs(declared(row.step)[row.name]))

    def departure(rows: list[Row], speed: int, offset: int) -> tuple[float, Row, float]:
        """The largest relative error, its row, and what is declared there."""
        worst = -1.0, rows[0], 0.0
        for row in rows:
            right = declared((row.step + offset) * speed)[row.name]
            # A weight near 0 is held against the largest.
            size = min(largest[row.name], max(1.0, abs(right)))
            error = max(0.0, gap(row.value, right) - row.digits) / size
            worst = max(worst, (math.inf if math.isnan(row.value) else error, row, right))
        return worst

    def best(rows: list[Row], speed: int) -> tuple[float, Row, float]:
        # A record's step may count the updates made or name the last one.
        return min(departure(rows, speed, offset) for offset in (0, -1))

    error, row, right = best(rows, 1)
    some, where = rows[:: max(1, len(rows) // 50)], ""
    if error > CLOCK_LIMIT:
        where = f"{row.name} at step {row.step} is {row.value:.5g}, declared is {right:.5g}"
        fast = [n for n in range(2, 65) if best(some, n)[0] <= CLOCK_LIMIT]
        where += f"; a clock {fast[0]} times as fast explains it" if fast else ""
    what = f"largest relative error of {len(rows)} weights and temperatures"
    found = [at_most(what, error, CLOCK_LIMIT, where=where, key="worst")]
    if not where and best(some, 2)[0] <= CLOCK_LIMIT:
        found.append(note("not judged: a clock twice as fast would give the same"))
    return found


@check(
    "Report raw components in evaluation: at temperature and weights that do not depend on the "
    "update."
)
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


@check(
    "Contrast with 16 candidates or more: a larger batch over all devices, or a queue of earlier "
    "embeddings."
)
def contrastive(contrastive_candidates: int) -> list[Measure]:
    """There are enough candidates for the contrastive term to carry a signal."""
    chance = math.log(contrastive_candidates)
    return [
        at_least("candidates of the contrastive term", contrastive_candidates, LEAST_CANDIDATES),
        note("nats of a guess among them", chance, key="chance"),
    ]
