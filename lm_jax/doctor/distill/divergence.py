"""The divergence of a student from a teacher, a function: its values and gradients are exact."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lm_jax.doctor.checks import check, fixture
from lm_jax.doctor.distill.subject import KINDS, Subject, gradients, scalar
from lm_jax.doctor.facts import Broken, Skip, call, pair
from lm_jax.doctor.findings import Measure, Status, at_most, holds, note
from lm_jax.doctor.numbers import FLOAT32_EPS as EPS
from lm_jax.doctor.numbers import gap, log_softmax

ROWS, LENGTH = 3, 5
GRADIENT_LIMIT = 0.01  # of the gradient's norm; twice what rounding it to bfloat16 costs
GRID = 2.0**-6  # logits below 4 on this grid are exact in bfloat16


class Logits(NamedTuple):
    """Student and teacher logits [B, T, V] and weights [B, T]."""

    student: np.ndarray
    teacher: np.ndarray
    weights: np.ndarray

    @property
    def size(self) -> float:
        """Largest logit."""
        return gap(np.stack(self[:2]))

    @property
    def tokens(self) -> float:
        """Sum of the weights."""
        return float(self.weights.sum(dtype=np.float64))


@dataclasses.dataclass(frozen=True)
class Divergence:
    """A function of (student, teacher, weights, temperature), beside what is declared of it."""

    subject: Subject
    name: str
    fn: Callable[..., Any]
    jax: bool = False  # it takes JAX's arrays and has a gradient

    def __call__(self, logits: Logits, temperature: float = 1.0) -> np.ndarray:
        """Sum and count."""
        arrays = map(jnp.asarray if self.jax else np.array, logits)
        made = self.pair(call(self.name, self.fn, *arrays, temperature))
        return np.array([call(f"a number of {self.name}", scalar, x) for x in made])

    def pair(self, made: Any) -> Any:
        """What the function should have returned."""
        sums = pair(self.name, made, "two scalars (sum, count)")
        if shapes := [np.shape(x) for x in sums if np.shape(x)]:
            raise Broken(f"{self.name} returned shapes {shapes}, not two scalars (sum, count)")
        return sums

    def draw(self, spread: float, stream: int = 0) -> Logits:
        """Random logits on a grid; ragged rows of weights that are not all 1."""
        rng, shape = self.subject.rng(stream), (ROWS, LENGTH, self.subject.vocab_size)
        z, y = (np.round(rng.normal(0, spread, shape) / GRID) * GRID for _ in range(2))
        there = np.arange(LENGTH)[None] < LENGTH - np.arange(ROWS)[:, None]
        weights = rng.choice([0.5, 1.0], shape[:2]) * there
        return Logits(*(x.astype(np.float32) for x in (z, y, weights)))

    def exact(self, logits: Logits, temperature: float = 1.0, kind: str = "") -> Any:
        """The declared sum, and its gradient by the student's logits, in float64."""
        # The kind is a KL(p || m) + b KL(q || m) with m = c p + (1 - c) q, p the teacher's.
        beta = self.subject.beta
        kinds = (1, 0, 0), (0, 1, 1), (beta, 1 - beta, beta), (1, 0, beta)
        a, b, c = kinds[KINDS.index(kind or self.subject.kind)]
        log_q, log_p = (log_softmax(np.float64(z) / temperature) for z in logits[:2])
        p, q = np.exp(log_p), np.exp(log_q)
        with np.errstate(divide="ignore"):
            log_m = np.logaddexp(np.log(c) + log_p, np.log(1 - c) + log_q)
        from_q = log_q - log_m
        to_q = (q * from_q).sum(-1)
        value = a * (p * (log_p - log_m)).sum(-1) + b * to_q
        # The student moves q itself, and with it its share of m.
        pull = (1 - c) * (a * np.exp(log_p + from_q) + b * np.exp(log_q + from_q))
        slope = b * q * (from_q - to_q[..., None]) - pull + q * pull.sum(-1)[..., None]
        scale = self.power(temperature) * logits.weights.astype(np.float64)
        return float((scale * value).sum()), scale[..., None] * slope / temperature

    def power(self, temperature: float) -> float:
        """What the declared value is multiplied by."""
        return temperature**2 if self.subject.t2 else 1.0

    def rounding(self, logits: Logits, temperature: float = 1.0) -> float:
        """Error that float32 may leave in the sum."""
        size = logits.size / temperature + math.log(self.subject.vocab_size)
        return EPS * 16 * size * self.power(temperature) * logits.tokens

    def gradient(self, logits: Logits, temperature: float = 1.0, dtype: Any = "float32") -> Any:
        """JAX's gradient by the student's logits, or `Skip`."""
        z, y = (jnp.asarray(x, dtype) for x in logits[:2])
        others = y, jnp.asarray(logits.weights), temperature
        found = gradients(self.name, lambda z: self.pair(self.fn(z, *others))[0], z)
        return np.asarray(found[0]).astype(np.float64)


