"""What short trainings show."""

import math

import numpy as np

from lm_jax.doctor import numbers
from lm_jax.doctor.checks import check
from lm_jax.doctor.facts import Skip
from lm_jax.doctor.findings import Measure, at_least, at_most, equals, holds, none, note
from lm_jax.doctor.training.subject import EARLY, REPEATED, Course, Overfitted, Subject

BLOCK = 64  # batches scored between looks at the standard error
MOST_BLOCKS = 56  # some seconds; then the power is what it is
MOST_LOGITS = 2**36  # computed by them, about as many as in training with V 50,257 and T 1024
PAIRS = 4  # batches whose halves are exchanged


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
        n, (excess, error) = len(means), numbers.mean(means)
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
