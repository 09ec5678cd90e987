"""N-grams of a text: how long one must be to be no coincidence, and where it recurs."""

import dataclasses
import functools
import math

import numpy as np

from lm_jax.doctor import numbers
from lm_jax.doctor.data.sample import PIECE, Sample, distinct, mix
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
    """Nats of each token given the few before it [N], as well by frequent contexts alone [N].

    The third array says which tokens are counted [N]. Of the tokens at `counted_at` [K] the first
    of each `kind` [K] is, so text that is merely read twice stays as informative as it is. A token
    is predicted from the counts of the others (leave one out, smoothed by one uniform observation)
    given up to six tokens before it; the context that predicts it best decides, so that no more
    nats are claimed than the text has.

    Raises:
        Skip: few tokens are counted.
    """
    _, first, number = distinct(kind)
    # Of a large text, pieces spread over all of it.
    every = -(-len(first) // MOST_COUNTED) or 1
    chosen = sample.piece_of[counted_at[first]] % every == 0
    if chosen.sum() < FEWEST:
        raise Skip(
            f"{sample.size} hold only {chosen.sum():,} distinct n-grams or tokens in distinct "
            "rows: too little text to tell copies from coincidence"
        )
    counted, own = np.zeros((2, len(sample.tokens)), bool)
    counted[counted_at[first[chosen]]] = True
    own[counted_at] = chosen[number]

    place = np.arange(len(sample.tokens))
    new = np.diff(sample.units, prepend=-1) != 0
    depth = place - np.maximum.accumulate(np.where(new, place, 0))
    probability, cautious = np.full((2, len(sample.tokens)), 1 / vocab_size)
    of_context = np.zeros(len(sample.tokens), np.uint64)
    for context in range(min(LONGEST_CONTEXT + 1, len(sample.tokens))):
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


def least_of(total: int) -> float:
    """Nats from which text is telling among so many tokens; see `Index.least_nats`."""
    return 2 * math.log(total)


def independent_nats(
    sample: Sample, vocab_size: int, least_nats: float, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """`token_nats` with repeats of a length removed that are copies and no coincidence.

    A template with a few free fields repeats its fixed text by nature. Were that counted once, it
    would look informative. So the length grows until grams of it carry `least_nats` in all but a
    hundredth of the pieces of text, up to `longest`. Contexts that were seen a few times do not
    count in that: edited copies of a text are no template.
    """
    n = SHORTEST
    while True:
        positions, hashes = sample.grams(n)
        nats, cautious, counted = token_nats(sample, vocab_size, positions + n - 1, hashes)
        if n >= longest:
            return nats, counted
        number = np.bincount(sample.piece_of[counted])
        total = np.bincount(sample.piece_of[counted], cautious[counted])
        low = float(np.quantile((total / np.maximum(number, 1))[number > 0], ODD))
        if n * low >= least_nats:
            return nats, counted
        n = min(longest, max(2 * n, math.ceil(least_nats / max(low, 1e-9))))


def row_nats(sample: Sample, vocab_size: int) -> np.ndarray:
    """Information of each row [R], rows that occur several times counted once."""
    place = np.flatnonzero(sample.real)
    kind = mix(sample.row_hashes[sample.row_of[place]] + mix(sample.offset_of[place]))
    return sample.by_row(token_nats(sample, vocab_size, place, kind)[0] * sample.real)


def _others(hashes: np.ndarray, counted: np.ndarray, own: np.ndarray) -> np.ndarray:
    """How many other counted places have the same hash, told by its low bits.

    One of 32 hashes may meet another's bucket, which makes a token look more predictable.
    """
    bucket = (hashes & np.uint64(BUCKETS - 1)).astype(np.int64)
    count = np.bincount(bucket[counted], minlength=BUCKETS).astype(np.int32)
    return np.maximum(count[bucket] - own, 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """The telling n-grams of a sample, those that no coincidence repeats, and where they recur.

    Attributes:
        sample: whose grams.
        n: how many tokens they have.
        nats: those of all tokens up to a position, summed [N + 1].
        share: telling grams among all n-grams.
        positions: where each gram begins [G].
        hashes: of each gram [G].
    """

    sample: Sample
    n: int
    nats: np.ndarray
    share: float
    positions: np.ndarray
    hashes: np.ndarray

    @staticmethod
    def build(sample: Sample, total: int, vocab_size: int) -> "Index":
        """Chooses n for comparisons among `total` tokens; `Skip` where nothing is telling."""
        least_nats = least_of(total)
        width = int(np.median(np.repeat(sample.lengths, sample.lengths)))  # of the median token
        longest = max(SHORTEST, min(width, PIECE) // 2)
        of_token, counted = independent_nats(sample, vocab_size, least_nats, longest)
        mean = float(of_token[counted].mean())
        n = max(SHORTEST, math.ceil(1.5 * least_nats / max(mean, 1e-9)))
        nats = np.concatenate([[0.0], np.cumsum(of_token)])
        positions, hashes = sample.grams(n)
        telling = nats[positions + n] - nats[positions] >= least_nats
        if n > SAME_PIECE * width or telling.sum() < FEWEST:
            raise Skip(
                f"{sample.name} has about {mean:.2f} nats a token, so only {n}-grams are no "
                f"coincidence among {total:,} tokens: too long or too few in rows of {width}"
            )
        share = float(telling.mean())
        return Index(sample, n, nats, share, positions[telling], hashes[telling])

    @functools.cached_property
    def _known(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The distinct hashes in order [K], the first gram of each [K], the number of each [G]."""
        return distinct(self.hashes)

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

    @property
    def nats_of_rows(self) -> np.ndarray:
        """Information of each row [R]."""
        return self.sample.by_row(np.diff(self.nats) * self.sample.real)

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """First position of each gram in this sample, -1 where it does not occur."""
        known, first, _ = self._known
        place = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        return np.where(known[place] == hashes, self.positions[first[place]], -1)

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
