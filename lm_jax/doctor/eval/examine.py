"""Checks of evaluation: sums and readings, coverage of the split, dropout, references."""

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lm_jax.doctor.eval import decoding
from lm_jax.doctor.eval.subject import Given
from lm_jax.doctor.old import (
    Report,
    Skip,
    Verdict,
    call,
    check,
    require,
    run_all,
    verdict,
    whole,
)

# Token costs in nats, above the caps that are in use: exp(10), exp(20), 100 nats.
_COSTS = (12.0, 25.0, 150.0)
_CAPS = (10.0, 20.0, 50.0, 100.0)


@check(
    "eval.aggregation",
    remedy="Add nats and token counts over all batches and divide once at the end.",
)
def aggregation(given: Given) -> Verdict:
    """A planted predictor gets its exact loss at every batch size."""
    given.need("evaluate_fn", "targets")
    truth = given.truth(given.noisy_V)
    found = {size: given.evaluate("loss", given.noisy_V, size) for size in given.batch_sizes}
    worst = max(found, key=lambda size: _gap(found[size], truth))
    evidence = (
        f"A planted predictor costs {truth:.6f} nats per target; evaluation reports "
        f"{found[worst]:.6f} at batch size {worst}, of sizes {_listed(found)} the farthest off "
        f"(relative limit 1e-4)."
    )
    return verdict(_gap(found[worst], truth) <= 1e-4, evidence, truth=truth, found=found)


def _gap(found: float, truth: float) -> float:
    """Relative difference; inf for what is not finite."""
    gap = abs(found - truth) / abs(truth)
    return gap if math.isfinite(gap) else math.inf


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(str(value) for value in values)


@check(
    "eval.perplexity",
    remedy="Report exp(sum of nats / number of tokens), not the mean of exponentials.",
)
def perplexity(given: Given) -> Verdict:
    """The perplexity reported is the exponential of the mean of all nats."""
    given.need("evaluate_fn", "targets")
    truth = given.truth(given.noisy_V)
    found = {size: given.evaluate("token_ppl", given.noisy_V, size) for size in given.batch_sizes}
    expected = math.exp(truth)
    worst = max(found, key=lambda size: _gap(found[size], expected))
    # A relative error of 1e-4 in the loss is one of 1e-4 times the loss here.
    limit = 1e-4 * max(1.0, truth)
    evidence = (
        f"The exponential of the planted mean is {expected:.6g}; evaluation reports perplexity "
        f"{found[worst]:.6g} at batch size {worst} (relative limit {limit:.0e})."
    )
    return verdict(_gap(found[worst], expected) <= limit, evidence, truth=expected, found=found)


@check(
    "eval.cap",
    remedy="Report nats, and perplexity without a cap; where a float overflows write inf.",
)
def cap(given: Given) -> Verdict:
    """A predictor that is very wrong is reported as bad as it is."""
    given.need("evaluate_fn", "targets")
    size, rows = given.batch_sizes[0], {}
    for cost in _COSTS:
        logits_V = given.costly_V(cost)
        truth, loss = given.truth(logits_V), given.evaluate("loss", logits_V, size)
        try:
            ppl = given.evaluate("token_ppl", logits_V, size)
        except Skip:  # nats alone are enough
            ppl = math.exp(truth)
        # Above 88 nats a float32 perplexity is inf in truth.
        overflow = ppl == math.inf and truth > math.log(np.finfo(np.float32).max)
        if _gap(loss, truth) > 1e-4:
            rows[truth] = f"loss {loss:.6g}"
        elif not overflow and _gap(ppl, math.exp(truth)) > 1e-4 * truth:
            nats = math.log(ppl) if ppl > 0 else math.nan
            known = [c for c in _CAPS if abs(nats - c) < 1e-3]
            rows[truth] = f"perplexity {ppl:.10g}" + (f" = exp({known[0]:g})" if known else "")
    evidence = f"Planted losses of {_listed(_COSTS)} nats are reported as they are."
    if rows:
        truth, what = next(iter(rows.items()))
        evidence = f"A planted loss of {truth:.6g} nats is reported as {what}."
    return verdict(not rows, evidence, wrong={f"{truth:.6g}": what for truth, what in rows.items()})


