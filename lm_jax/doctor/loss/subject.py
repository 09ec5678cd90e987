"""A loss function as a black box, and what the checks of it share."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.doctor import numbers, trees
from lm_jax.doctor.checks import check
from lm_jax.doctor.facts import Bound, Broken, Facts, array, call, function, one_of, pair, whole
from lm_jax.doctor.findings import Measure, at_most, holds, note
from lm_jax.doctor.numbers import FLOAT32_EPS as EPS

SPREAD = 3.0  # standard deviation of random logits
NUMBERS = 2**21  # logits of an ordinary call, about; no call has more than eight times as many
OBJECTIVES = one_of("causal", "bidirectional")
NARROW = Bound("give at most 524,288", lambda v: v <= 2**19)  # V
TOLD = 2  # differences of one kind that are told
COARSE = 0.25  # a gradient of weight x (softmax - one-hot) that is known no better is not judged

Function = Annotated[Callable[..., Any], function]
Places = tuple[np.ndarray, np.ndarray, np.ndarray]  # row, position and vocabulary entry of logits


class Batch(NamedTuple):
    """Arguments of the loss: logits [B, T, V], tokens int32 [B, T], weights float32 [B, T]."""

    logits: np.ndarray
    tokens: np.ndarray
    weights: np.ndarray

    def copy(self) -> "Batch":
        """A batch to change in place."""
        return Batch(*(a.copy() for a in self))


@dataclasses.dataclass
class Subject(Facts):
    """Examine a loss function of any framework.

    It gets logits [B, T, V], tokens int32 [B, T] and weights float32 [B, T], and scores
    logits[:, t] on tokens[:, t + 1] with weights[:, t + 1]. If JAX can differentiate it, these are
    JAX arrays, else NumPy's; its gradients then come from its attribute `gradient(logits, tokens,
    weights)`, that of the sum by the logits, if it has one, else from central differences.
    """

    loss_fn: Annotated[Function, "(logits, tokens, weights) -> (sum of nats, sum of weights)."]
    _: dataclasses.KW_ONLY
    vocab_size: Annotated[int, "V, at most 2^19.", whole(2), NARROW]
    seq_len: Annotated[int, "T of the longest call, less where V x T exceeds 2^21.", whole(4)]
    batch_size: Annotated[int, "B of ordinary calls; fewer rows if V is large.", whole(2)] = 4
    seed: Annotated[int, "of the random logits, tokens and weights.", whole()] = 0
    objective: Annotated[str, "causal; or bidirectional, without the shift.", OBJECTIVES] = "causal"

    def __post_init__(self) -> None:
        """Sizes of calls."""
        super().__post_init__()
        V = self.vocab_size
        self.ahead = int(self.objective == "causal")  # logits[:, t] are of tokens[:, t + ahead]
        # B and T of ordinary calls, and T of the longest, of a single row.
        self.rows = min(self.batch_size, max(2, NUMBERS // (4 * V)))
        self.length = max(4, min(self.seq_len, 64, NUMBERS // (self.rows * V)))
        self.full_length = max(self.length, min(self.seq_len, NUMBERS // V))

    def batch(self, rows: int | None = None, *, draw: int = 0, length: int | None = None) -> Batch:
        """Random logits and tokens; ragged rows with holes, at least two scored tokens in each.

        Logits are exact in bfloat16, so that a loss that casts them to it changes nothing.
        """
        rng = self.rng(draw)
        shape = rows or self.rows, length or self.length
        logits = rng.normal(0, SPREAD, (*shape, self.vocab_size)).astype(jnp.bfloat16)
        tokens = rng.integers(0, self.vocab_size, shape).astype(np.int32)
        ends = rng.integers(3, shape[1] + 1, shape[0])
        weights = (np.arange(shape[1]) < ends[:, None]) & (rng.random(shape) < 0.8)
        weights[:, 1:3] = True
        return Batch(logits.astype(np.float32), tokens, weights.astype(np.float32))

    def oracle(self, batch: Batch, ahead: int, margin: float) -> Batch:
        """Logits with `margin` on the token `ahead` of each position (cyclic)."""
        tokens = np.roll(batch.tokens, -ahead, axis=1)
        known = tokens[..., None] == np.arange(self.vocab_size)
        return batch._replace(logits=np.float32(margin) * known.astype(np.float32))

    @functools.cached_property
    def functions(self) -> tuple[Callable[..., Any], Callable[..., Any] | None, str]:
        """The loss, the gradient of its sum by the logits if there is one, and where it is from."""
        if hook := getattr(self.loss_fn, "gradient", None):
            return self.loss_fn, hook, "loss_fn.gradient"
        gradient = jax.grad(lambda *arrays: self.loss_fn(*arrays)[0])
        how = ""
        for wrap in (jax.jit, lambda fn: fn):  # a loss may ask for values, which compiling forbids
            found = wrap(self.loss_fn), wrap(gradient), "JAX"
            try:
                found[1](*map(jnp.asarray, self.batch()))
                return found
            except Exception as error:  # reported: gradients then come from central differences
                how = f"central differences, as JAX cannot trace it ({type(error).__name__})"
        return self.loss_fn, None, how

    @property
    def by_jax(self) -> bool:
        """Whether JAX differentiates the loss; the same program then rounds alike every time."""
        return self.functions[2] == "JAX"

    def arguments(self, batch: Batch) -> list[Any]:
        """The batch in the kind of array that the loss gets, safe to write to."""
        return [jnp.asarray(a) if self.by_jax else a.copy() for a in batch]

    def raw(self, batch: Batch, *, as_given: bool = False) -> list[np.ndarray]:
        """Sum and count in the types of the loss; never compiled if `as_given`."""
        function = self.loss_fn if as_given else self.functions[0]
        result = call("loss_fn", function, *self.arguments(batch))
        arrays = [array("loss_fn", x) for x in pair("loss_fn", result, "(sum, count)")]
        if shapes := [x.shape for x in arrays if x.shape]:
            raise Broken(f"loss_fn returned shapes {shapes}, not two scalars (sum, count)")
        return arrays

    def __call__(self, batch: Batch, *, as_given: bool = False) -> np.ndarray:
        """Sum and count."""
        arrays = self.raw(batch, as_given=as_given)
        return np.array([call("a number that loss_fn returned", float, x) for x in arrays])

    def mean(self, batch: Batch) -> float:
        """Nats per counted token."""
        total, count = self(batch)
        return float(total / count) if count else math.nan

    def places(self, batch: Batch, draw: int = 0) -> Places:
        """Logits at which gradients are compared: half of them those of targets."""
        rng = self.rng(draw, 1)
        rows, length, vocab_size = batch.logits.shape
        n = 512 if self.functions[1] else 16
        b, t = rng.integers(0, rows, n), rng.integers(0, length, n)
        target = batch.tokens[b, np.minimum(t + self.ahead, length - 1)]
        v = np.where(np.arange(n) % 2, target, rng.integers(0, vocab_size, n))
        return b, t, np.clip(v, 0, vocab_size - 1)

    def slopes(self, batch: Batch, places: Places) -> tuple[np.ndarray, float]:
        """Derivatives of the sum with respect to the logits at `places`, and their rounding."""
        _, backward, how = self.functions
        if backward is None:
            return self._differences(batch, places)
        found = call(f"the gradient by {how}", backward, *self.arguments(batch))
        gradient = call(f"an array of the gradient by {how}", trees.as_array, found)
        if gradient.shape != batch.logits.shape:
            raise Broken(f"the gradient of logits {batch.logits.shape} has shape {gradient.shape}")
        gradient = gradient.astype(np.float64)[places]
        size = float(np.abs(gradient[np.isfinite(gradient)]).max(initial=0))
        return gradient, 2 * numbers.resolution(gradient) * size + 32 * EPS * (1 + 5 * SPREAD)

    def _differences(self, batch: Batch, places: Places) -> tuple[np.ndarray, float]:
        total, _ = self(batch)
        noise = numbers.resolution(np.array([total])) * max(abs(total), 1)
        step = max(noise, 1e-12) ** (1 / 3)

        def moved(place: tuple[int, ...], by: float) -> float:
            logits = batch.logits.astype(np.float64)
            logits[place] += by
            return float(self(batch._replace(logits=logits))[0])

        ends = [[moved(place, by) for by in (step, -step)] for place in zip(*places, strict=True)]
        # The third derivative of log-sum-exp is below 0.1.
        return -np.diff(ends)[:, 0] / (2 * step), 4 * noise / step + 0.1 * step**2

    def expected(self, batch: Batch) -> np.ndarray:
        """Sum and count by the definition, in float64."""
        length = batch.tokens.shape[1] - self.ahead
        nats = numbers.nats(batch.logits[:, :length], batch.tokens[:, self.ahead :])
        weights = batch.weights[:, self.ahead :].astype(np.float64)
        return np.array([(nats * weights).sum(), weights.sum()])

    def rounding(self, batch: Batch) -> float:
        """Largest error of the sum if terms are in float32, added in whatever order."""
        total, count = self.expected(batch)
        n = np.count_nonzero(batch.weights)
        terms = 4 * (np.abs(batch.logits).max() + np.log(self.vocab_size)) * count
        return float(EPS * ((n / 2 + 2) * total + terms))

    @functools.cached_property
    def honours_fractions(self) -> bool:
        """Whether half the weights give about half the sum and count; else they are but a mask."""
        batch = self.batch()
        try:
            half = self(batch._replace(weights=batch.weights / 2))
        except Broken:  # a loss may refuse what is neither 0 nor 1
            return False
        return bool((np.abs(half / self(batch) - 0.5) < 0.125).all())

    def weighted(self, batch: Batch, stream: int) -> Batch:
        """The batch with random weights between 0 and 1, if the loss is made for them."""
        share = self.rng(6, stream).random(batch.weights.shape) if self.honours_fractions else 1.0
        return batch._replace(weights=(batch.weights * share).astype(np.float32))


class Errors(dict[str, tuple[float, float]]):
    """Largest difference and limit of what was compared, by what it is."""

    def add(self, what: str, a: Any, b: Any, limit: float) -> None:
        """Compare `a` and `b`."""
        self[what] = numbers.gap(a, b), limit

    def change(self, subject: Subject, why: str, old: Batch, new: Batch, places: Places) -> None:
        """Compare sum, count and gradient of two batches."""
        (before, rounding), (after, _) = (subject.slopes(b, places) for b in (old, new))
        what = f"change of sum or count with {why}"
        self.add(what, subject(new), subject(old), subject.rounding(old))
        self.add(f"change of the gradient with {why}", after, before, rounding)

    def measures(self, **more: Any) -> list[Measure]:
        """The first beyond their limit, else the nearest to it; see `findings.holds` for `more`.

        What is called a gradient is not judged if its limit allows anything.
        """
        vague = [what for what, (_, x) in self.items() if "gradient" in what and x > COARSE]
        found = {w: at_most(w, *pair, **more) for w, pair in self.items() if w not in vague}
        wrong = [measure for measure in found.values() if measure.status != "pass"]
        told, rest = wrong[:TOLD], [measure.what for measure in wrong[TOLD:]]
        told += [note(f"{len(rest)} more like that", rest, key="more")] if rest else []
        if found and not told:
            told = [found[max(found, key=lambda what: self[what][0] / (self[what][1] or 1))]]
        return told + [note(f"{w}: not judged, known to {self[w][1]:.2g} only") for w in vague]


@check("Return two finite scalars: the sum of nats and of the weights scored.", gate=True)
def contract(subject: Subject) -> list[Measure]:
    """An ordinary batch gives two finite scalars, the second above 0."""
    total, count = subject(subject.batch())
    return [
        holds(0 <= total < math.inf, "sum of a random batch", total, limit="0 or more, finite"),
        holds(0 < count < math.inf, "count", count, limit="above 0, finite"),
        note("gradients come from", subject.functions[2]),
    ]
