"""The tokenizer of a Hugging Face checkpoint: exactly the text's bytes, no special tokens added."""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers

from lm_jax.data.tokenizers.base import PARTS, Tokenizer, byte_alphabet, components
from lm_jax.files import read_json

_SPACE = "\u2581"  # SentencePiece's space
_MOST = 10**7  # ids
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a token of byte fallback


class HfTokenizer(Tokenizer):
    """Byte-pair encoding by the tokenizers library, byte-level (GPT-2) or SentencePiece's.

    A text is encoded as it stands: without the space that SentencePiece puts before it and without
    truncation; text spelt like a special token is text. Special tokens stand for no bytes.
    """

    kind = "hf"
    ARGUMENTS = ("definition", "separator", "vocab_size")

    def __init__(self, definition: str, separator: int, vocab_size: int) -> None:
        """Read the definition.

        Args:
            definition: content of tokenizer.json.
            separator: id that opens a document.
            vocab_size: rows of the model's table, at least the number of the tokenizer's ids.

        Raises:
            ValueError: if the tokenizer is of another kind or has ids beyond the table.
        """
        self.definition, self.separator = definition, separator
        try:
            _refuse_early(json.loads(definition), vocab_size)
            # The library fills in what older files leave out.
            tree = json.loads(tokenizers.Tokenizer.from_str(definition).to_str())
        except Exception as error:  # the library raises no narrower class
            raise ValueError(
                f"tokenizer.json cannot be read by the tokenizers library ({error}); "
                "copy the checkpoint again."
            ) from error
        tree |= {"truncation": None, "padding": None}
        for part in PARTS:
            tree[part] = _without_prefix(tree[part])
        tree["decoder"] = _without_prefix(tree["decoder"], removed="Strip")
        self._parts = {part: list(components(tree[part])) for part in PARTS}
        self._bytes_of = _writing(tree["model"], itertools.chain(*self._parts.values()))
        self._bytes = self._table(tree, vocab_size)
        tree["model"]["dropout"] = None
        if tree["model"].get("unk_token") not in tree["model"]["vocab"]:
            tree["model"]["unk_token"] = None  # the library would stop at a text that wants it
        if not 0 <= separator < vocab_size or self._bytes[separator]:
            raise ValueError(
                f"The separator {separator} is no special token of tokenizer.json below vocab_size "
                f"{vocab_size}; correct bos_token_id in config.json."
            )
        self._library = tokenizers.Tokenizer.from_str(json.dumps(tree))
        self._library.encode_special_tokens = True  # encodes their spelling like any other text

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """The tokenizer of a checkpoint: tokenizer.json, with what config.json says of the model.

        The separator is the token that begins a text; if there is none, the one that ends it.

        Raises:
            ValueError: if a file or field is missing, or the tokenizer is of another kind.
        """
        tokenizer, config = read_json(folder / "tokenizer.json"), read_json(folder / "config.json")
        rows = config.get("vocab_size")
        if not isinstance(rows, int) or not 0 < rows <= _MOST:
            raise ValueError(
                f"{folder / 'config.json'}: vocab_size is {rows!r}; "
                "give the rows of the token table."
            )
        try:
            separator = _separator(folder, tokenizer, config)
            return cls(json.dumps(tokenizer, ensure_ascii=False), separator, rows)
        except ValueError:
            raise
        except Exception as error:  # of the library too
            raise ValueError(
                f"{folder / 'tokenizer.json'} is not as the tokenizers library writes it "
                f"({error!r}); copy the checkpoint again."
            ) from error

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text, int32.

        Raises:
            ValueError: if the tokenizer would change the text.
        """
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of several documents, encoded in parallel where there are cores."""
        documents = self._encode_any(texts)
        for ids, text in zip(documents, texts, strict=True):
            if not self._keeps(ids, text):
                at = self.kept(text)
                raise ValueError(
                    f"tokenizer.json: {self._culprit(text)} changes the text at character {at}, "
                    f"{text[at : at + 8]!r}; take such documents out, or a tokenizer that keeps "
                    "every byte."
                )
        return documents

    def _encode_any(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]

    def _library_parts(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self._library.to_str())

    def _table(self, tree: dict[str, Any], vocab_size: int) -> list[bytes]:
        """The bytes of each id below `vocab_size`: none of special tokens and of padding rows."""
        pieces = {i: self._bytes_of(token) for token, i in tree["model"]["vocab"].items()}
        for token in tree["added_tokens"]:
            plain = self._bytes_of is _from_byte_alphabet  # added tokens are not written in it
            piece = token["content"].encode() if plain else self._bytes_of(token["content"])
            pieces[token["id"]] = b"" if token["special"] else piece
        highest = max((i for i, piece in pieces.items() if piece), default=0)
        if highest >= vocab_size:
            raise ValueError(
                f"tokenizer.json has a token of id {highest}, which vocab_size={vocab_size} "
                "of config.json leaves out; take the tokenizer that belongs to the model."
            )
        return [pieces.get(i, b"") for i in range(vocab_size)]

    def _culprit(self, text: str) -> str:
        """The component of tokenizer.json that does not keep the text."""
        normalizer, pre_tokenizer = self._library.normalizer, self._library.pre_tokenizer
        names = {part: [one["type"] for one in self._parts[part]] for part in PARTS}
        normal = text
        if normalizer is not None:
            normal = normalizer.normalize_str(text)
            if "ByteLevel" not in names["normalizer"] and normal.replace(_SPACE, " ") != text:
                return f"normalizer ({', '.join(names['normalizer'])})"
        if pre_tokenizer is not None:
            pieces = "".join(piece for piece, _ in pre_tokenizer.pre_tokenize_str(normal))
            if self._bytes_of(pieces) != text.encode():
                return f"pre_tokenizer ({', '.join(names['pre_tokenizer'])})"
        return "model, or one of added_tokens,"


