"""What logged evaluations and perplexities can and cannot be."""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import scipy.stats

from lm_jax.doctor import numbers
from lm_jax.doctor.checks import check
from lm_jax.doctor.facts import Skip
from lm_jax.doctor.findings import Measure, Status, at_least, at_most, holds, listed, none, note
from lm_jax.doctor.log.series import Series, mean_error, noise, pairs
from lm_jax.doctor.log.subject import SUBWORDS, Subject
from lm_jax.doctor.numbers import half_unit

_LOW = math.log(5)  # nats; less is not known of natural text
_BY_HEART = 0.5  # nats; so little is left of text that was seen many times
_TIES = 1e-3  # chance of the ties of a healthy run
# Where trainers cut perplexities off.
_CAPS = {f"e^{x}": math.exp(x) for x in (5, 7, 10, 12, 15, 20, 30, 50, 80, 88, 100)}
_OVERFLOW = math.floor(math.log(np.finfo(np.float32).max))  # nats, of a float32 perplexity
_UNKNOWN = "not stated"
_MOST = 1000  # rows whose printed digits are looked at


@check(
    "The run overfits: keep the parameters of the lowest evaluation, and train on more data, for "
    "fewer epochs, with a smaller model or with dropout and weight decay."
)
def overfit(subject: Subject) -> list[Measure]:
    """The held-out loss does not lose half of what it had gained while the training loss falls."""
    subject.skip_if_overfit()
    splits = [split for split in subject.scored() if len(subject.nats(split)) > 1]
    if not splits or not subject.has("train/loss"):
        raise Skip("The log has no two evaluations beside a training loss.")
    found = [note("evaluations compared with the training loss", listed(splits))]
    guess = math.log(subject.vocab_size) if subject.vocab_size else math.inf
    for split in splits:
        if course := subject.overfitted(split):
            text = f"{split} overfits: from {course.low:.4g} at step {course.step} it rises to "
            text += f"{course.end:.4g} while the training loss falls"
            # Worse than the model that training began with, or than a guess: nothing is left.
            status: Status = "fail" if course.end > min(course.start, guess) else "warn"
            found.append(holds(False, text, course._asdict(), otherwise=status, key=split))
    return found


@check(
    "Score each token of the split once: count the targets that are real next tokens, not slots, "
    "padding or batches x length, and look for repeated or sampled-over data."
)
def logged_tokens(subject: Subject) -> Measure:
    """No evaluation scores more tokens than its split holds."""
    shares = {
        split: float(subject.finite(f"{split}/token_count").values.max() / size)
        for split, size in subject.sizes.items()
        if subject.has(f"{split}/token_count")
    }
    if not shares:
        raise Skip("Token counts are not logged, or split_tokens is not given.", "split_tokens")
    most = max(shares, key=lambda split: shares[split])
    return at_most(f"tokens of {most} scored, times those it holds", shares[most], 1, key="share")


@check(
    "Take both over the same tokens: padding or prompt tokens that are easily copied count in the "
    "loss only (examine_loss: loss.padding)."
)
def accuracy(subject: Subject) -> Measure:
    """A token that is not the most probable has p <= 1/2: loss >= (1 - accuracy) ln 2."""
    found = []
    for split in subject.splits("accuracy"):
        if not subject.has(f"{split}/loss"):
            continue
        rows = pairs(subject.finite(f"{split}/loss"), subject.finite(f"{split}/accuracy"))
        for step, nats, right in zip(*(x.tolist() for x in rows), strict=True):
            right = right / 100 if right > 1 else right  # in percent
            slack = half_unit(nats) + 1e-6 * nats + half_unit(right)
            least = (1 - right) * math.log(2) - slack
            what = f"{split}/loss with an accuracy of {right:.4g}, at step {step:.10g}"
            found.append((nats - least, at_least(what, nats, least, key="loss")))
    if not found:
        raise Skip("No row has both a loss and an accuracy.")
    return min(found, key=lambda row: row[0])[1]


