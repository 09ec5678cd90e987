"""Checks of a loss function: the numbers it returns and their gradients."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from lm_jax.doctor.loss import target as loss_tokens
from lm_jax.doctor.loss.subject import (
    EPS,
    EXTREME,
    MARGIN,
    NUMBERS,
    Batch,
    Loss,
    definition,
    gap,
    judge,
    oracle,
)
from lm_jax.doctor.old import (
    Finding,
    Report,
    Skip,
    Verdict,
    call,
    check,
    run_all,
    verdict,
    whole,
)


@check(
    "loss.contract",
    remedy="Let it take logits [B, T, V], tokens [B, T] and weights [B, T] and return two finite "
    "scalars: the sum of nats and the sum of the weights scored.",
)
def contract(loss: Loss) -> Verdict:
    """An ordinary batch gives two finite scalars."""
    try:
        total, count = loss(loss.batch())
    except Skip as reason:
        return verdict(False, f"{reason}.")
    ok = math.isfinite(total) and math.isfinite(count) and total >= 0 and count > 0
    how = "differentiable by JAX" if loss.traceable else f"not traceable ({loss.untraceable})"
    return verdict(
        ok, f"A random batch gives sum {total:.6g}, count {count:.6g}; the loss is {how}."
    )


@check("loss.uniform", remedy="Divide the sum by the weights that went into it, nothing else.")
def uniform(loss: Loss) -> Verdict:
    """Equal logits cost ln V a token, whatever the padding."""
    batch = loss.batch()
    batch.logits[:] = 0
    index = np.arange(loss.length)
    lengths = np.linspace(2, loss.length, loss.rows).astype(int)[:, None]
    patterns = {
        "no padding": np.ones_like(batch.weights),
        "padding on the right": index < lengths,
        "padding on the left": index >= loss.length - lengths,
        "holes": batch.weights,
        "one token": (np.arange(loss.rows)[:, None] == 0) & (index == 1),
    }
    results, means = {}, {}
    for name, weights in patterns.items():
        total, count = loss(batch._replace(weights=weights.astype(np.float32)))
        means[name] = float(total / count) if count else math.nan
        bound = EPS * math.log(loss.vocab_size) * (weights.sum() / 2 + 8)
        results[name] = (gap(means[name], math.log(loss.vocab_size)), float(bound))
    return judge(
        results,
        f"All logits 0 must cost ln {loss.vocab_size} = {math.log(loss.vocab_size):.6f} nats a "
        f"token; measured {', '.join(f'{mean:.6f} ({name})' for name, mean in means.items())}",
        means=means,
    )


@check(
    "loss.definition",
    remedy="Sum weight x (logsumexp(logits) - logit of the target) in float32, and let its "
    "gradient be weight x (softmax - one-hot).",
)
def by_definition(loss: Loss) -> Verdict:
    """Value and gradient against their definition in float64."""
    batch = loss.batch(draw=1)
    batch.weights[:, -1] = 0.25
    nats, weights = definition(batch, loss.ahead)
    total, _ = loss(batch)
    b, t, v = loss.places(batch)
    keep = t < loss.length - loss.ahead
    b, t, v = b[keep], t[keep], v[keep]
    slopes, rounding = loss.slopes(batch, (b, t, v))
    target = batch.tokens[b, t + loss.ahead]
    log_p = batch.logits[b, t, v] - batch.logits[b, t, target] - nats[b, t]
    exact = weights[b, t] * (np.exp(log_p) - (v == target))
    row = loss.batch(1, draw=2, length=loss.full_length)
    row.weights[:, :] = 1
    row_nats, row_weights = definition(row, loss.ahead)
    expected = np.array([(row_nats * row_weights).sum(), row_weights.sum()])
    return judge(
        {
            "sum": (gap(total, (nats * weights).sum()), loss.rounding(batch)),
            "gradient": (gap(slopes, exact), rounding),
            f"sum or count of {loss.full_length} tokens": (
                gap(loss(row), expected),
                loss.rounding(row),
            ),
        },
        f"Against the definition in float64 (sum {(nats * weights).sum():.6g}, {len(b)} slopes)",
        total=float(total),
    )


@check(
    "loss.floor",
    remedy="Report the plain cross-entropy; keep smoothing and auxiliary terms in a second value.",
)
def floor(loss: Loss) -> Verdict:
    """Perfect predictions cost nothing: no smoothing, no auxiliary term in the reported number."""
    batch = loss.batch()
    results, means = {}, {}
    for margin in (20.0, MARGIN):
        total, count = loss(oracle(loss, batch, loss.ahead, margin))
        means[margin] = float(total / count) if count else math.nan
        bound = loss.vocab_size * math.exp(-margin) + 8 * EPS * (margin + math.log(loss.vocab_size))
        results[f"margin {margin:.0f}"] = (gap(means[margin]), bound)
    return judge(
        results,
        "Nats per token left when the target is preferred by 20 and 50 nats "
        f"({means[20.0]:.3g} and {means[MARGIN]:.3g})",
    )


@check(
    "loss.fractional_weights",
    remedy="Multiply each token's nats by its weight; do not test the weight only for being zero.",
)
def fractional_weights(loss: Loss) -> Verdict:
    """Sum and count are linear in the weights."""
    batch = loss.batch()
    part = np.random.default_rng(loss.seed).choice([0.25, 0.5, 0.75], batch.weights.shape)
    shares = [batch.weights * share.astype(np.float32) for share in (part, 1 - part)]
    whole = loss(batch)
    parts = [loss(batch._replace(weights=weights)) for weights in shares]
    half = loss(batch._replace(weights=batch.weights / 2))
    threshold = 2 * loss.rounding(batch)
    return judge(
        {
            "shares of the weights added": (gap(sum(parts), whole), threshold),
            "half the weights": (gap(2 * half, whole), threshold),
        },
        "Sum and count as linear functions of the weights",
    )


@check(
    "loss.repetition",
    remedy="Return a plain sum and the matching count, and divide one by the other only where the "
    "update is made.",
)
def repetition(loss: Loss) -> Verdict:
    """The batch twice: twice the sum and count, the same mean and gradient of the mean."""
    batch = loss.batch()
    twice = Batch(*(np.concatenate([a, a]) for a in batch))
    (total, count), (total2, count2) = loss(batch), loss(twice)
    b, t, v = loss.places(batch)
    slopes, rounding = loss.slopes(batch, (b, t, v))
    first, second = (loss.slopes(twice, (b + shift, t, v))[0] for shift in (0, loss.rows))
    scale = max(count, 1)
    results = {
        "sum": (gap(total2, 2 * total), 3 * loss.rounding(twice)),
        "count": (gap(count2, 2 * count), EPS * batch.weights.size * scale),
    }
    if count and count2:
        change = gap((first + second) / count2, slopes / count)
        results["gradient of the mean"] = (change, 3 * rounding / scale)
    means = [total / count, total2 / count2] if count and count2 else [math.nan] * 2
    return judge(
        results, f"Batch repeated: mean {means[0]:.6g} and {means[1]:.6g}; departure", means=means
    )


@check(
    "loss.split",
    remedy="Return sums, never means: sums of parts add up to the whole, means of unequal parts "
    "do not.",
)
def split(loss: Loss) -> Verdict:
    """Sums and counts over parts of any size add up to those of the whole."""
    batch = loss.batch(rows=max(8, 2 * loss.rows))
    whole = loss(batch)
    results = {}
    for size in (1, 7):
        starts = range(0, len(batch.tokens), size)
        parts = [loss(Batch(*(a[i : i + size] for a in batch))) for i in starts]
        results[f"batches of {size}"] = (
            gap(np.sum(parts, axis=0), whole),
            3 * loss.rounding(batch),
        )
    return judge(results, f"{len(batch.tokens)} rows at once and in smaller batches, sum and count")


def _draws(loss: Loss, kind: Any, rows: int, length: int, draws: int) -> dict[str, Any]:
    """Means of sum and count with logits of that type against the float64 definition."""
    results = {}
    for draw in range(draws):
        batch = loss.batch(rows, draw=draw, length=length)
        share = np.random.default_rng((loss.seed, draw)).random(batch.weights.shape)
        batch = batch._replace(weights=(batch.weights * share).astype(np.float32))
        nats, weights = definition(batch, loss.ahead)
        total, count = loss.raw(batch._replace(logits=batch.logits.astype(kind)))
        for name, value in {"sum": total, "count": count}.items():
            if str(getattr(value, "dtype", "")).endswith("float16"):
                results[f"{name} is {value.dtype}"] = (math.inf, 0.0)
        scale = float(weights.sum())
        error = gap(call("the sum", float, total), (nats * weights).sum())
        results[f"sum, draw {draw}"] = (error / scale, loss.rounding(batch) / scale)
        error = gap(call("the count", float, count), scale)
        results[f"count, draw {draw}"] = (error / scale, EPS * (weights.size / 2 + 8))
    return results


@check(
    "loss.dtype",
    remedy="Cast logits to float32 before the log-softmax and keep sums in float32.",
)
def dtype(loss: Loss) -> Verdict:
    """With bfloat16 logits the arithmetic is that of float32."""
    results = _draws(loss, jnp.bfloat16, loss.rows, loss.length, 4)
    return judge(results, "bfloat16 logits against float64, per token; float32 stays within")


@check("loss.accumulation", remedy="Add up nats and weights in float32 or wider.")
def accumulation(loss: Loss) -> Verdict:
    """Sums over many tokens keep float32 accuracy."""
    rows = max(loss.rows, min(64, NUMBERS // (16 * loss.vocab_size)))
    results = _draws(loss, np.float32, rows, max(16, loss.length), 4)
    text = f"{rows} x {max(16, loss.length)} tokens with fractional weights against float64"
    return judge(results, f"{text}, per token; float32 stays within")


@check(
    "loss.extreme_logits",
    remedy="Use logsumexp, not log(softmax); where where() hides log(0), make its argument safe "
    "with a second where().",
)
def extreme_logits(loss: Loss) -> Verdict:
    """Logits of +-8192: exact value, finite gradient, also where a weight of 0 hides a position."""
    batch = loss.batch()
    weights = batch.weights.copy()
    weights[0, loss.ahead + 1] = 0
    # Scored positions put the target on top; those of weight 0 put another token there.
    right = np.where(weights > 0, batch.tokens, (batch.tokens + 1) % loss.vocab_size)
    wrong = (batch.tokens + 1) % loss.vocab_size
    results = {}
    for name, tops in {"target on top": right, "another token on top": wrong}.items():
        known = oracle(loss, batch._replace(tokens=tops), loss.ahead, 2 * EXTREME)
        case = Batch(known.logits - np.float32(EXTREME), batch.tokens, weights)
        total, _ = loss(case)
        expected = (weights[:, loss.ahead :] * (tops != batch.tokens)[:, loss.ahead :]).sum()
        rounding = EPS * 8 * EXTREME * float(weights.sum())
        results[f"sum, {name}"] = (gap(total, 2 * EXTREME * expected), rounding)
        if loss.traceable:
            slopes, rounding = loss.slopes(case, loss.places(case))
            # Between 0 and 1 in size by definition; only NaN and inf matter here.
            results[f"gradient, {name}"] = (gap(slopes), 1 + rounding)
    how = "and size of the gradient (at most 1)" if loss.traceable else "(value alone)"
    return judge(results, f"Logits of +-{EXTREME:.0f}: error of the sum {how}")


CHECKS: tuple[Callable[..., Finding], ...] = (
    contract,
    *loss_tokens.CHECKS,
    uniform,
    by_definition,
    floor,
    fractional_weights,
    repetition,
    split,
    dtype,
    accumulation,
    extreme_logits,
)


def examine_loss(
    loss_fn: Callable,
    *,
    vocab_size: int,
    seq_len: int,
    batch_size: int = 4,
    seed: int = 0,
    objective: str = "causal",
) -> Report:
    """Examine a loss function of any framework.

    Args:
        loss_fn: (logits [B, T, V], tokens int32 [B, T], weights float32 [B, T]) -> (sum of nats,
            sum of weights). It shifts: logits[:, t] are scored on tokens[:, t + 1] with
            weights[:, t + 1]. It gets JAX arrays if JAX can differentiate it, else NumPy arrays;
            gradients then come from central differences.
        vocab_size: V, at least 2.
        seq_len: T of the longest call, at least 4, of one row and of about 2^21 logits at most.
            Ordinary calls are shorter, 64 at most; other lengths and batch sizes are tried as well.
        batch_size: B of ordinary calls, at least 2.
        seed: of the random logits, tokens and weights.
        objective: causal; or bidirectional, where logits[:, t] are scored on tokens[:, t].

    Raises:
        ValueError: an argument other than `loss_fn` makes no sense.
    """
    if not callable(loss_fn):
        raise ValueError("loss_fn must be a function of (logits, tokens, weights).")
    least = {"vocab_size": (vocab_size, 2), "seq_len": (seq_len, 4), "batch_size": (batch_size, 2)}
    least["seed"] = (seed, 0)
    for name, (value, low) in least.items():
        whole(value, name, low)
    if objective not in ("causal", "bidirectional"):
        raise ValueError(f"objective={objective!r} is unknown: use 'causal' or 'bidirectional'.")
    ahead = 1 if objective == "causal" else 0
    return run_all(CHECKS, Loss(loss_fn, vocab_size, seq_len, batch_size, seed, ahead))
