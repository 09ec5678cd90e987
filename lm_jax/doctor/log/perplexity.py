"""Logged perplexities: of which loss, of which tokens, cut off or not."""

import math
from typing import NamedTuple

import numpy as np

from lm_jax.doctor.checks import check, fixture
from lm_jax.doctor.facts import Skip
from lm_jax.doctor.findings import Measure, at_least, none, note
from lm_jax.doctor.log.series import pairs
from lm_jax.doctor.log.subject import Subject
from lm_jax.doctor.numbers import half_unit

# Where trainers cut perplexities off: exp of these, and powers of ten.
_CAPPED_LOSSES = (5, 7, 10, 12, 15, 20, 30, 50, 80, 88, 100)
_CAPS = {math.exp(x): f"e^{x}" for x in _CAPPED_LOSSES} | {10.0**x: f"1e{x}" for x in range(3, 13)}
_OVERFLOW = math.floor(math.log(np.finfo(np.float32).max))  # nats, of a float32 perplexity
_UNKNOWN = "not stated"
_MOST = 1000  # rows whose printed digits are looked at


class Beside(NamedTuple):
    """Perplexities beside the loss of the same rows."""

    split: str
    of: str  # the name of the loss
    steps: np.ndarray
    ppl: np.ndarray
    loss: np.ndarray  # as it was logged
    unit: float  # nats

    @property
    def good(self) -> np.ndarray:
        """The rows that can be compared."""
        return np.isfinite(self.loss) & np.isfinite(self.ppl) & (self.ppl > 0)

    def wrong(self) -> list[tuple[float, str, float]]:
        """(size, text, ln ppl - nats) of the rows that do not belong together."""
        found = []
        steps, ppl, loss = (x[self.good] for x in (self.steps, self.ppl, self.loss))
        excess = np.log(ppl) - loss * self.unit
        for i in np.argsort(-np.abs(excess))[:_MOST].tolist():
            if abs(excess[i]) > tolerance(ppl[i], loss[i], self.unit):
                text = (
                    f"{self.split} at step {steps[i]:g}: ln {ppl[i]:.8g} is {excess[i]:+.4g} from "
                    f"the {self.of} of {loss[i] * self.unit:.6g}"
                )
                found.append((abs(float(excess[i])), text, float(excess[i])))
        return found


def tolerance(ppl: float, loss: float, unit: float = 1.0) -> float:
    """By how much ln(ppl) may differ from a loss for the digits printed and float32 arithmetic."""
    return half_unit(ppl) / ppl + unit * (half_unit(loss) + 2e-6 * max(1.0, abs(loss)))


@fixture
def beside(subject: Subject) -> list[Beside]:
    """Every perplexity beside the next-token loss, where that is logged apart, or the loss."""
    found = []
    for split in ("train", *subject.splits("token_ppl")):
        for of in ("lm_ce", "loss"):
            ppl, loss = f"{split}/token_ppl", f"{split}/{of}"
            if subject.has(ppl) and subject.has(loss):
                rows = pairs(subject.rows.series(ppl), subject.rows.series(loss))
                unit = math.log(2) if subject.in_bits(loss) else 1.0
                found.append(Beside(split, of, *rows, unit))
                break
    return found


@check(
    "Remove the cap: it hides divergence and makes unequal runs look equal. Report nats and, "
    "above what a float holds, inf."
)
def capped(subject: Subject, beside: list[Beside]) -> Measure:
    """No perplexity or loss sits on a constant at which trainers cut them off."""
    ppls = [n for n in subject.rows.names if n.endswith("/token_ppl")]
    losses = [n for n in subject.rows.names if n.endswith("/loss")]
    if not any(np.isfinite(subject.series(n).values).any() for n in ppls + losses):
        raise Skip("The log has no finite perplexity and no finite loss.")
    found: list[str] = []
    for name in ppls:
        loss = name.replace("token_ppl", "loss")
        ppl = subject.series(name)
        nats = np.full(len(ppl), np.nan)
        if subject.has(loss):
            steps, _, x = pairs(ppl, subject.series(loss))
            nats[np.searchsorted(ppl.steps, steps)] = x
            found += _plateau(name, ppl.values, nats)
        early = np.isinf(ppl.values) & (nats < _OVERFLOW)
        found += [
            f"{name} is inf at step {step:g} where the loss is {x:.4g}"
            for step, x in zip(ppl.steps[early], nats[early], strict=True)
        ]
        for cap, label in _CAPS.items():
            for i in np.flatnonzero(np.abs(ppl.values / cap - 1) < 0.01)[:_MOST]:
                value = float(ppl.values[i])
                width = half_unit(value)
                off = abs(math.log(value) - nats[i]) > tolerance(value, nats[i])
                if abs(value - cap) <= 2 * width and (width / value < 1e-7 or off):
                    found.append(f"{name} = {value:.10g} = {label} at step {ppl.steps[i]:g}")
    for name in losses:
        x = subject.series(name).values
        top = np.max(x[np.isfinite(x)], initial=0.0)
        if top in (10.0, 20.0, 50.0, 100.0) and np.sum(x == top) > 1:
            found.append(f"{name} is exactly {top:g} in {np.sum(x == top)} rows")
    return none("values at a known cap", found, key="found")


def _plateau(name: str, ppl: np.ndarray, nats: np.ndarray) -> list[str]:
    """Whether the largest perplexity stands beside losses that differ."""
    use = np.isfinite(ppl) & np.isfinite(nats)
    top = float(np.max(ppl[use], initial=0.0))
    beside = nats[use & (ppl == top)]
    if top <= 0 or len(beside) < 2 or np.ptp(beside) <= 2 * tolerance(top, beside.max()):
        return []
    return [f"{name} is {top:.10g} at several steps of different loss"]


@check(
    "Perplexity must be exp(sum of nats / number of scored tokens), of unsmoothed next-token nats "
    "(lm_ce) alone and not of a total objective. Above it: exponentials were averaged. Below it: a "
    "cap, or another loss."
)
def ppl_of_loss(subject: Subject, beside: list[Beside]) -> list[Measure]:
    """Each perplexity is exp of the next-token loss of its row, to the digits printed."""
    found = []
    for name in subject.rows.names:
        if name.endswith("/token_ppl"):
            low = float(np.nanmin(subject.series(name).values, initial=math.inf))
            if low < 1:
                found.append(at_least(f"lowest {name}", low, 1, key="lowest"))
    seen = sum(int(rows.good.sum()) for rows in beside)
    if not seen and not found:
        raise Skip("No row has both a loss and a token perplexity.")
    wrong = sorted((row for rows in beside for row in rows.wrong()), reverse=True)
    texts = [text for _, text, _ in wrong]
    found.append(none("rows where perplexity is not exp(loss)", texts, of=seen, key="wrong"))
    if wrong:
        found.append(note("largest difference, nats", wrong[0][2], key="excess"))
    if any(rows.unit != 1 for rows in beside):
        found.append(note("losses are in bits (perplexity = 2^loss) and judged in nats"))
    return found


@check(
    "Compare bits per byte of the same text instead; a ratio of perplexities over other tokens "
    "or other text means nothing."
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
