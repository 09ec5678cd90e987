"""What the loss says beside ln V, the nats of a uniform guess."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from lm_jax.doctor.checks import check
from lm_jax.doctor.facts import Skip, give
from lm_jax.doctor.findings import Measure, at_most, holds, note
from lm_jax.doctor.log.series import Series, mean_error, noise
from lm_jax.doctor.log.subject import SUBWORDS, Subject
from lm_jax.doctor.numbers import Mean

LARGEST = 15.0  # nats; ln V of a million ids is 13.8
# Numbers of micro-batches and devices.
_PARTS = (1, 3, 5, 6, 10, 12, 20, 24, 40, 48, *(2**i for i in range(1, 11)))
_LARGE_VOCABULARY = 8000  # SentencePiece's default; made-up tasks have fewer ids


@check(
    "Report unsmoothed next-token nats alone, not a total objective; if they are, nothing is "
    "learned or labels do not belong to the logits (model.row_independence, model.suffix_swap, "
    "gradient.directional, loss.oracle, loss.definition)."
)
def above_uniform(subject: Subject, steady: bool, uniform: float | None = None) -> list[Measure]:
    """Neither loss nor perplexity stays above that of a uniform guess.

    Where V is not given, `LARGEST` is held against the loss: no vocabulary in use has so many ids.
    """
    limit = uniform or LARGEST
    found = [*_train_above(subject, limit), *_splits_above(subject, limit)]
    if not found:
        raise Skip("The log has no loss after the first 100 updates or the first epoch.")
    return [*found, *([note("ln V", uniform)] if uniform else [])]


def _splits_above(subject: Subject, limit: float) -> Iterator[Measure]:
    """The last loss and perplexity of each split."""
    # A perplexity of the sum of all terms of a distillation is wrong even while it falls.
    others = any(n.startswith("distill/") and "lm_ce" not in n for n in subject.rows.names)
    start = subject.logged("train/loss").values[:1].min(initial=math.inf)
    for split in () if subject.overfit else subject.scored():
        for name in ("loss", "token_ppl") if subject.vocab_size else ("loss",):
            if not subject.has(f"{split}/{name}"):
                continue
            series = subject.series(f"{split}/{name}")
            x = series.values[~np.isnan(series.values)]
            if not len(x) or not subject.settled(series.steps) or subject.overfitted(split):
                continue
            nats = x[-1] if name == "loss" else np.log(max(x[-1], 1e-9))
            falls = len(x) > 1 and x[-1] < x[0] and nats < start
            falls = falls and not (others and nats > limit + 0.5)
            most = limit if name == "loss" else float(subject.vocab_size or 0)
            status = "warn" if falls else "fail"
            yield at_most(f"last {split}/{name}", x[-1], most, otherwise=status)


def _train_above(subject: Subject, limit: float) -> Iterator[Measure]:
    """The training loss: of few rows the lowest, else the mean of the last quarter."""
    name = "distill/lm_ce" if subject.has("distill/lm_ce") else "train/loss"
    loss = subject.logged(name)
    if not len(loss) or not subject.settled(loss.steps):
        return
    x = loss.values
    if len(x) < 8:
        status = "warn" if len(x) > 1 and x[-1] == x.min() else "fail"
        yield at_most(f"lowest {name}", float(x.min()), limit, otherwise=status, key="lowest")
        return
    last = loss.tail(0.25).values
    error = mean_error(x, len(last))
    # Falling: less in the last quarter than in the one before, and within the last quarter too,
    # by at least half of what a straight line would fall (or too noisy to tell).
    third = loss.tail(0.5).values[: -len(last)]
    half = len(last) // 2
    fell = third.mean() - last.mean() if len(third) else 0.0
    late = last[:half].mean() - last[-half:].mean()
    falls = fell > 3 * math.sqrt(2) * error and late + 6 * error > fell / 4
    # It is not on its way back from a divergence, and would get there in three times its length.
    falls = falls and last.mean() < x[0] and last.mean() - 8 * fell < limit
    what, most = f"{name} over the last quarter", f"at most {limit:.4g} ± {error:.2g}"
    status, where = ("warn", "still falling") if falls else ("fail", "no longer falling")
    more: dict[str, Any] = dict(limit=most, otherwise=status, where=where, key="mean")
    yield holds(last.mean() - limit <= 3 * error, what, float(last.mean()), **more)
    if len(x) >= 20:
        text = f"share of rows with {name} above {limit:.4g}"
        over = float(np.mean(x[loss.steps > 0.05 * loss.steps[-1]] > limit))
        yield at_most(text, over, 0.25, otherwise="warn")


@check(
    "Divide the sum of nats by the number of scored tokens alone, not by micro-batches or devices, "
    "and see that gradients are not divided; a model that was trained before is in order."
)
def first_loss(subject: Subject, loss: Series, uniform: float) -> Measure:
    """The first loss of an untrained model is ln V, not ln V divided by 2, 3, 4 or more."""
    first, step = float(loss.values[0]), float(loss.steps[0])
    if step > 10 or (len(loss) > 1 and step > 0.02 * loss.steps[-1]):
        raise Skip("The log does not begin with the first updates.")
    parts = min(_PARTS, key=lambda n: abs(math.log(max(first, 1e-9) * n / uniform)))
    # A model at random begins some percent above ln V; ten updates may take a tenth off. A
    # pre-trained one may begin anywhere, but does not fall as far.
    power = parts & (parts - 1) == 0
    low, high = (0.97 if step <= 1 else 0.85, 1.06) if power else (0.98, 1.05)
    near = low <= first * parts / uniform <= high and (power or step <= 1)
    falls = loss.tail(0.1).values.mean() < (0.6 if power else 0.5) * first
    # Evaluations are not divided: one that is no larger says that the model was trained before.
    firsts = [subject.nats(split) for split in subject.scored()]
    same = any(y[0] < 1.5 * np.interp(at[0], *loss) for at, y in firsts)
    ok = not (parts > 1 and near and falls and not same)
    what, limit = f"first loss, at step {step:.10g}", f"ln V = {uniform:.4g}"
    where = f"ln V / {parts} = {uniform / parts:.4g}"
    return holds(ok, what, first, limit=limit, otherwise="warn", where=where, key="first")


@check(
    "Most likely the model sees its target: labels are not shifted, or there is no causal mask. "
    "Run loss.oracle, model.suffix_swap and training.gibbs."
)
def fall(subject: Subject, uniform: float) -> Measure:
    """The loss falls no faster than learning from new text goes.

    Below half of ln V it falls as a power of the tokens seen with an exponent below 0.5 (Hestness
    et al. 2017, arXiv 1712.00409); a copied target or a corpus without entropy, at any speed.
    """
    subject.skip_if_overfit()
    half = _learned(subject, uniform)
    loss = subject.finite("train/loss", 3)
    tokens, epochs = subject.tokens(loss.steps), subject.epochs(loss.steps)
    if tokens is None:
        raise give("tokens_per_step")
    use = (tokens > 0) & (epochs <= 1 if epochs is not None else True)
    tokens, values = tokens[use], loss.values[use]
    if not len(values) or values[0] < 0.7 * uniform:
        raise Skip("The log does not begin with an untrained model.")
    # The loss of a batch of n tokens has a standard error below ln V / sqrt(n).
    spread = uniform / math.sqrt(float(np.median(tokens / loss.steps[use].clip(1))))
    spread = min(spread, noise(values)) if len(values) >= 4 else spread
    # Means over bins of 5 % in tokens.
    bins = np.unique((np.log(tokens) / math.log(1.05)).astype(int), return_inverse=True)[1]
    count = np.bincount(bins)
    D, L = (np.bincount(bins, x) / count for x in (tokens, values))
    best, ends = Mean(-math.inf, 0.0), (0, 0)
    for b in np.flatnonzero((half > L) & (L > 0)).tolist():
        a = int(np.searchsorted(D, D[b] / 2, "right")) - 1
        if a < 0 or L[a] <= 0:
            continue
        span = math.log(D[b] / D[a])
        relative = math.hypot(*(spread / L[i] / math.sqrt(count[i]) for i in (a, b)))
        here = Mean(math.log(L[a] / L[b]) / span, relative / span)
        if _surely(here) > _surely(best):
            best, ends = here, (a, b)
    if best.value == -math.inf:
        return note(f"the loss stays above {half:.3g} nats while the data are new")
    (high, few), (low, many) = ((L[i], D[i]) for i in ends)
    course = f"from {high:.3g} to {low:.3g} nats between {few:.3g} and {many:.3g} tokens"
    known_text = "kn2" in (subject.references or {})
    sure = epochs is not None and (known_text or uniform >= math.log(_LARGE_VOCABULARY))
    course += "" if known_text else "; a corpus of near-zero entropy would look alike"
    what = f"exponent of the fall of the loss with the tokens seen (± {best.error:.2g})"
    limit, status = "text: below 0.5, copying: above 1", "fail" if sure else "warn"
    more: dict[str, Any] = dict(limit=limit, otherwise=status, where=course, key="exponent")
    return holds(_surely(best) <= 1, what, best.value, **more)


def _surely(slope: Mean) -> float:
    """What it is at least."""
    return slope.value - 3 * slope.error


def _learned(subject: Subject, uniform: float) -> float:
    """Nats below which a model must have learned from the data; Skip where none can be named."""
    references = subject.references or {}
    if uniform < math.log(SUBWORDS):
        raise Skip("With fewer than 1000 ids, text can be learned too fast for this check.")
    if "entropy_rate" in references:
        raise Skip("The entropy of the source is known, which decides more (log.floor).")
    bigram = references.get("kn2", math.inf)
    if bigram <= 10:
        raise Skip(f"A bigram model reaches perplexity {bigram:.4g}: the text is learned too fast.")
    return min(uniform / 2, math.log(bigram / 10))