@check(
    "The parameters do not move, the evaluation uses a copy or is not run again, or one split "
    "is used for two: run examine_training (training.updates, training.score_changes)."
)
def identical(subject: Subject) -> list[Measure]:
    """Evaluations at different steps, and of different splits, do not give the same number.

    The chance of a tie is the last printed digit over the usual change nearby; those seen, in a
    run or scattered, must be rarer than once in a thousand healthy runs.
    """
    splits = subject.splits("loss")
    found, seen = [], 0
    for split in splits:
        loss = subject.finite(f"{split}/loss")
        chances, same = _ties(subject, loss.where(slice(-1000, None)))
        seen += len(chances)
        runs = itertools.groupby(zip(chances, same, strict=True), lambda pair: bool(pair[1]))
        rarest = min((math.prod(p for p, _ in run) for tie, run in runs if tie), default=1.0)
        scattered = scipy.stats.poisson.sf(sum(map(bool, same)) - 1, sum(chances))
        if min(rarest * len(chances), scattered) < _TIES:
            what = f"evaluations of {split} that repeat"
            found.append(none(what, filter(None, same), of=len(chances), key=split))
    for a, b in [*(("train", split) for split in splits), *itertools.pairwise(splits)]:
        of_train = a == "train"
        if not subject.has(f"{a}/loss") or (of_train and subject.overfit):
            continue
        steps, x, y = pairs(subject.finite(f"{a}/loss"), subject.finite(f"{b}/loss"))
        same_at = (x == y) & (x != 0)
        digits = np.array([half_unit(v) / abs(v) for v in x[same_at][:_MOST]])
        # A row is equal by chance as often as its last digit goes into 1 %.
        chance = math.prod(np.minimum(1, 200 * digits))
        seen += len(x)
        if chance < (1e-4 if of_train else 0.05) and same_at.mean() > 0.9:
            what = f"rows where {a} and {b} have the same loss, so that one is the other"
            places = [f"step {s:.10g}" for s in steps[same_at]]
            found.append(none(what, places, of=len(x), key=b))
    if not seen:
        raise Skip("No two evaluations have a learning rate above 0 between them.")
    return found or [note("pairs of evaluations that differ", seen)]


def _ties(subject: Subject, loss: Series) -> tuple[list[float], list[str]]:
    """For each evaluation but the last, the chance that the next one is equal; where it is."""
    x, gaps = loss.values, np.diff(loss.steps)
    change, halves = np.abs(np.diff(x)), np.array([half_unit(value) for value in x])
    speed = change / gaps
    chances, same = [], []
    for i in np.flatnonzero(_learning(subject, loss.steps)).tolist():
        near = slice(max(0, i - 4), i + 5)
        moves = speed[near][change[near] > 0]
        # Without evaluations that differ, 1 % in 100 updates is taken for their usual change.
        usual = 0.01 * abs(x[i]) * min(1.0, gaps[i] / 100)
        usual = float(np.median(moves)) * gaps[i] if len(moves) else usual
        half = halves[near].min()
        exact = usual > 0 and half <= 1e-4 * abs(x[i])  # four decimals, as a rule
        chances.append(min(1.0, 2 * half / usual) if exact else 1.0)
        where = f"{x[i]:.10g} at steps {loss.steps[i]:.10g} and {loss.steps[i + 1]:.10g}"
        same.append("" if change[i] else where)
    return chances, same


def _learning(subject: Subject, steps: np.ndarray) -> np.ndarray:
    """Where the learning rate up to the next step is above 0.001 of its peak, or not logged."""
    if not subject.has("optim/lr"):
        return np.ones(len(steps) - 1, bool)
    lr = subject.finite("optim/lr")
    places, peak = np.searchsorted(lr.steps, steps, "right"), lr.values.max()
    above = np.cumsum(np.append(0, lr.values > 1e-3 * peak))[places]
    return (np.diff(above) > 0) | (np.diff(places) == 0) | (peak == 0)


@check(
    "Prove it first. The model sees its target (no label shift, no causal mask: loss.oracle, "
    "model.suffix_swap, training.gibbs), padding is scored as a target (loss.padding), valid text "
    "is in train or text is known by heart (data.document_containment)."
)
def floor(subject: Subject) -> list[Measure]:
    """The loss is not below the entropy of the source, nor far below an n-gram model's.

    No model of under 1e9 parameters reaches a tenth of a bigram's perplexity. Without references
    only sub-words are judged. A training loss on data that may not be new is never decisive.
    """
    subject.skip_if_overfit()
    best, references = _best(subject), subject.references or {}
    found = [] if "entropy_rate" in references else _memory(subject, references, bool(best))
    if best:
        found += _held_out(subject, *best)
    if not found:
        needs = "vocab_size" if subject.vocab_size is None else "references"
        raise Skip("Low losses are ordinary for under 1000 ids or unknown data.", needs)
    return found


