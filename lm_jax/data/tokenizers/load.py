"""Tokenizers by kind: trained on a corpus, or loaded from a file."""

import collections
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from lm_jax.config.section import advice
from lm_jax.data.tokenizers.base import FILE_NAME, Tokenizer, split_words
from lm_jax.data.tokenizers.hf import HfTokenizer
from lm_jax.data.tokenizers.kinds import (
    UNKNOWN,
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    WordTokenizer,
)

KINDS: dict[str, Callable[..., Tokenizer]] = {
    cls.kind: cls for cls in (ByteTokenizer, CharTokenizer, WordTokenizer, BpeTokenizer)
}


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into `folder`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is not complete.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {path}: name a folder into which a tokenizer was saved."
        )
    kinds = KINDS | {HfTokenizer.kind: HfTokenizer}
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
        return kinds[payload.pop("kind")](**payload)
    except Exception as error:  # the library of tokenizers raises no narrower class
        raise ValueError(
            f"{path} is not a complete tokenizer file ({error!r}): prepare the corpus again."
        ) from error


def train_tokenizer(kind: str, documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a tokenizer on the train split's `documents` alone.

    `vocab_size` counts all ids, the separator too; 0 means as many as there are (not for bpe).

    Raises:
        ValueError: if the kind does not exist or `vocab_size` does not fit.
    """
    if kind == "byte":
        tokenizer: Tokenizer = ByteTokenizer()
    elif kind == "char":
        characters: set[str] = set()
        for document in documents:
            characters.update(document)
        tokenizer = CharTokenizer("".join(sorted(characters)))
    elif kind == "word":
        tokenizer = _train_words(documents, vocab_size)
    elif kind == "bpe":
        if vocab_size < (least := ByteTokenizer().vocab_size):
            raise ValueError(
                f"tokenizer.vocab_size={vocab_size} is too small for kind bpe: set at least "
                f"--config.tokenizer.vocab_size={least}, "
                "the 256 bytes and the separator."
            )
        tokenizer = BpeTokenizer.train(documents, vocab_size)
    else:
        raise ValueError(f"tokenizer.kind={kind!r} does not exist: {advice(kind, list(KINDS))}")
    if vocab_size not in (0, tokenizer.vocab_size):
        fitting = tokenizer.vocab_size if kind == "bpe" else 0
        raise ValueError(
            f"tokenizer.vocab_size={vocab_size} does not fit, for kind {kind} finds "
            f"{tokenizer.vocab_size} ids in the train split: set "
            f"--config.tokenizer.vocab_size={fitting}."
        )
    return tokenizer


def _train_words(documents: Iterable[str], vocab_size: int) -> WordTokenizer:
    """Keeps the most frequent words; equally frequent words are in alphabetical order."""
    counts: collections.Counter[str] = collections.Counter()
    for document in documents:
        counts.update(split_words(document))
    types = sorted(counts, key=lambda word: (-counts[word], word))
    if 0 < vocab_size <= len(types):
        kept = types[: vocab_size - 1]
        types = kept if UNKNOWN in kept else [*kept[:-1], UNKNOWN]
    return WordTokenizer(types)
