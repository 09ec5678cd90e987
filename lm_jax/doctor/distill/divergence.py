"""Checks of the divergence of a student from a teacher: values and gradients of a function."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.doctor.numbers import FLOAT32_EPS as EPS
from lm_jax.doctor.numbers import gap
from lm_jax.doctor.old import Finding, Skip, Verdict, call, check, judge, verdict

ROWS, LENGTH = 3, 5
KINDS = ("forward", "reverse", "jsd", "skew")
GRID = 2.0**-6  # logits below 4 on this grid are exact in bfloat16
GRADIENT_LIMIT = 0.01  # of the gradient's norm; twice what rounding it to bfloat16 costs


class Logits(tuple):
    """Student and teacher logits [B, T, V] and weights [B, T]."""

    __slots__ = ()

    @property
    def size(self) -> float:
        """Largest logit."""
        return max(float(np.abs(z).max()) for z in self[:2])


@dataclasses.dataclass(eq=False)
class Divergence:
    """The examined function with what is declared about it."""

    fn: Callable | None
    topk_fn: Callable | None
    topk_union: bool
    kind: str
    beta: float
    t2: bool
    vocab_size: int
    seed: int

    def logits(self, spread: float, draw: int = 0, grid: float = GRID) -> Logits:
        """Random logits on a grid; ragged rows of weights that are not all 1."""
        rng = np.random.default_rng((self.seed, draw))
        shape = ROWS, LENGTH, self.vocab_size
        student, teacher = (_on(grid, rng.normal(0, spread, shape)) for _ in range(2))
        weights = rng.choice([0.5, 1.0], shape[:2]) * (
            np.arange(LENGTH)[None] < LENGTH - np.arange(ROWS)[:, None]
        )
        return Logits((student, teacher, weights.astype(np.float32)))

    def factor(self, temperature: float) -> float:
        """What the declared value is multiplied by."""
        return temperature**2 if self.t2 else 1.0

    def exact(
        self, logits: Logits, temperature: float, kind: str | None = None
    ) -> tuple[float, np.ndarray]:
        """The declared sum, and its gradient by the student's logits, in float64."""
        kind = kind or self.kind
        log_q, log_p = (log_softmax(z / temperature) for z in logits[:2])
        weights = logits[2].astype(np.float64)
        p, q = np.exp(log_p), np.exp(log_q)
        if kind == "forward":
            value, slope = (p * (log_p - log_q)).sum(-1), q - p
        elif kind == "skew":
            log_m = np.logaddexp(math.log(self.beta) + log_p, math.log(1 - self.beta) + log_q)
            value = (p * (log_p - log_m)).sum(-1)
            pull = (1 - self.beta) * q * np.exp(log_p - log_m)
            slope = q * pull.sum(-1)[..., None] - pull
        else:
            log_m, share = log_p, 1.0
            if kind == "jsd":
                share = 1 - self.beta
                log_m = np.logaddexp(math.log(self.beta) + log_p, math.log(share) + log_q)
            to_m = (q * (log_q - log_m)).sum(-1)
            value = share * to_m
            slope = share * q * (log_q - log_m - to_m[..., None])
            if kind == "jsd":
                value = value + self.beta * (p * (log_p - log_m)).sum(-1)
        scale = self.factor(temperature)
        gradient = scale * slope * weights[..., None] / temperature
        return float(scale * (value * weights).sum()), gradient

    @functools.cached_property
    def untraceable(self) -> str:
        """Name of the error where JAX cannot differentiate the function, else empty."""
        try:
            self._backward(*map(jnp.asarray, self.logits(1.0)), 1.0)
        except Exception as error:  # reported by the checks that need a gradient
            return type(error).__name__
        return ""

    @functools.cached_property
    def _backward(self) -> Callable:
        fn = self._given()
        return jax.grad(lambda *arrays: fn(*arrays)[0])

    def _given(self) -> Callable:
        if self.fn is None:
            raise Skip("Not given: kd_fn.")
        return self.fn

    def __call__(self, logits: Logits, temperature: float, dtype: Any = np.float32) -> np.ndarray:
        """Sum and count."""
        student, teacher, weights = logits
        arrays: tuple[Any, ...] = student.astype(dtype), teacher.astype(dtype), weights
        fn = self._given()
        if not self.untraceable:
            arrays = tuple(map(jnp.asarray, arrays))
        return pair("kd_fn", call("kd_fn", fn, *arrays, temperature))

    def gradient(self, logits: Logits, temperature: float, dtype: Any = np.float32) -> np.ndarray:
        """By the student's logits, through JAX."""
        self._given()
        if self.untraceable:
            raise Skip(f"JAX cannot differentiate kd_fn ({self.untraceable}).")
        student, teacher, weights = logits
        arrays = student.astype(dtype), teacher.astype(dtype), weights
        made = call("the gradient of kd_fn", self._backward, *map(jnp.asarray, arrays), temperature)
        return np.asarray(made).astype(np.float64)

    def pull(self, logits: Logits, temperature: float) -> tuple[float, float]:
        """Size of the gradient, measured and exact.

        It is the norm, or without JAX the slope from student to teacher by central differences.
        """
        exact = self.exact(logits, temperature)[1]
        if not self.untraceable:
            measured = self.gradient(logits, temperature)
            return float(np.linalg.norm(measured)), float(np.linalg.norm(exact))
        student, teacher, weights = logits
        step = 0.125 * (student - teacher)
        ends = [
            self(Logits((student + s * step, teacher, weights)), temperature)[0] for s in (1, -1)
        ]
        return abs(float(ends[0] - ends[1])) / 0.25, abs(float((exact * step / 0.125).sum()))

    def rounding(self, logits: Logits, temperature: float = 1.0) -> float:
        """Error that float32 may leave in the sum."""
        per_token = EPS * 16 * (logits.size / temperature + math.log(self.vocab_size))
        return per_token * self.factor(temperature) * float(logits[2].sum())


