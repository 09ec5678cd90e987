"""Text to ids and back: bytes, characters, words, byte-level BPE.

Id 0 is the separator in every kind here. It stands between documents and no text encodes to it.
"""

import abc
import collections
import difflib
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from lm_jax.data.files import sync

FILE_NAME = "tokenizer.json"
UNKNOWN = "<unk>"
BLOCK = 1 << 20  # characters split into words at once: a list of words is ten times their size
WHITESPACE = np.array([c for c in range(0x3001) if chr(c).isspace()], np.uint32)


def count_words(text: str) -> int:
    """Words between white space, plus one for each newline (WikiText's <eos>)."""
    count = text.count("\n")
    for start in range(0, len(text), BLOCK):
        count += len(text[start : start + BLOCK].split())
        if start:  # a word across the cut is counted on both sides
            count -= not (text[start - 1].isspace() or text[start].isspace())
    return count


class Tokenizer(abc.ABC):
    """Encodes and decodes one document at a time; immutable."""

    kind: ClassVar[str]
    separator: int = 0

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, the separator included."""

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids of a document, int32."""

    @abc.abstractmethod
    def token_bytes(self, ids: np.ndarray) -> list[bytes]:
        """UTF-8 bytes that each id stands for; none for the separator."""

    @abc.abstractmethod
    def _payload(self) -> dict[str, Any]:
        """The constructor's arguments, which with the kind define the tokenizer."""

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of several documents."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: np.ndarray) -> str:
        """Text of the ids; bytes that are not UTF-8 show as U+FFFD."""
        return b"".join(self.token_bytes(ids)).decode("utf-8", errors="replace")

    def spans(self, ids: np.ndarray, text: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Bytes and words that belong to each of a document's ids.

        They sum to len(text.encode()) and count_words(text). A word belongs to the token that
        holds its first byte. Kind "word" needs `text` unless it has WikiText's layout and no word
        became <unk>; the others recover it from the ids.
        """
        del text
        pieces = self.token_bytes(ids)
        bytes_T = np.array([len(piece) for piece in pieces], np.int64)
        # Stray bytes, which only a cut-out part of a document can have, count as letters.
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
        content = json.dumps({"kind": self.kind, **self._payload()}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json into `folder`, whole or not at all."""
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{FILE_NAME}.{os.getpid()}")
        content = {"kind": self.kind, **self._payload()}
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, ensure_ascii=True))
            sync(file)
        os.replace(partial, path)

    @staticmethod
    def load(folder: str | os.PathLike) -> "Tokenizer":
        """The tokenizer that `save` wrote into `folder`."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no {path}: name a folder into which a tokenizer was saved."
            )
        from lm_jax.data.hf_tokenizer import HfTokenizer  # which imports this module

        kinds = KINDS | {HfTokenizer.kind: HfTokenizer}
        try:
            payload = json.loads(path.read_text(encoding="utf-8"))
            return kinds[payload.pop("kind")](**payload)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a complete tokenizer file ({error!r}): prepare the corpus again."
            ) from error


class ByteTokenizer(Tokenizer):
    """One id a byte: 1 + its value."""

    kind = "byte"
    vocab_size = 257

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text's UTF-8 bytes, int32."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 1

    def token_bytes(self, ids: np.ndarray) -> list[bytes]:
        """The byte of each id."""
        return [bytes((i - 1,)) if i else b"" for i in np.asarray(ids).tolist()]

    def _payload(self) -> dict[str, Any]:
        return {}


class CharTokenizer(Tokenizer):
    """One id a character of the training split, in code-point order."""

    kind = "char"

    def __init__(self, characters: str) -> None:
        """`characters`: the distinct ones, sorted."""
        self.characters = characters
        self._codes = _code_points(characters)
        self._bytes = [b"", *(character.encode() for character in characters)]

    @property
    def vocab_size(self) -> int:
        """Number of ids, the separator included."""
        return len(self.characters) + 1

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text's characters, int32; an unseen character is an error."""
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

    def token_bytes(self, ids: np.ndarray) -> list[bytes]:
        """The UTF-8 bytes of each character."""
        return [self._bytes[i] for i in np.asarray(ids).tolist()]

    def _payload(self) -> dict[str, Any]:
        return {"characters": self.characters}