def _held_out(subject: Subject, name: str, nats: float, count: float) -> Iterator[Measure]:
    """The lowest loss on held-out or new data, a mean of `count` tokens, against what is known."""
    references = subject.references or {}
    if "entropy_rate" in references:
        rate = references["entropy_rate"]
        error = _token_sd(subject) / math.sqrt(count) if count else math.nan
        if not math.isfinite(error):
            raise Skip("The number of scored tokens is not known.", "split_tokens")
        what = f"{name}, against the entropy rate of the source of {rate:.5g} nats"
        yield at_least(what, nats, math.nextafter(rate - 3 * error, math.inf), key="loss")
        yield note("standard error at most", error, key="error")
    elif "kn2" in references:
        status = "warn" if (subject.parameters or 0) >= 1e9 else "fail"
        what = f"{name}, nats, against a tenth of the perplexity of a bigram model"
        yield at_least(what, nats, math.log(references["kn2"] / 10), otherwise=status, key="loss")
    elif (subject.vocab_size or 0) >= SUBWORDS:
        what = f"{name}, nats (perplexity {numbers.exp(nats):.4g} over {subject.vocab_size} ids)"
        yield at_least(what, nats, _LOW, otherwise="warn", key="loss")


def _memory(subject: Subject, references: Mapping[str, float], held_out: bool) -> list[Measure]:
    """Whether the training loss is that of text known by heart, or too low for unknown data."""
    loss = subject.logged("train/loss")
    if not len(loss) or (subject.vocab_size or 0) < SUBWORDS:
        return []
    epochs = subject.epochs(loss.steps[-1:])
    if held_out if epochs is None else epochs[0] <= 1:
        return []
    what, limit = "on data that may be new", min(_LOW, math.log(references.get("kn2", 50) / 10))
    if epochs is not None:
        what, limit = f"of {epochs[0]:.3g} epochs", _BY_HEART
    last = loss.tail(0.1).values
    error = mean_error(loss.values, len(last)) if len(loss) >= 4 else 0.0
    what = f"train/loss at the end {what}, nats"
    return [at_least(what, float(last.mean()), limit - 3 * error, otherwise="warn", key="train")]


@check(
    "Run examine_model (model.context_use, model.row_independence, model.truncation; a weak model "
    "may see its target: model.suffix_swap), then examine_gradients (gradient.directional)."
)
def baseline(subject: Subject, steady: bool, references: dict[str, float]) -> Measure:
    """After an epoch or 100 updates: better than a unigram; after 3 epochs: than a bigram."""
    reference = {k: math.log(references[k]) for k in ("unigram", "kn2") if k in references}
    if not reference:
        raise Skip("No reference lines are given.", "references")
    split = next(iter(subject.scored()), "train")
    if split != "train" and (subject.overfit or subject.overfitted(split)):
        raise Skip(f"{split} overfits (log.overfit).")
    loss = subject.finite("train/loss") if split == "train" else subject.nats(split)
    if not subject.settled(loss.steps):
        raise Skip(f"The log ends at step {loss.steps[-1]:.10g}, too early for this check.")
    nats = float(loss.tail(0.25 if split == "train" else 0).values.mean())
    epochs = subject.epochs(loss.steps[-1:])
    name = "kn2" if epochs is not None and epochs[0] >= 3 else "unigram"
    name = name if name in reference else next(iter(reference))
    falls = len(loss) > 1 and loss.values[-1] < loss.values[0] - 0.05 * abs(loss.values[0])
    falls &= subject.vocab_size is None or nats < math.log(subject.vocab_size)
    status: Status = "fail" if nats > reference.get("unigram", math.inf) and not falls else "warn"
    ok = nats <= reference[name] or (name == "unigram" and falls)
    what, limit = f"{split} at the end, nats", f"at most {reference[name]:.4g} ({name})"
    return holds(ok, what, nats, limit=limit, otherwise=status, key="loss")


