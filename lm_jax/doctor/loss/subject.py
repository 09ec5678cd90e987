"""A loss function as a black box, and what the checks of it share."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.doctor.old import Skip, Verdict, call, verdict

EPS = 2.0**-23  # distance of float32 numbers around 1
MARGIN = 50.0  # nats by which an oracle prefers its token
EXTREME = 8192.0  # a logit far outside what exp can hold, exact in bfloat16
SPREAD = 3.0  # standard deviation of random logits
NUMBERS = 2**21  # logits in one call, about


class Batch(NamedTuple):
    """Arguments of the loss: logits [B, T, V], tokens int32 [B, T], weights float32 [B, T]."""

    logits: np.ndarray
    tokens: np.ndarray
    weights: np.ndarray


@dataclasses.dataclass(eq=False)
class Loss:
    """The examined function; what it raises or returns amiss becomes a `Skip`.

    Logits made here are exact in bfloat16, so a loss that casts them to it changes nothing.
    `untraceable` names the error where JAX cannot differentiate the loss.
    """

    fn: Callable
    vocab_size: int
    seq_len: int
    rows: int
    seed: int
    ahead: int  # logits[:, t] are scored on tokens[:, t + ahead]
    untraceable: str = ""
    compiled: bool = False

    @property
    def length(self) -> int:
        """T of ordinary calls."""
        return max(4, min(self.seq_len, 64, NUMBERS // (self.rows * self.vocab_size)))

    @property
    def full_length(self) -> int:
        """T of the longest call, of a single row."""
        return max(self.length, min(self.seq_len, NUMBERS // self.vocab_size))

    @functools.cached_property
    def forward(self) -> Callable:
        """The function compiled."""
        return jax.jit(self.fn)

    def batch(self, rows: int | None = None, *, draw: int = 0, length: int | None = None) -> Batch:
        """Random logits and tokens; ragged rows with holes, at least two scored tokens in each."""
        rng = np.random.default_rng((self.seed, draw))
        shape = rows or self.rows, length or self.length
        logits = _exact(rng.normal(0, SPREAD, (*shape, self.vocab_size)))
        tokens = rng.integers(0, self.vocab_size, shape).astype(np.int32)
        ends = rng.integers(3, shape[1] + 1, shape[0])
        weights = (np.arange(shape[1]) < ends[:, None]) & (rng.random(shape) < 0.8)
        weights[:, 1:3] = True
        return Batch(logits, tokens, weights.astype(np.float32))

    @functools.cached_property
    def backward(self) -> Callable | None:
        """Gradient of the sum with respect to the logits by JAX, compiled where that works."""

        def total(*arrays: jax.Array) -> jax.Array:
            return self.fn(*arrays)[0]

        for backward in (jax.jit(jax.grad(total)), jax.grad(total)):
            try:
                backward(*map(jnp.asarray, self.batch()))
            except Exception as error:  # reported: gradients then come from central differences
                self.untraceable = type(error).__name__
            else:
                self.compiled = hasattr(backward, "lower")
                return backward
        return None

    @property
    def traceable(self) -> bool:
        """Whether JAX can differentiate the loss."""
        return self.backward is not None

    def raw(self, batch: Batch, *, as_given: bool = False) -> tuple[Any, Any]:
        """What the function returns, two scalars of its own kind; never compiled if `as_given`."""
        arrays = [jnp.asarray(a) for a in batch] if self.traceable else [a.copy() for a in batch]
        compiled = self.traceable and self.compiled and not as_given
        result = call("the loss", self.forward if compiled else self.fn, *arrays)
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise Skip(f"the loss returned a {type(result).__name__} instead of (sum, count)")
        shapes = [call("the shape of what the loss returned", np.shape, x) for x in result]
        if shapes != [(), ()]:
            raise Skip(f"the loss returned shapes {shapes} instead of two scalars (sum, count)")
        return tuple(result)

    def __call__(self, batch: Batch, *, as_given: bool = False) -> np.ndarray:
        """Sum and count."""
        pair = self.raw(batch, as_given=as_given)
        return np.array([call("a number that the loss returned", float, x) for x in pair])

    def places(self, batch: Batch, draw: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logits at which gradients are compared: half of them those of targets."""
        rng = np.random.default_rng((self.seed, draw, 1))
        rows, length, vocab_size = batch.logits.shape
        n = 512 if self.traceable else 16
        b, t = rng.integers(0, rows, n), rng.integers(0, length, n)
        target = batch.tokens[b, np.minimum(t + self.ahead, length - 1)]
        v = np.where(np.arange(n) % 2, target, rng.integers(0, vocab_size, n))
        return b, t, np.clip(v, 0, vocab_size - 1)

    def slopes(self, batch: Batch, places: tuple[np.ndarray, ...]) -> tuple[np.ndarray, float]:
        """Derivatives of the sum with respect to the logits at `places`, and their rounding."""
        if self.backward:
            gradient = call("the gradient of the loss", self.backward, *map(jnp.asarray, batch))
            gradient = np.asarray(gradient).astype(np.float64)[places]
            size = np.abs(gradient[np.isfinite(gradient)]).max(initial=0)
            return gradient, float(2 * resolution(gradient) * size + 32 * EPS * (1 + 5 * SPREAD))
        total, _ = self(batch)
        noise = resolution(np.array([total])) * max(abs(total), 1)
        step = max(noise, 1e-12) ** (1 / 3)
        values = []
        for place in zip(*places, strict=True):
            ends = []
            for sign in (1, -1):
                logits = batch.logits.astype(np.float64)
                logits[place] += sign * step
                ends.append(self(batch._replace(logits=logits))[0])
            values.append((ends[0] - ends[1]) / (2 * step))
        # The third derivative of log-sum-exp is below 0.1.
        return np.array(values), 4 * noise / step + 0.1 * step**2

    def rounding(self, batch: Batch) -> float:
        """Largest error of the sum if terms are in float32, added in whatever order."""
        nats, weights = definition(batch, self.ahead)
        n = np.count_nonzero(weights)
        terms = 4 * (np.abs(batch.logits).max() + np.log(self.vocab_size)) * weights.sum()
        return float(EPS * ((n / 2 + 2) * (nats * weights).sum() + terms))


