"""Text to ids and back: bytes, characters, words, byte-level BPE.

Id 0 is the separator in every kind here. It stands between documents and no text encodes to it.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Self

import numpy as np
import tokenizers

from lm_jax.data.tokenizers.base import Tokenizer, byte_alphabet, split_words

UNKNOWN = "<unk>"
SEPARATOR = "<|endoftext|>"  # what the separator is called outside
# What str.split takes for white space, but the newline; the library's \s lacks the last four.
_BLANKS = r"(?:[^\S\n]|[\x1c-\x1f])+"


class ByteTokenizer(Tokenizer):
    """One id a byte: 1 + its value."""

    kind = "byte"
    _bytes = [b"", *(bytes((value,)) for value in range(256))]

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text's UTF-8 bytes, int32."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 1

    def _library_parts(self) -> tokenizers.Tokenizer:
        return _byte_level([SEPARATOR, *byte_alphabet()], [])


class CharTokenizer(Tokenizer):
    """One id a character of the training split, in code-point order."""

    kind = "char"
    ARGUMENTS = ("characters",)

    def __init__(self, characters: str) -> None:
        """`characters`: the distinct ones, sorted."""
        self.characters = characters
        self._codes = _code_points(characters)
        self._bytes = [b"", *(character.encode() for character in characters)]

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text's characters, int32.

        Raises:
            ValueError: if the train split lacks a character.
        """
        codes = _code_points(text)
        places = np.searchsorted(self._codes, codes)
        known = self._codes[np.minimum(places, len(self._codes) - 1)] == codes
        if not known.all():
            at = int(np.argmin(known))
            raise ValueError(
                f"Character {text[at]!r} (U+{ord(text[at]):04X}) at position {at} does not occur "
                "in the train split, so kind char has no id for it: set "
                "--config.tokenizer.kind=byte or bpe."
            )
        return (places + 1).astype(np.int32)

    def _library_parts(self) -> tokenizers.Tokenizer:
        library = _whole_pieces([SEPARATOR, *self.characters])
        library.pre_tokenizer = tokenizers.pre_tokenizers.Split(
            tokenizers.Regex(r"[\s\S]"), "isolated"
        )
        library.decoder = tokenizers.decoders.Fuse()
        return library


class WordTokenizer(Tokenizer):
    r"""One id a word between white space, and one for the newline (WikiText's <eos>).

    It decodes into the layout of WikiText's files: a space before each word and each newline.
    """

    kind = "word"
    ARGUMENTS = ("types",)

    def __init__(self, types: list[str]) -> None:
        r"""`types`: words, and "\n" for the newline, in id order from 1."""
        self.types = types
        self._ids = {word: i for i, word in enumerate(types, start=1)}
        self._bytes = [b"", *(f" {word}".encode() for word in types)]

    @property
    def line_end(self) -> int:
        """Id of the newline; the separator where the train split had none."""
        return self._ids.get("\n", self.separator)

    def encode(self, text: str) -> np.ndarray:
        """Ids of the words and newlines, int32; an unseen word is <unk>.

        Raises:
            ValueError: if a word is unseen and there is no <unk>.
        """
        unknown = self._ids.get(UNKNOWN, -1)
        ids = np.fromiter((self._ids.get(word, unknown) for word in split_words(text)), np.int32)
        if unknown == -1 and (missing := np.flatnonzero(ids == -1)).size:
            word = next(itertools.islice(split_words(text), int(missing[0]), None))
            raise ValueError(
                f"Word {word!r}, number {missing[0]} of its document, does not occur "
                f"in the train split, which has no {UNKNOWN} either: set "
                "--config.tokenizer.kind=bpe, or a tokenizer.vocab_size below the number of types."
            )
        return ids

    def _library_parts(self) -> tokenizers.Tokenizer:
        name = SEPARATOR
        while name in self._ids:  # a word like any other
            name = f"<{name}>"
        library = _whole_pieces([name, *self.types])
        library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(_BLANKS), "removed"),
                tokenizers.pre_tokenizers.Split("\n", "isolated"),
            ]
        )
        space = tokenizers.decoders.Replace(tokenizers.Regex("^"), " ")
        library.decoder = tokenizers.decoders.Sequence([space, tokenizers.decoders.Fuse()])
        return library


