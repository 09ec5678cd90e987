"""The divergence of a student from a teacher, a function: its values and gradients are exact."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lm_jax.doctor.checks import check, fixture
from lm_jax.doctor.distill.subject import KINDS, Subject, gradients, scalar
from lm_jax.doctor.facts import Broken, Skip, call
from lm_jax.doctor.findings import Measure, at_most, holds, note
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
        return max(float(np.abs(z).max()) for z in self[:2])

    @property
    def tokens(self) -> float:
        """Sum of the weights."""
        return float(self.weights.sum(dtype=np.float64))


def pair(name: str, made: Any) -> tuple[Any, Any]:
    """What a function should have returned: a sum and a count."""
    if not isinstance(made, tuple | list) or [np.shape(x) for x in made] != [(), ()]:
        raise Broken(f"{name} returned {str(made)[:40]} instead of two scalars (sum, count)")
    return made[0], made[1]


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
        made = pair(self.name, call(self.name, self.fn, *arrays, temperature))
        return np.array([call(f"a number of {self.name}", scalar, x) for x in made])

    def draw(self, spread: float, stream: int = 0) -> Logits:
        """Random logits on a grid; ragged rows of weights that are not all 1."""
        rng, shape = self.subject.rng(stream), (ROWS, LENGTH, self.subject.vocab_size)
        z, y = (np.round(rng.normal(0, spread, shape) / GRID) * GRID for _ in range(2))
        there = np.arange(LENGTH)[None] < LENGTH - np.arange(ROWS)[:, None]
        weights = rng.choice([0.5, 1.0], shape[:2]) * there
        return Logits(*(x.astype(np.float32) for x in (z, y, weights)))

    def mixture(self, kind: str = "") -> tuple[float, float, float]:
        """A kind as a KL(p || m) + b KL(q || m) with m = c p + (1 - c) q: a, b and c.

        p is the teacher's distribution and q the student's.
        """
        beta = self.subject.beta
        found = (1, 0, 0), (0, 1, 1), (beta, 1 - beta, beta), (1, 0, beta)
        return found[KINDS.index(kind or self.subject.kind)]

    def exact(
        self, logits: Logits, temperature: float = 1.0, kind: str = ""
    ) -> tuple[float, np.ndarray]:
        """The declared sum, and its gradient by the student's logits, in float64."""
        a, b, c = self.mixture(kind)
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
        per_token = EPS * 16 * (logits.size / temperature + math.log(self.subject.vocab_size))
        return per_token * self.power(temperature) * logits.tokens

    def gradient(
        self, logits: Logits, temperature: float = 1.0, dtype: Any = np.float32
    ) -> np.ndarray:
        """JAX's gradient by the student's logits, or `Skip`."""
        z, y = (jnp.asarray(x, dtype) for x in logits[:2])
        weights = jnp.asarray(logits.weights)

        def total(z: Any) -> Any:
            return pair(self.name, self.fn(z, y, weights, temperature))[0]

        return np.asarray(gradients(self.name, total, z)[0]).astype(np.float64)

    def pull(self, logits: Logits, temperature: float) -> tuple[float, float]:
        """Size of the gradient, measured and exact.

        It is the norm, or without JAX the slope from student to teacher by central differences.
        """
        _, right = self.exact(logits, temperature)
        if self.jax:
            measured = self.gradient(logits, temperature)
            return float(np.linalg.norm(measured)), float(np.linalg.norm(right))
        z, step = logits.student, 0.125 * (logits.student - logits.teacher)
        up, down = (self(logits._replace(student=x), temperature)[0] for x in (z + step, z - step))
        return abs(float(up - down)) / 0.25, abs(float((right * step / 0.125).sum()))


@fixture
def kd(subject: Subject, kd_fn: Any) -> Divergence:
    """The examined function."""
    found = Divergence(subject, "kd_fn", kd_fn, jax=True)
    try:
        found.gradient(found.draw(1.0))
    except Skip:
        return dataclasses.replace(found, jax=False)
    return found


