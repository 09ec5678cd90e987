"""Checks of the teacher of a distillation and of the targets made of it."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lm_jax.doctor.distill.divergence import log_softmax
from lm_jax.doctor.distill.subject import Given, changed_leaves, next_token_nats
from lm_jax.doctor.findings import listed
from lm_jax.doctor.numbers import gap, resolution
from lm_jax.doctor.old import Finding, Skip, Verdict, call, check, is_floating, verdict
from lm_jax.doctor.trees import named


@check(
    "distill.teacher_gradient",
    remedy="Put stop_gradient on the teacher's output and give the optimiser the student's leaves "
    "only; a projection of the teacher's states that is trained by the divergence is a moving "
    "target.",
)
def teacher_gradient(given: Given) -> Verdict:
    """The gradient of the objective by every teacher-side leaf is exactly 0."""
    given.need("objective_fn", "student_params", "teacher_params", "batch")

    def total(student: Any, teacher: Any) -> Any:
        if given.whole_fn is not None:
            return given.whole_fn(student, teacher, given.batch)
        return given.objective_fn(student, teacher, given.batch, 0.5)[0]

    given.objective(given.teacher_params, 0.5)
    try:
        student, teacher = jax.grad(total, argnums=(0, 1), allow_int=True)(
            given.student_params, given.teacher_params
        )
    except Exception as error:  # the function works, but not under JAX
        name = "objective_fn" if given.whole_fn is None else "whole_fn"
        reason = f"JAX cannot differentiate {name} ({type(error).__name__}); differences "
        raise Skip(f"{reason}would not see a stop_gradient.") from error
    norms = {n: float(np.linalg.norm(g)) for n, g in named(teacher).items() if is_floating(g)}
    own = {n: float(np.linalg.norm(g)) for n, g in named(student).items() if is_floating(g)}
    leaking = [n for n, norm in norms.items() if norm != 0]
    size = math.hypot(*own.values())
    evidence = (
        f"Of {len(norms)} teacher-side leaves {len(leaking)} have a gradient that is not 0"
        f"{': ' + listed(leaking) if leaking else ''} (norm "
        f"{math.hypot(*norms.values()):.3g}; the student's is {size:.3g})."
    )
    ok = not leaking and math.isfinite(size) and size > 0
    return verdict(ok, evidence, leaking=leaking, norms=norms, student_norm=size)


@check(
    "distill.teacher_fixed",
    remedy="Keep the teacher and every projection of its outputs out of the optimiser (also out "
    "of its weight decay) and out of the average of the parameters.",
)
def teacher_fixed(given: Given) -> Verdict:
    """Updates change neither a teacher-side leaf nor the targets."""
    given.need("teacher_of")
    before, after = given.loop
    assert before.teacher is not None and after.teacher is not None
    moved = changed_leaves(before.teacher, after.teacher)
    evidence = (
        f"After {given.calls} calls {len(moved)} of {len(before.teacher)} teacher-side leaves "
        f"have moved{': ' + listed(moved) if moved else ''}"
    )
    drift = None
    if before.targets is not None and after.targets is not None:
        drift = gap(before.targets, after.targets)
        evidence += f", the targets by {drift:.3g} at most"
    return verdict(not moved and not drift, f"{evidence}.", moved=moved, drift=drift)


@check(
    "distill.roles",
    remedy="Exchange teacher and student where the loop is built: the optimiser must hold the "
    "student.",
)
def roles(given: Given) -> Verdict:
    """The student's leaves move, and parameters are as many as declared."""
    before, after = given.loop
    moved = changed_leaves(before.student, after.student)
    counts = {"student": sum(x.size for x in before.student.values())}
    others: list[str] = []
    evidence = f"After {given.calls} calls {len(moved)} of {len(before.student)} student leaves"
    evidence += f" ({counts['student']} parameters)"
    if before.teacher is not None and after.teacher is not None:
        counts["teacher"] = sum(x.size for x in before.teacher.values())
        others = changed_leaves(before.teacher, after.teacher)
        evidence += f" and {len(others)} of {len(before.teacher)} of the teacher"
        evidence += f" ({counts['teacher']})"
    declared = {"student": given.student_parameters, "teacher": given.teacher_parameters}
    wrong = [n for n, x in counts.items() if declared[n] not in (None, x)]
    said = "".join(f"; declared for the {name} are {declared[name]}" for name in wrong)
    return verdict(
        bool(moved) and not wrong, f"{evidence} have moved{said}.", moved=moved, counts=counts
    )


@check(
    "distill.teacher_eval",
    remedy="Run the teacher without dropout and with frozen statistics: deterministic, whatever "
    "mode the student is in.",
)
def teacher_eval(given: Given) -> Verdict:
    """The same batch gives bit-identical targets, twice."""
    changes: dict[str, float] = {}
    logits = None
    if given.targets_fn is not None:
        logits = given.targets()
        changes["targets_fn"] = gap(logits, given.targets())
    if given.teacher_fn is not None:
        logits = given.alone
        changes["teacher_fn"] = gap(logits, dataclasses.replace(given).alone)
    if not changes:
        raise Skip("Not given: teacher_fn or targets_fn.")
    told = ", ".join(f"{name} {change:.3g}" for name, change in changes.items())
    evidence = f"The same batch twice changes logits by at most {told}"
    ppl = None
    if logits is not None and given.tokens.max() < logits.shape[-1] and given.scored.any():
        ppl = math.exp(min(float(next_token_nats(given, logits).mean()), 700.0))
        evidence += f"; the teacher's perplexity on it is {ppl:.4g}"
    ok = all(x == 0 for x in changes.values())
    return verdict(ok, f"{evidence}.", changes=changes, perplexity=ppl)


