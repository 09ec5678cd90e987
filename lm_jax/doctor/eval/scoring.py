"""What an evaluation counts, sums and reports, of which tokens and with which model."""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lm_jax.doctor import numbers, trees
from lm_jax.doctor.checks import check, fixture
from lm_jax.doctor.eval.subject import Subject, apart, fit
from lm_jax.doctor.facts import Broken, Skip, call, give, kind_of
from lm_jax.doctor.findings import (
    Finding,
    Measure,
    at_least,
    at_most,
    equals,
    holds,
    listed,
    none,
    note,
)
from lm_jax.doctor.numbers import exp, gap

Row = dict[str, float]  # what an evaluation reports
Rows = dict[str, Row]  # by the way it was made
Batches = list[tuple[np.ndarray, np.ndarray]]  # tokens and weights of each
READ = {name: name for name in ("loss", "token_ppl", "token_count")}
READ |= dict.fromkeys(("ppl", "perplexity"), "token_ppl")
EXACT = 1e-4  # relative error of a sum in float32
COSTS = (12.0, 25.0, 150.0)  # nats a token, above the caps in use: exp(10), exp(20), 100 nats
CAPPED = 0.01  # relative; less than any cap takes off, more than rounding does
FLOAT32_NATS = math.log(np.finfo(np.float32).max)  # above these a perplexity is inf in truth


class Planted(NamedTuple):
    """A predictor that looks at nothing, in place of the model."""

    predict: Callable[[Any], Any]
    nats: float  # per target, exactly


@fixture
def counts_V(targets: Any, vocab_size: int) -> np.ndarray:
    """How often each id is a target."""
    return np.bincount(trees.as_array(targets).ravel(), minlength=vocab_size)


def plant(logits_V: np.ndarray, counts_V: np.ndarray) -> Planted:
    """The predictor that gives these logits everywhere."""
    logits_V = logits_V.astype(np.float32)

    def predict(tokens: Any) -> Any:
        if hasattr(tokens, "detach"):  # a tensor of PyTorch
            return tokens.float().new_tensor(logits_V).repeat(*tokens.shape, 1)
        return jnp.broadcast_to(jnp.asarray(logits_V), (*np.shape(tokens), len(logits_V)))

    nats = counts_V @ -numbers.log_softmax(logits_V) / counts_V.sum()
    return Planted(predict, float(nats))


@fixture
def evaluate(evaluate_fn: Any) -> Callable[..., Row]:
    """A planted predictor, and how it is evaluated, to what is reported of it."""

    def report(planted: Planted, *how: int) -> Row:
        found = call("evaluate_fn", evaluate_fn, planted.predict, *how)
        if not isinstance(found, Mapping) or "loss" not in found:
            names = f" with {listed(found) or 'nothing'}" if isinstance(found, Mapping) else ""
            told = f"{kind_of(found)}{names}, not a mapping with 'loss'"
            raise Broken(f"evaluate_fn returned {told}")
        return {
            READ[name]: call(f"float of {name}", float, trees.as_array(value))
            for name, value in found.items()
            if name in READ
        }

    return report


@fixture
def noisy(subject: Subject, counts_V: np.ndarray) -> Planted:
    """A predictor whose costs per token differ by nats."""
    return plant(subject.rng().normal(0, 3, subject.vocab_size), counts_V)


@fixture
def reported(subject: Subject, evaluate: Callable[..., Row], noisy: Planted) -> Rows:
    """What is reported of it, by batch size."""
    return {f"batch size {size}": evaluate(noisy, size) for size in subject.batch_sizes}


@check("Add nats and token counts over all batches in float32, and divide once at the end.")
def aggregation(noisy: Planted, reported: Rows) -> list[Measure]:
    """A planted predictor gets its exact loss at every batch size."""
    return _against("loss", reported, noisy.nats, EXACT)


@check("Report exp(sum of nats / number of tokens), not the mean of exponentials.")
def perplexity(reported: Rows) -> Measure:
    """The perplexity reported is the exponential of the loss reported."""
    ppl = {way: row["token_ppl"] for way, row in reported.items() if "token_ppl" in row}
    if not ppl:
        raise Skip("evaluate_fn does not report token_ppl.")
    wrong = [
        f"{x:.6g} at {way}, but exp(loss) is {exp(reported[way]['loss']):.6g}"
        for way, x in ppl.items()
        if not _is_exp(x, reported[way]["loss"])
    ]
    return none("perplexities that are not exp(loss)", wrong, of=len(ppl), key="wrong")


