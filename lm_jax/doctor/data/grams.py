"""N-grams of a text: how long one must be to be no coincidence, and where it recurs."""

import dataclasses
import functools
import math

import numpy as np

from lm_jax.doctor import numbers
from lm_jax.doctor.checks import fixture
from lm_jax.doctor.data.sample import PIECE, Sample, locate, mix
from lm_jax.doctor.facts import Skip
from lm_jax.doctor.numbers import Mean

SHORTEST = 13  # the customary length (Brown et al. 2020, appendix C)
LONGEST_CONTEXT = 6
MOST_COUNTED = 1 << 17  # tokens from which the others are predicted
BUCKETS = 32 * MOST_COUNTED
FEWEST = 1000  # n-grams from which anything is said
BLOCK = 256  # neighbouring grams are dependent; standard errors are those of block means
SAME_PIECE = 0.75  # share of a piece's tokens that makes it the same text as earlier ones
SEEN = 16  # sightings of a context from which its frequencies are known to 1 / sqrt(16)
ODD = 0.01  # share of pieces that may be more predictable than the text is taken to be


def rate(hits: np.ndarray, n: int) -> Mean:
    """Share of n-grams; the error is the larger of that of block means and of independent runs."""
    if not len(hits):
        return Mean(0.0, 0.0)
    share = float(hits.mean())
    error = math.sqrt(share * (1 - share) * n / len(hits))
    blocks = len(hits) // BLOCK
    if blocks > 1:
        of_block = hits[: blocks * BLOCK].reshape(blocks, BLOCK).mean(-1)
        error = max(error, numbers.mean(of_block).error)
    return Mean(share, error)


