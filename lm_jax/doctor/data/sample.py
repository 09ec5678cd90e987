"""Token streams of any form read into flat arrays: what the checks of data work on."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from lm_jax.doctor import old as findings

MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that its powers mod 2^64 never vanish
PIECE = 1024  # a longer document is no unit in which text recurs
_END = object()


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """Rows (or documents) end to end.

    Attributes:
        name: what is read, for evidence.
        tokens: ids [N], int64.
        starts: first position of each row and the end of the last [R + 1].
        segments: number of the document within its row, 0 at padding [N].
        scored: whether the position is scored as a target [N]; never the first of a row.
        batches: number of the batch of each row, -1 for rows that came alone [R].
        boundaries: ids that open a document within a row.
        complete: whether the stream came to its end before `max_tokens`.
        slots: whether rows have a fixed width, so that padding takes room.
    """

    name: str
    tokens: np.ndarray
    starts: np.ndarray
    segments: np.ndarray
    scored: np.ndarray
    batches: np.ndarray
    boundaries: tuple[int, ...]
    complete: bool
    slots: bool

    @property
    def size(self) -> str:
        """How much was read, in words."""
        rows = "rows" if self.slots else "documents"
        part = "" if self.complete else "the first "
        return f"{part}{self.real.sum():,} tokens in {len(self.lengths):,} {rows} of {self.name}"

    @property
    def largest_item(self) -> int:
        """Tokens of the largest row or batch: as many as a reader may drop at the end."""
        rows = np.bincount(self.batches[self.batches >= 0], minlength=1)
        return int(np.max(self.lengths)) * max(int(np.max(rows)), 1)

    @property
    def targets(self) -> int:
        """Tokens that are learnt: scored targets of rows, every token of documents."""
        return int(np.sum(self.scored if self.slots else self.real))

    def head(self, tokens: int) -> "Sample":
        """The first rows with no more than so many targets; all, if there are no more."""
        learnt = np.concatenate([[0], np.cumsum(self.scored if self.slots else self.real)])
        rows = int(np.searchsorted(learnt[self.starts[1:]], tokens, side="right"))
        if rows >= len(self.lengths):
            return self
        rows = max(rows, 1)
        end = int(self.starts[rows])
        return dataclasses.replace(
            self,
            tokens=self.tokens[:end],
            starts=self.starts[: rows + 1],
            segments=self.segments[:end],
            scored=self.scored[:end],
            batches=self.batches[:rows],
            complete=False,
        )

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Positions of each row [R]."""
        return np.diff(self.starts)

    @functools.cached_property
    def real(self) -> np.ndarray:
        """Whether a position holds text and not padding [N]."""
        return self.segments > 0

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
    def row_hashes(self) -> np.ndarray:
        """64-bit hash of each row's ids, in their order [R]."""
        longest = int(self.lengths.max(initial=0))
        power = np.full(longest + 1, MULTIPLIER, np.uint64)
        power[0] = 1
        np.multiply.accumulate(power, out=power)
        total = np.concatenate(
            [[np.uint64(0)], np.cumsum(mix(self.tokens) * power[self.offset_of])]
        )
        return mix(total[self.starts[1:]] - total[self.starts[:-1]]) + mix(self.lengths)

    def gram_hashes(self, n: int) -> np.ndarray:
        """Hash of the n ids from each position on, whatever they belong to [N - n + 1]."""
        if len(self.tokens) < n:
            return np.zeros(0, np.uint64)
        block, width = mix(self.tokens), 1
        result: np.ndarray = np.zeros(len(block) + 1, np.uint64)
        done = 0
        while n:
            if n & 1:
                length = len(self.tokens) - done - width + 1
                result = result[:length] + _power(done) * block[done : done + length]
                done += width
            n >>= 1
            if n:
                block = block[:-width] + _power(width) * block[width:]
                width *= 2
        return mix(result)

    def grams(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """First positions and hashes of the n-grams that lie within one document of one row."""
        last = max(len(self.units) - n + 1, 0)
        inside = np.flatnonzero(self.units[n - 1 :] == self.units[:last])
        return inside, self.gram_hashes(n)[inside]


def mix(values: np.ndarray) -> np.ndarray:
    """Scrambles integers to 64 bits (Steele, Lea and Flood 2014, the finaliser of SplitMix64)."""
    x = np.asarray(values).astype(np.uint64) + np.uint64(MULTIPLIER)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _power(exponent: int) -> np.uint64:
    return np.uint64(pow(MULTIPLIER, exponent, 1 << 64))


def read(
    name: str,
    stream: Any,
    *,
    max_tokens: int,
    padding: int | None = None,
    separator: int | None = None,
    end: int | None = None,
) -> Sample:
    """Reads a stream until it ends or `max_tokens` are exceeded; `Skip` says what is unreadable.

    An item is one document or row (a sequence of ids), a batch of rows [..., B, T], or a mapping
    with "tokens" and perhaps "segment_ids" and "weights" of the same shape.
    """
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    widths: list[np.ndarray] = []
    batches: list[np.ndarray] = []
    total = batch = 0
    slots = padding is not None
    items = findings.call(f"reading {name}", iter, _items(stream))
    while (item := findings.call(f"reading {name}", next, items, _END)) is not _END:
        if total >= max_tokens:
            break
        tokens, segments, weights = _parse(item, f"item {len(columns)} of {name}")
        if segments is None:
            segments = _without_padding(tokens, padding, padding in (separator, end))
        if weights is None:
            weights = np.full(tokens.shape, np.nan, np.float32)
        columns.append((tokens.ravel(), segments.ravel(), weights.ravel()))
        count = math.prod(tokens.shape[:-1])
        widths.append(np.full(count, tokens.shape[-1]))
        if tokens.ndim > 1:
            per_batch = max(tokens.shape[-2], 1)
            batches.append(batch + np.arange(count) // per_batch)
            batch += count // per_batch
        else:
            batches.append(np.full(1, -1))
        slots |= tokens.ndim > 1 or isinstance(item, Mapping)
        total += tokens.size
    if not total:
        raise findings.Skip(f"{name} holds no token in {len(columns)} items.")
    lengths = np.concatenate(widths)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    segments = np.concatenate([column[1] for column in columns])
    weights = np.concatenate([column[2] for column in columns])
    # Where no weights are given, whatever follows text and is text is scored.
    scored = np.where(np.isnan(weights), (segments > 0) & (np.roll(segments, 1) > 0), weights > 0)
    scored[starts[:-1][lengths > 0]] = False
    return Sample(
        name=name,
        tokens=np.concatenate([column[0] for column in columns]),
        starts=starts,
        segments=segments,
        scored=scored,
        batches=np.concatenate(batches),
        boundaries=tuple(i for i in (separator, end) if i is not None),
        complete=item is _END,
        slots=slots,
    )


def _items(stream: Any) -> Iterable[Any]:
    """A single batch or document counts as a stream of one."""
    single = isinstance(stream, Mapping) or getattr(stream, "ndim", None) == 1
    return [stream] if single else stream


def _parse(item: Any, where: str) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Tokens as int64, segment ids and weights of an item; `Skip` if they are none."""
    parts: Mapping[str, Any] = item if isinstance(item, Mapping) else {"tokens": item}
    if "tokens" not in parts:
        raise findings.Skip(f"{where} has the keys {sorted(map(str, parts))} and no 'tokens'.")
    arrays = {
        key: findings.call(f"{key} of {where}", np.asarray, parts[key])
        for key in ("tokens", "segment_ids", "weights")
        if key == "tokens" or parts.get(key) is not None
    }
    tokens = arrays["tokens"]
    if tokens.ndim == 0 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise findings.Skip(
            f"{where} is {tokens.dtype} of shape {tokens.shape}, not an array of integer ids."
        )
    for key, array in arrays.items():
        if array.shape != tokens.shape:
            raise findings.Skip(f"{where}: {key} {array.shape} for tokens {tokens.shape}.")
        if array.dtype.kind not in "iufb" or not np.isfinite(array).all():
            raise findings.Skip(f"{where}: {key} holds values that are not finite numbers.")
    return tokens.astype(np.int64), arrays.get("segment_ids"), arrays.get("weights")


def _without_padding(tokens: np.ndarray, padding: int | None, first_is_text: bool) -> np.ndarray:
    """Segment 1 for text, 0 for the run of padding at a row's end.

    Where padding doubles as the id that ends a document, the first of the run is that end.
    """
    if padding is None:
        return np.ones(tokens.shape, np.int32)
    run = np.logical_and.accumulate((tokens == padding)[..., ::-1], axis=-1)[..., ::-1]
    if first_is_text:
        run[..., 1:] &= run[..., :-1].copy()
        run[..., :1] &= run.all(-1, keepdims=True)
    return (~run).astype(np.int32)


def read_all(name: str, streams: Iterable[Any], **options: Any) -> Iterator[Sample]:
    """Each of several streams, whole; `Skip` if one does not end before `max_tokens`."""
    for number, stream in enumerate(streams):
        sample = read(f"{name} {number}", stream, **options)
        if not sample.complete:
            raise findings.Skip(
                f"{name} {number} goes on after {options['max_tokens']:,} tokens: give streams of "
                "a small finite corpus, for each must be read whole, or a larger max_tokens."
            )
        yield sample