@check("Multiply the divergence by T^2 exactly once, where t2 declares it: in kd_fn or outside.")
def temperature(subject: Subject, kd: Divergence) -> list[Measure]:
    """T^2 is present exactly as often as declared."""
    # At a spread of a quarter of the lower temperature softmax is linear to a few percent.
    logits = kd.draw(0.5)
    (low, low_exact), (high, high_exact) = (kd.pull(logits, t) for t in (2.0, 8.0))
    if not (low > 0 and high > 0 and math.isfinite(low + high)):
        sizes = "size of the gradient at T = 2 and T = 8"
        return [holds(False, sizes, f"{low:.3g}, {high:.3g}", limit="above 0")]
    ratio = (low / high) / (low_exact / high_exact)
    total, count = kd(logits, 16.0)
    variance = (logits.student - logits.teacher).astype(np.float64).var(-1)
    a, b, c = kd.mixture()
    share = (a * (1 - c) ** 2 + b * c**2) * kd.power(16.0) / 256
    limit = 0.5 * share * (variance * logits.weights).sum() / logits.tokens
    powers = {0: "", -1: "T^2 too often", 1: "T^2 missing"}
    near = min(powers, key=lambda power: abs(power - math.log(ratio) / math.log(16)))

    def fits(what: str, value: float, key: str) -> Measure:
        ok = abs(value - 1) <= 0.3
        return holds(ok, what, value, limit="0.7 to 1.3", where=powers[near], key=key)

    against = float(total / count) / limit if count else math.nan
    return [
        fits("gradient at T = 2 over that at T = 8, measured / exact", ratio, "gradient_ratio"),
        fits("value at T = 16 over half the variance of the difference", against, "value_ratio"),
    ]


@check("Sum p (log p - log q) over the vocabulary, logs by log_softmax, in the declared direction.")
def divergence(subject: Subject, kd: Divergence) -> list[Measure]:
    """Value per token and gradient are those of the declared direction, and equals give 0."""
    logits = kd.draw(2.0)
    known = {kind: kd.exact(logits, 1.0, kind)[0] / logits.tokens for kind in KINDS}
    value, allowed = known[subject.kind], kd.rounding(logits) / logits.tokens
    if value <= 4 * allowed:
        raise Skip(f"At beta = {subject.beta:g} the divergence drowns in float32's rounding.")
    total, count = kd(logits)
    equal, _ = kd(logits._replace(teacher=logits.student))
    per_token = float(total / count) if count else math.nan
    near = min(known, key=lambda kind: abs(known[kind] - per_token))
    looks = f"which is {near}" if abs(known[near] - per_token) <= allowed else ""
    found = [
        note("nats per token", per_token, key="per_token"),
        note(f"exact for {subject.kind}", value, key="exact"),
        at_most("its error", gap(per_token, value), allowed, where=looks, key="error"),
        at_most("nats of equal logits", gap(equal / max(count, 1)), allowed, key="equal"),
    ]
    if kd.jax:
        error = gap(kd.gradient(logits), kd.exact(logits)[1])
        limit = EPS * 32 * (1 + logits.size) * float(logits.weights.max())
        found.append(at_most("error of the gradient", error, limit))
    return found


@check("Return the weighted sum and the sum of weights; divide neither by batch nor by length.")
def padding(kd: Divergence) -> list[Measure]:
    """Columns of weight 0 change nothing; the batch twice along time is twice the sums."""
    logits, other = kd.draw(2.0), kd.draw(3.0, 1)
    longer = Logits(*(np.concatenate(x, 1) for x in zip(logits, other, strict=True)))
    longer.weights[:, LENGTH:] = 0
    once, padded, allowed = kd(logits), kd(longer), 2 * kd.rounding(longer)
    twice = kd(Logits(*(np.concatenate([x, x], 1) for x in logits)))
    return [
        note("sum and count", f"{once[0]:.6g}, {once[1]:.6g}", key="sums"),
        at_most(f"change by {LENGTH} columns of weight 0", gap(padded, once), allowed),
        at_most("error of twice the length", gap(twice, 2 * once), 2 * allowed),
        at_most("error of the count", gap(once[1], logits.tokens), EPS * 16 * logits.tokens),
    ]


