"""Windows that overlap: rows that begin inside other rows, as those cut at a small stride do."""

import math
from typing import NamedTuple

import numpy as np
import scipy.stats

from lm_jax.doctor import numbers
from lm_jax.doctor.data.grams import SHORTEST
from lm_jax.doctor.data.sample import Sample
from lm_jax.doctor.facts import Skip

OVERLAP = 0.01  # overlaps a row that may be there for no reason
LEAST = 4  # tokens that two windows share, of rows of any length
FEWEST = 20  # rows from which anything is said
PROBES = 1 << 13  # rows that are looked for in others
PREDICTABLE = 0.2  # nats a token given the one before; below, any two stretches are alike
HEAD_BITS = 22  # of a hash, by which places are told that may hold the head of a probe
MOST_PAIRS = 1 << 18  # neighbours from which those nats are estimated


class Overlap(NamedTuple):
    """How often rows begin inside other rows and continue to their end."""

    excess: numbers.Mean  # such overlaps a row, beyond chance
    limit: float
    stride: int  # tokens between the beginnings of two rows that overlap, the fewest
    tried: int
    width: int
    at_random: bool  # rows begin inside others as often as where others begin, as random crops do

    @property
    def found(self) -> bool:
        """Whether there are more than chance gives."""
        return self.excess.value > self.limit


def overlap(probes: Sample, rows: Sample) -> Overlap:
    """Look for the beginnings of `probes` at the ends of `rows`, which may be the same sample.

    At each shift the beginning of a probe is compared with the ends of all rows, and for chance
    with their beginnings: in text that was cut at its own width both are equally likely, however
    often it repeats itself. Targets of weight 0 are not scored again and do not count. Rows at a
    stride overlap at a few shifts; those are judged by themselves, for a few equal rows, which are
    alike at every shift, would outweigh them.

    Raises:
        Skip: there are too few rows of one width, or they are too predictable.
    """
    # Equal rows stay: text of one form has its rows again and again, and they show what is chance.
    at, width = _beginnings(rows)
    own = at if probes is rows else _beginnings(probes, width)[0]
    least = max(LEAST, min(width // 4, SHORTEST))
    own = own[_unlike(probes, own, least)] if width > least else own[:0]
    own = own[:: -(-len(own) // PROBES) or 1]
    if min(len(own), len(at)) < FEWEST:
        raise Skip(
            f"{' or '.join({probes.name: 0, rows.name: 0})} has fewer than {FEWEST} full rows of "
            f"one width of more than {least} tokens."
        )
    if _nats(rows) < PREDICTABLE:
        raise Skip(f"The tokens of {rows.name} follow from those before them: no copy tells.")
    inside, chance, by_shift = _counts(probes, own, rows, at, width, least)
    tried, shifts = len(own), by_shift.shape[1]
    least_share = numbers.share_limit(OVERLAP, tried)
    mean, square = by_shift / tried
    best = int(np.argmax(mean))
    error = math.sqrt((square[best] - mean[best] ** 2) / tried)
    single = numbers.Mean(float(mean[best]), error)
    single_limit = least_share + numbers.threshold(shifts) * error
    total = numbers.mean(inside - chance)
    # Of a few random crops hardly two are equal: one pair more or less must not decide.
    doubt = shifts / tried if rows.complete else 0.0
    total_limit = least_share + numbers.threshold() * math.hypot(total.error, doubt)
    pairs = (total, total_limit), (single, single_limit)
    excess, limit = max(pairs, key=lambda pair: pair[0].value - pair[1])
    stride = int(np.argmax(mean >= max(mean[best] / 2, 1 / tried)))
    overlaps = numbers.mean(inside)
    at_random = overlaps.value > least_share + numbers.threshold() * overlaps.error
    at_random &= excess.value <= limit and -total.value <= total_limit
    return Overlap(excess, limit, stride, tried, width, at_random)


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
    heads, hashes = probes.spans(own, least), rows.spans(places, least)
    sought = np.zeros(1 << HEAD_BITS, bool)
    low = np.uint64(len(sought) - 1)
    sought[heads & low] = True
    possible = sought[hashes & low]
    held = np.sort(hashes[possible])
    chosen = np.searchsorted(held, heads, "right") - np.searchsorted(held, heads) > same
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


def _unlike(sample: Sample, at: np.ndarray, length: int) -> np.ndarray:
    """Whether the beginning is no short pattern over and over, which overlaps itself."""
    ok = np.ones(len(at), bool)
    for period in range(1, length // 2 + 1):
        ok &= sample.spans(at, length - period) != sample.spans(at + period, length - period)
    return ok


def _times(keys: np.ndarray, rows: Sample, at: np.ndarray, length: int) -> np.ndarray:
    """How often each sorted key is the hash of a span at `at` with a scored target."""
    spans = rows.spans(at[rows.scores(at, length)], length)
    place = np.minimum(np.searchsorted(keys, spans), len(keys) - 1)
    return np.bincount(place[keys[place] == spans], minlength=len(keys))


def _nats(sample: Sample) -> float:
    """Entropy of a token given the one before, as counted."""
    tokens = sample.tokens[: MOST_PAIRS + 1]
    pairs = (tokens[:-1] << 32) + (tokens[1:] & 0xFFFFFFFF)
    counts = (np.unique(x, return_counts=True)[1] for x in (pairs, tokens[:-1]))
    joint, before = map(scipy.stats.entropy, counts)
    return float(joint - before)
