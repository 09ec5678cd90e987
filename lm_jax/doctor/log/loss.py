"""What the course of the training loss says by itself."""

import math

import numpy as np

from lm_jax.doctor.log.read import METRICS, PREFIXES
from lm_jax.doctor.log.subject import (
    Log,
    Series,
    blocks,
    half_unit,
    noise,
    number,
)
from lm_jax.doctor.old import Skip, Status, Verdict, check, verdict

LEAK_PROBES = ("target.oracle", "target.gibbs", "causality.suffix_swap")
CONTEXT_PROBES = ("causality.context_use", "causality.row_independence", "causality.truncation")
UPDATE_PROBES = ("training.updates",)
_SUBWORDS = 8000  # SentencePiece's default; made-up tasks have fewer ids


@check(
    "log.readable",
    "Map the trainer's columns to metrics, and repair or delete the lines named here; the other "
    "checks used the rest.",
)
def readable(log: Log) -> Verdict:
    """Rows could be read and hold metrics that are known."""
    if not log.records:
        raise_lines = "; ".join(f"line {p.line}: {p.what}" for p in log.problems[:5])
        return verdict(False, f"The log holds no record. {raise_lines}".strip())
    known = [name for name in log.names if name in METRICS]
    odd = sorted(
        name
        for name in METRICS
        if any(name in record and number(record[name]) is None for record in log.records)
    )
    lines = [f"line {p.line}: {p.what}" for p in log.problems]
    text = f"{len(log.records)} records with {', '.join(known) or 'no metric that is known'}."
    if lines:
        text += f" {len(lines)} lines could not be used: {'; '.join(lines[:5])}."
    if odd:
        text += f" No numbers in some rows of {', '.join(odd)}."
    cut_off = not odd and all(p.last for p in log.problems)  # what a kill leaves
    return verdict(
        bool(known) and not lines and not odd,
        text,
        otherwise="warn" if known and cut_off else "fail",
        records=len(log.records),
        lines=[p.line for p in log.problems],
    )


@check(
    "log.finite",
    "An isolated value comes from one batch: 0/0 where no token is scored (examine_loss: "
    "loss.nothing_scored) or a label out of range (loss.label_range); replay that batch. Values "
    "that stay non-finite mean poisoned parameters: skip the whole update, and never put 0 in its "
    "place.",
)
def finite(log: Log) -> Verdict:
    """No loss or norm is NaN or infinite, and no update was skipped for it."""
    scaled = log.has("optim/loss_scale")  # float16: gradients overflow while the scale is sought
    found, values = [], {}
    names = [n for n in log.names if n in METRICS or n.startswith(PREFIXES)]
    names = [n for n in names if not n.endswith("ppl")]
    if not names:
        raise Skip("the log has no loss and no norm.")
    for name in names:
        if scaled and name.startswith(("optim/", "grad_norm/")):
            continue
        series = log.series(name)
        bad = ~np.isfinite(series.values)
        if name == "optim/skipped_updates":
            bad |= series.values > 0
        if not bad.any():
            continue
        first, count = int(np.argmax(bad)), int(bad.sum())
        step = int(series.steps[first])
        stays = bad[first:].all() and first + 1 < len(bad)
        course = "and in every later row" if stays else f"in {count} of {len(bad)} rows"
        found.append(f"{name} at step {step}, {course}")
        values[name] = {"first_step": step, "count": count, "stays": bool(stays)}
    text = f"Not finite or skipped: {'; '.join(found)}." if found else "All values are finite."
    return verdict(not found, text, found=values)


@check(
    "log.negative",
    "A cross-entropy or a KL divergence is a mean of -log p or of log ratios under one "
    "distribution and never below 0: look for logits used as log-probabilities, a sign, negative "
    "weights, or a term that is subtracted (examine_loss: loss.definition).",
)
def negative(log: Log) -> Verdict:
    """No cross-entropy and no KL divergence is below 0 by more than rounding."""
    splits = [f"{split}/{name}" for split in ("valid", "test") for name in ("loss", "lm_ce")]
    names = ["train/loss", *splits, "distill/lm_ce", "distill/kd_kl", "distill/kd_kl_t2"]
    names = [name for name in names if log.has(name)]
    if not names:
        raise Skip("the log has no loss.")
    rounding = 100 * float(np.finfo(np.float32).eps)
    found = {}
    for name in names:
        series = log.finite(name)
        below = np.flatnonzero(series.values < -rounding)
        if len(below):
            found[name] = {
                "first_step": int(series.steps[below[0]]),
                "count": len(below),
                "lowest": float(series.values.min()),
            }
    text = "; ".join(
        f"{name} is below 0 in {x['count']} rows, from step {x['first_step']} on, "
        f"{x['lowest']:.4g} at the least"
        for name, x in found.items()
    )
    text = text or f"{', '.join(names)} are never below 0"
    return verdict(
        not found, f"{text} (float32 rounds logits of 100 to {rounding:.1g}).", found=found
    )