@check(
    "distill.temperature",
    remedy="Multiply the divergence of the softened distributions by T^2 exactly once, where it "
    "is declared (t2 says whether kd_fn does).",
)
def temperature(kd: Divergence) -> Verdict:
    """T^2 is present exactly as often as declared."""
    # At a spread of a quarter of the lower temperature softmax is linear to a few percent.
    logits = kd.logits(0.5)
    (low, low_exact), (high, high_exact) = (kd.pull(logits, t) for t in (2.0, 8.0))
    if not (low > 0 and high > 0 and math.isfinite(low + high)):
        return verdict(False, f"The gradient is {low:.3g} at T = 2 and {high:.3g} at T = 8.")
    ratio = (low / high) / (low_exact / high_exact)
    student, teacher, weights = logits
    total, count = kd(logits, 16.0)
    half = 0.5 * ((student - teacher).astype(np.float64).var(-1) * weights).sum() / weights.sum()
    shares = {"forward": 1.0, "reverse": 1.0, "jsd": kd.beta * (1 - kd.beta)}
    shares["skew"] = (1 - kd.beta) ** 2
    limit = half * shares[kd.kind] / (1 if kd.t2 else 256)
    against = float(total / count) / limit if count else math.nan
    powers = {0.0: "right", -2.0: "T^2 too often", 2.0: "T^2 missing"}
    found = -math.log(ratio) / math.log(4)
    guess = powers[min(powers, key=lambda power: abs(power + found))]
    ok = max(abs(ratio - 1), abs(against - 1)) <= 0.3
    evidence = (
        f"From T = 8 to T = 2 the gradient changes by a factor {low / high:.3g}, "
        f"{low_exact / high_exact:.3g} is right{'' if ok else f' ({guess})'}; at T = 16 the value "
        f"per token is {against:.3g} times its limit for high T, "
        f"{'half the variance of the logits difference' if kd.t2 else 'half the variance / T^2'} "
        "(both to 30 %)."
    )
    return verdict(ok, evidence, gradient_ratio=ratio, value_ratio=against)


