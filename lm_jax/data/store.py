"""The tokenised corpus on disk: ids, document offsets, exact counts, content hashes, manifest."""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lm_jax.data.corpora import Corpus
from lm_jax.data.tokenizers import Tokenizer, count_words, train_tokenizer

FORMAT = 1  # raised whenever the same corpus and tokenizer would give other files
MANIFEST_KEYS = (
    "format corpus corpus_fingerprint tokenizer_kind tokenizer_hash vocab_size entropy_rate splits"
).split()
SPLIT_KEYS = "tokens documents empty_documents bytes words sha256".split()
BATCH_CHARACTERS = 1 << 20  # text tokenised at once


@dataclasses.dataclass(frozen=True)
class Split:
    """One split: the documents' ids end to end, without separators."""

    name: str
    tokens: np.ndarray  # uint16 or uint32, memory-mapped and read-only
    document_starts: np.ndarray  # int64, one more than there are documents; the last is the length
    bytes: int  # of the documents' UTF-8
    words: int  # of the documents, count_words
    separator: int


@dataclasses.dataclass(frozen=True)
class Store:
    """A finished folder of splits and the tokenizer they were made with."""

    path: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer

    def split(self, name: str) -> Split:
        """The split of that name."""
        if name not in self.manifest["splits"]:
            raise ValueError(
                f"Corpus {self.manifest['corpus']!r} has no split {name!r} but "
                f"{', '.join(self.manifest['splits'])}: ask for one of these, or set "
                f"--config.data.{name}_fraction above 0 to hold one out."
            )
        counts = self.manifest["splits"][name]
        tokens, starts = _arrays(self.path, name)
        return Split(
            name, tokens, starts, counts["bytes"], counts["words"], self.tokenizer.separator
        )


def prepare(corpus: Corpus, *, tokenizer_kind: str, vocab_size: int, cache_dir: str) -> Store:
    """Tokenises every split of a corpus once; later calls open the finished store.

    The tokenizer learns from the train split alone. The store appears under its name only when
    it is complete.
    """
    stores = Path(cache_dir).expanduser() / "stores"
    key = json.dumps([corpus.fingerprint, tokenizer_kind, vocab_size, FORMAT])
    name = re.sub(r"[^\w.]+", "-", corpus.name)
    path = stores / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if path.exists():
        return open_store(path)
    stores.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=stores, prefix="partial-") as partial:
        folder = Path(partial) / "store"
        folder.mkdir()
        _write(corpus, tokenizer_kind, vocab_size, folder)
        try:
            os.replace(folder, path)
        except OSError:
            if not path.exists():  # otherwise another process finished the same store first
                raise
    return open_store(path)


def open_store(path: str | os.PathLike) -> Store:
    """Opens a finished store and checks every array against the manifest."""
    path = Path(path)
    manifest = _read_manifest(path / "manifest.json")
    tokenizer = Tokenizer.load(path / "tokenizer")
    if tokenizer.content_hash != manifest["tokenizer_hash"]:
        raise _broken(path / "tokenizer", "is not the tokenizer that the store was made with")
    if tokenizer.vocab_size != manifest["vocab_size"]:
        raise _broken(path / "manifest.json", "gives another vocab_size than the tokenizer")
    for name, counts in manifest["splits"].items():
        tokens, starts = _arrays(path, name)
        if len(tokens) != counts["tokens"]:
            problem = f"holds {len(tokens)} tokens, the manifest says {counts['tokens']}"
            raise _broken(_tokens_path(path, name), problem)
        if len(starts) != counts["documents"] + 1:
            problem = f"holds {len(starts) - 1} documents, the manifest says {counts['documents']}"
            raise _broken(_documents_path(path, name), problem)
        lowest, highest = int(tokens.min()), int(tokens.max())
        if lowest <= tokenizer.separator or highest >= tokenizer.vocab_size:
            problem = f"holds ids {lowest} to {highest}, not 1 to {tokenizer.vocab_size - 1}"
            raise _broken(_tokens_path(path, name), problem)
        if starts[0] != 0 or starts[-1] != len(tokens) or (np.diff(starts) <= 0).any():
            raise _broken(_documents_path(path, name), "does not divide the tokens into documents")
        if _content_hash(tokens, starts) != counts["sha256"]:
            raise _broken(_tokens_path(path, name), "differs from the sha256 in the manifest")
    return Store(path, manifest, tokenizer)


