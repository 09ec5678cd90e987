"""Checks of decoding: the cache, free generation against scoring, and the sampler."""

from typing import Any

import numpy as np

from lm_jax.doctor.eval.subject import Given, checked
from lm_jax.doctor.old import Skip, Verdict, call, check, verdict

OPTIONS = ("temperature", "top_k", "top_p", "repetition_penalty")
_IDS = 16  # vocabulary of the sampler's checks
_DRAWS = 4096


def _limit(given: Given) -> float:
    """Largest relative error that rounding explains: 1000 times eps, at most a quarter.

    Two ways to compute one layer differ by a few eps, and deep models multiply that.
    """
    return min(1000 * given.eps, 0.25)


def _spread(logits_BTV: np.ndarray) -> float:
    """Root mean square of the logits about their mean at each position."""
    spread = float((logits_BTV - logits_BTV.mean(-1, keepdims=True)).std())
    if not spread:
        raise Skip("All logits of logits_fn are equal: give a model that is not at zero.")
    return spread


@check(
    "eval.cached_decode",
    remedy="Give a token that is decoded the position it has in the whole text, and let it attend "
    "to all slots filled before and to no other.",
)
def cached_decode(given: Given) -> Verdict:
    """Token by token through the cache, the logits are those of the full forward pass."""
    given.need("logits_fn", "extend_fn")
    tokens_BT = given.tokens_BT
    full_BTV = given.logits(tokens_BT)
    spread, limit = _spread(full_BTV), _limit(given)
    T = tokens_BT.shape[1]
    prompt = T // 3 | 1
    worst, where, ways = 0.0, None, {"single tokens": [1] * T}
    ways[f"a prompt of {prompt}"] = [prompt] + [1] * (T - prompt)
    for way, sizes in ways.items():
        cache, start = None, 0
        for size in sizes:
            part = tokens_BT[:, start : start + size]
            made = call("extend_fn", given.extend_fn, part, cache)
            if not isinstance(made, tuple) or len(made) != 2:
                raise Skip("extend_fn does not return (logits, cache).")
            logits, cache = np.asarray(made[0], np.float64), made[1]
            shape = (*part.shape, given.vocab_size)
            logits = checked("extend_fn", logits, shape)
            gap_BTV = logits - full_BTV[:, start : start + size]
            gap_T = np.sqrt(np.square(gap_BTV).mean((0, 2))) / spread
            if where is None and gap_T.max() > limit:
                where = (way, start + int(np.argmax(gap_T > limit)))
            worst, start = max(worst, float(gap_T.max())), start + size
    evidence = (
        f"Cached logits differ from the full forward's by {worst:.1e} of their spread at most "
        f"over {T} positions (limit {limit:.0e})"
    )
    evidence += f", from position {where[1]} on, after {where[0]}." if where else "."
    return verdict(where is None, evidence, largest=worst, limit=limit, first=where)


@check(
    "eval.generation",
    remedy="Compare positions, cache, dropout and batch size of the two paths: the model that "
    "generates is not the one that is scored.",
)
def generation(given: Given) -> Verdict:
    """A free continuation scored by the evaluation path has its log-probabilities."""
    given.need("logits_fn", "continuation")
    context, ids, log_probs = given.continuation
    context, ids = np.asarray(context, np.int32).ravel(), np.asarray(ids, np.int32).ravel()
    if not (len(context) and len(ids)):
        raise Skip("continuation needs one id of context or more, and one continued id or more.")
    whole_T = np.concatenate([context, ids])
    if not 0 <= whole_T.min() <= whole_T.max() < given.vocab_size:
        raise Skip(f"continuation has ids outside [0, {given.vocab_size}).")
    logits_TV = given.logits(whole_T[None, :-1])[0, len(context) - 1 :]
    limit = min(4000 * given.eps, 0.25) * _spread(logits_TV)
    chosen_T = np.take_along_axis(logits_TV, ids[:, None], 1)[:, 0]
    top_T = logits_TV.max(1)
    if log_probs is None:
        gap_T = top_T - chosen_T
        what = "is the logit of a greedy token below the largest"
    else:
        scored_T = chosen_T - top_T - np.log(np.exp(logits_TV - top_T[:, None]).sum(1))
        given_T = np.asarray(log_probs, np.float64).ravel()
        gap_T = np.abs(checked("continuation", given_T, scored_T.shape) - scored_T)
        what = "differ the log-probabilities at generation from those of scoring"
    wrong = np.flatnonzero(gap_T > limit)
    evidence = (
        f"By {gap_T.max():.2e} nats at most {what} over {len(ids)} tokens (limit {limit:.0e})"
    )
    evidence += f", first at token {wrong[0]}." if len(wrong) else "."
    first = int(wrong[0]) if len(wrong) else None
    return verdict(first is None, evidence, largest=float(gap_T.max()), limit=limit, first=first)


