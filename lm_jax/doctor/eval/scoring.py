"""What an evaluation counts, sums and reports, of which tokens and with which model."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from lm_jax.doctor.checks import check
from lm_jax.doctor.eval.subject import Batches, Planted, Subject, apart, fit, plant
from lm_jax.doctor.facts import Broken, Skip, call, give
from lm_jax.doctor.findings import (
    Measure,
    at_least,
    at_most,
    equals,
    holds,
    listed,
    none,
    note,
)

EXACT = 1e-4  # relative error of a sum in float32
COSTS = (12.0, 25.0, 150.0)  # nats a token, above the caps in use: exp(10), exp(20), 100 nats
_FLOAT32_NATS = math.log(np.finfo(np.float32).max)  # above these a perplexity is inf in truth


@check("Add nats and token counts over all batches and divide once at the end.")
def aggregation(noisy: Planted, reported: dict[int, dict[str, float]]) -> list[Measure]:
    """A planted predictor gets its exact loss at every batch size."""
    return _against("loss", reported, noisy.nats, EXACT)


@check("Report exp(sum of nats / number of tokens), not the mean of exponentials.")
def perplexity(noisy: Planted, reported: dict[int, dict[str, float]]) -> list[Measure]:
    """The perplexity reported is the exponential of the mean of all nats."""
    # A relative error of the loss is one of as much times the loss here.
    return _against("token_ppl", reported, math.exp(noisy.nats), EXACT * max(1.0, noisy.nats))


@check(
    "Score each target of the split once, on all processes together, and let padded rows weigh "
    "nothing."
)
def token_count(reported: dict[int, dict[str, float]], counts_V: np.ndarray) -> list[Measure]:
    """The number of tokens scored is that of the split, at every batch size."""
    return _against("token_count", reported, int(counts_V.sum()), 0)


def _against(
    name: str, reported: dict[int, dict[str, float]], truth: float, limit: float
) -> list[Measure]:
    """A reading at all batch sizes against its true value."""
    found = {size: row[name] for size, row in reported.items() if name in row}
    if not found:
        raise Skip(f"evaluate_fn does not report {name}.")
    told = listed(f"{value:.6g} at batch size {size}" for size, value in found.items())
    worst = max(_error(value, truth) for value in found.values())
    return [
        at_most(f"largest relative error of {name}", worst, limit, key="error"),
        note(f"true {name}", truth, key="truth"),
        note(f"reported {told}", found, key="found"),
    ]


def _error(found: float, truth: float) -> float:
    """Relative difference; inf for what is not finite."""
    gap = abs(found - truth) / abs(truth)
    return gap if math.isfinite(gap) else math.inf


@check("Report nats, and perplexity without a cap; where a float overflows write inf.")
def cap(subject: Subject, evaluate_fn: Any, counts_V: np.ndarray) -> Measure:
    """A predictor that is very wrong is reported as bad as it is."""
    wrong = []
    for cost in COSTS:
        # It is sure of the rarest id, so that every other target costs as much.
        sure_V = np.where(np.arange(subject.vocab_size) == np.argmin(counts_V), cost, 0)
        planted = plant(sure_V.astype(np.float32), counts_V)
        found, truth = subject.evaluate(planted.predict, subject.batch_sizes[0]), planted.nats
        ppl = found.get("token_ppl", math.exp(truth))  # nats alone are enough
        overflow = ppl == math.inf and truth > _FLOAT32_NATS
        if _error(found["loss"], truth) > EXACT:
            wrong.append(f"{truth:.6g} nats reported as loss {found['loss']:.6g}")
        elif not overflow and _error(ppl, math.exp(truth)) > EXACT * truth:
            nats = math.log(ppl) if ppl > 0 else math.nan
            wrong.append(f"{truth:.6g} nats reported as perplexity {ppl:.10g} = exp({nats:.4g})")
    return none("planted losses reported as others", wrong, of=len(COSTS), key="wrong")


@check(
    "Score in the first window all targets and in each later one only the last stride of them; "
    "the rest is context."
)
def stride(
    subject: Subject, evaluate_fn: Any, noisy: Planted, counts_V: np.ndarray
) -> list[Measure]:
    """At every stride each target is scored once, which a predictor without context shows."""
    if not subject.strides:
        raise give("strides")
    split, wrong = int(counts_V.sum()), []
    for width in subject.strides:
        found = subject.evaluate(noisy.predict, subject.batch_sizes[-1], width)
        loss, count = found["loss"], found.get("token_count", split)
        if _error(loss, noisy.nats) > EXACT or count != split:
            wrong.append(f"{loss:.6g} nats over {count:,.0f} targets at stride {width}")
    return [
        none("strides with another result", wrong, of=len(subject.strides), key="wrong"),
        note("true nats per target", noisy.nats, key="truth"),
        note("targets of the split", split, key="split"),
    ]


@check(
    "Cut the split into windows so that each token is a target exactly once; keep the last, short "
    "window."
)
def coverage(subject: Subject, alone: Batches, counts_V: np.ndarray) -> list[Measure]:
    """The tokens with a weight in the batches are those of the split, each once."""
    return _compared(counts_V, _scored(subject, [alone]))


@check(
    "Give every process its own rows of the same fixed list, and add nats and counts over all of "
    "them."
)
def processes(subject: Subject, alone: Batches) -> list[Measure]:
    """The processes together score what one alone does."""
    n = subject.processes
    if n < 2:
        raise Skip("There is one process only.", "processes")
    together = [subject.batches(process, n) for process in range(n)]
    return _compared(_scored(subject, [alone]), _scored(subject, together))


def _scored(subject: Subject, shares: Iterable[Batches]) -> np.ndarray:
    """How often each id is scored."""
    ids = [tokens[weights > 0] for batches in shares for tokens, weights in batches]
    flat = np.concatenate([np.zeros(0, np.int64), *ids])
    if flat.size and not 0 <= flat.min() <= flat.max() < subject.vocab_size:
        raise Broken(
            f"batches_fn: ids from {flat.min():g} to {flat.max():g} are outside "
            f"[0, {subject.vocab_size})"
        )
    return np.bincount(flat.astype(np.int64), minlength=subject.vocab_size)


def _compared(expected_V: np.ndarray, found_V: np.ndarray) -> list[Measure]:
    """How often each id is scored, against how often it must be."""
    missing, extra = expected_V - found_V, found_V - expected_V
    return [
        equals("targets not scored", int(missing.clip(0).sum()), 0, key="missing"),
        equals("targets scored too often", int(extra.clip(0).sum()), 0, key="extra"),
        note("targets in all", int(expected_V.sum())),
    ]


@check(
    "Evaluate on one fixed list of windows, in order and without a random state, and log its hash."
)
def fixed_set(subject: Subject, alone: Batches) -> Measure:
    """Two evaluations read the same tokens."""
    pairs = itertools.zip_longest(alone, subject.batches(0, 1))
    changed = [
        number
        for number, (first, again) in enumerate(pairs)
        if first is None or again is None or not all(map(np.array_equal, first, again))
    ]
    return none("batches that differ when read again", changed, of=len(alone), key="changed")


@check("Switch dropout and every other source of noise off in evaluation.")
def deterministic(subject: Subject, tokens_BT: np.ndarray, logits_BTV: np.ndarray) -> list[Measure]:
    """The same tokens give the same bits twice."""
    gap_BTV = apart(logits_BTV, subject.logits(tokens_BT))
    return [
        equals("share of logits that change", float((gap_BTV > 0).mean()), 0, key="share"),
        note("largest change", float(gap_BTV.max()), key="largest"),
    ]


@check("Pass the training flag or the dropout key down to every layer that drops.")
def train_mode(
    subject: Subject, train_logits_fn: Any, tokens_BT: np.ndarray, logits_BTV: np.ndarray
) -> Measure:
    """The forward pass of training, which drops, differs from that of evaluation."""
    made = call("train_logits_fn", train_logits_fn, tokens_BT.copy(), subject.seed)
    gap = float(apart(fit("train_logits_fn", made, logits_BTV.shape), logits_BTV).max())
    # The same function compiled twice may round differently.
    limit = 8 * subject.eps * float(np.abs(logits_BTV[np.isfinite(logits_BTV)]).max())
    what = "largest difference between logits of training and evaluation"
    return holds(gap > limit, what, gap, limit=f"above {limit:.1g}", key="largest")


@check(
    "Look at what the references were fitted on and count all in nats per the same token; a loss "
    "below the entropy rate is no loss of this text."
)
def references(subject: Subject) -> list[Measure]:
    """Uniform, unigram, bigram and trigram improve in this order, and the loss is plausible."""
    given = subject.references
    if given is None:
        raise give("references")
    ppl = {n: float(given[n]) for n in ("uniform", "unigram", "kn2", "kn3") if n in given}
    if len(ppl) < 2 and subject.loss is None:
        raise give("loss")
    worse = [b for a, b in itertools.pairwise(ppl) if not ppl[a] >= ppl[b]]
    found = [
        # A small train split may fit a bigram that is worse than the unigram: no proof.
        none("references worse than a simpler one", worse, otherwise="warn", key="worse"),
        note(f"perplexities {listed(f'{n} {x:.4g}' for n, x in ppl.items())}", ppl, key="ppl"),
    ]
    if subject.loss is not None:
        nats, floor = float(subject.loss), float(given.get("entropy_rate", 0.0))
        found.append(at_least("nats of the model, against the entropy rate", nats, floor))
        if "unigram" in ppl:
            limit = math.log(ppl["unigram"])
            found.append(
                at_most("nats of the model, against the unigram", nats, limit, otherwise="warn")
            )
    return found
