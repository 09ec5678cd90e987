"""Windows that overlap: rows that begin inside other rows, as those cut at a small stride do."""

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
MOST_PAIRS = 1 << 18  # neighbours from which those nats are estimated


class Overlap(NamedTuple):
    """How often rows begin inside other rows and continue to their end."""

    excess: numbers.Mean  # such overlaps a row, beyond chance
    limit: float
    stride: int  # tokens between the beginnings of two rows that overlap, the fewest
    tried: int
    width: int

    @property
    def found(self) -> bool:
        """Whether there are more than chance gives."""
        return self.excess.value > self.limit


def overlap(probes: Sample, rows: Sample) -> Overlap:
    """Look for the beginnings of `probes` at the ends of `rows`, which may be the same sample.

    At each shift the beginning of a probe is compared with the ends of all rows, and for chance
    with their beginnings: in text that was cut at its own width both are equally likely, however
    often it repeats itself. Targets of weight 0 are not scored again and do not count.

    Raises:
        Skip: there are too few rows of one width, or they are too predictable.
    """
    # Equal rows stay: text of one form has its rows again and again, and they show what is chance.
    at, width = _beginnings(rows)
    own = at if probes is rows else _beginnings(probes, width)[0]
    least = max(LEAST, min(width // 4, SHORTEST))
    if width <= least:
        raise Skip(f"The commonest rows are of {width} tokens, too short to tell if they overlap.")
    own = own[_unlike(probes, own, least)]
    own = own[:: -(-len(own) // PROBES) or 1]
    if min(len(own), len(at)) < FEWEST:
        raise Skip(f"{probes.name} and {rows.name} have fewer than {FEWEST} rows of one width.")
    if _nats(rows) < PREDICTABLE:
        raise Skip(f"The tokens of {rows.name} follow from those before them: no copy tells.")
    overlaps = np.zeros(len(own))
    by_shift = np.zeros(width, int)
    same = int(probes is rows)
    for shift in range(1, width - least + 1):
        length = width - shift
        keys, number = np.unique(probes.spans(own, length), return_inverse=True)
        scored = probes.scores(own, length)
        ended = _times(keys, rows, at + shift, length)[number]
        begun = _times(keys, rows, at, length)[number]
        itself = same * (probes.spans(own + shift, length) == keys[number])
        more = scored * ((ended > itself).astype(int) - (begun > same))
        overlaps += more
        by_shift[shift] = more.sum()
    excess = numbers.mean(overlaps)
    limit = numbers.share_limit(OVERLAP, len(own)) + numbers.threshold() * excess.error
    stride = int(np.argmax(by_shift >= max(by_shift.max() / 2, 1)))
    return Overlap(excess, limit, stride, len(own), width)


def _beginnings(sample: Sample, width: int = 0) -> tuple[np.ndarray, int]:
    """Where the rows of the commonest width begin, and that width.

    Both without an id that opens every row. Rows with padding are left out.
    """
    full = sample.text == sample.lengths
    first = sample.tokens[sample.starts[:-1][full & (sample.lengths > 0)]]
    opened = int(len(first) > 0 and bool((first == first[0]).all()))
    width = width + opened or int(np.argmax(np.bincount(sample.lengths[full], minlength=1)))
    chosen = np.flatnonzero(full & (sample.lengths == width))
    return sample.starts[chosen] + opened, width - opened


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