@check(
    "eval.token_count",
    remedy="Score each target of the split once, on all processes together, and let padded rows "
    "weigh nothing.",
)
def token_count(given: Given) -> Verdict:
    """The number of tokens scored is that of the split, at every batch size."""
    given.need("evaluate_fn", "targets")
    split = int(given.counts_V.sum())
    found = {size: given.evaluate("token_count", given.noisy_V, size) for size in given.batch_sizes}
    wrong = {size: count for size, count in found.items() if count != split}
    evidence = f"The split has {split} targets, scored are "
    evidence += _listed(f"{count:.0f} at batch size {size}" for size, count in found.items()) + "."
    return verdict(not wrong, evidence, split=split, found=found)


@check(
    "eval.stride",
    remedy="Score in the first window all targets and in each later one only the last stride of "
    "them; the rest is context.",
)
def stride(given: Given) -> Verdict:
    """At every stride each target is scored once."""
    given.need("evaluate_fn", "targets")
    if not given.strides:
        raise Skip("Not given: strides.")
    truth, split = given.truth(given.noisy_V), int(given.counts_V.sum())
    wrong, losses = {}, {}
    for width in given.strides:
        how = (given.noisy_V, given.batch_sizes[-1], width)
        loss, count = (given.evaluate(name, *how) for name in ("loss", "token_count"))
        losses[width] = loss
        if _gap(loss, truth) > 1e-4 or count != split:
            wrong[width] = f"{loss:.6f} nats over {count:.0f} tokens at stride {width}"
    evidence = (
        f"A predictor that ignores context costs {truth:.6f} nats over {split} targets at any "
        f"stride; of strides {_listed(given.strides)} "
        + (f"evaluation reports {_listed(wrong.values())}." if wrong else "none differs.")
    )
    return verdict(not wrong, evidence, truth=truth, losses=losses)


@check(
    "eval.coverage",
    remedy="Cut the split into windows so that each token is a target exactly once; keep the last, "
    "short window.",
)
def coverage(given: Given) -> Verdict:
    """The tokens with a weight in the batches are those of the split, each once."""
    given.need("batches_fn", "targets")
    counts_V = _scored(given, [(0, 1)])
    extra = int(np.maximum(counts_V - given.counts_V, 0).sum())
    lost = int(np.maximum(given.counts_V - counts_V, 0).sum())
    evidence = (
        f"The batches score {counts_V.sum()} tokens of a split of {given.counts_V.sum()}: by id "
        f"{lost} are missing and {extra} too many."
    )
    return verdict(extra == lost == 0, evidence, missing=lost, extra=extra)