def _logits_V(given: Given, low: float, high: float) -> np.ndarray:
    """Distinct logits in random order, evenly spaced."""
    order = np.random.default_rng(given.seed).permutation(_IDS)
    return np.linspace(low, high, _IDS)[order].astype(np.float32)


def _draw(given: Given, logits_V: np.ndarray, **options: Any) -> np.ndarray:
    """How often each id is drawn."""
    rows_BV = np.tile(logits_V, (_DRAWS, 1))
    if "seen" in options:
        options["seen"] = np.full((_DRAWS, 1), options["seen"], np.int32)
    ids = np.asarray(call("sampler", lambda: given.sampler(rows_BV, given.seed, **options)))
    if ids.shape != (_DRAWS,) or not np.issubdtype(ids.dtype, np.integer):
        raise Skip(
            f"sampler returned {ids.dtype} {ids.shape}, expected are {_DRAWS} whole numbers."
        )
    if not 0 <= ids.min() <= ids.max() < _IDS:
        raise Skip(f"sampler returned ids from {ids.min()} to {ids.max()} of {_IDS} logits.")
    return np.bincount(ids, minlength=_IDS)


def _probabilities(given: Given, logits_V: np.ndarray) -> np.ndarray:
    """The softmax over ids that may be sampled."""
    wide_V = logits_V.astype(np.float64)
    wide_V[[i for i in given.never_sampled if i < _IDS]] = -np.inf
    p_V = np.exp(wide_V - np.max(wide_V))
    return p_V / p_V.sum()


def _needs(given: Given, option: str) -> None:
    given.need("sampler")
    if option not in given.sampler_options:
        raise Skip(f"The sampler has no option {option}.")


def _excess(count_V: np.ndarray, p_V: np.ndarray) -> np.ndarray:
    """Draws beyond those expected, in standard errors."""
    return (count_V - _DRAWS * p_V) / np.sqrt(np.maximum(_DRAWS * p_V * (1 - p_V), 1))


@check(
    "eval.temperature",
    remedy="Divide the logits by the temperature once, and take the argmax at temperature 0.",
)
def temperature(given: Given) -> Verdict:
    """Draws follow softmax(logits / T), and as T goes to 0 the argmax."""
    _needs(given, "temperature")
    logits_V = _logits_V(given, -2, 1)
    best, wrong = int(np.argmax(_probabilities(given, logits_V))), []
    for T in (1e-6, 0.0):
        try:
            count_V = _draw(given, logits_V, temperature=T)
        except Skip:
            if T:
                raise
            continue  # refusing 0 is in order
        if count_V[best] < _DRAWS:
            wrong.append(f"{_DRAWS - count_V[best]} of {_DRAWS} are not the argmax at T = {T:g}")
    worst = 0.0
    for T in (0.5, 1.0, 2.0):
        count_V = _draw(given, logits_V, temperature=T)
        z = float(np.abs(_excess(count_V, _probabilities(given, logits_V / T))).max())
        worst = max(worst, z)
        if z > 5:
            wrong.append(f"frequencies are off softmax(logits / T) by {z:.1f} SE at T = {T:g}")
    fine = (
        "all near T = 0 are the argmax, and at T of 0.5, 1 and 2 frequencies are within "
        f"{worst:.1f} SE of softmax(logits / T) (limit 5)"
    )
    evidence = f"Of {_DRAWS} draws each, " + ("; ".join(wrong) or fine)
    return verdict(not wrong, evidence + ".", z=worst)


