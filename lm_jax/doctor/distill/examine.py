"""Checks of a distillation: its objective, schedule and log, after those of its parts."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.doctor.distill import divergence, targets
from lm_jax.doctor.distill.divergence import KINDS, Divergence
from lm_jax.doctor.distill.subject import Given
from lm_jax.doctor.findings import listed
from lm_jax.doctor.log.read import number
from lm_jax.doctor.numbers import gap
from lm_jax.doctor.old import (
    Finding,
    Report,
    Skip,
    Verdict,
    call,
    check,
    is_floating,
    run_all,
    verdict,
    whole,
)

LEAST_CANDIDATES = 16

Row = tuple[int, str, float]  # step, name, logged weight


@check(
    "distill.present",
    remedy="Feed the teacher's logits, not the student's, to the divergence, and let the total be "
    "alpha times it plus (1 - alpha) times the cross-entropy.",
)
def present(given: Given) -> Verdict:
    """Other teacher weights change the distillation, and alpha = 0, 1 are the pure losses."""
    (kd, parts), (lm, lm_parts) = (given.objective(given.teacher_params, a) for a in (1.0, 0.0))
    rng = np.random.default_rng(given.seed)

    def other(x: Any) -> Any:
        x = jnp.asarray(x)
        if not is_floating(x):
            return x
        return x + jnp.asarray((0.3 + x.std()) * rng.standard_normal(x.shape), x.dtype)

    perturbed = jax.tree.map(other, given.teacher_params)
    moved = abs(given.objective(perturbed, 1.0)[0] - kd)
    kept = abs(given.objective(perturbed, 0.0)[0] - lm)
    size = max(1.0, abs(kd), abs(lm))
    # The total is a float32 of whatever it was computed from.
    limit, least = 32 * given.eps * size, 32 * float(jnp.finfo(jnp.float32).eps) * size
    named_limits = {"lm_ce": (lm, lm_parts), "kd_kl_t2": (kd, parts)}
    gaps = {n: gap(x, found[n]) for n, (x, found) in named_limits.items() if n in found}
    ok = moved > least and kept <= limit and all(x <= limit for x in gaps.values())
    told = ", ".join(f"|total - {n}| = {x:.2g}" for n, x in gaps.items()) or "no pure losses given"
    evidence = (
        f"Other teacher weights move the total by {moved:.3g} at alpha = 1 (total {kd:.5g}, at "
        f"least {least:.1g}) and {kept:.3g} at alpha = 0 (total {lm:.5g}); at the limits {told} "
        f"(rounding {limit:.1g})."
    )
    return verdict(ok, evidence, moved=moved, kept=kept, gaps=gaps)


def _terms(record: Mapping[str, Any]) -> dict[str, float]:
    """Weighted terms of a record."""
    return _numbers(record, "distill/weighted/")


def _raw(record: Mapping[str, Any]) -> dict[str, float]:
    """The other numbers of the distillation."""
    return {n: x for n, x in _numbers(record, "distill/").items() if "/" not in n}


def _numbers(record: Mapping[str, Any], start: str) -> dict[str, float]:
    found = {n.removeprefix(start): number(x) for n, x in record.items() if n.startswith(start)}
    return {n: x for n, x in found.items() if x is not None}


@check(
    "distill.terms",
    remedy="Log the raw term as distill/<name>, weight times it as distill/weighted/<name>, and "
    "the divergence with T^2 under a name of its own (kd_kl_t2).",
)
def terms(given: Given) -> Verdict:
    """Weighted terms add up to the objective, and names mean what they say."""
    given.need("records")
    wrong, seen, worst = [], 0, 0.0
    for record in given.records:
        weighted, total = _terms(record), number(record.get("distill/objective", ""))
        if not weighted or total is None:
            continue
        seen, step = seen + 1, record.get("step", seen)
        error = abs(sum(weighted.values()) - total) / max(1.0, abs(total))
        worst = max(worst, error)
        if not error <= 1e-5:
            added = sum(weighted.values())
            wrong.append(f"step {step}: terms add up to {added:.6g}, objective {total:.6g}")
        raw = _raw(record)
        if all(name in raw for name in ("kd_kl", "kd_kl_t2", "temperature")):
            scaled, expected = raw["kd_kl_t2"], raw["temperature"] ** 2 * raw["kd_kl"]
            if not gap(scaled, expected) <= 1e-4 * abs(expected):
                wrong.append(f"step {step}: kd_kl_t2 {scaled:.6g}, T^2 kd_kl is {expected:.6g}")
    if not seen:
        raise Skip("No record has distill/weighted/ terms and distill/objective.")
    evidence = f"{len(wrong)} faults in {seen} records, largest gap of the sum {worst:.2g}"
    evidence += f" (limit 1e-5): {listed(wrong, 2)}." if wrong else " (limit 1e-5)."
    return verdict(not wrong, evidence, wrong=wrong, worst=worst)


@check(
    "distill.clock",
    remedy="Drive weights and temperature by the counter of updates, not of micro-batches or "
    "epochs.",
)
def clock(given: Given) -> Verdict:
    """Logged weights and temperature are those declared for the update."""
    given.need("records", "weights_fn")
    rows: list[Row] = []
    for record in given.records:
        step, raw = number(record.get("step", "")), _raw(record)
        if step is None or not math.isfinite(step):
            continue
        # A weight shows where the raw term is large enough for its digits.
        used = {n: x / raw[n] for n, x in _terms(record).items() if abs(raw.get(n, 0)) > 1e-6}
        rows += [(int(step), n, x) for n, x in used.items()]
        rows += [(int(step), n, raw[n]) for n in ("temperature",) if n in raw]
    declared = functools.lru_cache(None)(
        lambda update: call("weights_fn", lambda: dict(given.weights_fn(update)))
    )
    rows = [row for row in rows if row[1] in declared(0)]
    if not rows:
        raise Skip("No record has a step and a weighted term with its raw term, of weights_fn.")

    def departure(rows: list[Row], speed: int, offset: int) -> tuple[float, Row, float]:
        """The largest error of a row, the row, and what is declared for it."""
        worst = -1.0, rows[0], 0.0
        for step, name, found in rows:
            update = max(0, step + offset) * speed
            expected = float(declared(update)[name])
            error = gap(found, expected) / max(1.0, abs(expected))
            error = math.inf if math.isnan(error) else error
            worst = max(worst, (error, (step, name, found), expected))
        return worst

    # A record's step may count the updates made or name the last one.
    worst, (step, name, found), expected = min(departure(rows, 1, o) for o in (0, -1))
    limit = 1e-3
    evidence = (
        f"In {len(rows)} logged weights and temperatures the largest departure is {worst:.2g} "
        f"(limit {limit:g}): {name} at step {step} is {found:.5g}, declared is {expected:.5g}."
    )
    if worst > limit:
        some = rows[:: max(1, len(rows) // 50)]
        fast = [n for n in range(2, 65) if min(departure(some, n, o)[0] for o in (0, -1)) <= limit]
        evidence += f" A clock {fast[0]} times as fast explains it." if fast else ""
    return verdict(worst <= limit, evidence, worst=worst, step=step, name=name)


@check(
    "distill.eval_components",
    remedy="Report raw components in evaluation: at temperature and weights that do not depend "
    "on the update.",
)
def eval_components(given: Given) -> Verdict:
    """What evaluation reports of given parameters does not depend on the update."""
    given.need("eval_fn", "student_params", "teacher_params", "batch", "steps")
    reports = []
    for update in (0, given.steps // 2, given.steps - 1):
        made = call(
            "eval_fn",
            given.eval_fn,
            given.student_params,
            given.teacher_params,
            given.batch,
            update,
        )
        if not isinstance(made, Mapping):
            raise Skip(f"eval_fn returned a {type(made).__name__}, not a mapping of components.")
        reports.append({str(n): call(f"component {n}", float, x) for n, x in made.items()})
    first = reports[0]
    limit = 4 * given.eps
    changed = {
        n: [r.get(n, math.nan) for r in reports]
        for n, x in first.items()
        if not max(gap(r.get(n, math.nan), x) for r in reports) <= limit * max(1.0, abs(x))
    }
    told = "; ".join(f"{n}: {', '.join(f'{x:.6g}' for x in xs)}" for n, xs in changed.items())
    evidence = f"At updates 0, {given.steps // 2}, {given.steps - 1} with the same parameters "
    evidence += f"{len(changed)} of {len(first)} components differ{': ' + told if told else ''}."
    return verdict(not changed and bool(first), evidence, changed=changed)


@check(
    "distill.contrastive",
    remedy="Contrast with 16 candidates or more: a larger batch over all devices, or a queue of "
    "earlier embeddings.",
)
def contrastive(given: Given) -> Verdict:
    """There are enough candidates for the contrastive term to carry a signal."""
    given.need("contrastive_candidates")
    chance = math.log(given.contrastive_candidates)
    evidence = (
        f"With {given.contrastive_candidates} candidates (at least {LEAST_CANDIDATES}) chance "
        f"costs ln {given.contrastive_candidates} = {chance:.3f} nats and is right in "
        f"{1 / given.contrastive_candidates:.1%}"
    )
    logged = [_raw(r)["contrastive"] for r in given.records or () if "contrastive" in _raw(r)]
    evidence += f"; the last logged loss is {logged[-1]:.3f}." if logged else "."
    ok = given.contrastive_candidates >= LEAST_CANDIDATES
    return verdict(ok, evidence, chance=chance, logged=logged[-1:])


CHECKS: tuple[Callable[..., Finding], ...] = (
    *targets.CHECKS,
    present,
    terms,
    clock,
    eval_components,
    contrastive,
)


def examine_distillation(
    *,
    kd_fn: Callable[..., Any] | None = None,
    kind: str = "forward",
    beta: float = 0.5,
    t2: bool = True,
    topk_fn: Callable[..., Any] | None = None,
    topk_union: bool = True,
    vocab_size: int = 32,
    teacher_fn: Callable[..., Any] | None = None,
    teacher_params: Any = None,
    targets_fn: Callable[..., Any] | None = None,
    batch: Any = None,
    unigram_nats: float | None = None,
    suffix_fn: Callable[..., Any] | None = None,
    compute_dtype: str = "float32",
    student_params: Any = None,
    objective_fn: Callable[..., Any] | None = None,
    whole_fn: Callable[..., Any] | None = None,
    eval_fn: Callable[..., Any] | None = None,
    init_fn: Callable[..., Any] | None = None,
    step_fn: Callable[..., Any] | None = None,
    student_of: Callable[..., Any] | None = None,
    teacher_of: Callable[..., Any] | None = None,
    calls: int = 4,
    student_parameters: int | None = None,
    teacher_parameters: int | None = None,
    records: Sequence[Mapping[str, Any]] | None = None,
    weights_fn: Callable[..., Any] | None = None,
    steps: int | None = None,
    contrastive_candidates: int | None = None,
    seed: int = 0,
) -> Report:
    """Examine a distillation of any framework; what is not given is skipped by name.

    Logits at position t are about token t + 1. Gradients come from JAX; without it the checks
    that need one are skipped, but for `distill.temperature`, which then uses differences.

    Args:
        kd_fn: `(student_logits [B, T, V], teacher_logits [B, T, V], weights [B, T],
            temperature) -> (sum, count)`, the divergence.
        kind: forward, KL(teacher || student); reverse; jsd; or skew, KL(teacher || mixture).
        beta: weight of the teacher in the mixture of jsd and skew, inside (0, 1).
        t2: whether the values of `kd_fn` and `topk_fn` contain temperature^2.
        topk_fn: like `kd_fn` with a further argument k: over the k most likely tokens only.
        topk_union: whether those are the union of the teacher's and the student's k.
        vocab_size: V of the logits made for `kd_fn` and `topk_fn`.
        teacher_fn: `(teacher_params, tokens [B, T]) -> logits [B, T, V]` by itself, as it is
            evaluated.
        teacher_params: tree of all that the targets are made of, projections included.
        targets_fn: `(teacher_params, batch) -> logits [B, T, V]`, the whole pipeline up to what
            the student's loss reads at the student's positions.
        batch: dict of what the pipeline reads: `tokens` [B, T] of the student, `weights` [B, T]
            (above 0 where a token is scored as a target; default all), and whatever else.
        unigram_nats: nats of a token under the corpus's frequencies; default from `batch`.
        suffix_fn: `(batch, cut) -> batch` with another text from student token `cut` on; default
            replaces `tokens`, so give it where the teacher has tokens of its own.
        compute_dtype: of teacher and objective; sets rounding errors.
        student_params: tree of what is trained.
        objective_fn: `(student_params, teacher_params, batch, alpha) -> (total, parts)` with
            total = alpha kd_kl_t2 + (1 - alpha) lm_ce and raw parts of these names; no dropout.
        whole_fn: `(student_params, teacher_params, batch) -> total`, all that is differentiated,
            where there are other terms; default `objective_fn` with alpha 1/2.
        eval_fn: `(student_params, teacher_params, batch, update) -> components`.
        init_fn: `(seed) -> state` of the loop.
        step_fn: `(state, batch) -> state` or `(state, metrics)`.
        student_of: `(state) -> student_params`.
        teacher_of: `(state) -> teacher_params`.
        calls: of `step_fn` after which the student must have moved.
        student_parameters: declared number of the student's parameters.
        teacher_parameters: the same of the teacher.
        records: log with `step`, `distill/objective`, raw terms `distill/<name>`, weighted terms
            `distill/weighted/<name>`, `distill/temperature`.
        weights_fn: `(update) -> {name: weight}` as declared, also of `temperature`.
        steps: updates of the run.
        contrastive_candidates: number of embeddings that each is contrasted with, itself
            included: the batch, or batch and queue.
        seed: of what is drawn.

    Raises:
        ValueError: if an argument makes no sense.
    """
    arguments = dict(locals())

    def require(ok: bool, name: str, remedy: str) -> None:
        if not ok:
            raise ValueError(f"{name}={arguments[name]!r}: {remedy}.")

    for name, value in arguments.items():
        if name.endswith(("_fn", "_of")):
            require(value is None or callable(value), name, "give a function")
    require(kind in KINDS, "kind", f"use one of {', '.join(KINDS)}")
    number = isinstance(beta, int | float)
    require(number and 0 < beta < 1, "beta", "give a number inside (0, 1)")
    for name, low in {"vocab_size": 4, "calls": 1, "steps": 1, "seed": 0}.items():
        if arguments[name] is not None:
            whole(arguments[name], name, low)
    require(batch is None or isinstance(batch, Mapping), "batch", "give a mapping with 'tokens'")
    least = contrastive_candidates is None or contrastive_candidates >= 1
    require(least, "contrastive_candidates", "give 1 or more")
    values = {f.name: arguments[f.name] for f in dataclasses.fields(Given)}
    report = run_all(
        divergence.CHECKS, Divergence(kd_fn, topk_fn, topk_union, kind, beta, t2, vocab_size, seed)
    )
    return report + run_all(CHECKS, Given(**values))