@check("Cast both logits to float32 before the softmax, and keep p - q in float32.")
def precision(subject: Subject, kd: Divergence) -> list[Measure]:
    """Near p = q the gradient is that of float32, whatever the dtype of the logits."""
    _, teacher, weights = kd.draw(1.0)
    teacher = np.clip(teacher, -3, 3)
    steps = subject.rng(2).integers(-1, 2, teacher.shape).astype(np.float32)
    logits = Logits(teacher + np.float32(GRID) * steps, teacher, weights)
    _, right = kd.exact(logits)
    found = []
    for name in ("float32", "bfloat16"):  # the logits are exact in both
        error = np.linalg.norm(kd.gradient(logits, 1.0, jnp.dtype(name)) - right)
        what = f"relative error of the gradient, {name} logits {GRID:.2g} apart"
        relative = float(error / np.linalg.norm(right))
        found.append(at_most(what, relative, GRADIENT_LIMIT, key=name))
    return found


@check("Use log_softmax without epsilon, clamp or nan_to_num: it is exact for finite logits.")
def saturation(subject: Subject, kd: Divergence) -> list[Measure]:
    """Values and gradients are exact far from zero: no epsilon, no clamp."""
    student, teacher, weights = kd.draw(2.0, 3)
    hot = np.arange(LENGTH) % subject.vocab_size
    target = np.arange(subject.vocab_size) == hot[None, :, None]
    sharp = np.where(target, np.float32(200), teacher)
    far = np.float32(2.0**16)
    found = []
    for name, z, y in (
        ("teacher one-hot", student, sharp),
        ("teacher one-hot where the student has exp(-120)", student - 120 * target, sharp),
        ("both from -40 to 40", np.clip(20 * student, -40, 40), np.clip(20 * teacher, -40, 40)),
        ("both 65536 higher", student + far, teacher + far),
    ):
        case = Logits(z.astype(np.float32), y.astype(np.float32), weights)
        value, slope = kd.exact(case)
        found.append(at_most(f"error, {name}", gap(kd(case)[0], value), kd.rounding(case)))
        if kd.jax:
            error = float(np.linalg.norm(kd.gradient(case) - slope))
            limit = 16 * EPS * case.size * (1 + float(np.linalg.norm(slope)))
            found.append(at_most("of the gradient", error, limit, key=f"gradient, {name}"))
    return found


@check("Make the ids of the union unique, or mask repeats, before the softmax over the subset.")
def subset(subject: Subject, topk_fn: Any) -> list[Measure]:
    """A subset that is the whole vocabulary gives the value of the whole vocabulary."""
    V, found = subject.vocab_size, []
    # Sorted the other way round both halves are in the union, and the middle is in it twice.
    for k in (V, (3 * V + 3) // 4) if subject.topk_union else (V,):

        def at_k(z: Any, y: Any, weights: Any, t: float, k: int = k) -> Any:
            return topk_fn(*map(jnp.asarray, (z, y, weights)), t, k)

        kd = Divergence(subject, "topk_fn", at_k)
        z, y, weights = kd.draw(1.0, 4)
        case = Logits(z, y, weights) if k == V else Logits(np.sort(z), -np.sort(-y), weights)
        total, right = kd(case, 2.0)[0], kd.exact(case, 2.0)[0]
        what = f"error of {right:.5g}, the sum over all {V} tokens, with k = {k}"
        found.append(at_most(what, gap(total, right), kd.rounding(case, 2.0), key=f"k = {k}"))
    return found
