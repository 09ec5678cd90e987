"""A training loop as a black box, and the runs made of it, each once."""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np

from lm_jax.doctor import trees
from lm_jax.doctor.checks import fixture
from lm_jax.doctor.facts import Broken, Facts, above, call, function, whole

EARLY = 20  # updates after which every parameter must have moved
REPEATED = 3  # updates that are made twice


@dataclasses.dataclass
class Subject(Facts):
    """Examine a training loop by short runs on random tokens.

    Ids are uniform in [0, V), so that no model can predict them. A state that was handed to
    `step_fn` is never used again: its buffers may be donated.
    """

    init_fn: Annotated[Callable[..., Any], "(seed) -> state.", function]
    step_fn: Annotated[
        Callable[..., Any],
        "(state, tokens int32 [B, T]) -> state or (state, metrics): one update.",
        function,
    ]
    score_fn: Annotated[
        Callable[..., Any],
        "(state, tokens) -> (sum of nats, number of scored tokens), without dropout.",
        function,
    ]
    _: dataclasses.KW_ONLY
    vocab_size: Annotated[int, "V.", whole(2)]
    seq_len: Annotated[int, "T.", whole(4)]
    batch_size: Annotated[int, "B, of all calls.", whole(2)] = 16
    steps: Annotated[
        int, "updates on fresh tokens; half as many more are made on one batch.", whole(EARLY)
    ] = 400
    seed: Annotated[int, "of the state and the tokens.", whole()] = 0
    params_of: Annotated[
        Callable[[Any], Any] | None,
        "(state) -> pytree of the parameters, to judge them one by one.",
        function,
    ] = None
    smallest_leak: Annotated[
        float, "nats a token that the Gibbs test is asked to see; else it warns.", above(0)
    ] = 0.003

    def batch(self, *stream: int) -> np.ndarray:
        """Fresh independent uniform ids [B, T], over the whole vocabulary."""
        size = (self.batch_size, self.seq_len)
        return self.rng(*stream).integers(0, self.vocab_size, size, dtype=np.int32)

    @property
    def chance(self) -> float:
        """Nats of a guess."""
        return math.log(self.vocab_size)

    def start(self) -> Any:
        """A fresh state."""
        return call("init_fn", self.init_fn, self.seed)

    def step(self, state: Any, tokens: np.ndarray) -> Any:
        """The state after one update; metrics, if there are any, are dropped."""
        shape: Any = jax.tree.structure(state)
        out = call("step_fn", self.step_fn, state, tokens.copy())
        if jax.tree.structure(out) == shape:
            return out
        if isinstance(out, tuple) and len(out) == 2 and jax.tree.structure(out[0]) == shape:
            return out[0]
        raise Broken("step_fn returned neither a state like the one it got nor (state, metrics)")

    def score(self, state: Any, tokens: np.ndarray) -> tuple[float, float]:
        """Summed nats and count."""
        out = call("score_fn", self.score_fn, state, tokens.copy())
        try:
            nats, count = (float(x) for x in out)
        except (TypeError, ValueError) as error:
            raise Broken(f"score_fn returned no (sum, count): {error}") from error
        if not (math.isfinite(nats) and math.isfinite(count) and count > 0):
            raise Broken(f"score_fn returned a sum of {nats} over a count of {count}")
        return nats, count

    def mean(self, state: Any, tokens: np.ndarray) -> float:
        """Nats per scored token."""
        nats, count = self.score(state, tokens)
        return nats / count

    def parameters(self, state: Any) -> trees.Arrays:
        """Copies of the floating-point leaves, by path."""
        tree = state if self.params_of is None else call("params_of", self.params_of, state)
        return {name: x.copy() for name, x in trees.float_leaves(tree).items() if x.size}


class Course(NamedTuple):
    """A run on fresh tokens, with the mean nats of one probe batch on the way."""

    state: Any
    parameters: list[trees.Arrays]  # at the start, after `EARLY` updates, at the end
    nats: list[float]  # at the start, after `REPEATED` and `EARLY` updates, at the end


@fixture
def probe(subject: Subject) -> np.ndarray:
    """The batch that is scored on the way."""
    return subject.batch(3)


@fixture
def course(subject: Subject, probe: np.ndarray) -> Course:
    """Train on fresh uniform tokens all the way."""
    state = subject.start()
    parameters, nats = [subject.parameters(state)], [subject.mean(state, probe)]
    for i in range(subject.steps):
        state = subject.step(state, subject.batch(1, i))
        if i + 1 in (REPEATED, EARLY):
            nats.append(subject.mean(state, probe))
        if i + 1 == EARLY:
            parameters.append(subject.parameters(state))
    parameters.append(subject.parameters(state))
    return Course(state, parameters, [*nats, subject.mean(state, probe)])


class Overfitted(NamedTuple):
    """A run on two rows over and over."""

    state: Any
    rows: np.ndarray
    late: float  # nats after two thirds of the updates
    end: float


@fixture
def overfitted(subject: Subject) -> Overfitted:
    """Train on two rows, as a batch of the usual shape."""
    rows = subject.batch(5)[:2]
    tokens = np.resize(rows, (subject.batch_size, subject.seq_len))
    steps = max(subject.steps // 2, EARLY)
    state = subject.start()
    for i in range(steps):
        if i == 2 * steps // 3:
            late = subject.mean(state, tokens)
        state = subject.step(state, tokens)
    return Overfitted(state, rows, late, subject.mean(state, tokens))