def _batches(given: Given, process: int, processes: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and weights of one process's batches."""
    batches = call("batches_fn", lambda: list(given.batches_fn(process, processes)))
    rows = []
    for batch in batches:
        try:
            tokens, weights = np.asarray(batch["tokens"]), np.asarray(batch["weights"])
        except (TypeError, KeyError, IndexError):
            raise Skip("A batch has no entries 'tokens' and 'weights'.") from None
        if tokens.shape != weights.shape:
            raise Skip(f"Tokens {tokens.shape} and weights {weights.shape} differ in shape.")
        rows.append((tokens, weights))
    if not rows:
        raise Skip(f"batches_fn({process}, {processes}) yields no batch.")
    return rows


def _scored(given: Given, shares: Iterable[tuple[int, int]]) -> np.ndarray:
    """How often each id is scored, over the given processes."""
    ids = [tokens[weights > 0] for share in shares for tokens, weights in _batches(given, *share)]
    flat = np.concatenate(ids)
    if flat.size and not 0 <= flat.min() <= flat.max() < given.vocab_size:
        raise Skip(f"Ids from {flat.min()} to {flat.max()} are outside [0, {given.vocab_size}).")
    return np.bincount(flat, minlength=given.vocab_size)


@check(
    "eval.fixed_set",
    remedy="Evaluate on one fixed list of windows, in order and without a random state, and log "
    "its hash.",
)
def fixed_set(given: Given) -> Verdict:
    """Two evaluations read the same tokens."""
    given.need("batches_fn")
    hashes = []
    for _ in range(2):
        digest = hashlib.blake2b(digest_size=8)
        for tokens, weights in _batches(given, 0, 1):
            digest.update(np.int64(tokens).tobytes() + np.float64(weights).tobytes())
        hashes.append(digest.hexdigest())
    evidence = f"Two readings of the evaluation set hash to {hashes[0]} and {hashes[1]}."
    return verdict(hashes[0] == hashes[1], evidence, hashes=hashes)


@check(
    "eval.processes",
    remedy="Give every process its own rows of the same fixed list, and add nats and counts over "
    "all of them.",
)
def processes(given: Given) -> Verdict:
    """The processes together score what one alone does."""
    given.need("batches_fn")
    if given.processes < 2:
        raise Skip("Not given: processes, 2 or more.")
    alone_V = _scored(given, [(0, 1)])
    together_V = _scored(given, [(p, given.processes) for p in range(given.processes)])
    lost = int(np.maximum(alone_V - together_V, 0).sum())
    extra = int(np.maximum(together_V - alone_V, 0).sum())
    evidence = (
        f"{given.processes} processes score {together_V.sum()} tokens, one alone {alone_V.sum()}: "
        f"{lost} are missing and {extra} too many."
    )
    return verdict(lost == extra == 0, evidence, missing=lost, extra=extra)


@check(
    "eval.deterministic",
    remedy="Switch dropout and every other source of noise off in evaluation.",
)
def deterministic(given: Given) -> Verdict:
    """The same tokens give the same bits twice."""
    given.need("logits_fn")
    tokens_BT = given.tokens_BT
    first, second = (given.logits(tokens_BT) for _ in range(2))
    different = first != second
    gap = float(np.abs(first - second).max())
    evidence = (
        f"Two evaluations of the same {tokens_BT.size} tokens differ in {different.mean():.1%} of "
        f"the logits, by {gap:.2g} at most (limit 0)."
    )
    return verdict(not different.any(), evidence, share=float(different.mean()), largest=gap)


@check(
    "eval.train_mode",
    remedy="Pass the training flag or the dropout key down to every layer that drops.",
)
def train_mode(given: Given) -> Verdict:
    """The forward pass of training, which drops, differs from that of evaluation."""
    given.need("logits_fn", "train_logits_fn")
    tokens_BT = given.tokens_BT
    train = call("train_logits_fn", given.train_logits_fn, tokens_BT, given.seed)
    train, plain = np.asarray(train, np.float64), given.logits(tokens_BT)
    if train.shape != plain.shape:
        raise Skip(f"train_logits_fn gives {train.shape}, logits_fn {plain.shape}.")
    gap = float(np.abs(train - plain).max())
    # The same function compiled twice may round differently.
    limit = 8 * given.eps * float(np.abs(plain).max())
    evidence = f"Logits of training and evaluation differ by {gap:.2g} at most (above {limit:.1g})."
    return verdict(gap > limit, evidence, largest=gap, limit=limit)


@check(
    "eval.references",
    remedy="Look at what the references were fitted on and count all in nats per the same token; a "
    "loss below the entropy rate is no loss of this text.",
)
def references(given: Given) -> Verdict:
    """Uniform, unigram, bigram and trigram improve in this order, and the loss is plausible."""
    given.need("references")
    names = [name for name in ("uniform", "unigram", "kn2", "kn3") if name in given.references]
    ppl = [float(given.references[name]) for name in names]
    order = all(a >= b for a, b in zip(ppl, ppl[1:], strict=False))
    evidence = _listed(f"{name} {value:.4g}" for name, value in zip(names, ppl, strict=True))
    evidence = f"Perplexities of the references: {evidence}."
    below, above = False, False
    if given.loss is not None:
        floor = given.references.get("entropy_rate", 0.0)
        below = given.loss < floor
        above = "unigram" in names and given.loss > math.log(given.references["unigram"])
        evidence += f" The model has {given.loss:.4f} nats"
        evidence += f", below the floor of {floor:.4f}." if below else "."
        evidence += " It is worse than the unigram." if above else ""
    # A small train split may fit a bigram that is worse than the unigram: no proof.
    return verdict(
        order and not (below or above),
        evidence,
        otherwise="fail" if below else "warn",
        references=dict(zip(names, ppl, strict=True)),
        loss=given.loss,
    )


CHECKS = (
    aggregation,
    perplexity,
    cap,
    token_count,
    stride,
    coverage,
    fixed_set,
    processes,
    deterministic,
    train_mode,
    *decoding.CHECKS,
    references,
)


def examine_evaluation(
    *,
    vocab_size: int,
    seq_len: int = 64,
    seed: int = 0,
    compute_dtype: str = "float32",
    evaluate_fn: Callable[..., Mapping[str, Any]] | None = None,
    targets: Any = None,
    batch_sizes: Sequence[int] = (1, 7, 64),
    strides: Sequence[int] = (),
    batches_fn: Callable[[int, int], Iterable[Mapping[str, Any]]] | None = None,
    processes: int = 2,
    logits_fn: Callable[..., Any] | None = None,
    train_logits_fn: Callable[..., Any] | None = None,
    extend_fn: Callable[..., Any] | None = None,
    continuation: tuple[Any, Any, Any] | None = None,
    sampler: Callable[..., Any] | None = None,
    sampler_options: Collection[str] = (),
    never_sampled: Collection[int] = (),
    loss: float | None = None,
    references: Mapping[str, float] | None = None,
) -> Report:
    """Examine how a model is evaluated and sampled; what is not given is skipped by name.

    Args:
        vocab_size: V.
        seq_len: T of the random tokens that the model is fed.
        seed: of tokens and planted predictors.
        compute_dtype: dtype of the forward pass, which sets rounding errors.
        evaluate_fn: `(predict, batch_size) -> {"loss", "token_ppl", "token_count"}`, the whole
            evaluation of a small split (the first entry, in nats per target, is required), with
            the model replaced by `predict(tokens [B, T]) -> logits [B, T, V]`, traceable by JAX.
            With `strides` it is also called as `(predict, batch_size, stride)`.
        targets: ids of all targets of that split, in any order.
        batch_sizes: sequences at a time.
        strides: targets scored per window.
        batches_fn: `(process, processes) -> batches` of that split, with `tokens` and `weights`
            [B, ...], where a weight above 0 marks a target.
        processes: number of processes to divide the batches among.
        logits_fn: `(tokens [B, T]) -> logits [B, T, V]` as in evaluation.
        train_logits_fn: `(tokens [B, T], seed) -> logits` as in training; only for a model that
            drops.
        extend_fn: `(tokens [B, n], cache) -> (logits [B, n, V], cache)`, cached decoding; the
            cache is None at the start.
        continuation: `(context ids, continued ids, log-probabilities or None)` of a free
            generation; without log-probabilities it was greedy.
        sampler: `(logits [B, 16], seed, **options) -> ids [B]`.
        sampler_options: those it has of `temperature`, `top_k`, `top_p` and
            `repetition_penalty`; the last comes with `seen`, ids [B, S].
        never_sampled: ids that it never returns.
        loss: nats per token of the model.
        references: perplexities `uniform`, `unigram`, `kn2`, `kn3` on the same tokens, and
            `entropy_rate` in nats.

    Raises:
        ValueError: if an argument is impossible.
    """
    given = Given(**locals())
    _validate(given)
    return run_all(CHECKS, given)


def _validate(given: Given) -> None:
    for name, low in (("vocab_size", 2), ("seq_len", 2), ("processes", 1), ("seed", 0)):
        whole(getattr(given, name), name, low)
    for name in ("batch_sizes", "strides"):
        sizes = getattr(given, name)
        require(isinstance(sizes, Sequence), name, "give a list of whole numbers")
        for size in sizes:
            whole(size, name, 1)
    require(bool(given.batch_sizes), "batch_sizes", "give one or more")
    options = given.sampler_options
    named = isinstance(options, Collection) and not isinstance(options, str)
    require(named, "sampler_options", "give the names of options")
    if given.targets is not None:
        ids = np.asarray(given.targets)
        ok = bool(ids.size) and np.issubdtype(ids.dtype, np.integer)
        ok = ok and 0 <= ids.min() and ids.max() < given.vocab_size
        require(ok, "targets", f"give whole numbers in [0, {given.vocab_size})")
    unknown = set(given.sampler_options) - set(decoding.OPTIONS)
    require(not unknown, "sampler_options", f"choose among {_listed(decoding.OPTIONS)}")
    require(
        given.continuation is None or len(given.continuation) == 3,
        "continuation",
        "give the context, the continued ids and their log-probabilities or None",
    )