def definition(batch: Batch, ahead: int) -> tuple[np.ndarray, np.ndarray]:
    """Nats and weight of every target, in float64."""
    length = batch.tokens.shape[1] - ahead
    logits = batch.logits[:, :length].astype(np.float64)
    top = logits.max(-1, keepdims=True)
    norm = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    picked = np.take_along_axis(logits, batch.tokens[:, ahead:, None], -1)[..., 0]
    return norm - picked, batch.weights[:, ahead:].astype(np.float64)


def resolution(values: np.ndarray) -> float:
    """Spacing, relative to their size, of the coarsest float type that holds all values exactly."""
    kinds: dict[Any, float] = {jnp.bfloat16: 2.0**-7, np.float16: 2.0**-10, np.float32: EPS}
    with np.errstate(over="ignore"):
        for kind, eps in kinds.items():
            if np.array_equal(values.astype(kind).astype(np.float64), values, equal_nan=True):
                return eps
    return 2.0**-52


def _exact(x: np.ndarray) -> np.ndarray:
    return x.astype(jnp.bfloat16).astype(np.float32)


def gap(a: Any, b: Any = 0.0) -> float:
    """Largest difference; NaN if there is one."""
    with np.errstate(invalid="ignore"):
        return float(np.abs(np.subtract(a, b)).max(initial=0))


def oracle(loss: Loss, batch: Batch, ahead: int, margin: float) -> Batch:
    """Logits with `margin` on the token `ahead` of each position (cyclic)."""
    tokens = np.roll(batch.tokens, -ahead, axis=1)
    logits = margin * (tokens[..., None] == np.arange(loss.vocab_size))
    return batch._replace(logits=logits.astype(np.float32))


def padded(loss: Loss, batch: Batch, columns: int, rows: int = 0) -> Batch:
    """The batch with further columns and rows of weight 0, random logits and token 0."""
    extra = loss.batch(len(batch.tokens) + rows, draw=9, length=batch.tokens.shape[1] + columns)
    extra.tokens[:] = 0
    extra.weights[:] = 0
    for whole, part in zip(extra, batch, strict=True):
        whole[: len(batch.tokens), : batch.tokens.shape[1]] = part
    return extra


def copy(batch: Batch) -> Batch:
    """A batch to change in place."""
    return Batch(*(a.copy() for a in batch))


def worst(results: dict[str, tuple[float, float]]) -> tuple[str, float, float]:
    """Name, difference and threshold of the case that exceeds its threshold the most."""

    def excess(name: str) -> float:
        difference, threshold = results[name]
        return math.inf if math.isnan(difference) else difference / max(threshold, 1e-300)

    name = max(results, key=excess)
    return name, *results[name]


def judge(results: dict[str, tuple[float, float]], text: str, **values: Any) -> Verdict:
    """Pass if every difference is within its threshold; `text` tells what was compared."""
    name, difference, threshold = worst(results)
    evidence = f"{text}: largest difference {difference:.3g} ({name}), threshold {threshold:.2g}."
    differences = {name: difference for name, (difference, _) in results.items()}
    return verdict(difference <= threshold, evidence, differences=differences, **values)
