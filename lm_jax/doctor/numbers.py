"""Numbers that several families need: rounding, nats, significance, ties, printed digits."""

import decimal
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats

FLOAT32_EPS = 2.0**-23  # distance of float32 numbers around 1
_ALARM = 3e-5  # how often a check of a healthy subject may alarm by chance


def roundoff(dtype: Any) -> float:
    """Largest relative error of rounding to a dtype."""
    return float(jnp.finfo(dtype).eps) / 2


def resolution(values: np.ndarray) -> float:
    """Spacing, relative to their size, of the coarsest float type that holds all values exactly."""
    kinds: dict[Any, float] = {jnp.bfloat16: 2.0**-7, np.float16: 2.0**-10, np.float32: FLOAT32_EPS}
    with np.errstate(over="ignore"):
        for kind, eps in kinds.items():
            if np.array_equal(values.astype(kind).astype(np.float64), values, equal_nan=True):
                return eps
    return 2.0**-52


def gap(a: Any, b: Any = 0.0) -> float:
    """Largest difference; NaN if there is one."""
    with np.errstate(invalid="ignore"):
        return float(np.abs(np.subtract(a, b)).max(initial=0))


# ---- Nats of logits ------------------------------------------------------------------------


def log_softmax(logits: Any) -> np.ndarray:
    """Log-probabilities over the last axis, in float64."""
    return scipy.special.log_softmax(np.asarray(logits, np.float64), axis=-1)  # type: ignore[no-any-return]


def nats(logits: Any, targets: Any) -> np.ndarray:
    """Nats of each target [...] under the logits [..., V], in float64."""
    log_p = log_softmax(logits)
    return -np.take_along_axis(log_p, np.asarray(targets)[..., None], -1)[..., 0]


# ---- Significance --------------------------------------------------------------------------


class Mean(NamedTuple):
    """A mean and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        """As it stands in a sentence."""
        return f"{self.value:.4g} ± {self.error:.2g}"


def mean(values: Any) -> Mean:
    """The mean of independent values and its standard error; infinite for a single value."""
    values = np.asarray(values, np.float64)
    n = len(values)
    return Mean(float(values.mean()), float(values.std(ddof=1) / n**0.5) if n > 1 else math.inf)


def threshold(looks: float = 1) -> float:
    """Standard errors beyond which a difference is no accident, when the largest of `looks` counts.

    A healthy subject then alarms three times in a hundred thousand: 4 for one look.
    """
    return float(scipy.stats.norm.isf(_ALARM / max(looks, 1)))


def share_limit(share: float, count: float) -> float:
    """A share, and five standard errors of as much among `count` independent things."""
    return share + 5 * math.sqrt(share * (1 - share) / max(count, 1))


def tied(values: np.ndarray) -> float:
    """Share of values that occur more than once."""
    _, counts = np.unique(values, return_counts=True)
    return float(counts[counts > 1].sum() / max(len(values), 1))


# ---- Printed numbers -----------------------------------------------------------------------


def half_unit(value: float) -> float:
    """Half a unit of the last decimal that is needed to write a number; inf if it is not finite."""
    if not math.isfinite(value):
        return math.inf
    exponent = decimal.Decimal(repr(float(value))).as_tuple().exponent
    return 0.5 * 10.0 ** int(exponent)


def exp(nats: float) -> float:
    """exp, infinite above what float64 holds."""
    with np.errstate(over="ignore"):
        return float(np.exp(nats))


def products(budgets: Iterable[Mapping[str, float]]) -> list[str]:
    """The budgets whose `stated` amount is not the product of their other entries to 0.5 %."""
    wrong = []
    for budget in budgets:
        factors = {name: x for name, x in budget.items() if name != "stated"}
        product = math.prod(factors.values())
        if abs(product - budget["stated"]) > 0.005 * abs(budget["stated"]):
            terms = " x ".join(f"{x:g} {name}" for name, x in factors.items())
            wrong.append(f"{terms} = {product:.4g}, but {budget['stated']:.4g} is stated")
    return wrong


def excess_of_sum(parts: Iterable[float], total: float) -> float:
    """How far a logged total is off the sum of its parts, over what rounding and digits allow."""
    parts = list(parts)
    digits = sum(half_unit(x) for x in (*parts, total) if x)  # a 0 is one, whatever its digits
    allowed = digits + 1e-5 * max(1.0, sum(map(abs, parts)))
    return abs(sum(parts) - total) / allowed
