"""The tokenised corpus on disk: ids, document offsets, exact counts, content hashes, manifest."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm_jax import console
from lm_jax.data import files, parts
from lm_jax.data.corpora import Corpus
from lm_jax.data.parts import Part
from lm_jax.data.recipe import Recipe, learn, no_tokens
from lm_jax.data.tokenizers.base import Tokenizer
from lm_jax.data.tokenizers.hf import HfTokenizer
from lm_jax.data.tokenizers.load import load_tokenizer
from lm_jax.files import write_text

FORMAT = 1  # raised whenever the same corpus and tokenizer would give other files
MANIFEST_KEYS = (
    "format corpus corpus_fingerprint tokenizer_kind tokenizer_hash vocab_size entropy_rate splits"
).split()
SPLIT_KEYS = [*parts.COUNTS, "sha256"]
_READS = ("tokenizer_hash", "tokenizer_identity")  # of a manifest; one of them tells ids apart
_SEAL = "sha256"  # of the rest of a manifest
BLOCK = 1 << 20  # ids or offsets read at once


@dataclasses.dataclass(frozen=True)
class Split:
    """One split: the documents' ids end to end, without separators."""

    name: str
    tokens: np.ndarray  # uint16 or uint32, memory-mapped and read-only
    document_starts: np.ndarray  # int64, one more than there are documents; the last is the length
    bytes: int  # of all documents in UTF-8
    words: int  # of all documents, as count_words counts them
    separator: int


@dataclasses.dataclass(frozen=True)
class Store:
    """A finished folder of splits and the tokenizer they were made with."""

    path: Path
    manifest: dict[str, Any] = dataclasses.field(repr=False)
    tokenizer: Tokenizer

    def split(self, name: str) -> Split:
        """The split of that name.

        Raises:
            ValueError: if the corpus has no such split.
        """
        if name not in self.manifest["splits"]:
            raise ValueError(
                f"Corpus {self.manifest['corpus']!r} has no split {name!r} but "
                f"{', '.join(self.manifest['splits'])}: ask for one of these, or set "
                f"--config.data.{name}_fraction above 0 to hold one out."
            )
        counts = self.manifest["splits"][name]
        tokens, starts = map(_load, _array_paths(self.path, name))
        return Split(
            name, tokens, starts, counts["bytes"], counts["words"], self.tokenizer.separator
        )


