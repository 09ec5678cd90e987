"""Windows that overlap: rows that begin inside other rows, as those cut at a small stride do."""

import math
from typing import NamedTuple

import numpy as np
import scipy.stats

from lm_jax.doctor import numbers
from lm_jax.doctor.data.grams import SHORTEST
from lm_jax.doctor.data.sample import Sample, locate
from lm_jax.doctor.facts import Skip

OVERLAP = 0.01  # overlaps a row that may be there for no reason
LEAST = 4  # tokens that two windows share, of rows of any length
FEWEST = 20  # rows from which anything is said
PROBES = 1 << 13  # rows that are looked for in others
PREDICTABLE = 0.2  # nats a token given the one before; below, any two stretches are alike
MOST_PAIRS = 1 << 18  # neighbours from which those nats are estimated


class Overlap(NamedTuple):
    """How often rows begin inside other rows and continue to their end."""

    excess: float  # such overlaps a row, beyond chance
    limit: float
    found: bool  # whether there are more
    stride: int  # tokens between the beginnings of two rows that overlap, the fewest
    tried: int
    at_random: bool  # rows begin inside others as often as where others begin, as random crops do


def overlap(probes: Sample, rows: Sample) -> Overlap:
    """Look for the beginnings of `probes` at the ends of `rows`, which may be the same sample.

    At each shift the beginning of a probe is compared with the ends of all rows, and for chance
    with their beginnings: in text that was cut at its own width both are equally likely, however
    often it repeats itself. Targets of weight 0 are not scored again and do not count. Rows at a
    stride overlap at a few shifts; those are judged by themselves, for a few equal rows, which are
    alike at every shift, would outweigh them.
    """
    # Equal rows stay: text of one form has its rows again and again, and they show what is chance.
    at, width = _beginnings(rows)
    own = at if probes is rows else _beginnings(probes, width)[0]
    least = max(LEAST, min(width // 4, SHORTEST))
    own = own if width > least else own[:0]
    own = own[:: 1 + len(own) // PROBES]
    if min(len(own), len(at)) < FEWEST:
        which = rows.name if probes is rows else f"{probes.name} or {rows.name}"
        raise Skip(f"{which} has fewer than {FEWEST} long rows of one width.")
    if _nats(rows) < PREDICTABLE:
        raise Skip(f"The tokens of {rows.name} follow from those before them: no copy tells.")
    inside, chance, by_shift = _counts(probes, own, rows, at, width, least)
    tried, shifts = len(own), by_shift.shape[1]
    share = numbers.share_limit(OVERLAP, tried)
    mean, square = by_shift / tried
    best = int(np.argmax(mean))
    single, error = float(mean[best]), math.sqrt((square[best] - mean[best] ** 2) / tried)
    total, overlaps = numbers.mean(inside - chance), numbers.mean(inside)
    limit_of_total = share + numbers.threshold() * total.error
    of_both = (total.value, limit_of_total), (single, share + numbers.threshold(shifts) * error)
    excess, limit = max(of_both, key=lambda x: x[0] - x[1])
    stride = int(np.argmax(mean >= max(mean[best] / 2, 1 / tried)))
    at_random = overlaps.value > share + numbers.threshold() * overlaps.error
    at_random &= excess <= limit and -total.value <= limit_of_total
    return Overlap(excess, limit, excess > limit, stride, tried, at_random)


def _counts(
    probes: Sample, own: np.ndarray, rows: Sample, at: np.ndarray, width: int, least: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """At how many shifts each probe begins inside a row [P], and where one begins [P].

    The third array is the sum, and the sum of squares, of their difference by shift [2, shifts].
    """
    same = int(probes is rows)
    inside, chance = np.zeros((2, len(own)))
    places = at + np.arange(width - least + 1)[:, None]
    by_shift = np.zeros((2, len(places)))
    # Only what holds the first tokens of a probe can overlap it.
    keys, number = np.unique(probes.spans(own, least), return_inverse=True)
    place, possible = locate(rows.spans(places, least), keys)
    chosen = np.bincount(place[possible], minlength=len(keys))[number] > same
    own = own[chosen]
    for shift in range(1, len(places) if len(own) else 0):
        length = width - shift
        keys, number = np.unique(probes.spans(own, length), return_inverse=True)
        scored = probes.scores(own, length)
        itself = same * (probes.spans(own + shift, length) == keys[number])
        ended = _times(keys, rows, places[shift, possible[shift]], length)[number] > itself
        begun = _times(keys, rows, at[possible[0]], length)[number] > same
        inside[chosen] += scored & ended
        chance[chosen] += scored & begun
        more = scored * (ended.astype(int) - begun)
        by_shift[:, shift] = more.sum(), np.abs(more).sum()
    return inside, chance, by_shift


def _beginnings(sample: Sample, width: int = 0) -> tuple[np.ndarray, int]:
    """Where the rows of the commonest width begin, and that width.

    Both without an id that opens every row. Rows with padding are left out.
    """
    full = sample.text == sample.lengths
    first = sample.tokens[sample.starts[:-1][full & (sample.lengths > 0)]]
    opened = int(len(first) > 0 and bool((first == first[0]).all()))
    commonest = int(np.argmax(np.bincount(sample.lengths[full], minlength=1))) - opened
    width = width or commonest
    chosen = np.flatnonzero(full & (sample.lengths == width + opened))
    return sample.starts[chosen] + opened, width


def _times(keys: np.ndarray, rows: Sample, at: np.ndarray, length: int) -> np.ndarray:
    """How often each sorted key is the hash of a span at `at` with a scored target."""
    spans = rows.spans(at[rows.scores(at, length)], length)
    place, known = locate(spans, keys)
    return np.bincount(place[known], minlength=len(keys))


def _nats(sample: Sample) -> float:
    """Entropy of a token given the one before, as counted."""
    pairs = sample.pairs(sample.real)[:MOST_PAIRS]
    counts = (np.unique(x, return_counts=True)[1] for x in (pairs, pairs >> 32))
    joint, before = map(scipy.stats.entropy, counts)
    return float(joint - before)
