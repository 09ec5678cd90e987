"""What the course of the training loss says by itself."""

import math

import numpy as np

from lm_jax.doctor.findings import Skip, Verdict, check, verdict
from lm_jax.doctor.records import (
    METRICS,
    PREFIXES,
    Log,
    Series,
    blocks,
    half_unit,
    noise,
    number,
    rank_correlation,
    residuals,
)

LEAK_PROBES = ("target.oracle", "target.gibbs", "causality.suffix_swap")
CONTEXT_PROBES = ("causality.context_use", "causality.row_independence", "causality.truncation")
UPDATE_PROBES = ("training.updates",)


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
    for name in log.names:
        if name.endswith("ppl") or not (name in METRICS or name.startswith(PREFIXES)):
            continue
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
        steps = []
        for i in np.flatnonzero(series.values == 0):
            before, after = series.values[max(0, i - 5) : i], series.values[i + 1 : i + 6]
            near = np.concatenate([before, after])
            near = near[near != 0]
            if len(before) and len(after) and len(near) and near.mean() > 6 * near.std():
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
    of the optimiser.
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
        half = min(half, math.log(log.references["kn2"]))
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
    return verdict(
        steepest - 3 * error <= 1,
        text,
        otherwise="warn" if epochs is None else "fail",
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
    """From a random start the loss falls at all, judged by the Mann-Kendall test."""
    loss = log.finite(log.objective(), 6)
    if loss.steps[-1] < 100:
        raise Skip(f"the log ends at step {loss.steps[-1]:g}, too early for this check.")
    if loss.values[0] < 0.7 * _uniform(log):
        raise Skip("the log does not begin with an untrained model.")
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


@check(
    "log.spikes",
    "Look at the batches of these updates; if they are ordinary, lower the peak learning rate or "
    "lengthen the warm-up.",
)
def spikes(log: Log) -> Verdict:
    """The loss does not jump above its recent past and stay there for several updates."""
    loss = log.finite("train/loss", 60)
    width = 50
    past = np.median(np.lib.stride_tricks.sliding_window_view(loss.values, width)[:-1], axis=1)
    over = (loss.values[width:] - past) / noise(loss.values) > 6
    starts = np.flatnonzero(over[2:] & over[1:-1] & over[:-2])
    if not len(starts):
        return verdict(True, f"No 3 rows in a row lie 6 sd above the median of {width} before.")
    first = starts[0]
    step, height = int(loss.steps[first + width]), loss.values[first + width] - past[first]
    text = (
        f"{len(starts)} runs of 3 rows lie over 6 sd ({6 * noise(loss.values):.3g} nats) above "
        f"the median of the {width} rows before; the first at step {step}, {height:.3g} above"
    )
    if log.has("optim/grad_norm"):
        norms = log.finite("optim/grad_norm")
        near = (norms.steps >= loss.steps[first]) & (norms.steps <= step)
        if near.any():
            peak, usual = norms.values[near].max(), np.median(norms.values[near])
            text += f", with a gradient norm up to {peak / usual:.3g} times its median before"
    return verdict(False, text + ".", otherwise="warn", step=step, count=len(starts))


@check(
    "log.resume",
    "A fall, or the rises and falls of the start of the run over again: the data were read from "
    "the beginning, so save the reader's position. A rise: optimiser state, schedule or averages "
    "were not restored. Compare N updates with N/2, resume, N/2 (examine_data: data.resume).",
)
def resume(log: Log) -> Verdict:
    """The loss does not jump, and batches do not repeat, where the run was resumed."""
    restarts = log.restarts()
    if not restarts:
        raise Skip("no resume is declared or seen.")
    loss = log.finite("train/loss")
    spread, wrong, least, judged = noise(loss.values), [], math.inf, 0
    for at in restarts:
        split = int(np.searchsorted(loss.steps, at, side="right"))
        size = min(32, split // 6, len(loss) - split)
        if size < 4:
            continue
        judged += 1
        jump = _jump(loss.values, split, size)
        # Where nothing was resumed the same fit shows what curvature and drift amount to.
        near = range(max(size, split // 2), min(len(loss) - size, 2 * split) + 1, size // 2)
        null = [_jump(loss.values, p, size) for p in near if abs(p - split) >= size]
        error = spread * math.sqrt(8 / size)  # of a step beside a common slope
        if null:
            error = max(error, 1.4826 * float(np.median(np.abs(null))))
        least = min(least, 4.5 * error)
        if abs(jump) > 4.5 * error:
            wrong.append(f"{jump:+.3g} nats after step {at} (SE {error:.2g}, 4.5 SE allowed)")
        rows = min(len(loss) - split, split)
        if rows >= 30:
            left = residuals(loss.values)
            again = rank_correlation(left[:rows], left[split : split + rows])
            if again > 5 / math.sqrt(rows):
                wrong.append(
                    f"the {rows} rows after step {at} repeat the noise of the first rows of the "
                    f"log (rank correlation {again:.2f}, {5 / math.sqrt(rows):.2f} allowed)"
                )
    if not judged:
        raise Skip("fewer than 4 rows before or after every resume.")
    text = f"Loss after a resume: {'; '.join(wrong)}." if wrong else ""
    text = text or f"{judged} resumes, no jump above {least:.3g} nats (4.5 SE)."
    return verdict(not wrong, text, wrong=wrong)


@check(
    "log.epoch_order",
    "Every epoch visits the same batches in the same order. Draw the order from (seed, epoch); "
    "examine_data (data.epoch_order) shows it.",
)
def epoch_order(log: Log) -> Verdict:
    """The noise of the loss does not repeat with the period of an epoch."""
    if log.overfit:
        raise Skip("overfitting is declared.")
    loss = log.finite("train/loss", 60)
    epochs = log.epochs(loss.steps)
    if epochs is None or epochs[-1] <= epochs[0]:
        raise Skip("epochs are not known; log data/epoch or give train_tokens.")
    period = round((len(loss) - 1) / (epochs[-1] - epochs[0]))
    rows = len(loss) - period
    if period < 20 or rows < 30:
        raise Skip(f"{len(loss)} rows of {period} an epoch do not repeat often enough.")
    left = residuals(loss.values)
    again = rank_correlation(left[:-period], left[period:])
    error = 1 / math.sqrt(rows)
    text = (
        f"Rows one epoch ({period} rows) apart have noise with rank correlation {again:.2f} "
        f"+- {error:.2g} (SE) over {rows} rows; more than 0.3 + 3 SE means the same batches."
    )
    return verdict(again <= 0.3 + 3 * error, text, correlation=again)


def _uniform(log: Log) -> float:
    if log.vocab_size is None:
        raise Skip("vocab_size is not given.")
    return math.log(log.vocab_size)


def _jump(values: np.ndarray, split: int, size: int) -> float:
    """The step at `split` in a fit of a slope and a step to `size` rows on either side."""
    place = np.arange(-size, size) + 0.5
    design = np.stack([np.ones_like(place), place, (place > 0).astype(float)], axis=1)
    rows = values[split - size : split + size]
    return float(np.linalg.lstsq(design, rows, rcond=None)[0][2])


CHECKS = (
    readable,
    finite,
    imputed,
    above_uniform,
    fall,
    trend,
    quantised,
    spikes,
    resume,
    epoch_order,
)
