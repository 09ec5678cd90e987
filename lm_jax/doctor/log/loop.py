"""What learning rate, norms, speed, budgets and resumes in a log say about the loop."""

import math

import numpy as np

from lm_jax.doctor.log.loss import UPDATE_PROBES
from lm_jax.doctor.log.subject import (
    Log,
    Series,
    half_unit,
    noise,
    rank_correlation,
    residuals,
)
from lm_jax.doctor.numbers import products
from lm_jax.doctor.old import Skip, Verdict, check, verdict

_MAX_MFU = 0.75  # no training of a language model is known to reach more


@check(
    "log.updates",
    "The optimiser does not step, or steps another copy of the parameters. Look at the counter "
    "that decides when an accumulated update is due, and run examine_training (training.updates) "
    "or examine_optimiser (optimiser.update_count).",
)
def updates(log: Log) -> Verdict:
    """The learning rate is not always 0, and norms of parameters and updates are not constant."""
    found, seen = [], []
    lr = log.finite("optim/lr") if log.has("optim/lr") else None
    if lr is not None and len(lr) > 1:
        seen.append("learning rate")
        if not lr.values.any():
            found.append(f"the learning rate is 0 in all {len(lr)} rows")
    learning = None if lr is None else lr.steps[lr.values > 1e-3 * lr.values.max()]

    def rows(name: str) -> np.ndarray:
        series = log.finite(name)
        use = np.ones(len(series), bool) if learning is None else np.isin(series.steps, learning)
        if log.has("optim/skipped_updates"):
            skipped = log.series("optim/skipped_updates")
            use &= ~np.isin(series.steps, skipped.steps[skipped.values > 0])
        return series.values[use]

    if log.has("optim/param_norm") and len(norm := rows("optim/param_norm")) > 2:
        if half_unit(norm[0]) < 1e-6 * abs(norm[0]):
            seen.append("parameter norm")
            if np.ptp(norm) == 0:
                found.append(f"the parameter norm is {norm[0]:.8g} in all {len(norm)} rows")
    for name, what in (("optim/update_norm", "update"), ("optim/grad_norm", "gradient")):
        if log.has(name) and len(norm := rows(name)) > 2:
            seen.append(f"{what} norm")
            if (norm == 0).mean() > 0.5:
                found.append(f"the {what} norm is 0 in {np.sum(norm == 0)} of {len(norm)} rows")
    if not seen:
        raise Skip("no learning rate, parameter norm, update norm or gradient norm is logged.")
    text = f"{'; '.join(found)}." if found else f"Updates happen by {', '.join(seen)}."
    return verdict(not found, text[0].upper() + text[1:], found=found, probes=UPDATE_PROBES)


@check(
    "log.lr_zero",
    "Let warm-up give the first update peak / warm-up, and size the schedule in updates, the unit "
    "in which it is stepped, so that it ends with the run.",
)
def lr_zero(log: Log) -> Verdict:
    """The learning rate is not 0 at the first update or over a last part of the run."""
    lr = log.finite("optim/lr", 3)
    peak = float(lr.values.max())
    if peak <= 0:
        raise Skip("the learning rate is always 0 (log.updates).")
    if half_unit(lr.values[lr.values > 0].min()) > 0.01 * peak:
        raise Skip("the learning rate is printed with too few digits.")
    zero = lr.values <= 1e-9 * peak
    zero_rows = np.flatnonzero(zero[1:]) + 1
    idle = float(len(zero_rows) / len(lr))
    text = (
        f"The first learning rate is {lr.values[0]:.3g} at step {lr.steps[0]:g}; "
        f"{len(zero_rows)} of {len(lr)} later rows have 0"
    )
    text += f", from step {lr.steps[zero_rows[0]]:g}." if len(zero_rows) else "."
    wasted = len(zero_rows) > 1 and idle > 0.05
    first = bool(zero[0]) and lr.steps[0] <= 1
    return verdict(
        not (wasted or first), text, otherwise="fail" if wasted else "warn", idle=idle, first=first
    )


