"""Rows or documents of ids in flat arrays: what the checks of data work on."""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that it has an inverse mod 2^64
PIECE = 1024  # a longer document is no unit in which text recurs
LAGS = (-1, 0, 1, 2)  # places between an input and the target that might be it


class Shifts(NamedTuple):
    """How targets that were handed along match the inputs."""

    counts: np.ndarray  # that equal the input so many places on, and that were compared [2, LAGS]
    lags: tuple[int, ...]  # that they may have
    top: int  # largest target


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """Rows (or documents) end to end."""

    name: str  # what is read, for evidence
    tokens: np.ndarray  # ids [N], int64
    starts: np.ndarray  # first position of each row and the end of the last [R + 1]
    segments: np.ndarray  # number of the document within its row, 0 at padding [N]
    scored: np.ndarray  # whether the position is a scored target [N]; never the first of a row
    batches: np.ndarray  # number of the batch of each row, -1 for rows that came alone [R]
    boundaries: tuple[int, ...]  # ids that open or end a document within a row
    complete: bool  # whether the stream came to its end before `max_tokens`
    slots: bool  # whether rows have a fixed width, so that padding takes room
    shifts: tuple[Shifts, ...] = ()  # of each item with targets

    @property
    def size(self) -> str:
        """How much was read, in words."""
        rows = "rows" if self.slots else "documents"
        part = "" if self.complete else "the first "
        return f"{part}{self.real.sum():,} tokens in {len(self.lengths):,} {rows} of {self.name}"

    @property
    def largest_batch(self) -> int:
        """Rows of the largest batch; 1 for rows that came alone."""
        return max(int(np.max(np.bincount(self.batches[self.batches >= 0], minlength=1))), 1)

    @property
    def largest_item(self) -> int:
        """Tokens of the largest row or batch: as many as a reader may drop at the end."""
        return int(np.max(self.lengths)) * self.largest_batch

    @property
    def learnt(self) -> np.ndarray:
        """Whether a token is learnt [N]: scored targets of rows, every token of documents."""
        return self.scored if self.slots else self.real

    def head(self, tokens: int) -> "Sample":
        """The first rows that learn no more than so many tokens; all, if there are no more."""
        learnt = np.concatenate([[0], np.cumsum(self.learnt)])
        rows = max(int(np.searchsorted(learnt[self.starts[1:]], tokens, side="right")), 1)
        if rows >= len(self.lengths):
            return self
        end = int(self.starts[rows])
        cut = {name: getattr(self, name)[:end] for name in ("tokens", "segments", "scored")}
        cut |= {"starts": self.starts[: rows + 1], "batches": self.batches[:rows]}
        return dataclasses.replace(self, **cut, complete=False)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Positions of each row [R]."""
        return np.diff(self.starts)

    @functools.cached_property
    def real(self) -> np.ndarray:
        """Whether a position holds text and not padding [N]."""
        return self.segments > 0

    @functools.cached_property
    def text(self) -> np.ndarray:
        """Tokens of each row without its padding [R]."""
        return self.by_row(self.real)

    def by_row(self, values: np.ndarray) -> np.ndarray:
        """Sum of values [N] over each row [R]."""
        return np.bincount(self.row_of, values, minlength=len(self.lengths))

    @functools.cached_property
    def row_of(self) -> np.ndarray:
        """Row of each position [N]."""
        return np.repeat(np.arange(len(self.lengths), dtype=np.int32), self.lengths)

    @functools.cached_property
    def piece_of(self) -> np.ndarray:
        """Number of the piece of each position: a row, or 1024 tokens of a longer one [N]."""
        return np.cumsum(self.offset_of % PIECE == 0, dtype=np.int32) - 1

    @functools.cached_property
    def offset_of(self) -> np.ndarray:
        """Place of each position in its row [N]."""
        return np.arange(len(self.tokens)) - np.repeat(self.starts[:-1], self.lengths)

    @functools.cached_property
    def units(self) -> np.ndarray:
        """Number that changes wherever a row or a document begins [N]."""
        change = self.offset_of == 0
        change[1:] |= self.segments[1:] != self.segments[:-1]
        change |= np.isin(self.tokens, self.boundaries) | ~self.real
        return np.cumsum(change, dtype=np.int32)

    @functools.cached_property
    def _polynomial(self) -> tuple[np.ndarray, np.ndarray]:
        """Sums of the ids times powers of the multiplier, and the powers of its inverse [N + 1]."""
        power, inverse = np.empty((2, len(self.tokens) + 1), np.uint64)
        for row, base in ((power, MULTIPLIER), (inverse, pow(MULTIPLIER, -1, 1 << 64))):
            row[0], row[1:] = 1, base
            np.multiply.accumulate(row, out=row)
        power[1:] = np.cumsum(mix(self.tokens) * power[:-1])
        power[0] = 0
        return power, inverse

    @functools.cached_property
    def _scored_before(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.scored)])

    def scores(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Whether a target is scored within each span."""
        return self._scored_before[starts + length] > self._scored_before[starts]  # type: ignore[no-any-return]

    def spans(self, starts: np.ndarray, length: int | np.ndarray) -> np.ndarray:
        """64-bit hash of the ids of each span, the same wherever it stands."""
        sums, inverse = self._polynomial
        return (sums[starts + length] - sums[starts]) * inverse[starts]  # type: ignore[no-any-return]

    @functools.cached_property
    def row_hashes(self) -> np.ndarray:
        """64-bit hash of each row's ids, in their order [R]."""
        return self.spans(self.starts[:-1], self.lengths) + mix(self.lengths)

    def gram_hashes(self, n: int) -> np.ndarray:
        """Hash of the n ids from each position on, whatever they belong to [N - n + 1]."""
        return self.spans(np.arange(max(len(self.tokens) - n + 1, 0)), n)

    def grams(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """First positions and hashes of the n-grams that lie within one document of one row."""
        last = max(len(self.units) - n + 1, 0)
        inside = np.flatnonzero(self.units[n - 1 :] == self.units[:last])
        return inside, self.spans(inside, n)

    def pairs(self, chosen: np.ndarray) -> np.ndarray:
        """Neighbours within a document, both among the chosen [N], as one number each."""
        both = chosen[1:] & chosen[:-1] & (self.units[1:] == self.units[:-1])
        return (self.tokens[:-1][both] << 32) + (self.tokens[1:][both] & 0xFFFFFFFF)  # type: ignore[no-any-return]


def locate(values: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Place of each value among sorted known ones, and whether it is one of them."""
    if not len(known):
        return np.zeros(values.shape, int), np.zeros(values.shape, bool)
    place = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return place, known[place] == values


def mix(values: np.ndarray) -> np.ndarray:
    """Scrambles integers to 64 bits (Steele, Lea and Flood 2014, the finaliser of SplitMix64)."""
    x = np.asarray(values).astype(np.uint64) + np.uint64(MULTIPLIER)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