def _write(corpus: Corpus, tokenizer_kind: str, vocab_size: int, folder: Path) -> None:
    if not any(corpus.splits["train"]()):
        raise _no_tokens(corpus, "train", "no documents, or empty ones")
    tokenizer = train_tokenizer(tokenizer_kind, corpus.splits["train"](), vocab_size)
    tokenizer.save(folder / "tokenizer")
    manifest = {
        "format": FORMAT,
        "corpus": corpus.name,
        "corpus_fingerprint": corpus.fingerprint,
        "tokenizer_kind": tokenizer.kind,
        "tokenizer_hash": tokenizer.content_hash,
        "vocab_size": tokenizer.vocab_size,
        "entropy_rate": corpus.entropy_rate,
        "splits": {name: _write_split(corpus, name, tokenizer, folder) for name in corpus.splits},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _write_split(corpus: Corpus, name: str, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Streams a split's ids to disk and returns its entry in the manifest."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size < 1 << 16 else "<u4")
    lengths: list[int] = []
    empty = n_bytes = n_words = 0
    with _tokens_path(folder, name).open("wb") as file:
        _write_header(file, dtype, 0)
        for texts in _batches(corpus.splits[name]()):
            for text, ids in zip(texts, _encode(texts, tokenizer, name), strict=True):
                if len(ids) == 0:
                    empty += 1
                    continue
                file.write(ids.astype(dtype).tobytes())
                lengths.append(len(ids))
                n_bytes += len(text.encode())
                n_words += count_words(text)
        file.seek(0)
        _write_header(file, dtype, sum(lengths))
    if not lengths:
        raise _no_tokens(corpus, name, f"{empty} empty documents")
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
    np.save(_documents_path(folder, name), starts)
    tokens, starts = _arrays(folder, name)
    return {
        "tokens": len(tokens),
        "documents": len(lengths),
        "empty_documents": empty,
        "bytes": n_bytes,
        "words": n_words,
        "sha256": _content_hash(tokens, starts),
    }


def _write_header(file: BinaryIO, dtype: np.dtype, length: int) -> None:
    """NumPy's header, which leaves room for any length and so can be written again at the end."""
    header = {"descr": dtype.str, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    """Documents in groups of about BATCH_CHARACTERS."""
    for first in documents:
        batch, size = [first], len(first)
        while size < BATCH_CHARACTERS and (more := list(itertools.islice(documents, 1))):
            batch += more
            size += len(more[0]) + 1
        yield batch


def _encode(texts: list[str], tokenizer: Tokenizer, split: str) -> list[np.ndarray]:
    try:
        return tokenizer.encode_all(texts)
    except ValueError as error:
        raise ValueError(f"Split {split!r} cannot be tokenised: {error}") from error


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {path}: name a finished store, or delete the folder to rebuild it."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _broken(path, "is not JSON") from error
    missing = [key for key in MANIFEST_KEYS if key not in manifest]
    for name, counts in manifest.get("splits", {}).items():
        missing += [f"splits.{name}.{key}" for key in SPLIT_KEYS if key not in counts]
    if missing:
        raise _broken(path, f"lacks {', '.join(missing)}")
    if manifest["format"] != FORMAT:
        raise _broken(path, f"has format {manifest['format']}, this version reads {FORMAT}")
    return manifest


def _arrays(path: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    loaded = []
    for file in (_tokens_path(path, name), _documents_path(path, name)):
        if not file.is_file():
            raise FileNotFoundError(f"There is no {file}: delete the folder to rebuild the store.")
        try:
            loaded.append(np.load(file, mmap_mode="r", allow_pickle=False))
        except ValueError as error:
            raise _broken(file, f"is cut short or damaged ({error})") from error
    return loaded[0], loaded[1]


def _content_hash(tokens: np.ndarray, starts: np.ndarray) -> str:
    """sha256 of the ids followed by the offsets, as little-endian bytes."""
    digest = hashlib.sha256(np.ascontiguousarray(tokens))
    digest.update(np.ascontiguousarray(starts))
    return digest.hexdigest()


def _tokens_path(path: Path, name: str) -> Path:
    return path / f"{name}.tokens.npy"


def _documents_path(path: Path, name: str) -> Path:
    return path / f"{name}.documents.npy"


def _no_tokens(corpus: Corpus, split: str, found: str) -> ValueError:
    return ValueError(
        f"Split {split!r} of corpus {corpus.name!r} holds no token ({found}): name files for it, "
        "or change data.valid_fraction and data.test_fraction."
    )


def _broken(path: Path, problem: str) -> ValueError:
    return ValueError(f"{path} {problem}: delete the folder to rebuild the store.")
