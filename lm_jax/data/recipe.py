"""What a store is made of, and the tokenizer that its train split gives."""

import contextlib
import dataclasses
from pathlib import Path

from lm_jax import console
from lm_jax.data import files, shards
from lm_jax.data.corpora import Corpus
from lm_jax.data.tokenizers.base import Tokenizer
from lm_jax.data.tokenizers.load import load_tokenizer, train_tokenizer
from lm_jax.files import can_write


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a store is made of, and the folder that it gets."""

    corpus: Corpus
    given: Tokenizer | None  # of a checkpoint; None: it is learned
    tokenizer_kind: str
    vocab_size: int
    sample: int
    path: Path

    @property
    def shared(self) -> Path:
        """The folder into which several machines write parts; see `lm_jax.data.prepare`."""
        return self.path.with_name(f"{self.path.name}.shared")


def learn(recipe: Recipe, unfinished: Path) -> Tokenizer:
    """The tokenizer that an earlier start saved in `unfinished`, or a new one saved there.

    Raises:
        ValueError: if the train split has no text, or one that does not fit the tokenizer.
    """
    _make(unfinished)
    corpus, given, sample = recipe.corpus, recipe.given, recipe.sample
    with contextlib.suppress(FileNotFoundError, ValueError):
        return load_tokenizer(unfinished)
    # Missing or damaged: training it again gives the same one.
    if given is None:
        if not any(corpus.documents("train")):
            raise no_tokens(corpus, "train", "no documents, or empty ones")
        train = corpus.splits["train"]
        documents = shards.heads(train, sample) if sample else shards.chain(train)
        with console.phase("learning the tokenizer"):
            given = train_tokenizer(recipe.tokenizer_kind, documents, recipe.vocab_size)
    files.refuse_changed(corpus.files)  # a part only notices a change while it is written
    given.save(unfinished)
    return load_tokenizer(unfinished)


def _make(folder: Path) -> None:
    if not can_write(folder):
        raise PermissionError(
            f"{folder.parent} has no tokens of this corpus and tokenizer and cannot be written "
            "into: set --config.data.cache_dir to a folder of yours."
        )
    folder.mkdir(parents=True, exist_ok=True)


def no_tokens(corpus: Corpus, split: str, found: str) -> ValueError:
    """The error that a split is empty; `found` says what is there instead."""
    return ValueError(
        f"Split {split!r} of corpus {corpus.name!r} holds no token ({found}): name files for it, "
        "or change data.valid_fraction and data.test_fraction."
    )
