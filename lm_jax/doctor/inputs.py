"""What `examine_data` was given, read once and shared by its checks."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lm_jax.doctor import findings, grams
from lm_jax.doctor.sample import Sample

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

    @property
    def index(self) -> grams.Index:
        """Where the n-grams of train's first epoch occur; `Skip` where none rules out chance."""
        if isinstance(self._index, findings.Skip):
            raise self._index
        return self._index

    @functools.cached_property
    def _index(self) -> grams.Index | findings.Skip:
        try:
            train = self.sample("train")
            if self.epoch_tokens is not None:
                train = train.head(self.epoch_tokens)
            read = [s for s in self.splits.values() if isinstance(s, Sample)]
            total = sum(len(sample.tokens) for sample in read)
            return grams.Index.build(train, total, self.vocab_size)
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
    def windows_overlap(self) -> bool:
        """Whether train scores targets again in overlapping windows."""
        share, _, _, rows = self.index.windows
        return share > grams.limit(CONTAINED, rows)