@check(
    "distill.divergence",
    remedy="Sum p (log p - log q) over the vocabulary axis, both logs from log_softmax, p the "
    "teacher's for forward and the student's for reverse KL; check the argument order of the "
    "library's KL and whether it expects log-probabilities.",
)
def divergence(kd: Divergence) -> Verdict:
    """Value per token and gradient are those of the declared direction; zero for equals."""
    logits = kd.logits(2.0)
    total, count = kd(logits, 1.0)
    tokens = float(logits[2].sum())
    value, gradient = kd.exact(logits, 1.0)
    student, teacher, weights = logits
    equal, _ = kd(Logits((student, student, weights)), 1.0)
    per_token = float(total / count) if count else math.nan
    rounding = kd.rounding(logits) / tokens
    results = {
        "value per token": (gap(per_token, value / tokens), rounding),
        "equal logits": (gap(equal / max(count, 1)), rounding),
    }
    if not kd.untraceable:
        mine = kd.gradient(logits, 1.0)
        results["gradient"] = (gap(mine, gradient), EPS * 32 * (1 + logits.size) * weights.max())
    known = {kind: kd.exact(logits, 1.0, kind)[0] / tokens for kind in KINDS}
    others = ", ".join(f"{kind} {x:.5f}" for kind, x in known.items())
    near = min(known, key=lambda kind: abs(known[kind] - per_token))
    looks = f", which is {near}" if abs(known[near] - per_token) <= rounding else ""
    return judge(
        results,
        f"Declared {kd.kind}: {per_token:.5f} nats per token{looks}, exact are {others}; equal "
        f"logits give {equal:.2g}",
        per_token=per_token,
        equal=float(equal),
        exact=known,
    )


@check(
    "distill.padding",
    remedy="Multiply each token's divergence by its weight, return sum and sum of weights, and "
    "divide neither by the batch nor by the length.",
)
def padding(kd: Divergence) -> Verdict:
    """Columns of weight 0 change nothing; the batch twice along time is twice the sums."""
    logits = kd.logits(2.0)
    sums = kd(logits, 1.0)
    other = kd.logits(3.0, draw=1)
    longer = Logits(
        (
            *(np.concatenate([a, b], 1) for a, b in zip(logits[:2], other[:2], strict=True)),
            np.concatenate([logits[2], 0 * logits[2]], 1),
        )
    )
    twice = Logits(np.concatenate([a, a], 1) for a in logits)
    scale = 2 * kd.rounding(longer)
    padded, doubled = kd(longer, 1.0), kd(twice, 1.0)
    tokens = float(logits[2].sum())
    return judge(
        {
            "padding": (gap(padded, sums), scale),
            "twice as long": (gap(doubled, 2 * sums), 2 * scale),
            "count": (gap(sums[1], tokens), EPS * 16 * tokens),
        },
        f"Sum and count {sums[0]:.6g}, {sums[1]:.6g} (weights {tokens:g}); with {LENGTH} columns "
        f"of padding {padded[0]:.6g}, {padded[1]:.6g}; twice as long {doubled[0]:.6g}, "
        f"{doubled[1]:.6g}",
    )


@check(
    "distill.precision",
    remedy="Cast both logits to float32 before the softmax and keep p, q and their difference in "
    "float32.",
)
def precision(kd: Divergence) -> Verdict:
    """Near p = q the gradient is that of float32, whatever the dtype of the logits."""
    _, teacher, weights = kd.logits(1.0)
    teacher = np.clip(teacher, -3, 3)
    rng = np.random.default_rng((kd.seed, 2))
    student = teacher + np.float32(GRID) * rng.integers(-1, 2, teacher.shape).astype(np.float32)
    logits = Logits((student, teacher, weights))
    exact = kd.exact(logits, 1.0)[1]
    errors = {}
    for name, dtype in {"float32": np.float32, "bfloat16": jnp.bfloat16}.items():
        error = kd.gradient(logits, 1.0, dtype) - exact
        errors[name] = float(np.linalg.norm(error) / np.linalg.norm(exact))
    evidence = (
        f"With logits {GRID:.4g} apart the gradient's relative error is {errors['float32']:.2g} "
        f"for float32 and {errors['bfloat16']:.2g} for bfloat16 logits (limit {GRADIENT_LIMIT:g}; "
        "logits are exact in both)."
    )
    return verdict(max(errors.values()) <= GRADIENT_LIMIT, evidence, errors=errors)


