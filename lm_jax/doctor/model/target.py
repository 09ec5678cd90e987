"""Which token do the logits of a position predict?"""

from typing import Any

import numpy as np

from lm_jax.doctor.model.subject import Model
from lm_jax.doctor.old import Skip, Verdict, check, verdict

OFFSETS = (-2, -1, 0, 1, 2, 3)


def row_nats(logits: np.ndarray, tokens: np.ndarray, offset: int) -> np.ndarray:
    """Mean nats of token[t + offset] under logits[t], one number a row [B]."""
    T = tokens.shape[1]
    first, last = max(0, -offset), T - max(0, offset)
    z = logits[:, first:last]
    targets = tokens[:, first + offset : last + offset, None]
    top = z.max(-1)
    normaliser = top + np.log(np.exp(z - top[..., None]).sum(-1))
    return (normaliser - np.take_along_axis(z, targets, -1)[..., 0]).mean(-1)


def scan(model: Model, tokens: np.ndarray) -> dict[int, np.ndarray]:
    """Mean nats of every row at every offset, with the given parameters."""
    rows: dict[int, list[np.ndarray]] = {offset: [] for offset in OFFSETS}
    for start in range(0, len(tokens), model.batch_size):
        part = tokens[start : start + model.batch_size]
        logits = model.given.logits(part)
        for offset in OFFSETS:
            rows[offset].append(row_nats(logits, part, offset))
    return {offset: np.concatenate(parts) for offset, parts in rows.items()}


@check(
    "target.offset_scan",
    remedy="Logits of position t must be trained on token t + 1. A minimum at 0 is a missing "
    "shift, at 2 one shift too many (in the model and in the collator, say).",
)
def offset_scan(model: Model) -> Verdict:
    """On text of the kind it was trained on, a model must predict token t + 1 best."""
    model.causal_only()
    if not model.trained or model.sample is None:
        raise Skip("a scan needs a trained model and text of its kind (trained=True and sample)")
    sample = np.asarray(model.sample)
    fits = sample.ndim == 2 and sample.dtype.kind in "iu" and sample.shape[1] > max(OFFSETS)
    if not fits or len(sample) < 2 or sample.min() < 0 or sample.max() >= model.vocab_size:
        raise Skip(
            f"sample is {sample.dtype} {list(sample.shape)}; two or more rows of ids [N, T] in "
            f"[0, {model.vocab_size}) are needed"
        )
    nats = scan(model, sample.astype(np.int32))
    means = {offset: float(rows.mean()) for offset, rows in nats.items()}
    best = min(means, key=lambda offset: means[offset])
    # Rows are independent, so the error of a difference comes from its spread over rows.
    rival = best if best != 1 else min((k for k in OFFSETS if k != 1), key=lambda k: means[k])
    gap = nats[rival] - nats[1]
    margin, error = float(gap.mean()), float(gap.std(ddof=1) / len(gap) ** 0.5)
    table = ", ".join(f"{offset:+d}: {value:.3f}" for offset, value in means.items())
    evidence = (
        f"Nats of token[t + k] under logits[t] over {len(sample)} rows, by k: {table}. The minimum "
        f"is at k = {best:+d}; k = {rival:+d} against +1: {margin:+.3f} ± {error:.3f}."
    )
    values: dict[str, Any] = {
        "nats": {str(k): v for k, v in means.items()},
        "best": best,
        "margin": margin,
    }
    if abs(margin) < 3 * error:
        return verdict(False, evidence + " That is within 3 SE.", otherwise="warn", **values)
    return verdict(best == 1, evidence, **values)


@check(
    "target.future_known",
    remedy="The model predicts tokens drawn at random better than chance, so it sees them. The "
    "causality checks say from where.",
)
def future_known(model: Model) -> Verdict:
    """No predictor is better than ln V on fresh uniform tokens: the Gibbs inequality."""
    model.causal_only()
    rng = model.rng(20)
    size = (max(16, 4 * model.batch_size), model.seq_len)
    # All ids, 0 included: the bound is that of the distribution drawn from.
    tokens = rng.integers(0, model.vocab_size, size, dtype=np.int32)
    nats = scan(model, tokens)
    chance = float(np.log(model.vocab_size))
    lines, ok = [], True
    values: dict[str, Any] = {}
    for offset in (1, 2, 3):
        rows = nats[offset]
        error = float(rows.std(ddof=1) / len(rows) ** 0.5)
        excess = float(rows.mean()) - chance
        # 4 SE and not 3: three offsets, and the error is itself estimated from a few rows.
        ok &= excess > -4 * error - 1e-5
        lines.append(f"{excess:+.4f} ± {error:.4f} at t{offset:+d}")
        values[f"t{offset:+d}"] = {"excess": excess, "error": error}
    evidence = (
        f"Nats above ln V = {chance:.4f} on {size[0]} rows of uniform tokens: {', '.join(lines)}; "
        "less than -4 SE would be a leak that these parameters use."
    )
    return verdict(ok, evidence, **values)


CHECKS = (offset_scan, future_known)
