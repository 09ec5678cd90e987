"""Do draws of the sampler follow the distribution that its options describe?"""

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.special
import scipy.stats

from lm_jax.doctor.checks import check, fixture
from lm_jax.doctor.eval.subject import Subject, are_ids
from lm_jax.doctor.facts import Broken, Skip, array, call
from lm_jax.doctor.findings import Measure, at_least, at_most, none
from lm_jax.doctor.numbers import threshold

IDS = 16  # vocabulary of these checks
DRAWS = 4096
Draw = Callable[..., np.ndarray]
Shares = dict[float, np.ndarray]  # probabilities by value of an option


@fixture
def draw(subject: Subject, sampler: Any) -> Draw:
    """Logits and an option with its value to how often each id is drawn."""

    def counts(logits_V: np.ndarray, option: str, value: Any, **more: Any) -> np.ndarray:
        if option not in subject.sampler_options:
            raise Skip(f"The sampler has no option {option}.", "sampler_options")
        rows_BV, options = np.tile(logits_V, (DRAWS, 1)), {option: value, **more}
        made = call("sampler", lambda: sampler(rows_BV, subject.seed, **options))
        ids = array("sampler", made)
        if ids.shape != (DRAWS,) or not are_ids(ids, IDS):
            expected = f"expected are {DRAWS} whole numbers from 0 to {IDS - 1}"
            raise Broken(f"sampler returned {ids.dtype} {ids.shape}; {expected}")
        return np.bincount(ids, minlength=IDS)

    return counts


def _spaced(subject: Subject, low: float = -2, high: float = 1) -> tuple[np.ndarray, np.ndarray]:
    """Distinct logits in random order, and the probabilities of ids that may be sampled."""
    logits_V = np.linspace(low, high, IDS)[subject.rng().permutation(IDS)].astype(np.float32)
    return logits_V, _chances(subject, logits_V)


def _chances(subject: Subject, logits_V: np.ndarray) -> np.ndarray:
    excluded_V = np.isin(np.arange(IDS), list(subject.never_sampled))
    return np.asarray(scipy.special.softmax(np.where(excluded_V, -np.inf, logits_V.astype(float))))


def _surprise(count_V: np.ndarray, p_V: np.ndarray) -> np.ndarray:
    """Standard errors of a normal variable that is as unlikely as each binomial count."""
    binomial = scipy.stats.binom(DRAWS, p_V)
    rarest = np.minimum(binomial.sf(count_V - 1), binomial.cdf(count_V))
    return np.asarray(scipy.stats.norm.isf(rarest)).clip(0)


def _follows(draw: Draw, logits_V: np.ndarray, option: str, shares: Shares) -> Measure:
    """At each value of an option ids are drawn as often as they must be."""
    z, where = 0.0, ""
    for value, p_V in shares.items():
        count_V = draw(logits_V, option, value)
        z_V = _surprise(count_V, p_V)
        id = int(np.argmax(z_V))
        if z_V[id] > z:
            z, drawn = float(z_V[id]), f"{count_V[id]} times of {DRAWS} at {option} {value:.4g}"
            where = f"id {id} is drawn {drawn}, expected are {DRAWS * p_V[id]:.0f}"
    what = "standard errors by which an id is drawn too often or too rarely"
    return at_most(what, z, threshold(2 * IDS * len(shares)), where=where, key="z")


def _best(p_V: np.ndarray, n: int) -> np.ndarray:
    """Probabilities of the n most likely ids alone."""
    kept_V = np.where(p_V >= np.sort(p_V)[-n], p_V, 0)
    return np.asarray(kept_V / kept_V.sum())


@check("Divide the logits by the temperature once, and take the argmax at temperature 0.")
def temperature(subject: Subject, draw: Draw) -> Measure:
    """Draws follow softmax(logits / T), and as T goes to 0 the argmax."""
    logits_V, values = _spaced(subject)[0], [1e-6, 0.5, 1.0, 2.0]
    try:
        draw(logits_V, "temperature", 0.0)
        values.append(0.0)
    except Broken as error:
        if error.__cause__ is None:
            raise  # refusing 0 is in order, answering with something else is not
    shares = {T: _chances(subject, logits_V / max(T, 1e-6)) for T in values}
    return _follows(draw, logits_V, "temperature", shares)


@check("Keep exactly the k largest logits.")
def top_k(subject: Subject, draw: Draw) -> Measure:
    """Draws come from the k most likely ids and from all of them."""
    logits_V, p_V = _spaced(subject)
    return _follows(draw, logits_V, "top_k", {k: _best(p_V, k) for k in (1, 5)})


@check("Keep ids from the most likely on until their mass reaches p, the one that reaches it too.")
def top_p(subject: Subject, draw: Draw) -> Measure:
    """Draws come from the fewest most likely ids whose mass reaches p, never from none."""
    logits_V, p_V = _spaced(subject)
    mass = np.cumsum(np.sort(p_V)[::-1])
    halfway = float(mass[3] + mass[4]) / 2  # between two sums, so that no rounding decides
    return _follows(draw, logits_V, "top_p", {1e-6: _best(p_V, 1), halfway: _best(p_V, 5)})


@check("Divide positive logits of seen tokens by the penalty and multiply negative ones.")
def repetition_penalty(subject: Subject, draw: Draw) -> list[Measure]:
    """A penalty makes tokens that were seen less likely, whatever the logits' sign."""
    raised, lowered, looks = [], 0, 2 * 8
    for low, high in ((-4.0, -1.0), (-1.5, 1.5)):
        logits_V, p_V = _spaced(subject, low, high)
        for id in np.argsort(-p_V)[: looks // 2].tolist():
            seen = np.full((DRAWS, 1), id, np.int32)
            count_V = draw(logits_V, "repetition_penalty", 2.0, seen=seen)
            share = count_V[id] / DRAWS
            if _surprise(count_V, p_V)[id] > threshold(looks):
                lowered += share < p_V[id]
                if share > p_V[id]:
                    text = f"one of logit {logits_V[id]:.2f} from {p_V[id]:.3f} to {share:.3f}"
                    raised.append(text)
    what = "seen tokens that a penalty of 2 makes"
    return [
        none(f"{what} more likely", raised, of=looks, key="raised"),
        at_least(f"{what} less likely", lowered, 1, key="lowered"),
    ]