class BpeTokenizer(Tokenizer):
    """Byte-level byte-pair encoding with GPT-2's pre-tokenisation; any text round trips.

    The merges never see the separator: ids of the library's model are shifted up by one, so no
    string, however it is spelt, can produce id 0.
    """

    kind = "bpe"
    ARGUMENTS = ("vocabulary", "merges")
    PIECE = 1 << 17  # characters after which a text is cut where it can be
    AT_ONCE = 1 << 20  # characters given to the library at once: it needs 30 times their size
    # Bytes after which learning cuts a run without a boundary, be it a genome, an unspaced script
    # or a row of dashes: the library's time is quadratic in the longest, and no token needs more.
    LONGEST = 1 << 10

    def __init__(self, vocabulary: list[str], merges: list[list[str]]) -> None:
        """Tokens in id order from 1 and merges by rank, in the byte-level alphabet."""
        self.vocabulary = vocabulary
        self.merges = merges
        known = set(vocabulary)
        if "" in known or not all({a, b, a + b} <= known for a, b in merges):
            raise ValueError("a merge is of other tokens than those of the vocabulary")
        self._library = _byte_level(vocabulary, merges)
        bytes_of = byte_alphabet()
        self._bytes = [b"", *(bytes(bytes_of[c] for c in token) for token in vocabulary)]

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> Self:
        """Learns merges from `documents` until there are `vocab_size` ids."""
        library = tokenizers.Tokenizer(tokenizers.models.BPE())
        pre_tokenizers = tokenizers.pre_tokenizers
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [_gpt2_words(), pre_tokenizers.FixedLength(cls.LONGEST)]
        )
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=2,
            initial_alphabet=list(byte_alphabet()),
            show_progress=False,
        )
        pieces = itertools.chain.from_iterable(map(cls._pieces, documents))
        library.train_from_iterator(pieces, trainer)
        model = json.loads(library.to_str())["model"]
        vocabulary = sorted(model["vocab"], key=model["vocab"].__getitem__)
        return cls(vocabulary, [list(merge) for merge in model["merges"]])

    @classmethod
    def _pieces(cls, text: str) -> Iterator[str]:
        """Cuts a long text where white space begins, as pre-tokenisation does."""
        start = 0
        while len(text) - start > cls.PIECE:
            boundary = re.compile(r"\S(?=[ \n])").search(text, start + cls.PIECE)
            if boundary is None:
                break
            yield text[start : boundary.end()]
            start = boundary.end()
        yield text[start:]

    def _library_parts(self) -> tokenizers.Tokenizer:
        return _byte_level([SEPARATOR, *self.vocabulary], self.merges)

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text, int32."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of several documents, encoded in parallel where there are cores."""
        found: list[list[np.ndarray]] = [[] for _ in texts]
        for group in self._groups(texts):
            encoded = self._library.encode_batch_fast([piece for _, piece in group])
            for (number, _), one in zip(group, encoded, strict=True):
                found[number].append(np.array(one.ids, np.int32) + 1)
        return [np.concatenate(of_text) for of_text in found]

    @classmethod
    def _groups(cls, texts: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
        """Groups of pieces, about AT_ONCE characters each; a piece comes with its text's number."""
        group: list[tuple[int, str]] = []
        size = 0
        for number, text in enumerate(texts):
            for piece in cls._pieces(text):
                if group and size + len(piece) > cls.AT_ONCE:
                    yield group
                    group, size = [], 0
                group.append((number, piece))
                size += len(piece)
        yield group


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _gpt2_words() -> tokenizers.pre_tokenizers.PreTokenizer:
    return tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _byte_level(vocabulary: Sequence[str], merges: Iterable[Sequence[str]]) -> tokenizers.Tokenizer:
    """Tokens in id order and merges by rank, in the byte-level alphabet."""
    ids = {token: i for i, token in enumerate(vocabulary)}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [(a, b) for a, b in merges]))
    library.pre_tokenizer = _gpt2_words()
    library.decoder = tokenizers.decoders.ByteLevel()
    return library


def _whole_pieces(vocabulary: Sequence[str]) -> tokenizers.Tokenizer:
    """Tokens in id order; a piece that is none is <unk>, or an error where that is no token."""
    ids = {token: i for i, token in enumerate(vocabulary)}
    return tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=UNKNOWN))
