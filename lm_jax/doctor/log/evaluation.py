"""What logged evaluation numbers can and cannot be."""

import math
from typing import Any

import numpy as np

from lm_jax.doctor.log.loss import CONTEXT_PROBES, LEAK_PROBES, UPDATE_PROBES
from lm_jax.doctor.log.subject import Log, Series, half_unit, noise, pairs
from lm_jax.doctor.old import Skip, Status, Verdict, check, verdict


@check(
    "eval.above_uniform",
    "The number is not a perplexity of the next token: a total objective (with distillation, "
    "smoothing or auxiliary terms) was exponentiated, labels belong to another vocabulary, or "
    "the model diverged. Report exp of unsmoothed next-token nats alone; examine_loss "
    "(loss.definition, loss.floor) decides.",
)
def above_uniform(log: Log) -> Verdict:
    """A trained model's perplexity is at most V, its loss at most ln V."""
    V = _vocabulary(log)
    if log.overfit:
        raise Skip("overfitting is declared.")
    wrong, seen, overfit, falling = [], [], "", True
    start = log.finite("train/loss").values[0] if log.has("train/loss") else math.inf
    for split in _scored(log):
        for name, limit in (("loss", math.log(V)), ("token_ppl", V)):
            if not log.has(f"{split}/{name}"):
                continue
            series = log.series(f"{split}/{name}")
            x = series.values[~np.isnan(series.values)]
            if not len(x) or not log.settled(series.steps):
                continue
            if x[-1] > limit and (course := _overfits(log, split)):
                overfit = course["text"]
                continue
            text = f"{split}/{name} = {x[-1]:.5g} against {limit:.5g}"
            seen.append(text)
            if x[-1] > limit:
                wrong.append(text)
                falling &= len(x) > 1 and x[-1] < x[0] and _nats(log, split).values[-1] < start
    if overfit and not seen:
        raise Skip(f"it overfits (eval.overfit): {overfit}.")
    if not seen:
        raise Skip("no evaluation after the first 100 updates or the first epoch.")
    text = f"Last against the uniform guess over {V} ids: {'; '.join(wrong or seen)}."
    text += " It still falls." if wrong and falling else ""
    return verdict(not wrong, text, otherwise="warn" if falling else "fail", wrong=wrong)


@check(
    "eval.overfit",
    "The run overfits: keep the parameters of the lowest evaluation, and train on more data, for "
    "fewer epochs, with a smaller model or with dropout and weight decay.",
)
def overfit(log: Log) -> Verdict:
    """The held-out loss does not lose half of what it had gained while the training loss falls."""
    if log.overfit:
        raise Skip("overfitting is declared.")
    splits = [split for split in _scored(log) if len(_nats(log, split)) > 1]
    if not splits or not log.has("train/loss"):
        raise Skip("no two evaluations beside a training loss.")
    found = {split: course for split in splits if (course := _overfits(log, split))}
    text = "; ".join(f"it overfits: {course['text']}" for course in found.values())
    text = text or f"{', '.join(splits)}: less than half of what was gained is lost again"
    return verdict(not found, f"{text[0].upper()}{text[1:]}.", otherwise="warn", found=found)


@check(
    "eval.logged_tokens",
    "Score each token of the split once: count the targets that are real next tokens, not slots, "
    "padding or batches x length, and look for repeated or sampled-over data.",
)
def logged_tokens(log: Log) -> Verdict:
    """No evaluation scored more tokens than its split holds."""
    rows = []
    for split, size in log.split_tokens.items():
        if log.has(f"{split}/token_count"):
            rows.append((split, float(log.finite(f"{split}/token_count").values.max()), size))
    if not rows:
        raise Skip("token counts are not logged, or split_tokens is not given.")
    text = ", ".join(f"{n:.6g} of {size:.6g} tokens of {split}" for split, n, size in rows)
    text += f" were scored ({max(n / size for _, n, size in rows):.3g} times the split)."
    return verdict(all(n <= size for _, n, size in rows), text, shares=[n / s for _, n, s in rows])


