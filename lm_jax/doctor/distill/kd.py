"""The examined divergence: its sums and gradients, and what they are exactly."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lm_jax.doctor.checks import fixture
from lm_jax.doctor.distill.subject import Subject, gradients, scalar
from lm_jax.doctor.facts import Broken, call
from lm_jax.doctor.numbers import FLOAT32_EPS as EPS
from lm_jax.doctor.numbers import log_softmax

ROWS, LENGTH = 3, 5
GRID = 2.0**-6  # logits below 4 on this grid are exact in bfloat16
Gradient = Callable[..., np.ndarray]  # of Logits, temperature and the dtype of the logits


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
    if not isinstance(made, tuple | list) or len(made) != 2:
        raise Broken(f"{name} returned a {type(made).__name__} instead of (sum, count)")
    shapes = [tuple(np.shape(x)) for x in made]
    if shapes != [(), ()]:
        raise Broken(f"{name} returned shapes {shapes} instead of two scalars (sum, count)")
    return made[0], made[1]


@dataclasses.dataclass(frozen=True)
class Divergence:
    """A function of (student, teacher, weights, temperature), beside what is declared of it."""

    subject: Subject
    name: str
    fn: Callable[..., Any]
    gradient: Gradient | None = None  # where JAX can differentiate it

    def __call__(self, logits: Logits, temperature: float = 1.0) -> np.ndarray:
        """Sum and count."""
        arrays = map(jnp.asarray if self.gradient else np.array, logits)
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
        kinds = {"forward": (1, 0, 0), "reverse": (0, 1, 1), "skew": (1, 0, beta)}
        return {**kinds, "jsd": (beta, 1 - beta, beta)}[kind or self.subject.kind]

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

    def pull(self, logits: Logits, temperature: float) -> tuple[float, float]:
        """Size of the gradient, measured and exact.

        It is the norm, or without JAX the slope from student to teacher by central differences.
        """
        _, right = self.exact(logits, temperature)
        if self.gradient:
            measured = self.gradient(logits, temperature)
            return float(np.linalg.norm(measured)), float(np.linalg.norm(right))
        z, step = logits.student, 0.125 * (logits.student - logits.teacher)
        up, down = (self(logits._replace(student=x), temperature)[0] for x in (z + step, z - step))
        return abs(float(up - down)) / 0.25, abs(float((right * step / 0.125).sum()))


@fixture
def gradient(subject: Subject, kd_fn: Any) -> Gradient:
    """JAX's gradient of the divergence by the student's logits."""

    def found(logits: Logits, temperature: float = 1.0, dtype: Any = np.float32) -> np.ndarray:
        z, y = (jnp.asarray(x, dtype) for x in logits[:2])
        weights = jnp.asarray(logits.weights)

        def total(z: Any) -> Any:
            return pair("kd_fn", kd_fn(z, y, weights, temperature))[0]

        return np.asarray(gradients("kd_fn", total, z)[0]).astype(np.float64)

    found(Divergence(subject, "kd_fn", kd_fn).draw(1.0))
    return found


@fixture
def kd(subject: Subject, kd_fn: Any, gradient: Any = None) -> Divergence:
    """The examined function with its gradient, if there is one."""
    return Divergence(subject, "kd_fn", kd_fn, gradient)