@check(
    "distill.alignment",
    remedy="Compute the teacher on the student's batch, or store the row's identity and offset "
    "with its cached outputs and look them up by these; logits at t predict token t + 1 in both.",
)
def alignment(given: Given) -> Verdict:
    """The targets are the teacher's own predictions of the batch's next tokens."""
    alone, targets = given.alone, given.targets()
    if alone.shape != targets.shape:
        raise Skip(f"The teacher has logits {alone.shape}, targets are {targets.shape}.")
    scored, ahead = given.scored, given.tokens[:, 1:][given.scored]
    if not scored.any():
        raise Skip("No token of batch is scored.")
    z, y = alone[:, :-1][scored], targets[:, :-1][scored]
    right, hit = z.argmax(-1) == ahead, y.argmax(-1) == ahead
    log_p, log_q = log_softmax(z), log_softmax(y)
    nats = float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())
    eps = max(given.eps, resolution(y))
    limit = max(1e-6, 0.5 * (8 * eps * float(z.std())) ** 2)
    evidence = (
        f"On {len(ahead)} next tokens of the student's batch the teacher is right in "
        f"{right.mean():.1%} alone and {hit.mean():.1%} through the pipeline; the divergence of "
        f"the targets from it is {nats:.3g} nats (limit {limit:.1g}, rounding of the logits)."
    )
    if nats > limit:
        shifts = {}
        for shift in (-2, -1, 1, 2):
            rolled = log_softmax(np.roll(targets, shift, axis=1))[:, 2:-2]
            p = log_softmax(alone)[:, 2:-2]
            shifts[shift] = float((np.exp(p) * (p - rolled)).sum(-1).mean()) if p.size else nats
        best = min(shifts, key=lambda shift: shifts[shift])
        if shifts[best] <= limit:
            evidence += f" They are {abs(best)} position{'s' * (abs(best) > 1)} too "
            evidence += "late." if best < 0 else "early."
    return verdict(nats <= limit, evidence, alone=right.mean(), piped=hit.mean(), divergence=nats)


@check(
    "distill.information",
    remedy="Give teacher and student one tokenizer, or align their texts by character offsets; a "
    "projection through the student's table that was never trained on tokens predicts nothing.",
)
def information(given: Given) -> Verdict:
    """The targets predict real next tokens better than their frequencies do."""
    nats = next_token_nats(given, given.targets())
    if given.unigram_nats is not None:
        unigram = np.full(len(nats), float(given.unigram_nats))
        how = "of unigram_nats"
    else:
        ahead = given.tokens[:, 1:][given.scored]
        if len(ahead) < 100:
            raise Skip(
                f"{len(ahead)} scored tokens are too few for frequencies; give unigram_nats."
            )
        # Frequencies among the other tokens of the batch, with a pseudo-count of 1 for all.
        counts = np.bincount(ahead)[ahead] - 1
        kinds = len(np.unique(ahead))
        unigram = -np.log((counts + 1 / kinds) / len(ahead))
        how = f"with frequencies of the other {len(ahead) - 1} tokens"
    difference = float((nats - unigram).mean())
    error = float((nats - unigram).std() / math.sqrt(len(nats)))
    evidence = (
        f"Next tokens cost {nats.mean():.4f} nats under the targets and {unigram.mean():.4f} "
        f"{how} ({difference:+.4f} with standard error {error:.2g}; below 0 is right)."
    )
    otherwise = "warn" if difference <= 3 * error else "fail"  # NaN fails
    return verdict(
        difference < 0,
        evidence,
        otherwise=otherwise,  # type: ignore[arg-type]
        nats=float(nats.mean()),
        unigram=float(unigram.mean()),
    )


@check(
    "distill.future",
    remedy="Let a student position read only teacher positions whose text ends at or before its "
    "own: no interpolation along time, no whole-sequence pooling, a causal teacher.",
)
def future(given: Given) -> Verdict:
    """Another suffix of the text leaves the targets before it as they were."""
    before = given.targets()
    length = given.tokens.shape[1]
    worst, places, later = 0.0, (0, 0), 0.0
    for cut in sorted({max(1, length // 3), length // 2, length - 1}):
        if given.suffix_fn is not None:
            changed = call("suffix_fn", given.suffix_fn, given.batch, cut)
        else:
            tokens = given.tokens.copy()
            # Tokens of the batch itself, moved by a row and a column, are surely in vocabulary.
            tokens[:, cut:] = np.roll(tokens, (1, 1), (0, 1))[:, cut:]
            changed = {**given.batch, "tokens": tokens}
        change = np.abs(given.targets(changed) - before).max(-1)
        later = max(later, float(change[:, cut:].max()))
        top = float(change[:, :cut].max())
        if top > worst or math.isnan(top):
            worst, places = top, (cut, int(np.argmax(change[:, :cut].max(0))))
    if not later and not worst:
        raise Skip("Targets do not change with the tokens (a cache?): nothing was tested.")
    limit = 8 * given.eps * float(np.abs(before).max())
    evidence = f"Another suffix moves later targets by {later:.3g}, earlier by {worst:.3g} "
    if worst > limit:
        evidence += f"(tokens from {places[0]} on change the target at {places[1]}; "
    else:
        evidence += "("
    evidence += f"limit {limit:.2g})."
    return verdict(worst <= limit, evidence, earlier=worst, later=later, place=places)


CHECKS: tuple[Callable[..., Finding], ...] = (
    teacher_gradient,
    teacher_fixed,
    roles,
    teacher_eval,
    alignment,
    information,
    future,
)
