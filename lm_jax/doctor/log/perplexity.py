"""Logged perplexities: of which loss, of which tokens, cut off or not."""

import math

import numpy as np

from lm_jax.doctor.log.subject import Log, Series, half_unit, pairs
from lm_jax.doctor.old import Skip, Status, Verdict, check, verdict

# Where trainers cut perplexities off: exp of these, and powers of ten.
_CAPPED_LOSSES = (5, 7, 10, 12, 15, 20, 30, 50, 80, 88, 100)
_CAPS = {math.exp(x): f"e^{x}" for x in _CAPPED_LOSSES} | {10.0**x: f"1e{x}" for x in range(3, 13)}
_UNKNOWN = "not stated"
_OVERFLOW = math.floor(math.log(np.finfo(np.float32).max))  # nats, of a float32 perplexity


@check(
    "eval.objective",
    "Exponentiate unsmoothed next-token nats (lm_ce) only, and log the objective under a name of "
    "its own: a perplexity must not move with the weights of other terms.",
)
def objective(log: Log) -> Verdict:
    """The perplexity is that of the next-token loss, not of a sum of losses."""
    parts = [n for n in log.names if n.startswith("distill/") and n != "distill/lm_ce"]
    wrong, seen = [], 0
    for split in log.splits("token_ppl"):
        ppl = log.finite(f"{split}/token_ppl")
        if log.has(f"{split}/lm_ce"):
            for step, value, nats in pairs(ppl, log.finite(f"{split}/lm_ce")):
                if value <= 0:
                    continue  # eval.ppl_of_loss says so
                seen += 1
                if abs(math.log(value) - nats) > _tolerance(value, nats):
                    wrong.append(f"ln {value:.6g} = {math.log(value):.4g} at step {step:g}, but "
                                 f"{split}/lm_ce = {nats:.4g}")  # fmt: skip
        elif parts and log.vocab_size and not log.overfit and log.has(f"{split}/loss"):
            last = float(log.finite(f"{split}/loss").values[-1])
            seen += 1
            if last > math.log(log.vocab_size) + 0.5:
                wrong.append(
                    f"the {split} loss of {last:.4g} behind it is above ln V = "
                    f"{math.log(log.vocab_size):.4g} while {len(parts)} other terms are trained"
                )
    if not seen:
        raise Skip("no perplexity beside lm_ce or the terms of a distillation.")
    text = f"{len(wrong)} perplexities are not of lm_ce: {wrong[0]}." if wrong else ""
    return verdict(not wrong, text or "Perplexities are exp(lm_ce).", count=len(wrong))


@check(
    "eval.capped",
    "Remove the cap: it hides divergence and makes unequal runs look equal. Report nats and, "
    "above what a float holds, inf.",
)
def capped(log: Log) -> Verdict:
    """No perplexity or loss sits on a constant at which trainers cut them off."""
    found = []
    names = [n for n in log.names if n.endswith(("/token_ppl", "/loss"))]
    for name in [n for n in names if n.endswith("/token_ppl")]:
        ppl = log.series(name)
        losses = log.series(loss) if log.has(loss := name.replace("token_ppl", "loss")) else None
        for step, value in zip(ppl.steps, ppl.values, strict=True):
            nats = None if losses is None else _at(losses, step)
            if math.isinf(value) and nats is not None and nats < _OVERFLOW:
                found.append(f"{name} is inf at step {step:g} where the loss is {nats:.4g}")
            if not math.isfinite(value) or value <= 0:
                continue
            width = half_unit(value)
            label = next((c for x, c in _CAPS.items() if abs(value - x) <= 2 * width), None)
            off = nats is not None and abs(math.log(value) - nats) > _tolerance(value, nats)
            if label and (width / value < 1e-7 or off):
                found.append(f"{name} = {value:.10g} = {label} at step {step:g}")
        if losses is not None and (top := _plateau(ppl, losses)):
            found.append(f"{name} is {top:.10g} at several steps of different loss")
    for name in [n for n in names if n.endswith("/loss")]:
        x = log.series(name).values
        top = np.nanmax(x) if np.isfinite(x).any() else math.nan
        if top in (10.0, 20.0, 50.0, 100.0) and np.count_nonzero(x == top) > 1:
            found.append(f"{name} is exactly {top:g} in {np.count_nonzero(x == top)} rows")
    if not found and not any(np.isfinite(log.series(n).values).any() for n in names):
        raise Skip("the log has no finite perplexity and no finite loss.")
    text = f"{'; '.join(found[:3])}." if found else "No value is a known cap."
    return verdict(not found, text, count=len(found))