@fixture
def kd(subject: Subject, kd_fn: Any) -> Divergence:
    """The examined function."""
    found = Divergence(subject, "kd_fn", kd_fn, jax=True)
    try:
        found.gradient(found.draw(1.0))
    except Skip:
        return dataclasses.replace(found, jax=False)
    return found


@fixture
def declared(subject: Subject, kd: Divergence) -> Divergence:
    """The function, if it is about the declared one: else every further error has that cause."""
    logits = kd.draw(2.0)
    value, slope = kd.exact(logits)
    off = [gap(kd(logits)[0], value) / value]
    off += [np.linalg.norm(kd.gradient(logits) - slope) / np.linalg.norm(slope)] if kd.jax else []
    if not max(off) <= 0.05:
        raise Skip(f"kd_fn is not the declared {subject.kind} sum to begin with.")
    return kd


@check(
    "Divide both logits by the temperature, and multiply the divergence by T^2 exactly once, where "
    "t2 declares it: in kd_fn or outside."
)
def temperature(kd: Divergence) -> list[Measure]:
    """Logits are divided by T, and T^2 is present exactly as often as declared."""
    # First where softmax is linear to a few percent, so that T itself cancels out; then where not.
    cases = (0.5, 2.0, 8.0, ("T^2 too often", "T^2 missing")), (8.0, 1.0, 8.0, ("T left out",) * 2)
    found = []
    for spread, low, high, causes in cases:
        logits = kd.draw(spread)
        equal = logits._replace(student=logits.teacher)  # what a cross-entropy has in addition
        sums = [(kd(logits, t) - kd(equal, t))[0] / kd.exact(logits, t)[0] for t in (low, high)]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = float(np.divide(*sums))
        what = f"divergence at T = {low:g} over that at T = {high:g}, measured / exact"
        ok, key = abs(ratio - 1) <= 0.3, f"ratio at spread {spread:g}"
        cause = causes[ratio > 1]
        found.append(holds(ok, what, ratio, limit="0.7 to 1.3", where=cause, key=key))
        if not ok:
            break
    return found


@check("Sum p (log p - log q) over the vocabulary, logs by log_softmax, in the declared direction.")
def divergence(subject: Subject, kd: Divergence) -> list[Measure]:
    """Value per token and gradient are those of the declared direction, and equals give 0."""
    logits = kd.draw(2.0)
    logits = logits._replace(weights=np.ones_like(logits.weights))  # those are for `padding`
    known = {kind: kd.exact(logits, 1.0, kind)[0] / logits.tokens for kind in KINDS}
    entropy = -(np.exp(log_p := log_softmax(logits.teacher)) * log_p).sum(-1).mean()
    known["forward plus the teacher's entropy, a cross-entropy"] = known["forward"] + entropy
    value, allowed = known[subject.kind], kd.rounding(logits) / logits.tokens
    if value <= 4 * allowed:
        raise Skip(f"At beta = {subject.beta:g} the divergence drowns in float32's rounding.")
    total, count = kd(logits)
    equal, _ = kd(logits._replace(teacher=logits.student))
    per_token = float(total / count) if count else math.nan
    near = min(known, key=lambda kind: abs(known[kind] - per_token))
    looks = f"which is {near}" if abs(known[near] - per_token) <= allowed else ""
    off = gap(per_token, value)
    found = [
        note(f"{subject.kind} is {value:.5g} nats a token, kd_fn's", per_token, key="per_token"),
        at_most("error of the divergence", off, allowed, where=looks, key="error"),
        at_most("nats of equal logits", gap(equal / max(count, 1)), allowed, key="equal"),
    ]
    if kd.jax:
        # Of a mean instead of a sum too: which it is, `padding` says.
        scale = logits.tokens / float(count)
        error = gap(scale * kd.gradient(logits), kd.exact(logits)[1])
        found.append(at_most("error of its gradient", error, EPS * 32 * (1 + logits.size)))
    return found


