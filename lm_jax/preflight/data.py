"""The data of a run, examined."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import numpy as np

from lm_jax.config import Config
from lm_jax.data import windows as pipeline
from lm_jax.data.store import Split, Store
from lm_jax.data.windows import Batch
from lm_jax.doctor.data import examine_data
from lm_jax.doctor.findings import Report

Batches = Iterator[Batch]
_SPLITS = ("valid", "test")
_MOST = 1 << 21  # tokens of a split
_READERS = 8  # processes that read at the most
_FEW = 64  # windows that they share


def examine_splits(cfg: Config, store: Store, windows: int, *, level: str = "fast") -> Report:
    """The splits, batches of two epochs of `windows` and, at level full, what readers read."""
    held = store.manifest["splits"]
    splits = {name: store.split(name) for name in ("train", *_SPLITS) if name in held}
    tokenizer, train = store.tokenizer, splits["train"]
    batches = functools.partial(
        pipeline.train_batches,
        seq_len=cfg.data.seq_len,
        document_mask=cfg.data.document_mask,
        seed=cfg.seed,
        threads=0,
    )

    def of_run(numbers: range) -> list[Batch]:
        size, movable = cfg.data.batch_size, cfg.data.window_offset
        return list(batches(train, batch_size=size, movable=movable, calls=_single(numbers)))

    second = -(-windows // cfg.data.batch_size)  # epoch, where it begins
    hashes = {"the store": store.manifest["tokenizer_hash"], "as loaded": tokenizer.content_hash}
    few = _beginning(train, cfg.data.seq_len) if level == "full" else None
    return examine_data(
        _documents(train),
        *(_documents(splits[name]) if name in splits else None for name in _SPLITS),
        vocab_size=tokenizer.vocab_size,
        separator=tokenizer.separator,
        tokenizer=(tokenizer.encode, tokenizer.decode),
        texts=map(tokenizer.decode, itertools.islice(_documents(splits["valid"]), 20)),
        byte_counts={n: split.bytes for n, split in splits.items() if len(split.tokens) < _MOST},
        epoch_tokens=min(len(train.tokens), _MOST),
        fingerprints={"tokenizer": hashes},
        epochs=[of_run(range(first, first + 2)) for first in (0, second)],
        readers=None if few is None else functools.partial(_readers, batches, few),
        reader_counts=(1, 2, _READERS),
        resume=(of_run(range(4)), of_run(range(2, 4))) if level == "full" else None,
        max_tokens=_MOST,
    )


def _single(numbers: range) -> list[range]:
    """Calls of one update each."""
    return [range(i, i + 1) for i in numbers]


def _readers(batches: Callable[..., Batches], few: Split, count: int) -> list[Batches]:
    """One epoch of a few windows, as so many processes read it."""
    read = functools.partial(batches, few, batch_size=_READERS, process_count=count)
    return [read(calls=_single(range(_FEW // _READERS)), process_index=i) for i in range(count)]


def _beginning(split: Split, seq_len: int) -> Split | None:
    """The first windows of a split as a split of just these, or None if it has fewer."""
    positions = _FEW * seq_len + 1
    separators = split.document_starts[:-1] + np.arange(len(split.document_starts) - 1)
    tokens = positions - int(np.searchsorted(separators, positions))
    if tokens > len(split.tokens):
        return None
    starts = split.document_starts[: positions - tokens]
    return dataclasses.replace(
        split, tokens=split.tokens[:tokens], document_starts=np.append(starts, tokens)
    )


def _documents(split: Split) -> Iterator[np.ndarray]:
    for first, end in zip(split.document_starts[:-1], split.document_starts[1:], strict=True):
        yield np.asarray(split.tokens[first:end])