def _best(subject: Subject) -> tuple[str, float, float] | None:
    """The lowest of the losses on held-out or new data, with the number of tokens behind it."""
    found = []
    for split in subject.scored():
        count: float = subject.sizes.get(split, 0)
        if subject.has(f"{split}/token_count"):
            count = float(subject.finite(f"{split}/token_count").values.min())
        found.append((f"lowest {split} loss", float(subject.nats(split).values.min()), count))
    if subject.has("train/loss"):
        loss = subject.finite("train/loss")
        tokens, epochs = subject.tokens(loss.steps), subject.epochs(loss.steps)
        if tokens is not None and epochs is not None and (new := epochs <= 1).sum() >= 8:
            # The last stretch; the lowest would be lowest by chance.
            size = max(4, int(new.sum()) // 10)
            mean = float(loss.values[new][-size:].mean())
            spent = float(np.diff(tokens[new]).mean()) * size
            found.append(("train/loss late in the first epoch", mean, spent))
    return min(found, key=lambda row: row[1]) if found else None


def _token_sd(subject: Subject) -> float:
    """Standard deviation of the nats of one token: from the noise of batches, else at most ln V."""
    bound = math.log(subject.vocab_size) if subject.vocab_size else math.inf
    loss = subject.logged("train/loss")
    tokens = subject.tokens(loss.steps)
    if tokens is None or len(loss) < 60:
        return bound
    per_row = float(np.median(np.diff(tokens)) / np.median(np.diff(loss.steps)))
    return min(bound, noise(loss.values) * math.sqrt(per_row))


@check(
    "Log exp(sum of next-token nats (lm_ce) / number of scored tokens). Above it, exponentials "
    "were averaged; below it is another loss, or a cap, which hides divergence."
)
def ppl_of_loss(subject: Subject) -> list[Measure]:
    """Each perplexity is exp of the next-token loss of its row, to the digits printed."""
    found: list[Measure] = []
    wrong: list[tuple[float, str]] = []
    seen, bits = 0, False
    for name in filter(subject.has, (f"{s}/token_ppl" for s in ("train", "valid", "test"))):
        split = name.split("/")[0]
        low = float(np.nanmin(subject.series(name).values, initial=math.inf))
        if low < 1:
            found.append(at_least(f"lowest {name}", low, 1, key="lowest"))
        of = "lm_ce" if subject.has(f"{split}/lm_ce") else "loss"
        if subject.has(f"{split}/{of}"):
            is_bits = subject.in_bits(f"{split}/{of}")
            rows = pairs(subject.series(name), subject.rows.series(f"{split}/{of}"))
            good, here = _wrong(*rows, math.log(2) if is_bits else 1.0, of)
            wrong += [(excess, f"{split} at {text}") for excess, text in here]
            seen, bits = seen + good, bits or is_bits
    if not seen and not found:
        raise Skip("No row has both a loss and a token perplexity.")
    wrong.sort(key=lambda row: -abs(row[0]))
    texts = [text for _, text in wrong]
    found.append(none("rows where perplexity is not exp(loss)", texts, of=seen, key="wrong"))
    if wrong:
        found.append(note("largest difference, nats", wrong[0][0], key="excess"))
    return [*found, *([note("losses are in bits and judged in nats")] if bits else [])]


def _wrong(steps: Any, ppl: Any, loss: Any, unit: float, of: str) -> tuple[int, list[Any]]:
    """How many rows can be compared, and (ln ppl - nats, text) of those that do not fit."""
    use = np.isfinite(loss) & (ppl > 0) & (np.isfinite(ppl) | (loss * unit < _OVERFLOW))
    excess = np.log(ppl[use]) - loss[use] * unit
    order = np.argsort(-np.abs(excess))[:_MOST]
    found = []
    columns = (x[order].tolist() for x in (steps[use], ppl[use], loss[use], excess))
    for step, p, x, off in zip(*columns, strict=True):
        digits = (0.0 if math.isinf(p) else half_unit(p) / p) + unit * half_unit(x)
        if abs(off) > digits + 2e-6 * unit * max(1.0, abs(x)):  # float32 arithmetic
            cap = next((f" = {cap}" for cap, at in _CAPS.items() if math.isclose(p, at)), "")
            ln = f"ln {p:.10g}{cap} is {math.log(p):.6g}"
            found.append((off, f"step {step:.10g}: {ln} and the {of} {x * unit:.6g} nats"))
    return int(use.sum()), found


@check(
    "Perplexities of other tokens or text cannot be compared; compare bits per byte of one text."
)
def compared(subject: Subject) -> Measure:
    """Perplexities held against each other are of the same tokens of the same text."""
    if not subject.comparisons:
        raise Skip("No comparisons are given.", "comparisons")
    wrong, unknown = [], []
    for other in subject.comparisons:
        for key in ("tokenizer", "corpus", "unit"):
            mine, theirs = (x.get(key, _UNKNOWN) for x in (subject.measured_on or {}, other))
            text = f"{other['name']}: {key} {theirs}, here {mine}"
            if _UNKNOWN in (mine, theirs):
                unknown.append(text)
            elif mine != theirs:
                wrong.append(text)
    status = "fail" if wrong else "warn"
    return none("differences of what is compared", wrong or unknown, otherwise=status, key="wrong")
