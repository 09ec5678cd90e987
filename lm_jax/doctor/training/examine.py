"""A few hundred updates on random tokens: is anything learned that cannot be known?"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lm_jax.doctor.findings import Report, Skip, Verdict, call, check, verdict, whole
from lm_jax.doctor.model.examine import gated
from lm_jax.doctor.model.subject import is_float_leaf

EARLY = 20  # updates after which every parameter must have moved
BLOCK = 64  # batches scored between looks at the standard error
PAIRS = 4  # batches whose halves are exchanged
MOST_BLOCKS = 56  # some seconds; then the power is what it is


@dataclasses.dataclass
class Trainee:
    """What the user handed in, and the runs made of it, each once.

    A state that was handed to `step_fn` is never used again: its buffers may be donated.
    """

    init_fn: Callable[..., Any]
    step_fn: Callable[..., Any]
    score_fn: Callable[..., Any]
    vocab_size: int
    seq_len: int
    batch_size: int
    steps: int
    seed: int
    params_of: Callable[[Any], Any] | None
    smallest_leak: float

    def __post_init__(self):
        """Refuse arguments that no check could use."""
        for name in ("init_fn", "step_fn", "score_fn"):
            if not callable(getattr(self, name)):
                raise ValueError(f"{name} is no function; give one.")
        least = dict(vocab_size=2, seq_len=4, batch_size=2, steps=EARLY, seed=0)
        for name, low in least.items():
            whole(getattr(self, name), name, low)
        if not isinstance(self.smallest_leak, int | float) or not self.smallest_leak > 0:
            raise ValueError(f"smallest_leak is {self.smallest_leak!r}; give nats above 0.")
        self.probe = self.batch(3)

    def batch(self, *stream: int) -> np.ndarray:
        """Fresh independent uniform ids [B, T], over the whole vocabulary."""
        rng = np.random.default_rng((self.seed, *stream))
        size = (self.batch_size, self.seq_len)
        return rng.integers(0, self.vocab_size, size, dtype=np.int32)

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
        raise Skip("step_fn returned neither a state like the one it got nor (state, metrics)")

    def score(self, state: Any, tokens: np.ndarray) -> tuple[float, float]:
        """Summed nats and count."""
        out = call("score_fn", self.score_fn, state, tokens.copy())
        try:
            nats, count = (float(x) for x in out)
        except (TypeError, ValueError) as error:
            raise Skip(f"score_fn returned no (sum, count): {error}") from error
        if not (np.isfinite(nats) and np.isfinite(count) and count > 0):
            raise Skip(f"score_fn returned a sum of {nats} over a count of {count}")
        return nats, count

    def mean(self, state: Any, tokens: np.ndarray) -> float:
        """Nats per scored token."""
        nats, count = self.score(state, tokens)
        return nats / count

    def parameters(self, state: Any) -> dict[str, np.ndarray]:
        """Copies of the floating-point leaves, by path."""
        tree = state if self.params_of is None else call("params_of", self.params_of, state)
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): np.array(leaf, copy=True)
            for path, leaf in jax.tree.leaves_with_path(tree)
            if hasattr(leaf, "dtype") and is_float_leaf(leaf)
        }

    @functools.cached_property
    def run(self) -> dict[str, Any]:
        """Train on fresh uniform tokens all the way, with looks at 0, 3 and `EARLY` updates."""
        state = self.start()
        seen: dict[str, Any] = {"before": self.parameters(state)}
        seen["score0"] = self.mean(state, self.probe)
        for i in range(self.steps):
            state = self.step(state, self.batch(1, i))
            if i + 1 == 3:
                seen["score3"] = self.mean(state, self.probe)
            if i + 1 == EARLY:
                seen["after"] = self.parameters(state)
                seen["score_early"] = self.mean(state, self.probe)
        return seen | {"state": state}

    @functools.cached_property
    def overfitted(self) -> dict[str, Any]:
        """Train on two rows over and over, as a batch of the usual shape."""
        rows = self.batch(5)[:2]
        tokens = np.resize(rows, (self.batch_size, self.seq_len))
        steps = max(self.steps // 2, EARLY)
        state = self.start()
        for i in range(steps):
            if i == 2 * steps // 3:
                late = self.mean(state, tokens)
            state = self.step(state, tokens)
        end = self.mean(state, tokens)
        return {"state": state, "rows": rows, "steps": steps, "late": late, "end": end}

    @functools.cached_property
    def chance(self) -> float:
        """Nats of a guess."""
        return float(np.log(self.vocab_size))


@check(
    "training.run",
    remedy="Hand in init_fn(seed), step_fn(state, tokens) and score_fn(state, tokens) that run on "
    "uniform ids and return finite sums; nothing else was examined.",
)
def run(t: Trainee) -> Verdict:
    """The run must go through with finite numbers."""
    try:
        seen = t.run
        end = t.mean(seen["state"], t.probe)
    except Skip as reason:
        return verdict(False, f"{reason}.")
    evidence = (
        f"{t.steps} updates on fresh uniform tokens [{t.batch_size}, {t.seq_len}]: "
        f"{seen['score0']:.4f} nats a token before, {end:.4f} after, ln V = {t.chance:.4f}."
    )
    return verdict(True, evidence, before=seen["score0"], after=end)


@check(
    "target.gibbs",
    remedy="The model predicts random tokens better than chance, so it sees its target: labels "
    "without a shift, no causal mask, or a sum over later positions. examine_model says where.",
)
def gibbs(t: Trainee) -> Verdict:
    """On fresh uniform tokens no predictor has less than ln V nats: the Gibbs inequality."""
    state = t.run["state"]
    means: list[float] = []
    counts: set[float] = set()
    for block in range(MOST_BLOCKS):
        for i in range(BLOCK):
            nats, count = t.score(state, t.batch(2, block, i))
            means.append(nats / count)
            counts.add(count)
        n = len(means)
        error = float(np.std(means, ddof=1) / n**0.5)
        # Without a leak the nats of random tokens are uncorrelated, so this is their variance,
        # that of the logits; half of it is what the noise of the parameters adds to the loss.
        noise = error**2 * n * min(counts) / 2
        either = float(np.hypot(error, noise * (2 / n) ** 0.5))
        # Stopping looks at errors alone, never at the mean.
        if 5 * either <= t.smallest_leak:
            break
    if len(counts) > 1:
        raise Skip(
            f"score_fn scored {min(counts):g} to {max(counts):g} tokens of batches of one shape: "
            "it leaves tokens out by their value, and ln V is no bound then"
        )
    excess = float(np.mean(means)) - t.chance
    evidence = (
        f"After {t.steps} updates, {n} batches of {count:g} scored tokens: {excess:+.5f} ± "
        f"{error:.5f} nats from ln V = {t.chance:.4f}; below -3 SE is a leak. The noise of the "
        f"parameters adds {noise:.5f} ± {noise * (2 / n) ** 0.5:.5f}."
    )
    # Float32 sums carry an error of their own, about eps times the value.
    leak = excess < -3 * error - 2.0**-22 * t.chance
    # Far from uniform, half the variance is not what noise adds, and all the excess may hide one.
    visible = 5 * either if noise < 0.05 else abs(excess) + 5 * error
    values: dict[str, Any] = {
        "excess": excess,
        "error": error,
        "noise": noise,
        "visible": visible,
        "batches": n,
    }
    if leak:
        return verdict(False, evidence, **values)
    evidence += (
        f" Smallest leak, once learned, that this run could have seen: {visible:.4f} nats, asked "
        f"for {t.smallest_leak:g}."
    )
    if noise < 0.05 and noise - excess > 3 * either:
        evidence += f" Less is added than the noise: a leak of {noise - excess:.4f} nats may hide."
        return verdict(False, evidence, otherwise="warn", **values)
    if visible > t.smallest_leak:
        evidence += " Not decided: train longer, or with a rate that comes nearer to ln V."
    return verdict(visible <= t.smallest_leak, evidence, otherwise="warn", **values)


@check(
    "training.updates",
    remedy="The named parameters are not trained: see that they are handed to the optimiser, that "
    "no stop_gradient or detach stands before them, and that the schedule is not 0.",
)
def updates(t: Trainee) -> Verdict:
    """Every parameter leaf must have changed after a few updates."""
    before, after = t.run["before"], t.run["after"]
    names = [name for name in before if before[name].size]
    if not names:
        raise Skip("the state has no floating-point arrays; give params_of")
    still = [n for n in names if np.array_equal(before[n], after.get(n), equal_nan=True)]
    evidence = f"{len(names) - len(still)} of {len(names)} leaves changed in {EARLY} updates"
    evidence += f"; unchanged: {', '.join(still[:6])}." if still else "."
    if t.params_of is None:
        evidence += " Which of them are parameters is not known without params_of."
        return verdict(len(still) < len(names), evidence, unchanged=still)
    return verdict(not still, evidence, unchanged=still)


@check(
    "training.score_changes",
    remedy="Training does not reach the parameters that are scored. Look at the accumulation "
    "counter, and at whether score_fn reads the state that step_fn returns.",
)
def score_changes(t: Trainee) -> Verdict:
    """The score of one batch must change in the first updates."""
    start, end = t.run["score0"], t.run["score_early"]
    evidence = f"One batch scored {start!r} nats before and {end!r} after {EARLY} updates."
    return verdict(start != end, evidence, before=start, after=end)


@check(
    "training.score_repeats",
    remedy="Switch dropout and every other source of randomness off in evaluation.",
)
def score_repeats(t: Trainee) -> Verdict:
    """Two scores of the same batch must be the same, bit by bit."""
    first, again = (t.score(t.run["state"], t.probe)[0] for _ in range(2))
    evidence = f"One batch scored twice: {first!r} and {again!r} nats in sum."
    return verdict(first == again, evidence, difference=first - again)


@check(
    "training.reproducible",
    remedy="The same seed and batches give another run. Look for memory that is read before it "
    "is written, keys drawn from the clock, or kernels that add in random order.",
)
def reproducible(t: Trainee) -> Verdict:
    """The same seed and the same three batches must lead to the same score."""
    state = t.start()
    for i in range(3):
        state = t.step(state, t.batch(1, i))
    again, first = t.mean(state, t.probe), t.run["score3"]
    gap = abs(again - first) / max(abs(first), 1e-30)
    # Kernels that add in random order differ by roundings, not by half the digits of float32.
    limit = 2.0**-11.5
    evidence = (
        f"After three updates from the same seed {first!r} and {again!r} nats; allowed 0, and "
        f"beyond a relative {limit:.1g} rounding explains nothing."
    )
    return verdict(gap == 0, evidence, otherwise="fail" if gap > limit else "warn", gap=gap)


@check(
    "training.row_independence",
    remedy="A row's score depends on the other rows of its batch. Look for attention over the "
    "batch axis, keys and values of one row used for all, or statistics over the batch.",
)
def row_independence(t: Trainee) -> Verdict:
    """Halves of two batches exchanged: the sum of both scores must stay."""
    # Overfitted parameters make the most of their context, so any mixing of rows is large.
    state, half = t.overfitted["state"], t.batch_size // 2
    gap = allowed = 0.0
    for i in range(PAIRS):
        a, b = t.batch(4, i, 0), t.batch(4, i, 1)
        crossed = np.concatenate([a[:half], b[half:]]), np.concatenate([b[:half], a[half:]])
        sums = [t.score(state, tokens)[0] for tokens in (a, b, *crossed)]
        gap = max(gap, abs(sums[0] + sums[1] - sums[2] - sums[3]))
        # A float32 sum of n terms by halves carries log2(n) roundings.
        allowed = max(allowed, 2.0**-24 * np.log2(a.size) * float(np.abs(sums).sum()))
    evidence = (
        f"Rows {half} on of two batches exchanged, {PAIRS} times: the sum of both scores changes "
        f"by up to {gap:.3g} nats, allowed {allowed:.2g} (rounding of {t.probe.size} terms)."
    )
    return verdict(gap <= allowed, evidence, gap=gap, allowed=allowed)


@check(
    "training.overfit",
    remedy="One batch of two rows cannot be learned: look at the gradients (examine_gradients) and "
    "at the learning rate before anything else.",
)
def overfit(t: Trainee) -> Verdict:
    """Two rows, over and over, must be learned better than by the frequencies of their tokens."""
    rows, late, end = (t.overfitted[name] for name in ("rows", "late", "end"))
    shares = np.unique(rows[:, 1:], return_counts=True)[1] / rows[:, 1:].size
    entropy = float(-(shares * np.log(shares)).sum())
    evidence = (
        f"Two rows for {t.overfitted['steps']} updates: {late:.3f} nats after two thirds, "
        f"{end:.3f} at the end; their token frequencies alone give {entropy:.3f}."
    )
    values = {"end": end, "late": late, "entropy": entropy}
    if end >= entropy and end < late - 0.01 * entropy:
        return verdict(False, evidence + " Still falling.", otherwise="warn", **values)
    return verdict(end < entropy, evidence, **values)


@check(
    "training.norms",
    remedy="Find the first update at which the named parameters are not finite; clip gradients, "
    "lower the rate, or skip non-finite updates.",
)
def norms(t: Trainee) -> Verdict:
    """All parameters must be finite after training."""
    end = t.parameters(t.run["state"])
    if not end:
        raise Skip("the state has no floating-point arrays; give params_of")
    bad = [n for n, leaf in end.items() if not np.isfinite(leaf.astype(np.float64)).all()]

    def norm(leaves: Mapping[str, np.ndarray]) -> float:
        squares = [np.square(leaf.astype(np.float64)).sum() for leaf in leaves.values()]
        return float(np.sqrt(sum(squares)))

    before, after = norm(t.run["before"]), norm(end)
    evidence = f"Norm of all leaves {before:.4g} before and {after:.4g} after {t.steps} updates; "
    evidence += f"not finite: {', '.join(bad[:4])}." if bad else "all finite."
    return verdict(not bad, evidence, before=before, after=after, non_finite=bad)


CHECKS = (
    gibbs,
    updates,
    score_changes,
    score_repeats,
    reproducible,
    row_independence,
    overfit,
    norms,
)


def examine_training(
    init_fn: Callable[..., Any],
    step_fn: Callable[..., Any],
    score_fn: Callable[..., Any],
    *,
    vocab_size: int,
    seq_len: int,
    batch_size: int = 16,
    steps: int = 400,
    seed: int = 0,
    params_of: Callable[[Any], Any] | None = None,
    smallest_leak: float = 0.003,
) -> Report:
    """Examine a training loop by short runs on random tokens: families training, target.

    Args:
        init_fn: (seed) -> state.
        step_fn: (state, tokens int32 [B, T]) -> state or (state, metrics): one update. It may
            donate the state that it gets.
        score_fn: (state, tokens) -> (sum of nats, number of scored tokens), without dropout.
        vocab_size: V; ids are uniform in [0, V).
        seq_len: T.
        batch_size: B, of all calls.
        steps: updates on fresh tokens; half as many more are made on one batch.
        seed: of the state and the tokens.
        params_of: (state) -> pytree of the parameters, to judge them one by one.
        smallest_leak: nats a token that the Gibbs test is asked to see; it warns where its own
            noise is larger.

    Raises:
        ValueError: if an argument is impossible.
    """
    trainee = Trainee(
        init_fn,
        step_fn,
        score_fn,
        vocab_size,
        seq_len,
        batch_size,
        steps,
        seed,
        params_of,
        smallest_leak,
    )
    return gated(run, CHECKS, trainee)
