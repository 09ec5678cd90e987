"""What `examine_data` was given, read once and shared by its checks."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lm_jax.doctor import old as findings
from lm_jax.doctor.data import grams
from lm_jax.doctor.data.sample import Sample
from lm_jax.doctor.old import require

COPIED_FAIL, COPIED_WARN = 0.10, 0.01  # share of train that stands earlier in train
CONTAINED = 0.01  # share of an evaluation split that may stand in train for no reason


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """The arguments of `examine_data`, of which `splits` are read: a sample, or why there is none.

    A split that was not given is absent.
    """

    splits: Mapping[str, Sample | findings.Skip]
    reading: Mapping[str, Any]  # options of `sample.read`
    vocab_size: int
    table_rows: int | None
    separator: int | None
    end: int | None
    unknown: int | None
    epoch_tokens: int | None
    tokenizer: tuple[Callable[[str], Any], Callable[[Any], str]] | None
    texts: Sequence[str] | None
    round_trip_loss: float
    byte_counts: Mapping[str, int] | None
    epochs: Sequence[Iterable[Any]] | None
    readers: Callable[[int], Iterable[Any]] | Mapping[int, Iterable[Any]] | None
    reader_counts: Sequence[int]
    resume: tuple[Sequence[Any], Sequence[Any]] | None
    split_ids: Mapping[str, Iterable[Any]] | None
    fingerprints: Mapping[str, Mapping[str, str]] | None

    def sample(self, name: str) -> Sample:
        """The sample of a split; `Skip` if it was not given or cannot be read."""
        found = self.splits.get(name, findings.Skip(f"no {name} split was given"))
        if isinstance(found, findings.Skip):
            raise found
        return found

    def samples(self) -> list[Sample]:
        """The splits that were given; `Skip` if there is none."""
        if not self.splits:
            raise findings.Skip("no split was given")
        return [self.sample(name) for name in self.splits]

    def evaluation(self) -> list[Sample]:
        """The valid and test splits that were given; `Skip` if there is none."""
        names = [name for name in self.splits if name != "train"]
        if not names:
            raise findings.Skip("neither a valid nor a test split was given")
        return [self.sample(name) for name in names]

    @functools.cached_property
    def first_epoch(self) -> Sample:
        """What was read of train's first epoch."""
        train = self.sample("train")
        return train if self.epoch_tokens is None else train.head(self.epoch_tokens)

    @property
    def total(self) -> int:
        """Tokens of all splits that could be read."""
        return sum(len(s.tokens) for s in self.splits.values() if isinstance(s, Sample))

    @functools.cached_property
    def row_nats(self) -> np.ndarray:
        """Information of each row of train's first epoch [R], also where no n-gram is telling."""
        try:
            return self.index.nats_of_rows
        except findings.Skip:
            return grams.row_nats(self.first_epoch, self.vocab_size)

    @property
    def index(self) -> grams.Index:
        """Where the n-grams of train's first epoch occur; `Skip` where none rules out chance."""
        if isinstance(self._index, findings.Skip):
            raise self._index
        return self._index

    @functools.cached_property
    def _index(self) -> grams.Index | findings.Skip:
        try:
            return grams.Index.build(self.first_epoch, self.total, self.vocab_size)
        except findings.Skip as reason:
            return reason

    @functools.cached_property
    def copied(self) -> tuple[float, float, int, int]:
        """Of train: share of tokens in copied pieces, its limit, their distance, tokens read."""
        index = self.index
        sizes = np.bincount(index.sample.piece_of)
        lags = index.lag[index.earlier & index.copied[index.sample.piece_of[index.positions]]]
        distance = int(np.median(lags)) if len(lags) else 0
        read = int(sizes.sum())
        limit = grams.limit(COPIED_WARN, read**2 / float((sizes.astype(float) ** 2).sum()))
        return float(sizes[index.copied].sum()) / read, limit, distance, read

    @functools.cached_property
    def train_repeats(self) -> bool:
        """Whether train holds so many copies that it is no yardstick for others."""
        share, limit, _, _ = self.copied
        return share > max(COPIED_FAIL, limit) or self.windows_overlap

    @property
    def known_to_repeat(self) -> bool:
        """`train_repeats`, where that can be told."""
        return isinstance(self._index, grams.Index) and self.train_repeats

    @property
    def windows_overlap(self) -> bool:
        """Whether train scores targets again in overlapping windows."""
        share, _, _, rows = self.index.windows
        return share > grams.limit(CONTAINED, rows)


