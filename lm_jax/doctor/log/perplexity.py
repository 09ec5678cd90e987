"""Logged perplexities: of which loss, of which tokens, cut off or not."""

import math

import numpy as np

from lm_jax.doctor.checks import check
from lm_jax.doctor.facts import Skip
from lm_jax.doctor.findings import Measure, at_least, none, note
from lm_jax.doctor.log.series import pairs
from lm_jax.doctor.log.subject import Subject
from lm_jax.doctor.numbers import half_unit

# Where trainers cut perplexities off.
_CAPS = {f"e^{x}": math.exp(x) for x in (5, 7, 10, 12, 15, 20, 30, 50, 80, 88, 100)}
_OVERFLOW = math.floor(math.log(np.finfo(np.float32).max))  # nats, of a float32 perplexity
_UNKNOWN = "not stated"
_MOST = 1000  # rows whose printed digits are looked at


@check(
    "Perplexity must be exp(sum of nats / number of scored tokens), of unsmoothed next-token nats "
    "(lm_ce) alone and not of a total objective. Above it: exponentials were averaged. Below it: "
    "another loss, or a cap, which hides divergence: remove it."
)
def ppl_of_loss(subject: Subject) -> list[Measure]:
    """Each perplexity is exp of the next-token loss of its row, to the digits printed."""
    found: list[Measure] = []
    wrong: list[tuple[float, str]] = []
    seen, bits = 0, False
    for split in ("train", *subject.splits("token_ppl")):
        name = f"{split}/token_ppl"
        if not subject.has(name):
            continue
        low = float(np.nanmin(subject.series(name).values, initial=math.inf))
        if low < 1:
            found.append(at_least(f"lowest {name}", low, 1, key="lowest"))
        of = "lm_ce" if subject.has(f"{split}/lm_ce") else "loss"
        if subject.has(f"{split}/{of}"):
            is_bits = subject.in_bits(f"{split}/{of}")
            rows = pairs(subject.series(name), subject.rows.series(f"{split}/{of}"))
            good, here = _wrong(*rows, math.log(2) if is_bits else 1.0, of)
            wrong += [(excess, f"{split} at {text}") for excess, text in here]
            seen, bits = seen + good, bits or is_bits
    if not seen and not found:
        raise Skip("No row has both a loss and a token perplexity.")
    wrong.sort(key=lambda row: -abs(row[0]))
    texts = [text for _, text in wrong]
    found.append(none("rows where perplexity is not exp(loss)", texts, of=seen, key="wrong"))
    if wrong:
        found.append(note("largest difference, nats", wrong[0][0], key="excess"))
    if bits:
        found.append(note("losses are in bits (perplexity = 2^loss) and judged in nats"))
    return found


def _wrong(
    steps: np.ndarray, ppl: np.ndarray, loss: np.ndarray, unit: float, of: str
) -> tuple[int, list[tuple[float, str]]]:
    """How many rows can be compared, and (ln ppl - nats, text) of those that do not fit."""
    use = np.isfinite(loss) & (ppl > 0) & (np.isfinite(ppl) | (loss * unit < _OVERFLOW))
    excess = np.log(ppl[use]) - loss[use] * unit
    order = np.argsort(-np.abs(excess))[:_MOST]
    found = []
    columns = (x[order].tolist() for x in (steps[use], ppl[use], loss[use], excess))
    for step, p, x, off in zip(*columns, strict=True):
        digits = (0.0 if math.isinf(p) else half_unit(p) / p) + unit * half_unit(x)
        if abs(off) > digits + 2e-6 * unit * max(1.0, abs(x)):  # float32 arithmetic
            cap = next((f" = {cap}" for cap, at in _CAPS.items() if math.isclose(p, at)), "")
            ln = f"ln {p:.10g}{cap} is {math.log(p):.6g}"
            found.append((off, f"step {step:.10g}: {ln} and the {of} {x * unit:.6g} nats"))
    return int(use.sum()), found


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