@check(
    "log.warmup",
    "Shorten the warm-up to at most a tenth of the run, counted in updates.",
)
def warmup(log: Log) -> Verdict:
    """The learning rate reaches its peak before half of the run is over."""
    lr = _whole_lr(log)
    place = int(np.argmax(lr.values))
    share = float((lr.steps[place] - lr.steps[0]) / (lr.steps[-1] - lr.steps[0]))
    rises = place == len(lr) - 1 and lr.values[-1] > lr.values[-2]
    if log.steps is None and share > 0.5 and lr.values[-1] > 0.5 * lr.values[place]:
        raise Skip(
            f"the log ends at {lr.values[-1] / lr.values[place]:.0%} of the peak of the learning "
            "rate, in the middle of a schedule, and steps is not given."
        )
    text = f"The peak of {lr.values[place]:.3g} comes at step {lr.steps[place]:g}, {share:.0%} on."
    if log.lr_peak and rises and lr.values[place] < 0.99 * log.lr_peak:
        text += f" {log.lr_peak:.3g} is configured."
    return verdict(
        share <= 0.5, text, otherwise="fail" if rises else "warn", share=share, rises=rises
    )


@check(
    "log.lr_end",
    "Size the schedule in updates if it is stepped once per update; a schedule sized in "
    "micro-batches never comes to its end. examine_optimiser (optimiser.executed_lr) decides.",
)
def lr_end(log: Log) -> Verdict:
    """The last learning rate is the configured one, to 5 % and 1 % of the peak."""
    lr = _whole_lr(log)
    peak = log.lr_peak or float(lr.values.max())
    last = float(lr.values[-1])
    ratio = last / peak
    accumulation = _accumulation(lr, ratio) if last < lr.values.max() else None
    text = f"The last learning rate is {last:.4g}, {ratio:.3f} of the peak"
    if log.lr_end is None:
        raise Skip(f"{text}; lr_end is not given.")
    text += f"; {log.lr_end:.4g} is configured."
    slack = 0.05 * log.lr_end + 0.01 * peak
    high, low = last - log.lr_end > slack, log.lr_end - last > slack
    if (high or low) and log.steps is None:
        if last == lr.values.max():
            raise Skip("the log ends at the peak of the learning rate and steps is not given.")
        text += " The run may have ended early: steps is not given."
    if high and accumulation:
        text += (
            f" A {accumulation[1]} schedule sized in micro-batches with {accumulation[0]} of them "
            "to an update ends there."
        )
    return verdict(
        not (high or low),
        text,
        otherwise="warn" if log.steps is None else "fail",
        ratio=ratio,
        accumulation=accumulation[0] if high and accumulation else None,
    )


@check("log.clipping", "")
def clipping(log: Log) -> Verdict:
    """How often gradients were clipped; a fact, not a fault."""
    rate = log.finite("optim/clip_rate")
    late = float(rate.tail(0.5).values.mean())
    text = f"{late:.1%} of the updates of the second half were clipped."
    if late > 0.9:
        text += (
            " Clipping keeps the direction, and Adam divides a constant factor out again, so "
            "this alone explains no bad loss; small batches keep norms high by their noise. "
            "Under plain SGD it fixes the length of every step. A loss summed instead of "
            "averaged over tokens does this from the first update on (loss.repetition)."
        )
    return verdict(True, text, rate=late)


@check(
    "log.throughput",
    "Count each token once (not per device, micro-batch or padding slot), wait for the device "
    "before stopping the clock, and check the parameter count.",
)
def throughput(log: Log) -> Verdict:
    """6 N FLOPs for each token, at the rate logged, fit into the device's peak."""
    if log.has("perf/tokens_per_second") and log.parameters and log.peak_flops:
        rate = float(np.median(log.finite("perf/tokens_per_second").values))
        mfu = 6 * log.parameters * rate / log.peak_flops
        text = f"6 x {log.parameters:.4g} parameters x {rate:.4g} tokens/s"
        text += f" = {6 * log.parameters * rate:.3g} FLOP/s of {log.peak_flops:.3g}: {mfu:.0%}"
    elif log.has("perf/mfu"):
        logged = log.finite("perf/mfu").values
        logged = logged[logged >= 0]  # nanoGPT has -1 until it is measured
        if not len(logged):
            raise Skip("perf/mfu is negative: not measured.")
        mfu = float(np.median(logged))
        mfu = mfu / 100 if 1 < mfu <= 100 else mfu  # in percent
        text = f"The logged share of the peak is {mfu:.0%}"
    else:
        raise Skip("needs perf/tokens_per_second, parameters and peak_flops, or perf/mfu.")
    return verdict(mfu < _MAX_MFU, f"{text}; above {_MAX_MFU:.0%} is not possible.", mfu=mfu)