def require_sizes(vocab_size: Any, counts: Mapping[str, Any], ids: Mapping[str, Any]) -> None:
    """Refuses numbers of the wrong type or range."""
    require(_is_count(vocab_size, 2), f"vocab_size={vocab_size!r}", "give an integer from 2 on")
    for name, count in counts.items():
        ok = _is_count(count, 1) or (count is None and name != "max_tokens")
        require(ok, f"{name}={count!r}", "give a positive integer or leave it out")
    for name, number in ids.items():
        ok = number is None or _is_count(number)
        require(ok, f"{name}={number!r}", "give an integer id or leave it out")


def require_text(tokenizer: Any, texts: Any, round_trip_loss: Any, byte_counts: Any) -> None:
    """Refuses wrong types of what concerns the tokenizer."""
    pair = isinstance(tokenizer, Sequence) and len(tokenizer) == 2 and all(map(callable, tokenizer))
    require(tokenizer is None or pair, "tokenizer", "give the two functions (encode, decode)")
    require(
        texts is None or _is_stream(texts),
        "texts",
        "give an iterable of strings, a single one in a list",
    )
    share = isinstance(round_trip_loss, int | float | np.integer | np.floating)
    share = share and not isinstance(round_trip_loss, bool) and 0 <= round_trip_loss < 1
    require(share, f"round_trip_loss={round_trip_loss!r}", "give a share from 0 to below 1")
    if byte_counts is not None:
        ok = isinstance(byte_counts, Mapping)
        ok = ok and all(_is_count(count, 0) for count in byte_counts.values())
        require(ok, "byte_counts", "give a mapping from the name of a split to a number of bytes")


def require_streams(
    given: Mapping[str, Any], epochs: Any, readers: Any, reader_counts: Any, resume: Any
) -> None:
    """Refuses wrong types of what hands out items."""
    for name, stream in given.items():
        ok = _is_stream(stream) or isinstance(stream, Mapping)
        require(ok, name, "give an iterable of token arrays or batches")
    require(
        epochs is None or _is_stream(epochs), "epochs", "give a list of the items of each epoch"
    )
    if isinstance(readers, Mapping):
        ok = all(_is_count(number, 1) for number in readers)
        require(ok, "readers", "give a mapping from a number of readers to their streams")
    else:
        ok = readers is None or callable(readers)
        require(ok, "readers", "give a function of a number of readers, or their streams by number")
    ok = isinstance(reader_counts, Sequence | np.ndarray)
    ok = ok and all(_is_count(number, 1) for number in reader_counts)
    require(ok, f"reader_counts={reader_counts!r}", "give a list of positive integers")
    pair = isinstance(resume, Sequence) and len(resume) == 2 and all(map(_is_stream, resume or ()))
    require(
        resume is None or pair,
        "resume",
        "give two lists of batches or of their hashes, uninterrupted and resumed",
    )


def require_names(split_ids: Any, fingerprints: Any) -> None:
    """Refuses wrong types of what is compared by name."""
    if split_ids is not None:
        ok = isinstance(split_ids, Mapping) and all(map(_is_stream, split_ids.values()))
        require(ok, "split_ids", "give a mapping from the name of a split to its document numbers")
    if fingerprints is not None:
        ok = isinstance(fingerprints, Mapping) and all(
            isinstance(places, Mapping) and all(isinstance(v, str) for v in places.values())
            for places in fingerprints.values()
        )
        require(ok, "fingerprints", "give a mapping from a name to the hashes (strings) by place")


def _is_count(value: Any, least: float = -math.inf) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        return False
    return bool(value >= least)


def _is_stream(value: Any) -> bool:
    """Whether it can be iterated over and is neither text nor a mapping."""
    return hasattr(value, "__iter__") and not isinstance(value, str | bytes | Mapping)
