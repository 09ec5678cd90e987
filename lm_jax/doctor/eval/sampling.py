"""Do draws of the sampler follow the distribution that its options describe?"""

from typing import Any

import numpy as np
import scipy.special
import scipy.stats

from lm_jax.doctor import trees
from lm_jax.doctor.checks import check, fixture
from lm_jax.doctor.eval.subject import Subject
from lm_jax.doctor.facts import Broken, Skip, call
from lm_jax.doctor.findings import Measure, at_most, equals, none
from lm_jax.doctor.numbers import threshold

IDS = 16  # vocabulary of these checks
DRAWS = 4096


@fixture
def logits_V(subject: Subject) -> np.ndarray:
    """Distinct logits in random order, evenly spaced."""
    return _spaced(subject, -2, 1)


def _spaced(subject: Subject, low: float, high: float) -> np.ndarray:
    return np.linspace(low, high, IDS)[subject.rng().permutation(IDS)].astype(np.float32)


def _draw(subject: Subject, logits_V: np.ndarray, option: str, value: Any, **more: Any) -> Any:
    """Ids drawn with an option, as the sampler returns them."""
    if option not in subject.sampler_options:
        raise Skip(f"The sampler has no option {option}.", "sampler_options")
    assert subject.sampler is not None
    made, rows_BV = subject.sampler, np.tile(logits_V, (DRAWS, 1))
    return call("sampler", lambda: made(rows_BV, subject.seed, **{option: value}, **more))


def _count(drawn: Any) -> np.ndarray:
    """How often each id was drawn."""
    ids = trees.as_array(drawn)
    if ids.shape != (DRAWS,) or not np.issubdtype(ids.dtype, np.integer):
        raise Broken(f"sampler returned {ids.dtype} {ids.shape}, expected are {DRAWS} integers")
    if not 0 <= ids.min() <= ids.max() < IDS:
        raise Broken(f"sampler returned ids from {ids.min()} to {ids.max()} of {IDS} logits")
    return np.bincount(ids, minlength=IDS)


def _chances(subject: Subject, logits_V: np.ndarray) -> np.ndarray:
    """The softmax over ids that may be sampled."""
    wide_V = logits_V.astype(np.float64)
    wide_V[[i for i in subject.never_sampled if i < IDS]] = -np.inf
    return np.asarray(scipy.special.softmax(wide_V))


def _surprise(count_V: np.ndarray, p_V: np.ndarray) -> np.ndarray:
    """Standard errors of a normal variable that is as unlikely as each binomial count."""
    binomial = scipy.stats.binom(DRAWS, p_V)
    rarest = np.minimum(binomial.sf(count_V - 1), binomial.cdf(count_V))
    return np.asarray(scipy.stats.norm.isf(rarest)).clip(0)


def _follows(cases: dict[str, tuple[np.ndarray, np.ndarray]]) -> Measure:
    """The counts of every case are draws of its probabilities."""
    worst, where = 0.0, ""
    for name, (count_V, p_V) in cases.items():
        z_V = _surprise(count_V, p_V)
        id = int(np.argmax(z_V))
        if z_V[id] > worst:
            expected = f"{DRAWS * p_V[id]:.0f} of {DRAWS} are expected"
            worst, where = (
                float(z_V[id]),
                f"id {id} comes {count_V[id]} times at {name}, {expected}",
            )
    what = f"largest departure from the expected shares at {', '.join(cases)}, standard errors"
    return at_most(what, worst, threshold(2 * IDS * len(cases)), where=where, key="z")


@check("Divide the logits by the temperature once, and take the argmax at temperature 0.")
def temperature(subject: Subject, sampler: Any, logits_V: np.ndarray) -> list[Measure]:
    """Draws follow softmax(logits / T), and as T goes to 0 the argmax."""
    best, found, cases = int(np.argmax(_chances(subject, logits_V))), [], {}
    for T in (1e-6, 0.0):
        try:
            drawn = _draw(subject, logits_V, "temperature", T)
        except Broken:
            if T:
                raise
            continue  # refusing 0 is in order
        others = DRAWS - int(_count(drawn)[best])
        found.append(equals(f"draws that are not the argmax at T = {T:g}", others, 0))
    for T in (0.5, 1.0, 2.0):
        count_V = _count(_draw(subject, logits_V, "temperature", T))
        cases[f"T = {T:g}"] = count_V, _chances(subject, logits_V / T)
    return [*found, _follows(cases)]


@check("Keep exactly the k largest logits.")
def top_k(subject: Subject, sampler: Any, logits_V: np.ndarray) -> list[Measure]:
    """Draws come from the k most likely ids and from all of them."""
    return _kept(subject, logits_V, "top_k", {1: 1, 5: 5})


@check(
    "Keep ids from the most likely on until their mass reaches p, the one that reaches it "
    "included, and so always the first."
)
def top_p(subject: Subject, sampler: Any, logits_V: np.ndarray) -> list[Measure]:
    """Draws come from the fewest most likely ids whose mass reaches p, never from none."""
    mass = np.cumsum(np.sort(_chances(subject, logits_V))[::-1])
    halfway = float(mass[3] + mass[4]) / 2  # between two sums, so that no rounding decides
    return _kept(subject, logits_V, "top_p", {1e-6: 1, halfway: 5})


def _kept(
    subject: Subject, logits_V: np.ndarray, option: str, kept: dict[Any, int]
) -> list[Measure]:
    """At each value of an option draws come from so many of the most likely ids."""
    cases, outside = {}, []
    p_V = _chances(subject, logits_V)
    for value, n in kept.items():
        name, order = f"{option} = {value:.4g}", np.argsort(-p_V)
        count_V = _count(_draw(subject, logits_V, option, value))
        if cut := int(count_V[order[n:]].sum()):
            outside.append(f"{cut} of {DRAWS} draws at {name}, where {n} ids are to be kept")
        share_V = np.where(np.isin(np.arange(IDS), order[:n]), p_V, 0)
        cases[name] = count_V, share_V / share_V.sum()
    return [none("values at which ids that are cut are drawn", outside), _follows(cases)]


@check(
    "Divide positive logits of seen tokens by the penalty and multiply negative ones, or subtract "
    "from the log-probability."
)
def repetition_penalty(subject: Subject, sampler: Any) -> Measure:
    """A penalty never makes a token that was seen more likely, whatever the logits' sign."""
    raised, looks = [], 2 * 8
    for low, high in ((-4.0, -1.0), (-1.5, 1.5)):
        logits_V = _spaced(subject, low, high)
        p_V = _chances(subject, logits_V)
        for id in np.argsort(-p_V)[: looks // 2].tolist():
            seen = np.full((DRAWS, 1), id, np.int32)
            count_V = _count(_draw(subject, logits_V, "repetition_penalty", 2.0, seen=seen))
            share = count_V[id] / DRAWS
            if share > p_V[id] and _surprise(count_V, p_V)[id] > threshold(looks):
                raised.append(f"one of logit {logits_V[id]:.2f} from {p_V[id]:.3f} to {share:.3f}")
    return none("seen tokens that a penalty of 2 makes more likely", raised, of=looks, key="raised")