def _is_exp(ppl: float, nats: float) -> bool:
    """Whether a perplexity is that of a loss, as far as both are exact."""
    if ppl == math.inf:
        return nats > FLOAT32_NATS
    if math.isnan(nats):
        return True  # what is amiss is the loss
    # A relative error of the loss is one of as much times the loss here.
    return gap(ppl, exp(nats)) <= EXACT * max(1.0, nats) * exp(nats)


@check("Score each target once, on all processes together, and let padded rows weigh nothing.")
def token_count(reported: Rows, counts_V: np.ndarray) -> list[Measure]:
    """The number of tokens scored is that of the split, at every batch size."""
    return _against("token_count", reported, int(counts_V.sum()), 0)


def _against(name: str, rows: Rows, truth: float, limit: float) -> list[Measure]:
    """A reading against its true value, in whatever way it was made."""
    found = {way: row[name] for way, row in rows.items() if name in row}
    if not found:
        raise Skip(f"evaluate_fn does not report {name}.")
    values = list(found.values())
    worst = gap(values, truth) / abs(truth)
    told = listed(f"{value:.6g} at {way}" for way, value in found.items())
    where, way = "", next(iter(found)).rsplit(" ", 1)[0]
    if name == "loss" and len(values) > 1 and gap(values, values[0]) <= limit * truth:
        where = f"the same at every {way}: look at what is scored, and in which unit"
    return [
        at_most(f"relative error of {name}", worst, limit, where=where, key=f"error of {name}"),
        note(f"{name} is {truth:.6g}, reported {told}", found, key=name),
    ]


@check("Report nats, and perplexity without a cap; where a float overflows write inf.")
def cap(
    subject: Subject, evaluate: Any, counts_V: np.ndarray, perplexity: Finding | None = None
) -> Measure:
    """A predictor that is very wrong is reported as bad as it is."""
    wrong, factor = [], 0.0
    for cost in COSTS:
        # It is sure of the rarest id, so that every other target costs as much.
        planted = plant(np.eye(len(counts_V))[np.argmin(counts_V)] * cost, counts_V)
        found, truth = evaluate(planted, subject.batch_sizes[0]), planted.nats
        loss, ppl = found["loss"], found.get("token_ppl", math.nan)
        # Against the first one, so that a wrong count or unit is no cap.
        factor = factor or loss / truth
        if not gap(loss, factor * truth) <= CAPPED * abs(factor) * truth:
            wrong.append(f"{truth:.6g} nats reported as loss {loss:.6g}")
        elif perplexity is not None and not _is_exp(ppl, loss):
            nats = math.log(ppl) if ppl > 0 else math.nan
            wrong.append(f"{truth:.6g} nats reported as perplexity {ppl:.10g} = exp({nats:.4g})")
    return none("losses that are known, reported as others", wrong, of=len(COSTS), key="wrong")


@check("Score all targets of the first window and only the last stride of them in later ones.")
def stride(subject: Subject, evaluate: Any, noisy: Planted, counts_V: np.ndarray) -> list[Measure]:
    """At every stride each target is scored once, which a predictor without context shows."""
    if not subject.strides:
        raise give("strides")
    rows = {f"stride {n}": evaluate(noisy, subject.batch_sizes[-1], n) for n in subject.strides}
    found = _against("loss", rows, noisy.nats, EXACT)
    if all("token_count" in row for row in rows.values()):
        found += _against("token_count", rows, int(counts_V.sum()), 0)
    return found


@fixture
def read(batches_fn: Any, vocab_size: int) -> Callable[[int, int], Batches]:
    """Process and number of processes to the batches of that process."""

    def batches(process: int, processes: int) -> Batches:
        found = []
        for batch in call("batches_fn", lambda: list(batches_fn(process, processes))):
            try:
                tokens, weights = (trees.as_array(batch[name]) for name in ("tokens", "weights"))
            except (TypeError, KeyError, IndexError):
                raise Broken("a batch of batches_fn has no 'tokens' and 'weights'") from None
            if tokens.shape != weights.shape:
                raise Broken(f"batches_fn: tokens {tokens.shape}, but weights {weights.shape}")
            if not np.isin(tokens[weights > 0], np.arange(vocab_size)).all():
                raise Broken(f"batches_fn: a target is no id in [0, {vocab_size})")
            found.append((tokens, weights))
        return found

    return batches


