"""A training loop as a black box: what every loop has, and the runs made of it, each once."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np

from lm_jax.doctor import trees
from lm_jax.doctor.checks import fixture
from lm_jax.doctor.facts import Broken, Facts, above, call, function, whole

EARLY = 20  # updates after which every parameter must have moved
REPEATED = 3  # updates that are made twice
LOGITS = 2**26  # of a batch if its size is not given: 256 MiB in float32
Function = Annotated[Callable[..., Any], function]


def kind(state: Any) -> Any:
    """What a step leaves as it is: the structure of the state, and the types of its objects."""
    leaves, structure = jax.tree.flatten(state, is_leaf=lambda x: x is None)
    plain = (numbers.Number, type(None))
    objects = [not (isinstance(x, plain) or hasattr(x, "dtype")) and type(x) for x in leaves]
    return structure, objects


def stepped(before: Any, out: Any) -> tuple[Any, Any]:
    """State and metrics, or None, from what `step_fn` made of a state of the kind `before`."""
    if kind(out) == before:
        return out, None
    if isinstance(out, tuple) and len(out) == 2 and kind(out[0]) == before:
        return out
    told = "step_fn returned neither a state like the one it got nor (state, metrics)"
    raise Broken(f"{told}; let it return the state even if it changes in place")


def opened(tree: Any) -> Any:
    """PyTorch's modules and optimisers, and generators, replaced by the arrays in them."""

    def arrays(leaf: Any) -> Any:
        if hasattr(leaf, "named_parameters"):
            return dict(leaf.named_parameters())
        if hasattr(leaf, "param_groups"):
            return {str(name): x for name, x in leaf.state_dict()["state"].items()}
        return leaf

    return jax.tree.map(arrays, list(tree) if isinstance(tree, Iterator) else tree)


def unmoved(before: trees.Arrays, after: trees.Arrays) -> list[str]:
    """Names of the leaves whose values are exactly the same."""
    return [n for n, x in before.items() if np.array_equal(x, after.get(n), equal_nan=True)]


@dataclasses.dataclass
class Subject(Facts):
    """Examine a training loop by short runs on random tokens.

    Ids are uniform in [0, V), so that no model can predict them. A state that was handed to
    `step_fn` is never used again: its buffers may be donated.
    """

    init_fn: Annotated[Function, "(seed) -> state."]
    step_fn: Annotated[Function, "(state, tokens int32 [B, T]) -> state or (state, metrics)."]
    score_fn: Annotated[Function, "(state, tokens) -> (sum of nats, count), without dropout."]
    _: dataclasses.KW_ONLY
    vocab_size: Annotated[int, "V.", whole(2)]
    seq_len: Annotated[int, "T.", whole(4)]
    batch_size: Annotated[int | None, "B; None: up to 16 in 256 MiB of logits.", whole(2)] = None
    steps: Annotated[int, "updates on fresh ids; half as many on one batch.", whole(EARLY)] = 400
    seed: Annotated[int, "of the state and the tokens.", whole()] = 0
    params_of: Annotated[Callable[..., Any] | None, "(state) -> parameters.", function] = None
    smallest_leak: Annotated[float, "nats a token that must be seen.", above(0)] = 0.003

    def batch(self, *stream: int) -> np.ndarray:
        """Fresh independent uniform ids [B, T], over the whole vocabulary."""
        size = (self.rows, self.seq_len)
        return self.rng(*stream).integers(0, self.vocab_size, size, dtype=np.int32)

    @property
    def rows(self) -> int:
        """Rows of a batch."""
        return self.batch_size or min(16, max(2, LOGITS // (self.vocab_size * self.seq_len)))

    @property
    def chance(self) -> float:
        """Nats of a guess."""
        return math.log(self.vocab_size)

    def start(self) -> Any:
        """A fresh state."""
        return call("init_fn", self.init_fn, self.seed)

    def step(self, state: Any, tokens: np.ndarray) -> Any:
        """The state after one update; metrics, if there are any, are dropped."""
        before = kind(state)
        return stepped(before, call("step_fn", self.step_fn, state, tokens.copy()))[0]

    def score(self, state: Any, tokens: np.ndarray) -> tuple[float, float]:
        """Summed nats and count."""
        out = call("score_fn", self.score_fn, state, tokens.copy())
        try:
            nats, count = (float(trees.as_array(x)) for x in out)
        except (TypeError, ValueError) as error:
            raise Broken(f"score_fn returned no (sum, count): {error}") from error
        if not (-1e-3 * count <= nats < math.inf and len(tokens) <= count <= tokens.size):
            found = f"score_fn returned a sum of {nats:.6g} over a count of {count:.6g}"
            raise Broken(f"{found}: let it return the nats of all scored tokens, and their number")
        return nats, count

    def mean(self, state: Any, tokens: np.ndarray) -> float:
        """Nats per scored token."""
        nats, count = self.score(state, tokens)
        return nats / count

    def parameters(self, state: Any) -> trees.Arrays:
        """The floating-point leaves by path, which the next step may overwrite."""
        tree = state if self.params_of is None else call("params_of", self.params_of, state)
        return {name: x for name, x in trees.float_leaves(opened(tree)).items() if x.size}


class Course(NamedTuple):
    """A run on fresh tokens, with the mean nats of one probe batch on the way."""

    state: Any
    nats: list[float]  # at the start, after `REPEATED` and `EARLY` updates, at the end
    leaves: int  # of floating-point numbers
    unmoved: list[str]  # after `EARLY` updates
    nonfinite: list[str]  # at the end


@fixture
def probe(subject: Subject) -> np.ndarray:
    """The batch that is scored on the way."""
    return subject.batch(3)


@fixture
def course(subject: Subject, probe: np.ndarray) -> Course:
    """Train on fresh uniform tokens all the way."""
    state = subject.start()
    start = {name: x.copy() for name, x in subject.parameters(state).items()}
    first, count = subject.score(state, probe)
    # Untrained, no 16 tokens cost together what one costs by chance.
    if count >= 16 and 0.5 < first / subject.chance < 2:
        raise Broken(f"score_fn returned {first:.4g} for {count:g} tokens: not a sum but a mean")
    nats, leaves = [first / count], len(start)
    for i in range(subject.steps):
        state = subject.step(state, subject.batch(1, i))
        if i + 1 in (REPEATED, EARLY):
            nats.append(subject.mean(state, probe))
        if i + 1 == EARLY:
            still = unmoved(start, subject.parameters(state))
            start.clear()  # of a large model each copy is gigabytes
    nats.append(subject.mean(state, probe))
    return Course(state, nats, leaves, still, trees.nonfinite(subject.parameters(state)))


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
    tokens = np.resize(rows, (subject.rows, subject.seq_len))
    steps = max(subject.steps // 2, EARLY)
    state = subject.start()
    for i in range(steps):
        if i == 2 * steps // 3:
            late = subject.mean(state, tokens)
        state = subject.step(state, tokens)
    return Overfitted(state, rows, late, subject.mean(state, tokens))