def _refuse_early(tree: dict[str, Any], vocab_size: int) -> None:
    """Raise ValueError for what the library does not survive.

    It takes memory for all ids below the largest, and panics, which Python cannot catch as an
    error, at a merge whose result is longer than every token.
    """
    model, added = tree["model"], tree.get("added_tokens") or []
    vocab = model["vocab"] if isinstance(model["vocab"], dict) else {}
    for i in (vocab_size, *vocab.values(), *(one["id"] for one in added)):
        if not isinstance(i, int) or not 0 <= i <= _MOST:
            raise ValueError(f"{i!r} is no id, nor a number of ids, up to {_MOST:,}")
    if len({*vocab.values()}) < len(vocab):
        raise ValueError("two tokens have one id")
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in model.get("merges") or ():
        a, b = merge.split(" ") if isinstance(merge, str) else merge
        if not (b.startswith(prefix) and {a, b, a + b[len(prefix) :]} <= vocab.keys()):
            raise ValueError(f"the merge {a} {b} is of other tokens than those of the vocabulary")


def _writing(model: dict[str, Any], parts: Iterable[dict[str, Any]]) -> Callable[[str], bytes]:
    """The function from a token of the model to its bytes.

    Raises:
        ValueError: if the model is neither byte-level BPE nor SentencePiece's.
    """
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model["type"] != "BPE" or affixes:
        raise ValueError(
            f"tokenizer.json: model is of type {model['type']}{' with affixes' if affixes else ''};"
            " supported is BPE without affixes."
        )
    for part in parts:
        if part["type"] == "ByteLevel":
            return _from_byte_alphabet
        if _SPACE in (part.get("replacement"), part.get("content")):
            return _from_sentencepiece
    raise ValueError(
        "tokenizer.json: pre_tokenizer is neither ByteLevel nor Metaspace; "
        "supported are byte-level BPE and SentencePiece's BPE."
    )


def _without_prefix(part: dict[str, Any] | None, removed: str = "Prepend") -> dict[str, Any] | None:
    """The same normaliser, pre-tokeniser or decoder without the space before the text.

    `removed` is the type that puts it there, or takes it away.
    """
    if part is None or part["type"] == removed:
        return None
    part = dict(part)
    for name in ("normalizers", "pretokenizers", "decoders"):
        if name in part:
            inner = (_without_prefix(one, removed) for one in part[name])
            part[name] = [one for one in inner if one is not None]
            if not part[name]:
                return None
    if "prepend_scheme" in part:
        part["prepend_scheme"] = "never"
    if "add_prefix_space" in part:
        part["add_prefix_space"] = False
    return part


def _from_byte_alphabet(token: str) -> bytes:
    """Bytes of a token in the alphabet of byte-level BPE, or its UTF-8 if it has other letters."""
    try:
        return bytes(map(byte_alphabet().__getitem__, token))
    except KeyError:
        return token.encode()


def _from_sentencepiece(token: str) -> bytes:
    """Bytes of a token as SentencePiece writes it."""
    byte = _BYTE.fullmatch(token)
    return bytes((int(byte[1], 16),)) if byte else token.replace(_SPACE, " ").encode()


def _separator(folder: Path, tokenizer: dict[str, Any], config: dict[str, Any]) -> int:
    """Id of the token that begins a text; if there is none, of the one that ends it."""
    path = folder / "tokenizer_config.json"
    named = read_json(path) if path.is_file() else {}
    for name in ("bos", "eos"):
        token = named.get(f"{name}_token")
        if isinstance(token, dict):
            token = token.get("content")
        for added in tokenizer.get("added_tokens", []):
            if added["content"] == token:
                return added["id"]
        given = config.get(f"{name}_token_id")
        if isinstance(given, list) and given:
            given = given[0]
        if isinstance(given, int):
            return given
    raise ValueError(
        f"{folder} names no token that begins or ends a text; give bos_token_id in config.json."
    )