@check(
    "log.budget",
    "State tokens as updates x sequences x length as executed, and find which factor differs "
    "from the run that was made.",
)
def budget(log: Log) -> Verdict:
    """Stated amounts are the products of their factors; tokens logged fit the steps."""
    wrong, seen = products(log.budgets), len(log.budgets)
    if log.tokens_per_step and log.has("data/tokens"):
        tokens = log.finite("data/tokens")
        seen += 1
        expected = float(tokens.steps[-1] * log.tokens_per_step)
        # Fewer: padding is not counted. One more step: they are counted from 0.
        if tokens.values[-1] > 1.005 * expected + log.tokens_per_step:
            wrong.append(
                f"{tokens.steps[-1]:g} steps x {log.tokens_per_step:g} tokens = {expected:.4g}, "
                f"but data/tokens is {tokens.values[-1]:.4g}"
            )
    if not seen:
        raise Skip("no budgets are given, and no tokens_per_step beside data/tokens.")
    text = "; ".join(wrong) or f"{seen} products agree to 0.5 %"
    return verdict(not wrong, f"{text}.", wrong=wrong)


@check(
    "log.components",
    "Log raw values, weights and weighted values under names of their own, and let the objective "
    "be their sum.",
)
def components(log: Log) -> Verdict:
    """Weighted terms add up to the objective, to 1e-5 and the digits printed."""
    parts = [name for name in log.names if name.startswith("distill/weighted/")]
    if not parts:
        raise Skip("the log has no distill/weighted/ terms.")
    total = log.finite("distill/objective")
    worst, seen = (0.0, 0.0, 0.0, 0.0), 0
    columns = [log.finite(name) for name in parts]
    for step, value in zip(total.steps, total.values, strict=True):
        terms = [c.values[c.steps == step] for c in columns]
        if not all(map(len, terms)):
            continue
        x = np.array([float(term[0]) for term in terms])
        seen += 1
        allowed = (
            1e-5 * max(1.0, float(np.abs(x).sum())) + sum(map(half_unit, x)) + half_unit(value)
        )
        excess = abs(x.sum() - value) / allowed
        worst = max(worst, (float(excess), float(step), float(x.sum()), float(value)))
    if not seen:
        raise Skip("no row has all weighted terms and the objective.")
    excess, step, added, value = worst
    text = f"Largest gap of {seen} rows at step {step:g}: the {len(parts)} terms add up to "
    text += f"{added:.6g}, the objective is {value:.6g} ({excess:.3g} times what is allowed)."
    return verdict(excess <= 1, text, step=step, sum=added, objective=value)


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


def _whole_lr(log: Log) -> Series:
    lr = log.finite("optim/lr", 3)
    if not lr.values.max():
        raise Skip("the learning rate is always 0 (log.updates).")
    if log.steps is not None and lr.steps[-1] < log.steps:
        raise Skip(f"the log ends at step {lr.steps[-1]:g} of {log.steps}.")
    return lr


def _accumulation(lr: Series, ratio: float) -> tuple[int, str] | None:
    """The number of micro-batches in an update that explains the last rate, and the schedule.

    A schedule sized in micro-batches is executed up to 1/a of its length, of which the first part
    was warm-up.
    """
    ends = lr.steps[-1]
    warm = lr.steps[int(np.argmax(lr.values))]
    for count in (2, 3, 4, 6, 8, 12, 16, 24, 32, 64):
        done = (ends - warm) / (count * ends - warm)
        for name, left in (
            ("cosine", 0.5 * (1 + math.cos(math.pi * done))),
            ("linear", 1 - done),
        ):
            if abs(left - ratio) < 0.01:
                return count, name
    return None


def _jump(values: np.ndarray, split: int, size: int) -> float:
    """The step at `split` in a fit of a slope and a step to `size` rows on either side."""
    place = np.arange(-size, size) + 0.5
    design = np.stack([np.ones_like(place), place, (place > 0).astype(float)], axis=1)
    rows = values[split - size : split + size]
    return float(np.linalg.lstsq(design, rows, rcond=None)[0][2])


CHECKS = (
    updates,
    lr_zero,
    warmup,
    lr_end,
    clipping,
    throughput,
    budget,
    components,
    spikes,
    resume,
    epoch_order,
)