@check(
    "eval.accuracy",
    "Loss and accuracy are not taken over the same tokens; padding or prompt tokens that are "
    "easily copied count in the loss only. Use one set of weights for both (examine_loss: "
    "loss.padding).",
)
def accuracy(log: Log) -> Verdict:
    """A token that is not the most probable has p <= 1/2: loss >= (1 - accuracy) ln 2."""
    rows = []
    for split in log.splits("accuracy"):
        if not log.has(f"{split}/loss"):
            continue
        rows_of_both = pairs(log.finite(f"{split}/loss"), log.finite(f"{split}/accuracy"))
        for step, nats, right in rows_of_both:
            right = right / 100 if right > 1 else right  # in percent
            slack = half_unit(nats) + 1e-6 * nats + half_unit(right)
            rows.append((nats + slack - (1 - right) * math.log(2), step, nats, right))
    if not rows:
        raise Skip("no row has both a loss and an accuracy.")
    margin, step, nats, right = min(rows)
    text = (
        f"At step {step:g} an accuracy of {right:.4g} needs a loss of at least "
        f"{(1 - right) * math.log(2):.4g}; it is {nats:.4g}."
    )
    return verdict(margin >= 0, text, step=float(step), loss=nats, accuracy=right)


@check(
    "eval.identical",
    "The parameters do not move (no optimiser step, or the evaluation uses another copy), or the "
    "evaluation is not run again. Run examine_training (training.updates, "
    "training.score_changes): after a few updates every parameter must have changed.",
)
def identical(log: Log) -> Verdict:
    """Evaluations at different steps do not give the same number to the last digit."""
    names = [f"{split}/loss" for split in log.splits()]
    same, seen = [], 0
    for name in names:
        loss = log.finite(name)
        for i in range(len(loss) - 1):
            x = loss.values[i]
            if half_unit(x) > 1e-5 * abs(x) or not _learns(log, *loss.steps[i : i + 2]):
                continue
            seen += 1
            if x == loss.values[i + 1]:
                same.append(f"{name} = {x!r} at steps {loss.steps[i]:g} and {loss.steps[i + 1]:g}")
    for a, b in zip(log.splits(), log.splits()[1:], strict=False):
        for step, x, y in pairs(log.finite(f"{a}/loss"), log.finite(f"{b}/loss")):
            if x == y and half_unit(x) <= 1e-5 * abs(x):
                same.append(f"{a} and {b} loss are both {x!r} at step {step:g}: one split is used")
    if not seen and not same:
        raise Skip("no two evaluations with 5 digits and a learning rate above 0 between them.")
    text = f"{'; '.join(same[:3])}." if same else f"{seen} pairs of evaluations all differ."
    return verdict(not same, text.replace("np.float64", ""), same=same, probes=UPDATE_PROBES)


@check(
    "eval.floor",
    "Prove it before believing it. Most likely the model sees its target (no label shift, no "
    "causal mask), padding is scored as a target, or valid text is in train. Run examine_loss "
    "(target.oracle, loss.padding), examine_model (causality.suffix_swap), examine_training "
    "(target.gibbs) and examine_data (data.document_containment).",
)
def floor(log: Log) -> Verdict:
    """The loss is not below the entropy of the source, nor far below an n-gram model's.

    A model of under 1e9 parameters does not reach a tenth of the perplexity of a bigram model.
    Without reference lines only sub-word vocabularies (1000 ids or more) are judged, since
    perplexities of 3 to 6 are ordinary for characters. A training loss on data that may not be new
    is never decisive.
    """
    if log.overfit:
        raise Skip("overfitting is declared.")
    best = _best(log)
    if not best:
        return _train_floor(log)
    name, nats, count = best
    if "entropy_rate" in log.references:
        limit = log.references["entropy_rate"]
        error = _token_sd(log) / math.sqrt(count) if count else math.nan
        if not math.isfinite(error):
            raise Skip("the number of scored tokens is not known.")
        text = (
            f"{name} = {nats:.5g} against the source's entropy rate of {limit:.5g} nats; "
            f"SE at most {error:.2g} over {count:.4g} tokens."
        )
        return verdict(nats > limit - 3 * error, text, loss=nats, limit=limit, error=error)
    if "kn2" in log.references:
        kn2 = log.references["kn2"]
        text = (
            f"{name} = {nats:.4g} nats, perplexity {_exp(nats):.4g}, against {kn2:.4g} of a "
            "bigram model of the same tokens; less than a tenth of that must be proven."
        )
        large = (log.parameters or 0) >= 1e9
        ok = nats >= math.log(kn2 / 10)
        limit = math.log(kn2 / 10)
        status: Status = "warn" if large else "fail"
        return verdict(
            ok,
            text,
            otherwise=status,
            loss=nats,
            limit=limit,
            probes=LEAK_PROBES + ("loss.padding",),
        )
    if _vocabulary(log) < 1000:
        raise Skip("with fewer than 1000 ids, low perplexities are ordinary; give references.")
    text = (
        f"{name} = {nats:.4g} nats, perplexity {_exp(nats):.4g} over {log.vocab_size} ids; "
        "below 5 is not known of natural text, but no reference lines are given."
    )
    return verdict(nats >= math.log(5), text, otherwise="warn", loss=nats, probes=LEAK_PROBES)


