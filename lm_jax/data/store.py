"""The tokenised corpus on disk: ids, document offsets, exact counts, content hashes, manifest."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lm_jax.data import files, parts
from lm_jax.data.corpora import Corpus
from lm_jax.data.parts import Part
from lm_jax.data.shards import Documents
from lm_jax.data.tokenizers.base import Tokenizer
from lm_jax.data.tokenizers.hf import HfTokenizer
from lm_jax.data.tokenizers.load import load_tokenizer, train_tokenizer
from lm_jax.files import sync

FORMAT = 1  # raised whenever the same corpus and tokenizer would give other files
MANIFEST_KEYS = (
    "format corpus corpus_fingerprint tokenizer_kind tokenizer_hash vocab_size entropy_rate splits"
).split()
SPLIT_KEYS = [*parts.COUNTS, "sha256"]
BLOCK = 1 << 20  # ids or offsets read at once


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


def prepare(
    corpus: Corpus,
    *,
    tokenizer_kind: str,
    vocab_size: int,
    folder: str = "",
    sample: int = 0,
    workers: int = 0,
    cache_dir: str,
) -> Store:
    """Tokenises every split of a corpus once; later calls open the finished store.

    The tokenizer is that of the checkpoint in `folder` (kind hf), or learns from the train split
    alone: from `sample` characters of it, taken in equal shares from the start of every piece, or
    from all (0). `workers` processes tokenise (0: one a core); the store is the same, byte for
    byte, for any number. It appears under its name only when it is complete; what a killed
    preparation had finished is beside it, and the next goes on from there. One process at a time
    may prepare a store.

    Raises:
        ValueError: if the corpus cannot be tokenised, or its files changed since they were hashed;
            then nothing is left behind.
        ChildProcessError: if a process that tokenised ended before its work did.
        OSError: if a file cannot be read, or what was written does not come back from the disk.
    """
    stores = Path(cache_dir).expanduser() / "stores"
    given = HfTokenizer.from_folder(Path(folder)) if folder else None
    decides_ids = tokenizer_kind if given is None else given.content_hash
    key = json.dumps([corpus.fingerprint, decides_ids, vocab_size, sample, FORMAT])
    name = re.sub(r"[^\w.]+", "-", corpus.name)
    path = stores / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    unfinished = path.with_name(f"{path.name}.parts")
    if path.exists():
        store = open_store(path)
        shutil.rmtree(unfinished, ignore_errors=True)  # a kill may have left some of it
        return store
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        tokenizer = _tokenizer(corpus, given, tokenizer_kind, vocab_size, sample, unfinished)
        _write_and_join(corpus, tokenizer, unfinished, workers)
        files.refuse_changed(corpus.files)
    except ValueError:
        shutil.rmtree(unfinished)
        raise
    try:
        open_store(unfinished / "store")
        os.replace(unfinished / "store", path)
    except ValueError as error:
        raise _not_written(error) from error
    except OSError:
        if not path.exists():  # otherwise another process finished the same store first
            raise
    shutil.rmtree(unfinished, ignore_errors=True)  # what is left goes when the store is opened
    return _open(path)


def open_store(path: str | os.PathLike) -> Store:
    """Opens a finished store and checks every array against the manifest, in bounded memory."""
    store = _open(path)
    path, manifest, tokenizer = store.path, store.manifest, store.tokenizer
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
        _check_content(path, name, tokens, starts, tokenizer, counts["sha256"])
    return store


def _open(path: str | os.PathLike) -> Store:
    """A store whose arrays nobody has looked at, or which is known to be whole."""
    path = Path(path)
    return Store(path, _read_manifest(path / "manifest.json"), load_tokenizer(path / "tokenizer"))


def _check_content(
    path: Path,
    name: str,
    tokens: np.memmap,
    starts: np.memmap,
    tokenizer: Tokenizer,
    sha256: str,
) -> None:
    digest = hashlib.sha256()
    highest, separated = -1, False
    for block in _blocks(tokens):
        digest.update(block)
        highest = max(highest, int(block.max()))
        separated |= bool((block == tokenizer.separator).any())
    if separated or highest >= tokenizer.vocab_size:
        problem = f"holds the separator, or an id that is not below {tokenizer.vocab_size}"
        raise _broken(_tokens_path(path, name), problem)
    ascending, last = starts[0] == 0, -1
    for block in _blocks(starts):
        digest.update(block)
        ascending &= bool((np.diff(block, prepend=last) > 0).all())
        last = int(block[-1])
    if not ascending or last != len(tokens):
        raise _broken(_documents_path(path, name), "does not divide the tokens into documents")
    if digest.hexdigest() != sha256:
        raise _broken(_tokens_path(path, name), "differs from the sha256 in the manifest")


def _blocks(array: np.memmap) -> Iterator[np.ndarray]:
    """The array, read block by block: pages touched through its map would stay in memory."""
    assert array.filename is not None
    with open(array.filename, "rb") as file:
        file.seek(array.offset)
        while len(block := np.fromfile(file, array.dtype, BLOCK)):
            yield block


def _tokenizer(
    corpus: Corpus,
    given: Tokenizer | None,
    kind: str,
    vocab_size: int,
    sample: int,
    unfinished: Path,
) -> Tokenizer:
    """The tokenizer that an earlier start has saved, or a new one; the parts read it there."""
    try:
        return load_tokenizer(unfinished)
    except (FileNotFoundError, ValueError):  # not there or not whole: learnt again, it is the same
        tokenizer = given or _learn(corpus, kind, vocab_size, sample)
    files.refuse_changed(corpus.files)  # the parts only know that they did not change meanwhile
    tokenizer.save(unfinished)
    return load_tokenizer(unfinished)


def _learn(corpus: Corpus, kind: str, vocab_size: int, sample: int) -> Tokenizer:
    """The tokenizer of the train split."""
    if not any(corpus.documents("train")):
        raise _no_tokens(corpus, "train", "no documents, or empty ones")
    documents = _heads(corpus.splits["train"], sample) if sample else corpus.documents("train")
    return train_tokenizer(kind, documents, vocab_size)


def _heads(pieces: Sequence[Documents], characters: int) -> Iterator[str]:
    """So many characters in all, in equal shares from the start of every piece."""
    share = -(-characters // len(pieces))
    for piece in pieces:
        left = share
        for text in piece():
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break


def _write_and_join(corpus: Corpus, tokenizer: Tokenizer, unfinished: Path, workers: int) -> None:
    """Tokenises what no earlier start has, or what since was damaged, and joins the parts."""
    all_parts = parts.plan(corpus.splits)
    damaged: set[Path] = set()
    while True:
        parts.write_all(all_parts, tokenizer, unfinished, workers)
        try:
            return _join(corpus, all_parts, tokenizer, unfinished)
        except parts.Damaged as error:
            if damaged & set(error.args):
                raise _not_written(error) from error
            damaged.update(error.args)
            for folder in error.args:
                print(f"{folder} is damaged and is tokenised again", file=sys.stderr)
                shutil.rmtree(folder)


def _join(corpus: Corpus, all_parts: list[Part], tokenizer: Tokenizer, unfinished: Path) -> None:
    """Writes the folder `store` from the finished parts."""
    folder = unfinished / "store"
    folder.mkdir(exist_ok=True)
    tokenizer.save(folder / "tokenizer")
    manifest = {
        "format": FORMAT,
        "corpus": corpus.name,
        "corpus_fingerprint": corpus.fingerprint,
        "tokenizer_kind": tokenizer.kind,
        "tokenizer_hash": tokenizer.content_hash,
        "vocab_size": tokenizer.vocab_size,
        "entropy_rate": corpus.entropy_rate,
        "splits": {
            name: _join_split(
                corpus,
                name,
                [unfinished / part.name for part in all_parts if part.split == name],
                tokenizer,
                folder,
            )
            for name in corpus.splits
        },
    }
    with (folder / "manifest.json").open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=1) + "\n")
        sync(file)


def _join_split(
    corpus: Corpus, name: str, folders: list[Path], tokenizer: Tokenizer, folder: Path
) -> dict[str, Any]:
    """Copies a split's parts end to end and returns its entry in the manifest.

    Raises:
        Damaged: if parts do not hold what was written into them.
    """
    records, damaged = {}, []
    for part in folders:
        if (record := parts.read_record(part, tokenizer)) is None:
            damaged.append(part)
        else:
            records[part] = record
    if damaged:
        raise parts.Damaged(*damaged)
    counts = {key: sum(record[key] for record in records.values()) for key in parts.COUNTS}
    if not counts["tokens"]:
        raise _no_tokens(corpus, name, f"{counts['empty_documents']} empty documents")
    digest = hashlib.sha256()
    with _tokens_path(folder, name).open("wb") as file:
        _write_header(file, parts.id_type(tokenizer), counts["tokens"])
        for part, record in records.items():
            of_part = hashlib.sha256()
            with (part / "ids").open("rb") as ids_file:
                while block := ids_file.read(BLOCK):
                    of_part.update(block)
                    digest.update(block)
                    file.write(block)
            if of_part.hexdigest() != record["ids"]:
                damaged.append(part)
        sync(file)
    with _documents_path(folder, name).open("wb") as file:
        _write_header(file, np.dtype("<i8"), counts["documents"] + 1)
        starts = np.zeros(1, "<i8")
        digest.update(starts)
        file.write(starts.tobytes())
        for part, record in records.items():
            lengths = np.fromfile(part / "lengths", "<i8")
            if hashlib.sha256(lengths).hexdigest() != record["lengths"]:
                damaged.append(part)
            starts = np.cumsum(np.concatenate([starts[-1:], lengths]))
            digest.update(starts[1:])
            file.write(starts[1:].tobytes())
        sync(file)
    if damaged:
        raise parts.Damaged(*dict.fromkeys(damaged))
    return {**counts, "sha256": digest.hexdigest()}


def _write_header(file: BinaryIO, dtype: np.dtype, length: int) -> None:
    header = {"descr": dtype.str, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


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


def _arrays(path: Path, name: str) -> tuple[np.memmap, np.memmap]:
    loaded = []
    for file in (_tokens_path(path, name), _documents_path(path, name)):
        if not file.is_file():
            raise FileNotFoundError(f"There is no {file}: delete the folder to rebuild the store.")
        try:
            loaded.append(np.load(file, mmap_mode="r", allow_pickle=False))
        except ValueError as error:
            raise _broken(file, f"is cut short or damaged ({error})") from error
    return loaded[0], loaded[1]


def _tokens_path(path: Path, name: str) -> Path:
    return path / f"{name}.tokens.npy"


def _documents_path(path: Path, name: str) -> Path:
    return path / f"{name}.documents.npy"


def _no_tokens(corpus: Corpus, split: str, found: str) -> ValueError:
    return ValueError(
        f"Split {split!r} of corpus {corpus.name!r} holds no token ({found}): name files for it, "
        "or change data.valid_fraction and data.test_fraction."
    )


def _not_written(error: Exception) -> OSError:
    return OSError(
        f"What was written does not come back from the disk ({error}): check the disk or name "
        "another --config.data.cache_dir, and start again."
    )


def _broken(path: Path, problem: str) -> ValueError:
    return ValueError(f"{path} {problem}: delete the folder to rebuild the store.")