@check(
    "eval.ppl_of_loss",
    "Perplexity must be exp(sum of nats / number of scored tokens). Above it: exponentials were "
    "averaged. Below it: a cap, or another loss.",
)
def ppl_of_loss(log: Log) -> Verdict:
    """Each perplexity is exp of the loss of the same row, to the digits that are printed."""
    for name in (n for n in log.names if n.endswith("/token_ppl")):
        low = float(np.nanmin(log.series(name).values, initial=math.inf))
        if low < 1:
            return verdict(False, f"{name} is {low:.6g}; no perplexity is below 1.", lowest=low)
    wrong, seen = [], 0
    for split in ["train", *log.splits("token_ppl")]:
        if not (log.has(f"{split}/token_ppl") and log.has(f"{split}/loss")):
            continue
        if log.has(f"{split}/lm_ce"):
            continue  # eval.objective compares with that
        rows = pairs(log.series(f"{split}/token_ppl"), log.series(f"{split}/loss"))
        for step, value, nats in rows:
            if not (math.isfinite(nats) and 0 < value < math.inf):
                continue
            seen += 1
            excess = math.log(value) - nats
            if abs(excess) > _tolerance(value, nats):
                wrong.append((split, step, value, nats, excess))
    if not seen:
        raise Skip("no row has both a loss and a token perplexity.")
    if not wrong:
        return verdict(True, f"exp(loss) in all {seen} rows.", rows=seen)
    split, step, value, nats, excess = max(wrong, key=lambda row: abs(row[4]))
    text = (
        f"{len(wrong)} of {seen} rows; at step {step:g} the {split} perplexity is {value:.8g}, "
        f"whose logarithm is {excess:+.4g} from the loss {nats:.6g} "
        f"({_tolerance(value, nats):.2g} allowed for the printed digits)."
    )
    return verdict(False, text, step=float(step), excess=excess, count=len(wrong))


@check(
    "eval.compared",
    "Compare bits per byte of the same text instead; a ratio of perplexities over other tokens "
    "or other text means nothing.",
)
def compared(log: Log) -> Verdict:
    """Perplexities held against each other are of the same tokens of the same text."""
    if not log.comparisons:
        raise Skip("no comparisons are given.")
    wrong, unknown = [], []
    for other in log.comparisons:
        for key in ("tokenizer", "corpus", "unit"):
            mine, theirs = (x.get(key, _UNKNOWN) for x in (log.measured_on, other))
            text = f"{other['name']}: {key} {theirs}, here {mine}"
            if _UNKNOWN in (mine, theirs):
                unknown.append(text)
            elif mine != theirs:
                wrong.append(text)
    text = "; ".join(wrong or unknown) or "Same tokenizer, corpus and unit"
    status: Status = "fail" if wrong else "warn"
    return verdict(not wrong and not unknown, f"{text}.", otherwise=status, wrong=wrong)


def _at(series: Series, step: float) -> float | None:
    place = np.flatnonzero(series.steps == step)
    return float(series.values[place[0]]) if len(place) else None


def _tolerance(ppl: float, nats: float) -> float:
    """By how much ln(ppl) may differ from nats for the digits printed and float32 arithmetic."""
    return half_unit(ppl) / ppl + half_unit(nats) + 2e-6 * max(1.0, abs(nats))


def _plateau(ppl: Series, losses: Series) -> float | None:
    """The largest perplexity if it stands beside losses that differ, else None."""
    found = [(x, nats) for _, x, nats in pairs(ppl, losses) if math.isfinite(x)]
    top = max((x for x, _ in found), default=0.0)
    beside = [nats for x, nats in found if x == top]
    if top <= 0 or len(beside) < 2:
        return None
    spread = max(beside) - min(beside)
    return top if spread > 2 * _tolerance(top, max(beside)) else None


CHECKS = (objective, capped, ppl_of_loss, compared)