@check(
    "eval.baseline",
    "The model does worse than counting. Run examine_model: does it use the context, of the right "
    "row and in the right order (causality.context_use, causality.row_independence, "
    "causality.truncation), and none of the future (causality.suffix_swap; a weak model may well "
    "see its target, which a log cannot show)? Then examine_gradients (gradient.directional).",
)
def baseline(log: Log) -> Verdict:
    """After an epoch or 100 updates: better than a unigram; after 3 epochs: than a bigram."""
    reference = {k: math.log(log.references[k]) for k in ("unigram", "kn2") if k in log.references}
    if not reference:
        raise Skip("no reference lines are given.")
    split = next(iter(_scored(log)), "train")
    if log.overfit and split != "train":
        raise Skip("overfitting is declared.")
    loss = log.finite("train/loss") if split == "train" else _nats(log, split)
    last = loss.tail(0.25 if split == "train" else 0)
    if not log.settled(loss.steps):
        raise Skip(f"the log ends at step {loss.steps[-1]:g}, too early for this check.")
    nats = float(last.values.mean())
    if split != "train" and (course := _overfits(log, split)):
        raise Skip(f"it overfits (eval.overfit): {course['text']}.")
    epochs = log.epochs(loss.steps[-1:])
    limit_name = "kn2" if epochs is not None and epochs[0] >= 3 else "unigram"
    limit_name = limit_name if limit_name in reference else next(iter(reference))
    limit = reference[limit_name]
    falling = len(loss) > 1 and loss.values[-1] < loss.values[0] - 0.05 * abs(loss.values[0])
    falling &= log.vocab_size is None or nats < math.log(log.vocab_size)
    text = (
        f"{split} ends at {nats:.4g} nats, perplexity {_exp(nats):.4g}, and counting gives "
        + ", ".join(f"{math.exp(x):.4g} ({k})" for k, x in reference.items())
        + "."
    )
    over_unigram = "unigram" in reference and nats > reference["unigram"] and not falling
    return verdict(
        nats <= limit or (limit_name == "unigram" and falling),
        text,
        otherwise="fail" if over_unigram else "warn",
        loss=nats,
        references=reference,
        probes=CONTEXT_PROBES + ("causality.suffix_swap",),
    )


def _train_floor(log: Log) -> Verdict:
    """`floor` of a training loss where it is not known whether the data were new."""
    loss = log.finite("train/loss")
    if log.epochs(loss.steps) is not None:
        raise Skip("no evaluation and no training loss on new data.")
    if _vocabulary(log) < 1000:
        raise Skip("with fewer than 1000 ids, low perplexities are ordinary; give references.")
    limit = math.log(5)
    if "kn2" in log.references:
        limit = min(limit, math.log(log.references["kn2"] / 10))
    limit = min(limit, log.references.get("entropy_rate", limit))
    last = loss.tail(0.1).values
    nats = float(last.mean())
    error = noise(loss.values) / math.sqrt(len(last)) if len(loss) >= 4 else 0.0
    text = (
        f"train/loss ends at {nats:.4g} +- {error:.2g} (SE) nats over {log.vocab_size} ids; "
        f"whether its data are new is not known. Below {limit:.3g} it is memory or no natural text."
    )
    ok = nats >= limit - 3 * error
    return verdict(ok, text, otherwise="warn", loss=nats, limit=limit, probes=LEAK_PROBES)


