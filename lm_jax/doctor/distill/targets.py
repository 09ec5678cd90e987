"""Checks of the teacher of a distillation and of the targets made of it."""

from typing import Any

import numpy as np
import scipy.special

from lm_jax.doctor import trees
from lm_jax.doctor.checks import check
from lm_jax.doctor.distill.subject import Point, Subject
from lm_jax.doctor.facts import Broken, Skip, call, give
from lm_jax.doctor.findings import Finding, Measure, at_least, at_most, equals, holds, none, note
from lm_jax.doctor.numbers import gap, log_softmax, mean, nats, resolution

MOST = 2**23  # logits that are taken to float64 at once
FLOOR = 50  # nats; logits further below the largest of their position say nothing
Loop = tuple[Point, Point]


def floored(logits: np.ndarray) -> np.ndarray:
    """Logits in float64 without what a mask puts far below the others."""
    wide = logits.astype(np.float64)
    return np.maximum(wide, wide.max(-1, keepdims=True) - FLOOR)


def change(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Largest difference of two logits [B, T, V] at every position, [B, T]."""
    pairs = zip(*(x.reshape(-1, x.shape[-1]) for x in (a, b)), strict=True)
    return np.reshape([gap(floored(x), floored(y)) for x, y in pairs], a.shape[:2])


def thinned(places: np.ndarray, vocab_size: int) -> np.ndarray:
    """As many of the places [2, N], evenly, as fit into memory with their logits."""
    n = places.shape[1]
    return places[:, np.linspace(0, n - 1, min(n, max(64, MOST // vocab_size))).astype(int)]


def nats_apart(a: np.ndarray, b: np.ndarray) -> float:
    """Mean divergence of logits b from logits a, [N, V].

    Where b has left tokens out, as a cache of the likeliest does, it is that of the others, and
    what they have less than as many of the likeliest.
    """
    a, lost = floored(a), 0.0
    kept = floored(b) == b
    if not kept.all():
        most = np.logaddexp.accumulate(-np.sort(-a), axis=-1)
        most = np.take_along_axis(most, kept.sum(-1, keepdims=True) - 1, -1)[..., 0]
        a = np.where(kept, a, -np.inf)
        lost = most - scipy.special.logsumexp(a, axis=-1)
        b = np.where(kept, b, -np.inf)
    log_p, log_q = log_softmax(floored(a)), log_softmax(floored(b))
    return float(((np.exp(log_p) * (log_p - log_q)).sum(-1) + lost).mean())


def moved(before: trees.Arrays, after: trees.Arrays) -> list[str]:
    """Names of the leaves of which any bit is another."""
    return [n for n, x in before.items() if n not in after or not trees.same(x, after[n])]


@check("Keep the teacher and projections of its outputs out of optimiser, decay and averages.")
def teacher_fixed(
    subject: Subject, teacher_of: Any, loop: Loop, teacher_eval: Finding | None = None
) -> list[Measure]:
    """Updates change neither a teacher-side leaf nor the targets."""
    before, after = loop
    what = f"teacher-side leaves moved by {subject.calls} calls"
    found = [none(what, moved(before.teacher, after.teacher), of=len(before.teacher), key="moved")]
    # Targets that differ at every reading say nothing of updates.
    if teacher_eval and before.targets is not None and after.targets is not None:
        drift = float(change(before.targets, after.targets).max())
        found.append(equals("change of the targets", drift, 0, key="drift"))
    return found


@check("Exchange teacher and student where the loop is built: the optimiser must hold the student.")
def roles(subject: Subject, loop: Loop) -> list[Measure]:
    """The student's leaves move, and parameters are as many as declared."""
    before, after = loop
    students = moved(before.student, after.student)
    what = f"leaves of the student, of {len(before.student)}, moved by {subject.calls} calls"
    found = [at_least(what, len(students), 1, key="moved")]
    for name in ("student", "teacher"):
        leaves, declared = getattr(before, name), getattr(subject, f"{name}_parameters")
        if leaves and declared is not None:
            size = sum(x.size for x in leaves.values())
            found.append(equals(f"parameters of the {name}", size, declared))
    return found


@check("Run the teacher without dropout and with frozen statistics, as it is evaluated.")
def teacher_eval(subject: Subject, batch: Any, alone: Any = None, taught: Any = None) -> list:
    """The same batch gives bit-identical targets, twice."""
    found = []
    for name, first, read in (
        ("targets_fn", taught, batch),
        ("teacher_fn", alone, batch["tokens"]),
    ):
        if first is not None:
            drift = change(first, subject.logits(name, subject.teacher_params, read)).max()
            found.append(equals(f"change of what {name} returns", float(drift), 0, key=name))
    if not found:
        raise give("targets_fn", "teacher_params")
    return found


@check("Compute the teacher on the student's batch, or look up what is stored by row and offset.")
def alignment(
    subject: Subject, alone: np.ndarray, taught: np.ndarray, scored: Any, teacher_eval: Finding
) -> Measure:
    """The targets are the teacher's own predictions of the batch's next tokens."""
    if alone.shape != taught.shape:
        raise Skip(f"The teacher has logits {alone.shape}, targets are {taught.shape}.")
    rows, columns = thinned(scored, alone.shape[-1])
    T, z, y = alone.shape[1], alone[rows, columns], taught[rows, columns]
    inner = np.clip(columns, 2, T - 3)

    def shifted(targets: np.ndarray, shift: int) -> float:
        return nats_apart(alone[rows, inner], targets[rows, (inner - shift) % T])

    eps = max(subject.eps, resolution(y.astype(np.float64)))
    used = np.where(floored(z) == z, z, np.nan).astype(np.float64)
    limit = max(1e-6, 0.5 * (8 * eps * float(np.nanstd(used))) ** 2)
    narrow = 0.5 * (2.0**-8 * float(np.nanstd(used))) ** 2
    found, hint, otherwise = nats_apart(z, y), "", "fail"
    if limit < found <= narrow:
        hint, otherwise = "as storing them in bfloat16 makes it", "warn"
    elif not found <= limit:
        best = min((-2, -1, 1, 2), key=lambda shift: shifted(taught, shift))
        if shifted(taught, best) <= limit:
            many = ("1 position", "2 positions")[abs(best) - 1]
            hint = f"they are {many} too {'late' if best < 0 else 'early'}"
    elif shifted(alone, 1) <= limit:
        raise Skip("The teacher says the same at neighbouring positions: a shift would not show.")
    what = "nats by which the targets differ from the teacher's own predictions"
    return at_most(what, found, limit, where=hint, otherwise=otherwise, key="divergence")


@check("Give both one tokenizer or align their texts: an untrained projection predicts nothing.")
def information(taught: Any, scored: Any, tokens: Any, unigram_nats: Any = None) -> list[Measure]:
    """The targets predict real next tokens better than their frequencies do."""
    rows, columns = thinned(scored, taught.shape[-1])
    ahead, others = tokens[rows, columns + 1], tokens[scored[0], scored[1] + 1]
    if not 0 <= ahead.min() <= ahead.max() < taught.shape[-1]:
        raise Broken(f"tokens reach {ahead.max()}, targets have {taught.shape[-1]} entries")
    if unigram_nats is None:
        if len(others) < 100:
            why = f"{len(others)} scored tokens are too few for frequencies; give unigram_nats."
            raise Skip(why, "unigram_nats")
        # Frequencies among the other tokens of the batch, with a pseudo-count of 1 for all.
        counts = np.bincount(others)
        unigram_nats = -np.log((counts[ahead] - 1 + 1 / np.count_nonzero(counts)) / len(others))
    logits = taught[rows, columns]
    kept = np.take_along_axis(floored(logits) == logits, ahead[:, None], -1)[:, 0]
    cost, share = nats(floored(logits), ahead), float(kept.mean())
    if 0 < share < 1:  # a token that is left out costs what its frequency does, once that is told
        cost = np.where(kept, cost - np.log(share), unigram_nats - np.log(1 - share))
    excess = mean(cost - unigram_nats)
    above: Any = "warn" if excess.value <= 3 * excess.error else "fail"  # NaN fails
    what = "nats a next token costs more under the targets than by its frequency"
    return [
        holds(excess.value < 0, what, excess.value, limit="below 0", otherwise=above, key="excess"),
        note("standard error of that", excess.error),
    ]


@check("Let a position read the teacher up to its own text: no interpolation or pooling in time.")
def future(
    subject: Subject,
    taught: np.ndarray,
    tokens: np.ndarray,
    batch: Any,
    teacher_eval: Finding,
    suffix_fn: Any = None,
) -> Measure:
    """Another suffix of the text leaves the targets before it as they were."""
    limit = 8 * subject.eps * max(gap(floored(x)) for row in taught for x in row)
    length, worst, later, where = tokens.shape[1], 0.0, 0.0, ""
    for cut in sorted({max(1, length // 3), length // 2, length - 1}):
        if suffix_fn is not None:
            changed = call("suffix_fn", suffix_fn, batch, cut)
        else:
            other = tokens.copy()
            # Tokens of the batch itself, moved by a row and a column, are surely in vocabulary.
            other[:, cut:] = np.roll(tokens, (1, 1), (0, 1))[:, cut:]
            changed = {**batch, "tokens": trees.like(batch["tokens"], other)}
        made = change(taught, subject.logits("targets_fn", subject.teacher_params, changed)).max(0)
        later = max(later, float(made[cut:].max()))
        if made[:cut].max() > worst:
            worst = float(made[:cut].max())
            where = f"tokens from {cut} on change the target at {np.argmax(made[:cut])}"
    if max(later, worst) <= limit:
        raise Skip("Targets do not change with the tokens (a cache?): nothing was tested.")
    return at_most(
        "change of targets before the text that was replaced",
        worst,
        limit,
        where=where,
        key="earlier",
    )
