"""The base of all tokenizers, and the count of words."""

import abc
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lm_jax.files import write_text

FILE_NAME = "tokenizer.json"
BLOCK = 1 << 20  # characters split into words at once: a list of words is ten times their size
WHITESPACE = np.array([c for c in range(0x3001) if chr(c).isspace()], np.uint32)


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

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of several documents."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: np.ndarray) -> str:
        """Text of the ids; bytes that are not UTF-8 show as U+FFFD."""
        return b"".join(self.token_bytes(ids)).decode("utf-8", errors="replace")

    def spans(self, ids: np.ndarray, text: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Bytes and words that belong to each of a document's ids.

        They sum to len(text.encode()) and count_words(text). A word belongs to the token that
        holds its first byte. Kind "word" needs `text` unless the text has WikiText's layout and no
        word became <unk>; the other kinds recover the text from the ids.
        """
        del text
        pieces = self.token_bytes(ids)
        bytes_T = np.array([len(piece) for piece in pieces], np.int64)
        # Part of a document may begin or end within a character; such bytes count as letters.
        decoded = b"".join(pieces).decode("utf-8", errors="surrogateescape")
        codes = np.frombuffer(decoded.encode("utf-32-le", errors="surrogatepass"), "<u4")
        sizes = 1 + (codes >= 0x80) + (codes >= 0x800).astype(np.int64) + (codes >= 0x10000)
        sizes[(codes >= 0xDC80) & (codes <= 0xDCFF)] = 1
        space = np.isin(codes, WHITESPACE)
        starts_word = ~space & np.concatenate([[True], space[:-1]])[: len(space)]
        offsets = (np.cumsum(sizes) - sizes)[starts_word | (codes == ord("\n"))]
        owner = np.searchsorted(np.cumsum(bytes_T), offsets, side="right")
        return bytes_T, np.bincount(owner, minlength=len(bytes_T))

    @functools.cached_property
    def content_hash(self) -> str:
        """sha256 of everything that decides the ids."""
        content = json.dumps(self._definition(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json into `folder`, whole or not at all."""
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(self._definition()))

    def _definition(self) -> dict[str, Any]:
        return {"kind": self.kind, **{name: getattr(self, name) for name in self.ARGUMENTS}}


def split_words(text: str) -> Iterator[str]:
    r"""Words between white space, and "\n" for each newline."""
    *lines, rest = text.split("\n")
    for line in lines:
        yield from line.split()
        yield "\n"
    yield from rest.split()


def byte_alphabet() -> list[str]:
    """The printable character by which byte-level BPE writes each byte value."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = itertools.count(0x100)
    return [chr(byte if byte in visible else next(shifted)) for byte in range(256)]
