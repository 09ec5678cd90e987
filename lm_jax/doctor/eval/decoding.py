"""Is the model that generates the model that is scored?"""

from typing import Any

import numpy as np

from lm_jax.doctor import numbers
from lm_jax.doctor.checks import check, fixture
from lm_jax.doctor.eval.subject import Subject, apart, are_ids, fit
from lm_jax.doctor.facts import Broken, Skip, array, call, pair
from lm_jax.doctor.findings import Measure, at_most

ROUNDING = 0.25  # of the spread of the logits, the most that any dtype may explain


@fixture
def spread(logits_BTV: np.ndarray) -> float:
    """Root mean square of the logits about their mean at each position; -inf is left out."""
    finite = np.where(np.isfinite(logits_BTV), logits_BTV, np.nan)
    spread = float(np.nanstd(finite - np.nanmean(finite, -1, keepdims=True)))
    if not spread:
        raise Skip("All logits of logits_fn are equal: give a model that is not at zero.")
    return spread


def _near(what: str, gap_T: Any, limit: float) -> Measure:
    """Gaps within a limit at every position."""
    where = f"first at position {np.argmax(np.asarray(gap_T) > limit)} of {len(gap_T)}"
    return at_most(what, float(np.max(gap_T)), limit, where=where)


@check("Give a decoded token its position in the whole text; let it attend to all filled slots.")
def cached_decode(
    subject: Subject, extend_fn: Any, tokens_BT: np.ndarray, logits_BTV: np.ndarray, spread: float
) -> list[Measure]:
    """Token by token through the cache, the logits are those of the full forward pass."""
    T, found = subject.seq_len, []
    for prompt in (1, T // 3 | 1):
        cache, gap_T = None, list[float]()
        for size in [prompt] + [1] * (T - prompt):
            span = slice(len(gap_T), len(gap_T) + size)
            made = call("extend_fn", extend_fn, tokens_BT[:, span].copy(), cache)
            logits, cache = pair("extend_fn", made, "(logits, cache)")
            logits = fit("extend_fn", logits, (2, size, subject.vocab_size))
            gap_BTV = apart(logits, logits_BTV[:, span])
            gap_T.extend(np.sqrt(np.square(gap_BTV).mean((0, 2))) / spread)
        # Two ways to compute one layer differ by a few eps, and deep models multiply that.
        limit = min(1000 * subject.eps, ROUNDING)
        what = f"logits with a cache less those without, over their spread, prompt of {prompt}"
        found.append(_near(what, gap_T, limit))
    return found


@check("Compare positions, cache, dropout and batch size of generation with those of scoring.")
def generation(subject: Subject, forward: Any, continuation: tuple) -> Measure:
    """A free continuation scored by the evaluation path has its log-probabilities."""
    context, ids = (array("continuation", x).ravel() for x in continuation[:2])
    if not all(are_ids(x, subject.vocab_size) for x in (context, ids)):
        some = "one id of context or more, and one continued id or more"
        raise Broken(f"continuation needs {some}, all in [0, {subject.vocab_size})")
    whole_T = np.concatenate([context, ids]).astype(np.int32)
    logits_TV = forward(whole_T[None, :-1])[0, len(context) - 1 :]
    if continuation[2] is None:
        what = "nats by which a greedy token is less likely than the likeliest one"
        gap_T = logits_TV.max(-1) - np.take_along_axis(logits_TV, ids[:, None], 1)[:, 0]
    else:
        what = "nats by which a generated token differs from the same token scored"
        given_T = fit("continuation", array("continuation", continuation[2]).ravel(), ids.shape)
        gap_T = apart(given_T, -numbers.nats(logits_TV, ids))
    return _near(what, gap_T, min(4000 * subject.eps, ROUNDING) * spread(logits_TV))