class WordTokenizer(Tokenizer):
    r"""One id a word between white space, and one for the newline (WikiText's <eos>).

    It decodes into the layout of WikiText's files: a space before each word and each newline.
    """

    kind = "word"

    def __init__(self, types: list[str]) -> None:
        r"""`types`: words, and "\n" for the newline, in id order from 1."""
        self.types = types
        self._ids = {word: i for i, word in enumerate(types, start=1)}
        self._bytes = [b"", *(f" {word}".encode() for word in types)]

    @property
    def vocab_size(self) -> int:
        """Number of ids, the separator included."""
        return len(self.types) + 1

    @property
    def line_end(self) -> int:
        """Id of the newline; the separator where the train split had none."""
        return self._ids.get("\n", self.separator)

    def encode(self, text: str) -> np.ndarray:
        """Ids of the words and newlines, int32; an unseen word is <unk> or an error."""
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

    def token_bytes(self, ids: np.ndarray) -> list[bytes]:
        """Each word with the space before it."""
        return [self._bytes[i] for i in np.asarray(ids).tolist()]

    def spans(self, ids: np.ndarray, text: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Bytes and words of each id; with `text`, white space belongs to the word after it."""
        ids = np.asarray(ids)
        words_T = (ids != self.separator).astype(np.int64)
        if text is None:
            return np.array([len(piece) for piece in self.token_bytes(ids)], np.int64), words_T
        ends = [match.end() for match in re.finditer(r"\n|\S+", text)]
        if len(ends) != words_T.sum():
            raise ValueError(
                f"The text has {len(ends)} words and the ids {words_T.sum()}: "
                "give spans() the document that the ids were encoded from."
            )
        if ends:
            ends[-1] = len(text)
        bounds = itertools.pairwise([0, *ends])
        bytes_T = np.zeros(len(ids), np.int64)
        bytes_T[words_T > 0] = [len(text[start:end].encode()) for start, end in bounds]
        return bytes_T, words_T

    def _payload(self) -> dict[str, Any]:
        return {"types": self.types}


class BpeTokenizer(Tokenizer):
    """Byte-level byte-pair encoding with GPT-2's pre-tokenisation; any text round trips.

    The merges never see the separator: ids of the library's model are shifted up by one, so no
    string, however it is spelt, can produce id 0.
    """

    kind = "bpe"
    PIECE = 1 << 17  # characters of a piece, where the text can be cut
    AT_ONCE = 1 << 20  # characters given to the library at once: it needs 30 times their size

    def __init__(self, vocabulary: list[str], merges: list[list[str]]) -> None:
        """Tokens in id order from 1 and merges by rank, in the byte-level alphabet."""
        import tokenizers

        self.vocabulary = vocabulary
        self.merges = merges
        model = tokenizers.models.BPE(
            {token: i for i, token in enumerate(vocabulary)}, [(a, b) for a, b in merges]
        )
        self._library = tokenizers.Tokenizer(model)
        self._library.pre_tokenizer = _gpt2_words()
        to_byte = {character: byte for byte, character in enumerate(byte_alphabet())}
        self._bytes = [b"", *(bytes(to_byte[c] for c in token) for token in vocabulary)]

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> Self:
        """Learns merges from `documents` until there are `vocab_size` ids."""
        import tokenizers

        library = tokenizers.Tokenizer(tokenizers.models.BPE())
        library.pre_tokenizer = _gpt2_words()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=2,
            initial_alphabet=byte_alphabet(),
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

    @property
    def vocab_size(self) -> int:
        """Number of ids, the separator included."""
        return len(self.vocabulary) + 1

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
        """Pieces of some AT_ONCE characters together, each with the number of its text."""
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

    def token_bytes(self, ids: np.ndarray) -> list[bytes]:
        """The bytes of each token."""
        return [self._bytes[i] for i in np.asarray(ids).tolist()]

    def _payload(self) -> dict[str, Any]:
        return {"vocabulary": self.vocabulary, "merges": self.merges}


KINDS: dict[str, Callable[..., Tokenizer]] = {
    cls.kind: cls for cls in (ByteTokenizer, CharTokenizer, WordTokenizer, BpeTokenizer)
}


def train_tokenizer(kind: str, documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer that knows the train split's `documents` and nothing else.

    `vocab_size` counts all ids, the separator too; 0 means as many as there are (not for bpe).
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
        if vocab_size < ByteTokenizer.vocab_size:
            raise ValueError(
                f"tokenizer.vocab_size={vocab_size} is too small for kind bpe: set at least "
                f"--config.tokenizer.vocab_size={ByteTokenizer.vocab_size}, "
                "the 256 bytes and the separator."
            )
        tokenizer = BpeTokenizer.train(documents, vocab_size)
    else:
        nearest = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.0)[0]
        raise ValueError(f"tokenizer.kind={kind!r} does not exist: did you mean {nearest!r}?")
    if vocab_size not in (0, tokenizer.vocab_size):
        fitting = tokenizer.vocab_size if kind == "bpe" else 0
        raise ValueError(
            f"tokenizer.vocab_size={vocab_size} does not fit, for kind {kind} finds "
            f"{tokenizer.vocab_size} ids in the train split: set "
            f"--config.tokenizer.vocab_size={fitting}."
        )
    return tokenizer


def split_words(text: str) -> Iterator[str]:
    r"""Words between white space, and "\n" for each newline."""
    *lines, rest = text.split("\n")
    for line in lines:
        yield from line.split()
        yield "\n"
    yield from rest.split()


def _train_words(documents: Iterable[str], vocab_size: int) -> WordTokenizer:
    """The most frequent words, equally frequent ones by alphabet."""
    counts: collections.Counter[str] = collections.Counter()
    for document in documents:
        counts.update(split_words(document))
    types = sorted(counts, key=lambda word: (-counts[word], word))
    if 0 < vocab_size <= len(types):
        kept = types[: vocab_size - 1]
        types = kept if UNKNOWN in kept else [*kept[:-1], UNKNOWN]
    return WordTokenizer(types)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _gpt2_words() -> Any:
    import tokenizers

    return tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def byte_alphabet() -> list[str]:
    """The printable character by which byte-level BPE writes each byte value."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = itertools.count(0x100)
    return [chr(byte if byte in visible else next(shifted)) for byte in range(256)]
