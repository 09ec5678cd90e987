"""A training loop as a black box: short runs on random tokens, each made once, and their checks."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np

from lm_jax.doctor import trees
from lm_jax.doctor.checks import check, fixture
from lm_jax.doctor.facts import Broken, Facts, Skip, above, call, function, whole
from lm_jax.doctor.findings import Measure, at_least, at_most, equals, holds, none, note
from lm_jax.doctor.numbers import mean

EARLY = 20  # updates after which every parameter must have moved
REPEATED = 3  # updates that are made twice
LOGITS = 2**26  # of a batch if its size is not given: 256 MiB in float32
BLOCK = 64  # batches scored between looks at the standard error
MOST_BLOCKS = 56  # some seconds; then the power is what it is
MOST_LOGITS = 2**36  # computed by them, about as many as in training with V 50,257 and T 1024
PAIRS = 4  # batches whose halves are exchanged
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


@check("Hand in functions that run on uniform ids and return finite sums.", gate=True)
def run(subject: Subject, course: Course) -> list[Measure]:
    """The loop runs on uniform tokens with finite scores."""
    return [
        note(f"nats a token before, where ln V is {subject.chance:.4f}", course.nats[0]),
        note(f"after {subject.steps} updates", course.nats[-1], key="after"),
    ]


@check("Look for labels without a shift or a missing mask; examine_model says where.")
def gibbs(subject: Subject, course: Course) -> list[Measure]:
    """On fresh uniform tokens no predictor has less than ln V nats: the Gibbs inequality."""
    means: list[float] = []
    counts: set[float] = set()
    logits = BLOCK * subject.rows * subject.seq_len * subject.vocab_size
    for block in range(min(MOST_BLOCKS, max(1, MOST_LOGITS // logits))):
        for i in range(BLOCK):
            nats, count = subject.score(course.state, subject.batch(2, block, i))
            means.append(nats / count - subject.chance)
            counts.add(count)
        n, (excess, error) = len(means), mean(means)
        # Without a leak the nats of random tokens are uncorrelated, so this is their variance,
        # that of the logits; half of it is what the noise of the parameters adds to the loss.
        noise = error**2 * n * min(counts) / 2
        either = float(np.hypot(error, noise * (2 / n) ** 0.5))
        # Stopping looks at errors alone, never at the mean.
        if 5 * either <= subject.smallest_leak:
            break
    if len(counts) > 1:
        raise Skip("score_fn leaves tokens out by their value, and ln V is no bound then.")
    # Float32 sums carry an error of their own, about eps times the value.
    bound = -3 * error - 2.0**-22 * subject.chance
    untrained = course.nats[0] < 0.999 * subject.chance
    where = "as before any training: look at score_fn's sum and count" if untrained else ""
    what = f"nats above ln V = {subject.chance:.4f} on {n} batches of random tokens"
    found = [
        at_least(what, excess, bound, where=where, key="excess"),
        note("standard error", error, key="error"),
        note("of the excess, noise of the parameters", noise, key="noise"),
    ]
    if excess < bound:
        return found
    # Far from uniform, half the variance is not what noise adds, and all the excess may hide one.
    near = noise < 0.05
    lacking, visible = noise - excess, 5 * either if near else abs(excess) + 5 * error
    if near and lacking > 3 * either:
        found.append(at_most("nats less than noise adds", lacking, 3 * either, otherwise="warn"))
    where = "not decided: train longer, or with a rate that comes nearer to ln V"
    what, most = "smallest leak that would have been seen, nats", subject.smallest_leak
    return [*found, at_most(what, visible, most, otherwise="warn", where=where, key="visible")]


@check("See that the optimiser gets these leaves, and that nothing detaches them.")
def updates(subject: Subject, course: Course) -> list[Measure]:
    """Every parameter leaf changes in the first updates, and is finite at the end."""
    leaves, still = course.leaves, course.unmoved
    if not leaves:
        raise Skip("The state has no floating-point arrays; give params_of.", "params_of")
    # Without params_of the state is more than parameters, and some of it may well stay.
    if subject.params_of is None and len(still) < leaves:
        still = []
    return [
        none(f"leaves unchanged after {EARLY} updates", still, of=leaves, key="unchanged"),
        none("leaves not finite at the end", course.nonfinite, of=leaves, key="nonfinite"),
    ]


@check("Look at the accumulation counter, and whether score_fn reads the state of step_fn.")
def score_changes(course: Course) -> Measure:
    """The score of one batch changes in the first updates."""
    start, _, early, _ = course.nats
    return holds(start != early, f"change of one batch's nats in {EARLY} updates", early - start)


@check("Switch dropout and every other source of randomness off in evaluation.")
def score_repeats(subject: Subject, course: Course, probe: np.ndarray) -> Measure:
    """Two scores of the same batch are the same, bit by bit."""
    first, again = (subject.score(course.state, probe)[0] for _ in range(2))
    return equals("difference of two scores of one batch", first - again, 0, key="difference")


@check("Look for memory read before it is written, keys of the clock, or unordered sums.")
def reproducible(subject: Subject, course: Course, probe: np.ndarray) -> Measure:
    """The same seed and the same batches lead to the same score."""
    state = subject.start()
    for i in range(REPEATED):
        state = subject.step(state, subject.batch(1, i))
    again, first = subject.mean(state, probe), course.nats[1]
    gap = abs(again - first) / max(abs(first), 1e-30)
    # Kernels that add in random order differ by roundings, not by half the digits of float32.
    otherwise = "fail" if gap > 2.0**-11.5 else "warn"
    what = f"relative difference after {REPEATED} updates from one seed"
    return equals(what, gap, 0, otherwise=otherwise, key="gap")


@check("Look for attention over the batch axis, and for keys or statistics of other rows.")
def row_independence(subject: Subject, overfitted: Overfitted) -> Measure:
    """Two batches that exchange half their rows score the same together."""
    # Overfitted parameters make the most of their context, so any mixing of rows is large.
    half = subject.rows // 2
    gap = allowed = 0.0
    for i in range(PAIRS):
        a, b = subject.batch(4, i, 0), subject.batch(4, i, 1)
        crossed = np.concatenate([a[:half], b[half:]]), np.concatenate([b[:half], a[half:]])
        sums = [subject.score(overfitted.state, tokens)[0] for tokens in (a, b, *crossed)]
        gap = max(gap, abs(sums[0] + sums[1] - sums[2] - sums[3]))
        # A float32 sum of n terms by halves carries log2(n) roundings.
        allowed = max(allowed, 2.0**-24 * np.log2(a.size) * float(np.abs(sums).sum()))
    return at_most("change of the two batches' nats together", gap, allowed, key="gap")


@check("Look at the gradients (examine_gradients) and at the learning rate first.")
def overfit(overfitted: Overfitted) -> Measure:
    """Two rows, over and over, are learned better than by the frequencies of their tokens."""
    rows, late, end = overfitted.rows, overfitted.late, overfitted.end
    shares = np.unique(rows[:, 1:], return_counts=True)[1] / rows[:, 1:].size
    entropy = -float((shares * np.log(shares)).sum())
    falling = end < late - 0.01 * entropy
    status, where = ("warn", "still falling") if falling else ("fail", "no longer falling")
    what, most = "nats of two rows seen again and again", math.nextafter(entropy, 0)
    return at_most(what, end, most, otherwise=status, where=where, key="end")