def token_nats(
    sample: Sample, vocab_size: int, counted_at: np.ndarray, kind: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nats of each token [N], those by frequent contexts alone [N], and which are counted [N].

    Of the tokens at `counted_at` [K] the first of each `kind` [K] is counted, so text that is
    merely read twice stays as informative as it is. A token is predicted from the counts of the
    others (leave one out, smoothed by one uniform observation) given up to six tokens before it;
    the context that predicts it best decides, so that no more nats are claimed than the text has.
    """
    _, first, number = np.unique(kind, return_index=True, return_inverse=True)
    # Of a large text, pieces spread over all of it.
    every = 1 + len(first) // MOST_COUNTED
    chosen = sample.piece_of[counted_at[first]] % every == 0
    if chosen.sum() < FEWEST:
        why = "distinct n-grams or tokens in distinct rows: too little to tell copies from chance"
        raise Skip(f"{sample.size} hold only {chosen.sum():,} {why}")
    counted, own = np.zeros((2, len(sample.tokens)), bool)
    counted[counted_at[first[chosen]]] = True
    own[counted_at] = chosen[number]

    place = np.arange(len(sample.tokens))
    new = np.diff(sample.units, prepend=-1) != 0
    depth = place - np.maximum.accumulate(np.where(new, place, 0))
    probability, cautious = np.full((2, len(sample.tokens)), 1 / vocab_size)
    of_context = np.zeros(len(sample.tokens), np.uint64)
    for context in range(LONGEST_CONTEXT + 1):
        ends = slice(context, None)
        of_gram = sample.gram_hashes(context + 1)
        before = _others(of_context[: len(of_gram)], counted[ends], own[ends])
        here = (_others(of_gram, counted[ends], own[ends]) + 1 / vocab_size) / (before + 1)
        within = depth[ends] >= context
        np.maximum(probability[ends], here, out=probability[ends], where=within)
        within &= before >= SEEN
        np.maximum(cautious[ends], here, out=cautious[ends], where=within)
        of_context = of_gram
    return -np.log(probability), -np.log(cautious), counted


def independent_nats(
    sample: Sample, vocab_size: int, least_nats: float, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """`token_nats` with repeats of a length removed that are copies and no coincidence.

    A template with a few free fields repeats its fixed text by nature. Were that counted once, it
    would look informative. So the length grows until grams of it carry `least_nats` in all but a
    hundredth of the pieces of text, up to `longest`. Contexts that were seen a few times do not
    count in that: copies of a text are no template.
    """
    n = SHORTEST
    while True:
        positions, hashes = sample.grams(n)
        nats, cautious, counted = token_nats(sample, vocab_size, positions + n - 1, hashes)
        pieces = sample.piece_of[counted]
        means = np.bincount(pieces, cautious[counted]) / np.maximum(np.bincount(pieces), 1)
        low = float(np.quantile(means[means > 0], ODD))
        if n >= longest or n * low >= least_nats:
            return nats, counted
        n = min(longest, max(2 * n, math.ceil(least_nats / low)))


def _others(hashes: np.ndarray, counted: np.ndarray, own: np.ndarray) -> np.ndarray:
    """How many other counted places have the same hash, told by its low bits (1 in 32 meets)."""
    bucket = (hashes & np.uint64(BUCKETS - 1)).astype(np.int64)
    count = np.bincount(bucket[counted], minlength=BUCKETS).astype(np.int32)
    return np.maximum(count[bucket] - own, 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """The telling n-grams of a sample, those that no coincidence repeats, and where they recur."""

    sample: Sample
    n: int  # tokens of a gram
    nats: np.ndarray  # of each token [N]
    share: float  # of telling grams among all n-grams
    positions: np.ndarray  # where each gram begins [G]
    hashes: np.ndarray  # of each gram [G]

    @functools.cached_property
    def _known(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The distinct hashes in order [K], the first gram of each [K], the number of each [G]."""
        return np.unique(self.hashes, return_index=True, return_inverse=True)

    @functools.cached_property
    def earlier(self) -> np.ndarray:
        """Whether the gram stands in an earlier piece of text as well [G]."""
        _, first, number = self._known
        piece = self.sample.piece_of[self.positions]
        return piece[first][number] < piece  # type: ignore[no-any-return]

    @property
    def lag(self) -> np.ndarray:
        """Tokens since its last occurrence, 0 at the first [G]."""
        number = self._known[2]
        order = np.argsort(number, kind="stable")
        lag = np.zeros(len(order), np.int64)
        lag[order[1:]] = np.diff(self.positions[order]) * (np.diff(number[order]) == 0)
        return lag

    @property
    def usual(self) -> Mean:
        """Share of all n-grams that are telling and recur in another piece of the sample."""
        _, first, number = self._known
        again = np.zeros(len(first), bool)
        again[number[self.earlier]] = True
        found = rate(again[number], self.n)
        return Mean(self.share * found.value, self.share * found.error)

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """First position of each gram in this sample, -1 where it does not occur."""
        known, first, _ = self._known
        place, found = locate(hashes, known)
        return np.where(found, self.positions[first[place]], -1)

    @functools.cached_property
    def copied(self) -> np.ndarray:
        """Whether three quarters of a piece's text stand in earlier pieces [P]."""
        begins = self.positions[self.earlier]
        depth = np.zeros(len(self.sample.tokens) + 1, np.int32)
        depth[begins] += 1
        depth[begins + self.n] -= 1
        text = np.bincount(self.sample.piece_of, self.sample.real)
        copies = np.bincount(self.sample.piece_of, np.cumsum(depth)[:-1] > 0)
        return (text > 0) & (copies >= SAME_PIECE * text)


@fixture
def least_nats(samples: list[Sample]) -> float:
    """Nats of a text that no coincidence repeats among so many tokens."""
    return 2 * math.log(sum(len(sample.tokens) for sample in samples))


@fixture
def index(first_epoch: Sample, least_nats: float, vocab_size: int) -> Index:
    """N-grams that mostly hold `least_nats`; `Skip` where none rules out chance."""
    width = int(np.median(np.repeat(first_epoch.lengths, first_epoch.lengths)))  # of median token
    longest = max(SHORTEST, min(width, PIECE) // 2)
    nats, counted = independent_nats(first_epoch, vocab_size, least_nats, longest)
    mean = float(nats[counted].mean())
    n = max(SHORTEST, math.ceil(1.5 * least_nats / mean))
    before = np.concatenate([[0.0], np.cumsum(nats)])
    positions, hashes = first_epoch.grams(n)
    telling = before[positions + n] - before[positions] >= least_nats
    if n > SAME_PIECE * width or telling.sum() < FEWEST:
        why = f"only {n}-grams are no coincidence: too long or too few in rows of {width}."
        raise Skip(f"Of {first_epoch.name}, with {mean:.2f} nats a token, {why}")
    share = float(telling.mean())
    return Index(first_epoch, n, nats, share, positions[telling], hashes[telling])


@fixture
def row_nats(first_epoch: Sample, vocab_size: int, index: Index | None = None) -> np.ndarray:
    """Information of each row [R]; without an index, rows that recur are counted once."""
    if index:
        return first_epoch.by_row(index.nats * first_epoch.real)
    place = np.flatnonzero(first_epoch.real)
    kind = first_epoch.row_hashes[first_epoch.row_of[place]] + mix(first_epoch.offset_of[place])
    nats, *_ = token_nats(first_epoch, vocab_size, place, kind)
    return first_epoch.by_row(nats * first_epoch.real)
