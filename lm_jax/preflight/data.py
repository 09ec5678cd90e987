"""The data of a run, examined."""

from collections.abc import Iterator

import numpy as np

from lm_jax.config import Config
from lm_jax.data import windows as pipeline
from lm_jax.data.store import Split, Store
from lm_jax.doctor.data import examine_data
from lm_jax.doctor.findings import Report

_SPLITS = ("valid", "test")


def examine_splits(cfg: Config, store: Store, windows: int) -> Report:
    """The splits, and the first batches of two epochs."""
    splits = {name: store.split(name) for name in ("train", *_SPLITS) if name in _names(store)}
    tokenizer = store.tokenizer
    texts = [tokenizer.decode(document) for document in _first(splits["valid"], 20)]

    def epoch(number: int) -> list[dict[str, np.ndarray]]:
        first = number * -(-windows // cfg.data.batch_size)
        calls = [range(first + i, first + i + 1) for i in range(2)]
        return list(
            pipeline.train_batches(
                splits["train"],
                seq_len=cfg.data.seq_len,
                batch_size=cfg.data.batch_size,
                document_mask=cfg.data.document_mask,
                seed=cfg.seed,
                calls=calls,
                movable=cfg.data.window_offset,
                threads=0,
            )
        )

    return examine_data(
        _documents(splits["train"]),
        *(_documents(splits[name]) if name in splits else None for name in _SPLITS),
        vocab_size=tokenizer.vocab_size,
        separator=tokenizer.separator,
        tokenizer=(tokenizer.encode, tokenizer.decode),
        texts=texts,
        epochs=[epoch(0), epoch(1)],
        max_tokens=1 << 21,
    )


def _names(store: Store) -> list[str]:
    return list(store.manifest["splits"])


def _documents(split: Split) -> Iterator[np.ndarray]:
    for first, end in zip(split.document_starts[:-1], split.document_starts[1:], strict=True):
        yield np.asarray(split.tokens[first:end])


def _first(split: Split, count: int) -> list[np.ndarray]:
    documents = _documents(split)
    return [document for document, _ in zip(documents, range(count), strict=False)]