@check("Return the weighted sum and the sum of weights; divide neither by batch nor by length.")
def padding(kd: Divergence) -> list[Measure]:
    """Columns of weight 0 change nothing; the batch twice along time is twice the sums."""
    logits, unweighted = kd.draw(2.0), kd.draw(3.0, 1)
    unweighted.weights[:] = 0
    longer, doubled = (
        Logits(*map(np.hstack, zip(logits, more, strict=True))) for more in (unweighted, logits)
    )
    once, allowed = kd(logits), 2 * kd.rounding(longer)
    halved = kd(logits._replace(weights=logits.weights / 2))
    return [
        at_most(f"the sums change by {LENGTH} columns of weight 0", gap(kd(longer), once), allowed),
        at_most(
            "with the batch twice along time, the sums are off by",
            gap(kd(doubled), 2 * once),
            2 * allowed,
        ),
        at_most("with half the weights, the sums are off by", gap(2 * halved, once), allowed),
        at_most(
            "the count is off the sum of weights by",
            gap(once[1], logits.tokens),
            EPS * 16 * logits.tokens,
        ),
    ]


@check("Cast both logits to float32 before the softmax, and keep p - q in float32.")
def precision(subject: Subject, declared: Divergence) -> list[Measure]:
    """Near p = q the gradient is that of float32, whatever the dtype of the logits."""
    kd, narrow = declared, jnp.dtype(subject.compute_dtype) != jnp.float32
    _, teacher, weights = kd.draw(1.0)
    teacher = np.clip(teacher, -3, 3)
    steps = subject.rng(2).integers(-1, 2, teacher.shape).astype(np.float32)
    logits = Logits(teacher + np.float32(GRID) * steps, teacher, weights)
    right, found = kd.exact(logits)[1], []
    for name in ("float32", "bfloat16"):  # the logits are exact in both
        error = np.linalg.norm(kd.gradient(logits, 1.0, name) - right) / np.linalg.norm(right)
        what = f"relative error of the gradient, {name} logits {GRID:.2g} apart"
        # Where all is float32 the other case does not come up.
        severity: Status = "fail" if narrow or name == "float32" else "warn"
        found.append(at_most(what, float(error), GRADIENT_LIMIT, key=name, otherwise=severity))
    return found


@check("Use log_softmax without epsilon, clamp or nan_to_num: it is exact for finite logits.")
def saturation(subject: Subject, declared: Divergence) -> list[Measure]:
    """Values and gradients are exact far from zero: no epsilon, no clamp."""
    kd = declared
    student, teacher, weights = kd.draw(2.0, 3)
    target = np.eye(subject.vocab_size)[np.arange(LENGTH) % subject.vocab_size]
    sharp, found = np.where(target, 200, teacher), []
    for name, z, y in (
        ("teacher one-hot", student, sharp),
        ("teacher one-hot where the student has exp(-120)", student - 120 * target, sharp),
        ("both from -40 to 40", np.clip(20 * student, -40, 40), np.clip(20 * teacher, -40, 40)),
        ("both 65536 higher", student + 2**16, teacher + 2**16),
    ):
        case = Logits(z.astype(np.float32), y.astype(np.float32), weights)
        value, slope = kd.exact(case)
        found.append(
            at_most(f"error of the sum, {name}", gap(kd(case)[0], value), kd.rounding(case))
        )
        if kd.jax:
            error = float(np.linalg.norm(kd.gradient(case) - slope))
            limit = 16 * EPS * case.size * (1 + float(np.linalg.norm(slope)))
            found.append(at_most(f"error of the gradient, {name}", error, limit))
    return found


@check(
    "Make the ids of the union unique, or mask repeats, before the softmax over the subset. Let "
    "both sides add up to 1 on it, or give all other tokens one entry together."
)
def subset(subject: Subject, topk_fn: Any) -> list[Measure]:
    """A subset of all tokens gives the whole value, and of some it is least for equal logits."""
    V, union = subject.vocab_size, subject.topk_union

    def of(k: int) -> Divergence:
        return Divergence(
            subject, "topk_fn", lambda z, y, w, t: topk_fn(*map(jnp.asarray, (z, y, w)), t, k)
        )

    k = (3 * V + 3) // 4 if union else V
    kd = of(k)
    case = kd.draw(1.0, 4)
    if union:  # one sorted up, one down: both halves are in the union, the middle is in it twice
        case = Logits(np.sort(case.student), -np.sort(-case.teacher), case.weights)
    right = kd.exact(case, 2.0)[0]
    what = f"error of {right:.5g}, the sum over all {V} tokens, with k = {k}"
    few, likely = of(max(1, V // 4)), case.teacher >= np.sort(case.teacher)[..., [-max(1, V // 4)]]
    equal, *others = (
        few(case._replace(student=case.teacher + np.float32(more) * likely))[0]
        for more in (0, 0.5, -0.5)
    )
    better = f"with k = {V // 4}, nats by which another student is better than an equal one"
    return [
        at_most(what, gap(kd(case, 2.0)[0], right), kd.rounding(case, 2.0), key="error"),
        at_most(
            better, float(equal - min(others)), kd.rounding(case), otherwise="warn", key="better"
        ),
    ]