def _nats(log: Log, split: str) -> Series:
    """The loss of a split, or the logarithm of its perplexity where only that is logged."""
    if log.has(f"{split}/loss"):
        return log.finite(f"{split}/loss")
    ppl = log.finite(f"{split}/token_ppl")
    if ppl.values.min() <= 0:
        raise Skip(f"{split}/token_ppl is not positive (eval.ppl_of_loss).")
    return Series(ppl.steps, np.log(ppl.values))


def _overfits(log: Log, split: str) -> dict[str, Any] | None:
    """How a split's loss rose while the training loss fell, or None.

    The rise is above half of the fall before it, from the first row of either loss. The means of
    up to 8 training rows before the lowest evaluation and at the end differ by more than 3 SE.
    """
    if not log.has("train/loss"):
        return None
    loss, train = _nats(log, split), log.finite("train/loss")
    place = int(np.argmin(loss.values))
    low, end, step = float(loss.values[place]), float(loss.values[-1]), loss.steps[place]
    start = max(float(loss.values[0]), float(train.values[0]))
    before, after = train.values[train.steps <= step], train.values[train.steps > step]
    size = min(8, len(before), len(after))
    if not size or end - low <= max(0.5 * (start - low), 0):
        return None
    first, last = float(before[-size:].mean()), float(after[-size:].mean())
    spread = noise(train.values) if len(train) >= 4 else 0.0
    if first - last <= 3 * spread * math.sqrt(2 / size):
        return None
    text = (
        f"{split} fell to {low:.4g} nats by step {step:g} and rose to {end:.4g} while train/loss "
        f"went from {first:.4g} to {last:.4g}"
    )
    return {"text": text, "step": int(step), "lowest": low, "end": end}


def _vocabulary(log: Log) -> int:
    if log.vocab_size is None:
        raise Skip("vocab_size is not given.")
    return log.vocab_size


def _scored(log: Log) -> list[str]:
    """Splits with a loss or a perplexity."""
    return list(dict.fromkeys(log.splits() + log.splits("token_ppl")))


def _learns(log: Log, start: float, stop: float) -> bool:
    """Whether the learning rate between two steps is above 0.001 of its peak, or not logged."""
    if not log.has("optim/lr"):
        return True
    lr = log.finite("optim/lr")
    within = lr.values[(lr.steps > start) & (lr.steps <= stop)]
    return not len(within) or not lr.values.max() or within.max() > 1e-3 * lr.values.max()


def _best(log: Log) -> tuple[str, float, float] | None:
    """The lowest of the losses on held-out or new data, with the number of tokens behind it."""
    found = []
    for split in _scored(log):
        nats = float(_nats(log, split).values.min())
        count: float = log.split_tokens.get(split, 0)
        if log.has(f"{split}/token_count"):
            count = float(log.finite(f"{split}/token_count").values.min())
        found.append((f"{split} loss", nats, count))
    if log.has("train/loss"):
        loss = log.finite("train/loss")
        tokens, epochs = log.tokens(loss.steps), log.epochs(loss.steps)
        if tokens is not None and epochs is not None and (new := epochs <= 1).sum() >= 8:
            # The last stretch; the lowest would be lowest by chance.
            size = max(4, int(new.sum()) // 10)
            mean = float(loss.values[new][-size:].mean())
            spent = float(np.diff(tokens[new]).mean()) * size
            found.append(("train/loss late in the first epoch", mean, spent))
    return min(found, key=lambda row: row[1]) if found else None


def _token_sd(log: Log) -> float:
    """Standard deviation of the nats of one token: from the noise of batches, else at most ln V."""
    bound = math.log(log.vocab_size) if log.vocab_size else math.inf
    if log.has("train/loss"):
        loss = log.finite("train/loss")
        tokens = log.tokens(loss.steps)
        if tokens is not None and len(loss) >= 60:
            per_row = float(np.median(np.diff(tokens)) / np.median(np.diff(loss.steps)))
            return min(bound, noise(loss.values) * math.sqrt(per_row))
    return bound


CHECKS = (
    above_uniform,
    overfit,
    logged_tokens,
    accuracy,
    identical,
    floor,
    baseline,
)


def _exp(nats: float) -> float:
    with np.errstate(over="ignore"):  # inf above what float64 holds
        return float(np.exp(nats))