@check(
    "distill.saturation",
    remedy="Use log_softmax without epsilon, clamp or nan_to_num: it is finite and exact for any "
    "finite logits in float32.",
)
def saturation(kd: Divergence) -> Verdict:
    """Exact values and gradients far from zero: no epsilon, no clamp."""
    base = kd.logits(2.0, draw=3)
    student, teacher, weights = base
    target = np.arange(kd.vocab_size) == (np.arange(LENGTH) % kd.vocab_size)[None, :, None]
    sharp = np.where(target, np.float32(200), teacher)
    far = np.float32(2.0**16)
    cases = {
        "teacher one-hot": (student, sharp),
        "teacher one-hot where the student has exp(-120)": (student - 120 * target, sharp),
        "both wide (-40 to 40)": (np.clip(20 * student, -40, 40), np.clip(20 * teacher, -40, 40)),
        "both 65536 higher": (student + far, teacher + far),
    }
    results, told = {}, {}
    for name, (z, y) in cases.items():
        case = Logits((z.astype(np.float32), y.astype(np.float32), weights))
        value, gradient = kd.exact(case, 1.0)
        total, _ = kd(case, 1.0)
        told[name] = (float(total), value)
        results[f"value, {name}"] = (gap(total, value), kd.rounding(case))
        if not kd.untraceable:
            size = float(np.linalg.norm(gradient))
            error = np.linalg.norm(kd.gradient(case, 1.0) - gradient)
            results[f"gradient, {name}"] = (float(error), 16 * EPS * case.size * (1 + size))
    name, (total, value) = list(told.items())[1]
    return judge(results, f"{name}: sum {total:.6g}, -ln q gives {value:.6g}", sums=told)


@check(
    "distill.subset",
    remedy="Make the ids of the union unique (or mask repeats) before the softmax over the "
    "subset; every token may count once.",
)
def subset(kd: Divergence) -> Verdict:
    """A subset that is the whole vocabulary gives the value of the whole vocabulary."""
    if kd.topk_fn is None:
        raise Skip("Not given: topk_fn.")
    fn, V = kd.topk_fn, kd.vocab_size
    student, teacher, weights = kd.logits(1.0, draw=4)
    cases = {V: (student, teacher)}
    if kd.topk_union:
        # Teacher and student rank tokens the other way round: both halves are in the union, and
        # the middle is in it twice.
        k = (3 * V + 3) // 4
        cases[k] = np.sort(student), np.sort(teacher)[..., ::-1]
    results, values = {}, {}
    for k, (z, y) in cases.items():
        case = Logits((z, y, weights))
        made = call("topk_fn", fn, *map(jnp.asarray, case), 2.0, k)
        total, _ = pair("topk_fn", made)
        exact = kd.exact(case, 2.0)[0]
        values[k] = (float(total), exact)
        results[f"k = {k}"] = (gap(total, exact), kd.rounding(case, 2.0))
    told = ", ".join(f"{a:.6g} against {b:.6g} (k = {k})" for k, (a, b) in values.items())
    text = f"Subsets that contain all {V} tokens against the whole vocabulary: {told}"
    return judge(results, text, sums=values)


CHECKS: tuple[Callable[..., Finding], ...] = (
    temperature,
    divergence,
    padding,
    precision,
    saturation,
    subset,
)


def log_softmax(z: np.ndarray) -> np.ndarray:
    """In float64, over the last axis."""
    z = z.astype(np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def pair(what: str, made: Any) -> np.ndarray:
    """Sum and count as two finite or non-finite floats; Skip for anything else."""
    if not isinstance(made, tuple | list) or len(made) != 2:
        raise Skip(f"{what} returned a {type(made).__name__} instead of (sum, count).")
    shapes = [call(f"the shape of what {what} returned", np.shape, x) for x in made]
    if shapes != [(), ()]:
        raise Skip(f"{what} returned shapes {shapes} instead of two scalars (sum, count).")
    return np.array([call(f"a number that {what} returned", float, x) for x in made])


def _on(grid: float, x: np.ndarray) -> np.ndarray:
    return (np.round(x / grid) * grid).astype(np.float32)
