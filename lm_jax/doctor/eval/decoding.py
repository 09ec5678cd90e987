"""Is the model that generates the model that is scored?"""

from typing import Any

import numpy as np

from lm_jax.doctor import numbers, trees
from lm_jax.doctor.checks import check
from lm_jax.doctor.eval.subject import Subject, apart, fit
from lm_jax.doctor.facts import Broken, Skip, call
from lm_jax.doctor.findings import Measure, at_most

ROUNDING = 0.25  # of the spread of the logits, the most that any dtype may explain


def _spread(logits: np.ndarray) -> float:
    """Root mean square of the logits about their mean at each position; -inf is left out."""
    finite = np.where(np.isfinite(logits), logits, np.nan)
    spread = float(np.nanstd(finite - np.nanmean(finite, -1, keepdims=True)))
    if not spread:
        raise Skip("All logits of logits_fn are equal: give a model that is not at zero.")
    return spread


def _near(what: str, gap_T: Any, limit: float) -> Measure:
    """Gaps within a limit at every position."""
    gap_T = np.asarray(gap_T)
    first = int(np.argmax(gap_T > limit))
    what = f"{what}, largest at {len(gap_T)} positions"
    return at_most(what, float(gap_T.max()), limit, where=f"first at position {first}")


@check(
    "Give a token that is decoded the position it has in the whole text, and let it attend to all "
    "slots filled before and to no other."
)
def cached_decode(
    subject: Subject, extend_fn: Any, tokens_BT: np.ndarray, logits_BTV: np.ndarray
) -> list[Measure]:
    """Token by token through the cache, the logits are those of the full forward pass."""
    T, spread = subject.seq_len, _spread(logits_BTV)
    prompt, found = T // 3 | 1, []
    for way, sizes in (
        ("single tokens", [1] * T),
        (f"a prompt of {prompt}", [prompt] + [1] * (T - prompt)),
    ):
        cache, gap_T = None, list[float]()
        for size in sizes:
            span = slice(len(gap_T), len(gap_T) + size)
            made = call("extend_fn", extend_fn, tokens_BT[:, span].copy(), cache)
            if not isinstance(made, tuple | list) or len(made) != 2:
                raise Broken("extend_fn does not return (logits, cache)")
            logits, cache = fit("extend_fn", made[0], (2, size, subject.vocab_size)), made[1]
            gap_BTV = apart(logits, logits_BTV[:, span])
            gap_T.extend(np.sqrt(np.square(gap_BTV).mean((0, 2))) / spread)
        # Two ways to compute one layer differ by a few eps, and deep models multiply that.
        limit = min(1000 * subject.eps, ROUNDING)
        what = f"share of their spread by which logits after {way} differ from the full forward's"
        found.append(_near(what, gap_T, limit))
    return found


@check(
    "Compare positions, cache, dropout and batch size of the two paths: the model that generates "
    "is not the one that is scored."
)
def generation(subject: Subject, forward: Any, continuation: tuple) -> Measure:
    """A free continuation scored by the evaluation path has its log-probabilities."""
    context, ids = (trees.as_array(x).astype(np.int32).ravel() for x in continuation[:2])
    if not (len(context) and len(ids)):
        raise Broken("continuation needs one id of context or more, and one continued id or more")
    whole_T = np.concatenate([context, ids])
    if not 0 <= whole_T.min() <= whole_T.max() < subject.vocab_size:
        raise Broken(f"continuation has ids outside [0, {subject.vocab_size})")
    logits_TV = forward(whole_T[None, :-1])[0, len(context) - 1 :]
    if continuation[2] is None:
        what = "nats by which a greedy token is less likely than the likeliest one"
        gap_T = logits_TV.max(-1) - np.take_along_axis(logits_TV, ids[:, None], 1)[:, 0]
    else:
        what = "nats by which a generated token differs from the same token scored"
        given_T = fit("continuation", continuation[2], ids.shape)
        gap_T = apart(given_T, -numbers.nats(logits_TV, ids))
    return _near(what, gap_T, min(4000 * subject.eps, ROUNDING) * _spread(logits_TV))