def same_data(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two manifests are of the same data.

    The entropy rate of a known source is computed, and NumPy's versions differ in its last bits.
    A tokenizer that does the same may be in another file; version 0.3 kept the hash of that alone.
    """
    names = {*MANIFEST_KEYS} - {"entropy_rate", "tokenizer_hash"}
    same = all(one.get(name) == other.get(name) for name in names)
    alike = (one[key] == other[key] for key in _READS if key in one and key in other)
    return same and any(alike)


def read_recipe(
    corpus: Corpus,
    *,
    tokenizer_kind: str,
    vocab_size: int,
    folder: str = "",
    sample: int = 0,
    cache_dir: str,
) -> Recipe:
    """The recipe of the store that `prepare` makes of the same arguments."""
    given = HfTokenizer.from_folder(Path(folder)) if folder else None
    decides_ids = tokenizer_kind if given is None else given.content_hash
    key = files.hash_json([corpus.fingerprint, decides_ids, vocab_size, sample, FORMAT])
    name = re.sub(r"[^\w.]+", "-", corpus.name)
    path = Path(cache_dir).expanduser() / "stores" / f"{name}-{key[:12]}"
    return Recipe(corpus, given, tokenizer_kind, vocab_size, sample, path)


def prepare(corpus: Corpus, *, workers: int = 0, **options: Any) -> Store:
    """Tokenises every split of a corpus once; later calls open the finished store.

    The tokenizer is that of the checkpoint in `folder` (kind hf), or it learns from the train split
    alone: from `sample` characters of it, in equal shares from the start of every piece, or from
    all (0). `workers` processes tokenise (0: one a core); the store is the same, byte for byte, for
    any number. It gets its name only when it is complete. A killed preparation leaves its finished
    parts beside it, and the next one goes on from there. One process at a time may prepare a store.

    The options are those of `read_recipe`.

    Raises:
        ValueError: if the corpus cannot be tokenised, or its files changed since they were hashed;
            then nothing is left behind.
        FileExistsError: if several machines prepare it.
        ChildProcessError: if a process that tokenised ended before its work did.
        OSError: if a file cannot be read, or the disk does not give back what was written.
    """
    recipe = read_recipe(corpus, **options)
    path = recipe.path
    unfinished = path.with_name(f"{path.name}.parts")
    if path.exists():
        with console.phase("checking the tokens"):
            store = open_store(path)
        for left in (unfinished, recipe.shared):  # by a kill
            shutil.rmtree(left, ignore_errors=True)
        return store
    if any(recipe.shared.glob("*")):
        raise FileExistsError(
            f"{recipe.shared} holds parts of this store that several machines write: join them by "
            "python -m lm_jax.data.prepare, or delete the folder to prepare all of it here."
        )
    try:
        tokenizer = learn(recipe, unfinished)
        _write_and_join(corpus, tokenizer, unfinished, workers)
        files.refuse_changed(corpus.files)
    except ValueError:
        shutil.rmtree(unfinished)
        raise
    return finish_store(path, unfinished)


def finish_store(path: Path, unfinished: Path) -> Store:
    """Checks the store in the folder `unfinished`, gives it its name and removes the folder.

    Raises:
        OSError: if the disk does not give back what was written.
    """
    try:
        store = open_store(unfinished / "store")
        os.replace(store.path, path)
    except ValueError as error:
        raise _not_written(error) from error
    except OSError:
        if not path.exists():
            raise
        store = open_store(path)  # another process finished it first
    shutil.rmtree(unfinished, ignore_errors=True)  # what stays is removed at the next opening
    return dataclasses.replace(store, path=path)


def open_store(path: str | os.PathLike) -> Store:
    """Opens a finished store and checks every array against the manifest, in bounded memory.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file does not hold what was written into it.
    """
    path = Path(path)
    manifest, tokenizer = _read_manifest(path / "manifest.json"), load_tokenizer(path / "tokenizer")
    if tokenizer.content_hash != manifest["tokenizer_hash"]:
        raise _broken(path / "tokenizer", "is not the tokenizer that the store was made with")
    if tokenizer.vocab_size != manifest["vocab_size"]:
        raise _broken(path / "manifest.json", "gives another vocab_size than the tokenizer")
    for name, counts in manifest["splits"].items():
        _check_split(path, name, tokenizer, counts)
    return Store(path, manifest, tokenizer)


def _check_split(path: Path, name: str, tokenizer: Tokenizer, counts: dict[str, Any]) -> None:
    """Raises ValueError if a split's arrays are not those of the manifest."""
    tokens_path, starts_path = _array_paths(path, name)
    tokens, starts = _load(tokens_path), _load(starts_path)
    for file, array, kind, what, ends in (
        (tokens_path, tokens, parts.id_type(tokenizer), "tokens", 0),
        (starts_path, starts, np.dtype("<i8"), "documents", 1),
    ):
        if array.ndim != 1 or array.dtype != kind:
            raise _broken(file, f"holds an array {array.shape} of {array.dtype}, no row of {kind}")
        if (found := len(array) - ends) != counts[what]:
            raise _broken(file, f"holds {found} {what}, the manifest says {counts[what]}")
    digest = hashlib.sha256()
    for block in _blocks(tokens):
        digest.update(block)
        if (block == tokenizer.separator).any() or block.max() >= tokenizer.vocab_size:
            problem = f"holds the separator, or an id that is not below {tokenizer.vocab_size}"
            raise _broken(tokens_path, problem)
    ascending, last = starts[0] == 0, -1
    for block in _blocks(starts):
        digest.update(block)
        ascending &= bool((np.diff(block, prepend=last) > 0).all())
        last = int(block[-1])
    if not ascending or last != len(tokens):
        raise _broken(starts_path, "does not divide the tokens into documents")
    if digest.hexdigest() != counts["sha256"]:
        raise _broken(tokens_path, "differs from the sha256 in the manifest")


def _blocks(array: np.memmap) -> Iterator[np.ndarray]:
    """Reads an array block by block; pages touched through its map would stay in memory."""
    assert array.filename is not None
    with open(array.filename, "rb") as file:
        file.seek(array.offset)
        while len(block := np.fromfile(file, array.dtype, BLOCK)):
            yield block


def _write_and_join(corpus: Corpus, tokenizer: Tokenizer, unfinished: Path, workers: int) -> None:
    """Tokenises the parts that are missing or damaged, and joins all parts."""
    all_parts = parts.plan(corpus.splits)
    damaged: set[Path] = set()
    while True:
        parts.write_all(all_parts, tokenizer, unfinished, workers)
        try:
            return join_parts(corpus, all_parts, tokenizer, unfinished)
        except parts.Damaged as error:
            if damaged & set(error.args):
                raise _not_written(error) from error
            damaged.update(error.args)
            for folder in error.args:
                console.say(f"{folder} is damaged and is tokenised again")
                shutil.rmtree(folder)


def join_parts(
    corpus: Corpus, all_parts: Sequence[Part], tokenizer: Tokenizer, unfinished: Path
) -> None:
    """Writes the folder `store` from the finished parts in `unfinished`.

    Raises:
        Damaged: if parts do not hold what was written into them.
        ValueError: if a split holds no token.
    """
    folder = unfinished / "store"
    shutil.rmtree(folder, ignore_errors=True)  # of a kill, with files that nobody would remove
    folder.mkdir()
    tokenizer.save(folder / "tokenizer")
    splits = {}
    for name in corpus.splits:
        of_split = [unfinished / part.name for part in all_parts if part.split == name]
        counts = parts.join(of_split, tokenizer, *_array_paths(folder, name))
        if not counts["tokens"]:
            raise no_tokens(corpus, name, f"{counts['empty_documents']} empty documents")
        if empty := counts["empty_documents"]:
            console.say(f"{name}: {empty} documents without text are left out")
        splits[name] = counts
    manifest = {
        "format": FORMAT,
        "corpus": corpus.name,
        "corpus_fingerprint": corpus.fingerprint,
        "tokenizer_kind": tokenizer.kind,
        "tokenizer_hash": tokenizer.content_hash,
        "tokenizer_identity": tokenizer.identity,
        "vocab_size": tokenizer.vocab_size,
        "entropy_rate": corpus.entropy_rate,
        "splits": splits,
    }
    sealed = manifest | {_SEAL: files.hash_json(manifest)}
    write_text(folder / "manifest.json", json.dumps(sealed, indent=1) + "\n")


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {path}: name a finished store, or delete the folder to rebuild it."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in MANIFEST_KEYS if key not in manifest]
        for name, counts in manifest.get("splits", {}).items():
            missing += [f"splits.{name}.{k}" for k in SPLIT_KEYS if not _is_count(k, counts.get(k))]
    except (ValueError, RecursionError, TypeError, AttributeError) as error:
        raise _broken(path, "is not JSON of a store") from error
    if missing:
        raise _broken(path, f"lacks {', '.join(missing)}")
    if manifest["format"] != FORMAT:
        raise _broken(path, f"has format {manifest['format']}, this version reads {FORMAT}")
    seal = manifest.pop(_SEAL, None)
    # Those of version 0.3 have neither a seal nor this identity.
    if (seal or "tokenizer_identity" in manifest) and seal != files.hash_json(manifest):
        raise _broken(path, "is not what was written")
    return manifest


def _is_count(key: str, value: Any) -> bool:
    return isinstance(value, str if key == "sha256" else int)


def _array_paths(path: Path, name: str) -> tuple[Path, Path]:
    """A split's files of tokens and of document starts."""
    return path / f"{name}.tokens.npy", path / f"{name}.documents.npy"


def _load(path: Path) -> np.memmap:
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: delete the folder to rebuild the store.")
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # NumPy raises all kinds for a damaged header
        if isinstance(error, OSError):
            raise
        raise _broken(path, f"is cut short or damaged ({error})") from error


def _not_written(error: Exception) -> OSError:
    return OSError(
        f"What was written does not come back from the disk ({error}): check the disk or name "
        "another --config.data.cache_dir, and start again."
    )


def _broken(path: Path, problem: str) -> ValueError:
    return ValueError(f"{path} {problem}: delete the folder to rebuild the store.")
