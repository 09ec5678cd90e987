"""The base of all tokenizers, and the count of words."""

import abc
import functools
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tokenizers

from lm_jax.data.files import hash_json
from lm_jax.files import write_text

FILE_NAME = "tokenizer.json"
PARTS = ("normalizer", "pre_tokenizer")  # parts of tokenizer.json that may change the text
BLOCK = 1 << 20  # characters split into words at once: a list of words is ten times their size


def count_words(text: str) -> int:
    """Words between white space, plus one for each newline (WikiText's <eos>)."""
    count = text.count("\n")
    for start in range(0, len(text), BLOCK):
        count += len(text[start : start + BLOCK].split())
        if start:  # a word across the cut was counted on both sides
            count -= not (text[start - 1].isspace() or text[start].isspace())
    return count


class Tokenizer(abc.ABC):
    """Encodes and decodes one document at a time; immutable."""

    kind: ClassVar[str]
    ARGUMENTS: ClassVar[Sequence[str]] = ()  # the constructor's, kept as attributes and in the file
    separator: int = 0
    _bytes: list[bytes]  # of each id

    def __repr__(self) -> str:
        """Its kind and size."""
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"

    @property
    def vocab_size(self) -> int:
        """Number of ids, the separator included."""
        return len(self._bytes)

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids of a document, int32."""

    def token_bytes(self, ids: np.ndarray) -> list[bytes]:
        """UTF-8 bytes that each id stands for; none for the separator."""
        return [self._bytes[i] for i in np.asarray(ids).tolist()]

    @functools.cached_property
    def bytes_V(self) -> np.ndarray:
        """The number of bytes that each id stands for, uint32."""
        return np.array([len(piece) for piece in self._bytes], np.uint32)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of several documents."""
        return [self.encode(text) for text in texts]

    def encode_kept(self, texts: Sequence[str]) -> list[np.ndarray | None]:
        """Ids of several documents; None for one that its ids would not give back."""
        pairs = zip(self._encode_any(texts), texts, strict=True)
        return [ids if self._keeps(ids, text) else None for ids, text in pairs]

    def kept(self, text: str) -> int:
        """The number of characters before the first that the ids of a text would not give back."""
        (ids,) = self._encode_any([text])
        return len(os.path.commonprefix([text, self.decode(ids)]))

    def _encode_any(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode_all`, also where the ids stand for another text."""
        return self.encode_all(texts)

    def _keeps(self, ids: np.ndarray, text: str) -> bool:
        return b"".join(self.token_bytes(ids)) == text.encode()

    def decode(self, ids: np.ndarray) -> str:
        """Text of the ids; bytes that are not UTF-8 show as U+FFFD."""
        return b"".join(self.token_bytes(ids)).decode("utf-8", errors="replace")

    @functools.cached_property
    def content_hash(self) -> str:
        """sha256 of the file that `save` writes; see `identity` for what it does."""
        return hash_json(self._definition())

    @functools.cached_property
    def identity(self) -> str:
        """sha256 of what decides the ids, equal for all files and kinds that do the same."""
        return hash_json(self.behaviour())

    def behaviour(self) -> dict[str, Any]:
        """What decides the ids of a text and what they stand for, part by part.

        Left out is what decides none: rows of the table that stand for nothing, what is put around
        a text or cut from it, and how ids are decoded.
        """
        tree = json.loads(self._library_parts().to_str())
        model, pieces = tree["model"], dict(enumerate(self._bytes))
        added = [token for token in tree["added_tokens"] if not token["special"]]
        return {
            "separator": self.separator,
            "vocabulary": {token: i for token, i in model["vocab"].items() if pieces.get(i)},
            "merges": model.get("merges"),
            "model": [model.get(name) for name in ("type", "byte_fallback", "ignore_merges")],
            "added_tokens": added,
            # The library does not look for added tokens within a special one.
            "special_tokens": [
                token["content"]
                for token in tree["added_tokens"]
                if token["special"] and any(one["content"] in token["content"] for one in added)
            ],
            **{part: list(map(_deciding, components(tree[part]))) for part in PARTS},
        }

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json into `folder`, whole or not at all."""
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(self._definition()))

    def to_library(self) -> tokenizers.Tokenizer:
        """The same tokenizer for the tokenizers library, and with it for transformers.

        Its ids of a text are those of `encode`, and its text of ids is that of `decode`, if it is
        asked for no special tokens and its `encode_special_tokens` is True: then text spelt like
        the separator is text. With special tokens the separator stands before the text, as in
        training and evaluation.
        """
        library = self._library_parts()
        name = library.id_to_token(self.separator)
        library.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False)])
        library.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{name} $A",
            pair=f"{name} $A $B",
            special_tokens=[(name, self.separator)],
        )
        return library

    @abc.abstractmethod
    def _library_parts(self) -> tokenizers.Tokenizer:
        """Model, pre-tokeniser and decoder of `to_library`; the separator is in the vocabulary."""

    def _definition(self) -> dict[str, Any]:
        return {"kind": self.kind, **{name: getattr(self, name) for name in self.ARGUMENTS}}


def components(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The single normalisers or pre-tokenisers of a nested sequence."""
    if part is not None:
        for inner in part.get("normalizers", part.get("pretokenizers", [])):
            yield from components(inner)
        if part["type"] != "Sequence":
            yield part


def _deciding(part: dict[str, Any]) -> dict[str, Any]:
    """A component without what decides no ids."""
    return {name: value for name, value in part.items() if name != "trim_offsets"}


def split_words(text: str) -> Iterator[str]:
    r"""Words between white space, and "\n" for each newline."""
    *lines, rest = text.split("\n")
    for line in lines:
        yield from line.split()
        yield "\n"
    yield from rest.split()


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """The byte values by the printable characters in which byte-level BPE writes them."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = itertools.count(0x100)
    return {chr(byte if byte in visible else next(shifted)): byte for byte in range(256)}