@check(
    "log.imputed",
    "A loss of exactly 0 between ordinary values is a non-finite value that was replaced; skip "
    "the update instead and look at its batch (loss.nothing_scored).",
)
def imputed(log: Log) -> Verdict:
    """No single loss is exactly 0 between neighbours far above 0."""
    names = [n for n in log.names if n in ("train/loss", "distill/lm_ce", "distill/kd_kl")]
    found = {}
    for name in names:
        series = log.finite(name)
        printed = min((half_unit(x) for x in series.values if x), default=0.0)
        steps = []
        for i in np.flatnonzero(series.values == 0):
            before, after = series.values[max(0, i - 5) : i], series.values[i + 1 : i + 6]
            near = np.concatenate([before, after])
            near = near[near != 0]
            if not (len(before) and len(after) and len(near)):
                continue
            if near.mean() > 6 * math.hypot(near.std(), printed):
                steps.append(int(series.steps[i]))
        if steps:
            found[name] = steps
    if not names:
        raise Skip("the log has no loss.")
    text = "; ".join(f"{name} is exactly 0 at steps {s[:5]}" for name, s in found.items())
    return verdict(
        not found, f"{text or 'No loss is exactly 0 between ordinary values'}.", steps=found
    )


@check(
    "log.above_uniform",
    "Nothing is learned, labels do not belong to the logits, or the value is not a mean of "
    "next-token nats. Run examine_model (causality.row_independence, causality.suffix_swap), "
    "examine_gradients on the whole loss (gradient.directional) and examine_loss (target.oracle).",
)
def above_uniform(log: Log) -> Verdict:
    """The loss does not stay above ln V, that of a uniform guess."""
    name = "distill/lm_ce" if log.has("distill/lm_ce") else "train/loss"
    limit = _uniform(log)
    loss = log.finite(name)
    if not log.settled(loss.steps):
        raise Skip(f"the log ends at step {loss.steps[-1]:g}, too early for this check.")
    if len(loss) < 8:
        low = float(loss.values.min())
        falls = len(loss) > 1 and loss.values[-1] <= low
        text = f"{name} is {low:.4g} at the least, and ln V = {limit:.4g}."
        return verdict(low <= limit, text, otherwise="warn" if falls else "fail", lowest=low)
    last, before = loss.tail(0.25), Series(*(x[: len(x) * 2 // 3] for x in loss.tail(0.75)))
    spread = noise(loss.values)
    mean, error = float(last.values.mean()), spread / math.sqrt(len(last))
    falls = before.values.mean() - mean > 3 * spread * math.sqrt(2 / len(last))
    falls &= mean < loss.values[0]  # and is not on its way back from a divergence
    text = (
        f"{name} over the last quarter is {mean:.4g} +- {error:.2g} (SE), and ln V = {limit:.4g}"
        f"{'; it still falls' if falls else ''}."
    )
    over = mean - limit > 3 * error
    return verdict(not over, text, otherwise="warn" if falls else "fail", mean=mean, error=error)


@check(
    "log.fall",
    "Most likely the model sees its target: the labels are not shifted, or there is no causal "
    "mask. examine_loss (target.oracle), examine_model (causality.suffix_swap) and "
    "examine_training (target.gibbs) decide.",
)
def fall(log: Log) -> Verdict:
    """No fall of the loss that language modelling does not know.

    Below half of ln V a model must learn from the data. Where the data are new, its loss then
    falls as a power of the tokens seen with an exponent below 0.5 (Hestness et al. 2017,
    arXiv 1712.00409: 0.5 in theory, below 0.35 as measured). A copied target falls with the speed
    of the optimiser, and so does a corpus of near-zero entropy: where a bigram model is known, only
    a tenth of its perplexity is judged, as in eval.floor.
    """
    uniform = _uniform(log)
    half = uniform / 2
    if log.overfit:
        raise Skip("overfitting is declared.")
    if uniform < math.log(1000):
        raise Skip("with fewer than 1000 ids, text can be learned too fast for this check.")
    if "entropy_rate" in log.references:
        raise Skip("the entropy of the source is known, which decides more (eval.references).")
    if "kn2" in log.references:
        half = min(half, math.log(log.references["kn2"] / 10))
        if half <= 0:
            raise Skip(
                f"a bigram model reaches perplexity {log.references['kn2']:.4g}, so the text can "
                "be learned too fast for this check."
            )
    loss = log.finite("train/loss", 3)
    tokens = log.tokens(loss.steps)
    if tokens is None:
        raise Skip("tokens seen are not known; log data/tokens or give tokens_per_step.")
    epochs = log.epochs(loss.steps)
    use = (tokens > 0) & (epochs <= 1 if epochs is not None else True)
    tokens, values = tokens[use], loss.values[use]
    if not len(values) or values[0] < 0.7 * uniform:
        raise Skip("the log does not begin with an untrained model.")
    # The loss of a batch of n tokens has a standard error below ln V / sqrt(n).
    spread = uniform / math.sqrt(float(np.median(tokens / loss.steps[use].clip(1))))
    if len(values) >= 4:
        spread = min(spread, noise(values))
    # Means over bins of 5 % in tokens.
    bins = np.unique((np.log(tokens) / math.log(1.05)).astype(int), return_inverse=True)[1]
    count = np.bincount(bins)
    D, L = (np.bincount(bins, x) / count for x in (tokens, values))
    steepest, where, error = -math.inf, (0, 0), 0.0
    for b in np.flatnonzero(half > L).tolist():
        earlier = np.flatnonzero(D <= D[b] / 2).tolist()
        if not earlier or L[b] <= 0:
            continue
        a = earlier[-1]
        span = math.log(D[b] / D[a])
        relative = math.hypot(*(spread / L[i] / math.sqrt(count[i]) for i in (a, b)))
        if math.log(L[a] / L[b]) / span - 3 * relative / span > steepest - 3 * error:
            steepest, where, error = math.log(L[a] / L[b]) / span, (a, b), relative / span
    if steepest == -math.inf:
        return verdict(True, f"The loss stays above {half:.3g} nats while the data are new.")
    a, b = where
    known = "new" if epochs is not None else "new or not, the log does not say"
    text = (
        f"The loss falls from {L[a]:.3g} to {L[b]:.3g} nats between {D[a]:.3g} and {D[b]:.3g} "
        f"tokens (data {known}): as tokens to the power -{steepest:.2f} +- {error:.2g} (SE). "
        "Learning from new text goes with less than 0.5, and more than 1 is copying."
    )
    known_text = "kn2" in log.references
    if not known_text:
        text += " A corpus of near-zero entropy would look alike; references would tell."
    decisive = epochs is not None and (known_text or uniform >= math.log(_SUBWORDS))
    return verdict(
        steepest - 3 * error <= 1,
        text,
        otherwise="fail" if decisive else "warn",
        exponent=steepest,
        error=error,
        probes=LEAK_PROBES,
    )


@check(
    "log.trend",
    "The course is that of a frozen model, so differences between rows are differences between "
    "batches: explain none of them by a hyper-parameter. Run examine_training "
    "(training.updates): the parameters must move, and two evaluations must differ.",
)
def trend(log: Log) -> Verdict:
    """From a random start the loss falls at all: at once, or by the Mann-Kendall test."""
    loss = log.finite(log.objective(), 6)
    if loss.steps[-1] < 100:
        raise Skip(f"the log ends at step {loss.steps[-1]:g}, too early for this check.")
    if loss.values[0] < 0.7 * _uniform(log):
        raise Skip("the log does not begin with an untrained model.")
    spread, start = noise(loss.values), float(loss.values[0])
    rest = float(np.median(loss.values[1:]))
    if start - rest > max(6 * spread, 0.05 * start):
        text = f"The first row is {start:.4g}, and the median of the later ones {rest:.4g}: "
        return verdict(True, f"{text}more than 6 sd ({6 * spread:.2g}) and 5 % below.")
    x = blocks(loss.values, 200)
    n = len(x)
    falls = np.sign(x[:, None] - x[None, :])[np.triu_indices(n, 1)].sum()
    z = (falls - np.sign(falls)) / math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    third = len(loss) // 3
    drop = float(loss.values[:third].mean() - loss.values[-third:].mean())
    error = float(np.std(loss.values, ddof=1)) * math.sqrt(2 / third)
    text = (
        f"{log.objective()} goes from {loss.values[0]:.4g} to {loss.values[-1]:.4g} over "
        f"{len(loss)} rows: Mann-Kendall z = {z:.2f} for a fall (2.33 needed), first to last "
        f"third {drop:.3g} +- {error:.2g} (SE), rows differ by sd {np.std(loss.values):.3g}."
    )
    if drop + 3 * error < 0 and -drop > 0.05 * start:
        raise Skip(f"{log.objective()} rises from {start:.4g}; log.divergence judges that.")
    decisive = drop + 3 * error < 0.05 * loss.values[0]
    return verdict(
        z > 2.33,
        text,
        otherwise="fail" if decisive else "warn",
        z=float(z),
        drop=drop,
        error=error,
        probes=UPDATE_PROBES,
    )


@check(
    "log.divergence",
    "The run diverges. Lower the peak learning rate or lengthen the warm-up, and look at the "
    "batches and the gradient norm at the step named; parameters from before it are still good. "
    "If the data change there, log the losses of both apart.",
)
def divergence(log: Log) -> Verdict:
    """The loss does not end far above the lowest that it had reached.

    Medians of blocks are compared, which spikes do not move. The lowest of 40 blocks lies 2.2 SE
    below their mean by chance, so that 6 SE of a difference leave more than 4.
    """
    name = log.objective()
    loss = log.finite(name, 16)
    parts = np.array_split(np.arange(len(loss)), min(40, len(loss) // 4))
    x = np.array([np.median(loss.values[part]) for part in parts])
    low = int(np.argmin(x))
    least, end, start = float(x[low]), float(x[-1]), float(loss.values[0])
    # The variance of a median is pi / 2 times that of a mean; that of blocks is larger where
    # batches that follow each other are alike.
    alone = noise(loss.values) * math.sqrt(math.pi / 2 / len(parts[-1]))
    error = math.sqrt(2) * max(alone, noise(x) if len(x) >= 8 else 0)
    step = int(loss.steps[parts[low][-1]])
    allowed = max(6 * error, 0.05 * abs(start))
    text = (
        f"{name} goes from {start:.4g} to {least:.4g} by step {step} and ends at {end:.4g}, "
        f"{end - least:.3g} above; allowed are {allowed:.2g} (6 SE, and 5 % of the first row)."
    )
    rises = end - least > allowed
    if rises:
        how = f"fell to {least:.4g}" if low else f"was {least:.4g}"
        text = f"{name} {how} at step {step} and rose to {end:.4g}: it diverges. {text}"
    status: Status = "fail" if end > start / 2 else "warn"
    return verdict(not rises, text, otherwise=status, step=step, lowest=least, end=end, error=error)


@check(
    "log.quantised",
    "The loss is computed or logged in bfloat16. Compute logits, log-softmax and sums in float32 "
    "(examine_loss: loss.dtype).",
)
def quantised(log: Log) -> Verdict:
    """The losses are not all values of bfloat16, which has 8 significant bits."""
    x = log.finite("train/loss", 10).values
    x = np.unique(x[x != 0])
    step = 2.0 ** (np.floor(np.log2(np.abs(x))) - 7)
    printed = np.array([half_unit(value) for value in x])
    hits = np.abs(x - np.round(x / step) * step) <= printed
    # The logarithm of the chance that printed numbers all fall beside a bfloat16 number.
    chance = float(np.log(np.minimum(1, 2 * printed / step)).sum())
    if chance > math.log(1e-6):
        raise Skip("the losses are printed with too few digits, or too few differ.")
    text = f"{hits.sum()} of {len(x)} different losses are bfloat16 numbers to their last digit."
    return verdict(not hits.all(), text, share=float(hits.mean()))


def _uniform(log: Log) -> float:
    if log.vocab_size is None:
        raise Skip("vocab_size is not given.")
    return math.log(log.vocab_size)


CHECKS = (
    readable,
    finite,
    negative,
    imputed,
    above_uniform,
    fall,
    trend,
    quantised,
    divergence,
)