@check(
    "eval.top_k",
    remedy="Keep exactly the k largest logits.",
)
def top_k(given: Given) -> Verdict:
    """Draws come from the k most likely ids and from all of them."""
    _needs(given, "top_k")
    logits_V = _logits_V(given, -2, 1)
    order = np.argsort(-_probabilities(given, logits_V))
    return _support(
        given,
        {f"k = {k}": (_draw(given, logits_V, top_k=k), order[:k]) for k in (1, 5)},
        _probabilities(given, logits_V),
    )


@check(
    "eval.top_p",
    remedy="Keep ids from the most likely on until their mass reaches p, the one that reaches it "
    "included, and so always the first.",
)
def top_p(given: Given) -> Verdict:
    """Draws come from the fewest most likely ids whose mass reaches p, never from none."""
    _needs(given, "top_p")
    logits_V = _logits_V(given, -2, 1)
    p_V = _probabilities(given, logits_V)
    order = np.argsort(-p_V)
    mass = np.cumsum(p_V[order])
    cases = {"p = 1e-06": (_draw(given, logits_V, top_p=1e-6), order[:1])}
    # Halfway between two sums, so that no rounding decides.
    p = float(mass[3] + mass[4]) / 2
    cases[f"p = {p:.3f}"] = (_draw(given, logits_V, top_p=p), order[:5])
    return _support(given, cases, p_V)


def _support(
    given: Given, cases: dict[str, tuple[np.ndarray, np.ndarray]], p_V: np.ndarray
) -> Verdict:
    """Each count's ids are exactly those kept, with probabilities in proportion."""
    wrong = []
    for name, (count_V, kept) in cases.items():
        outside = _DRAWS - int(count_V[kept].sum())
        absent = [int(i) for i in kept if not count_V[i]]
        share_V = np.where(np.isin(np.arange(_IDS), kept), p_V, 0)
        z = float(np.abs(_excess(count_V, share_V / share_V.sum())).max())
        if outside or absent:
            wrong.append(
                f"at {name} {outside} draws are outside the {len(kept)} ids to be kept, "
                f"{len(absent)} of them never come up"
            )
        elif z > 5:
            wrong.append(f"at {name} frequencies are off by {z:.1f} SE (limit 5)")
    evidence = f"Of {_DRAWS} draws each, " + ("; ".join(wrong) or "all are from the ids to be kept")
    return verdict(not wrong, evidence + ".", cases=list(cases))


@check(
    "eval.repetition_penalty",
    remedy="Divide positive logits of seen tokens by the penalty and multiply negative ones, or "
    "subtract from the log-probability.",
)
def repetition_penalty(given: Given) -> Verdict:
    """A penalty never makes a token that was seen more likely, whatever the logits' sign."""
    _needs(given, "repetition_penalty")
    raised, worst = {}, -np.inf
    for low, high in ((-4.0, -1.0), (-1.5, 1.5)):
        logits_V = _logits_V(given, low, high)
        p_V = _probabilities(given, logits_V)
        for seen in np.argsort(-p_V)[:8].tolist():
            count_V = _draw(given, logits_V, repetition_penalty=2.0, seen=seen)
            z = float(_excess(count_V, p_V)[seen])
            worst = max(worst, z)
            if z > 5:
                raised[f"{logits_V[seen]:.2f}"] = (float(p_V[seen]), count_V[seen] / _DRAWS)
    evidence = f"With a penalty of 2, of 16 seen tokens {len(raised)} become more likely"
    if raised:
        logit, (before, after) = next(iter(raised.items()))
        evidence += f": one of logit {logit} from {before:.3f} to {after:.3f}"
    evidence += f" (largest excess {worst:.1f} SE, limit 5)."
    return verdict(not raised, evidence, raised=raised)


CHECKS = (cached_decode, generation, temperature, top_k, top_p, repetition_penalty)