@check(
    "Evaluate on one fixed list of windows that has each token once as a target, the last, short "
    "window too; give every process rows of its own and add up all."
)
def coverage(subject: Subject, read: Any, counts_V: np.ndarray | None = None) -> list[Measure]:
    """The batches score each target once, on any number of processes and at every reading."""
    n, alone = subject.processes, read(0, 1)
    if not alone:
        raise Broken("batches_fn(0, 1) yields no batch")

    def scored(batches: Batches) -> np.ndarray:
        ids = [tokens[weights > 0].astype(int) for tokens, weights in batches]
        return np.bincount(np.concatenate([np.zeros(0, int), *ids]), minlength=subject.vocab_size)

    together = [batch for process in range(n) for batch in read(process, n)]
    alone_V, found = scored(alone), []
    rows: Any = ("", alone_V, counts_V), (f" by {n} processes", scored(together), alone_V)
    for how, found_V, right_V in rows if counts_V is not None else rows[1:]:
        of, extra_V = f"of {right_V.sum():,} targets those", found_V - right_V
        missing, extra = (int(x.clip(0).sum()) for x in (-extra_V, extra_V))
        found.append(equals(f"{of} not scored{how}", missing, 0, key=f"missing{how}"))
        found.append(equals(f"{of} scored too often{how}", extra, 0, key=f"extra{how}"))
    pairs = enumerate(itertools.zip_longest(alone, read(0, 1), fillvalue=()))
    changed = [i for i, (a, b) in pairs if len(a) != len(b) or not all(map(np.array_equal, a, b))]
    return [*found, none("batches that differ when read again", changed, of=len(alone))]


@check("Hand the training flag or the dropout key to every layer that drops, in training alone.")
def deterministic(
    subject: Subject, forward: Any, tokens_BT: Any, logits_BTV: Any, train_logits_fn: Any = None
) -> list[Measure]:
    """Evaluation repeats itself bit by bit, and training, where it drops, differs from it."""
    drift = float(apart(logits_BTV, forward(tokens_BT)).max())
    found = [equals("largest change of a logit in evaluation", drift, 0)]
    if train_logits_fn is not None:
        made = call("train_logits_fn", train_logits_fn, tokens_BT.copy(), subject.seed)
        moved = float(apart(fit("train_logits_fn", made, logits_BTV.shape), logits_BTV).max())
        # The same function compiled twice may round differently.
        limit = 8 * subject.eps * float(np.abs(logits_BTV[np.isfinite(logits_BTV)]).max())
        what = "largest difference between logits of training and evaluation"
        found.append(holds(moved > limit, what, moved, limit=f"above {limit:.1g}", key="training"))
    return found


@check("Look at what the references were fitted on and count all in nats per the same token.")
def references(subject: Subject) -> list[Measure]:
    """Uniform, unigram, bigram and trigram improve in this order, and the loss is plausible."""
    given, loss = subject.references, subject.loss
    if given is None:
        raise give("references")
    ppl = {n: float(given[n]) for n in ("uniform", "unigram", "kn2", "kn3") if n in given}
    if len(ppl) < 2 and loss is None:
        raise give("loss")
    worse = [b for a, b in itertools.pairwise(ppl) if not ppl[a] >= ppl[b]]
    # A small train split may fit a bigram that is worse than the unigram: no proof.
    found = [
        none("references worse than a simpler one", worse, otherwise="warn", key="worse"),
        note(f"perplexities {listed(f'{n} {x:.4g}' for n, x in ppl.items())}", ppl),
    ]
    if loss is not None:
        what, floor = "nats of the model, against the", float(given.get("entropy_rate", 0))
        found.append(at_least(f"{what} entropy rate", float(loss), floor))
        if "unigram" in ppl:
            limit = math.log(ppl["unigram"])
            found.append(at_most(f"{what} unigram", float(loss), limit, otherwise="warn"))
    return found
