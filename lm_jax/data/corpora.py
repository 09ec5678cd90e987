"""Corpora: named splits of documents, read lazily and always in the same order."""

import contextlib
import dataclasses
import difflib
import fractions
import glob
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lm_jax.data.synthetic import MarkovSource

CORPORA = ("synthetic", "wikitext2", "wikitext103", "text", "tfds:NAME")
SYNTHETIC_DOCUMENTS = {"train": 200, "valid": 20, "test": 20}
SYNTHETIC_LENGTH = 10_000  # symbols a document
TFDS_SPLITS = {"train": ("train",), "valid": ("validation", "valid", "dev"), "test": ("test",)}

Documents = Callable[[], Iterator[str]]  # each call starts a fresh pass


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents by split."""

    name: str
    fingerprint: str  # sha256 of what defines the documents
    splits: Mapping[str, Documents]  # "train", "valid" and perhaps "test"
    entropy_rate: float | None = None  # nats per symbol, where it is known


def open_corpus(
    corpus: str,
    *,
    source_dir: str = "",
    files: str = "",
    valid_files: str = "",
    test_files: str = "",
    document: str = "file",
    valid_fraction: float = 0.1,
    test_fraction: float = 0.0,
    cache_dir: str,
) -> Corpus:
    """Opens corpus "synthetic", "wikitext2", "wikitext103", "text" or "tfds:NAME[:VERSION]".

    source_dir: folder of the corpus's own files; of a TFDS set, its data_dir.
    files, valid_files, test_files: paths or globs of corpus "text", separated by commas.
    document: what one document of corpus "text" is: "file", "line" or "jsonl:FIELD".
    valid_fraction, test_fraction: share held out where the corpus has no such split, by the hash
        of the document's content; of a single document the end is held out, in characters.
    cache_dir: downloads and prepared data sets live here.
    """
    cache = Path(cache_dir).expanduser()
    source = Path(source_dir).expanduser() if source_dir else None
    held_out = {"valid": valid_fraction, "test": test_fraction}
    for split, fraction in held_out.items():
        if not 0 <= fraction < 1 or sum(held_out.values()) >= 1:
            raise ValueError(
                f"data.{split}_fraction={fraction} leaves no text to train on or is negative: "
                "set data.valid_fraction and data.test_fraction to shares that sum below 1."
            )
    if corpus == "synthetic":
        return _synthetic()
    if corpus in ("wikitext2", "wikitext103"):
        return _wikitext(corpus, source, cache)
    if corpus == "text":
        patterns = {"train": files, "valid": valid_files, "test": test_files}
        return _text(patterns, source, document, held_out)
    if corpus.startswith("tfds:"):
        return _tfds(corpus.removeprefix("tfds:"), source or cache / "tfds", held_out)
    nearest = difflib.get_close_matches(corpus, CORPORA, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"data.corpus={corpus!r} does not exist: did you mean --config.data.corpus={nearest}?"
    )


def _synthetic() -> Corpus:
    source = MarkovSource(seed=0)

    def documents(split: str) -> Iterator[str]:
        seed = 1 + list(SYNTHETIC_DOCUMENTS).index(split)
        return source.documents(SYNTHETIC_DOCUMENTS[split], SYNTHETIC_LENGTH, seed)

    return Corpus(
        name="synthetic",
        fingerprint=_fingerprint(
            np.round(source.probability_CSS, 9).tolist(), SYNTHETIC_DOCUMENTS, SYNTHETIC_LENGTH
        ),
        splits={split: _bind(documents, split) for split in SYNTHETIC_DOCUMENTS},
        entropy_rate=source.entropy_rate,
    )


def _wikitext(name: str, source: Path | None, cache: Path) -> Corpus:
    from lm_jax.data import wikitext

    source = source or wikitext.download(name, cache)
    hashes = [_hash_text_file(source / file) for file in wikitext.FILES.values()]
    fingerprint = _fingerprint(name, hashes)
    # A folder per source: TFDS itself would reuse whatever was prepared first.
    data_dir = cache / "tfds" / f"{name}-{fingerprint[:16]}"
    builder = wikitext.BUILDERS[name](data_dir=data_dir, file_format="array_record")
    _prepare(builder, manual_dir=source)
    splits = {split: _bind(_tfds_documents, builder, split, "text") for split in wikitext.FILES}
    return Corpus(name, fingerprint, splits)


def _text(
    patterns: dict[str, str], source: Path | None, document: str, held_out: dict[str, float]
) -> Corpus:
    mode, _, field = document.partition(":")
    if mode not in ("file", "line", "jsonl") or (mode == "jsonl") != bool(field):
        raise ValueError(
            f"data.document={document!r} does not exist: set --config.data.document=file, line "
            "or jsonl:FIELD."
        )
    if not patterns["train"]:
        raise ValueError(
            'data.files is empty: corpus "text" needs --config.data.files=PATH, a path or a glob.'
        )
    paths = {split: _find(value, split, source) for split, value in patterns.items() if value}
    hashes = {split: [_hash_text_file(path) for path in of] for split, of in paths.items()}
    _refuse_shared_files(paths, hashes)

    splits = {split: _bind(_file_documents, of, mode, field) for split, of in paths.items()}
    shares = {split: held_out[split] for split in held_out if split not in paths}
    splits = _hold_out(splits, shares)
    return Corpus("text", _fingerprint(document, shares, hashes), splits)


def _tfds(name: str, data_dir: Path, held_out: dict[str, float]) -> Corpus:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as error:
        raise ValueError(
            f"data.corpus='tfds:{name}' is neither a TensorFlow Datasets name nor prepared in "
            f"{data_dir}: correct the name or give its data_dir as --config.data.source_dir."
        ) from error
    try:
        _prepare(builder)
    except (OSError, tfds.download.DownloadError) as error:
        raise FileNotFoundError(
            f"data.corpus='tfds:{name}' could not be downloaded ({error}): prepare it elsewhere "
            "with file_format='array_record' and give its data_dir as --config.data.source_dir."
        ) from error
    feature = _text_feature(name, builder.info.features)
    available = {
        split: next((own for own in names if own in builder.info.splits), None)
        for split, names in TFDS_SPLITS.items()
    }
    if available["train"] is None:
        raise ValueError(
            f"data.corpus='tfds:{name}' has no train split but {sorted(builder.info.splits)}: "
            "choose another data set."
        )
    shares = {split: held_out[split] for split in held_out if available[split] is None}
    splits = {
        split: _bind(_tfds_documents, builder, own, feature)
        for split, own in available.items()
        if own is not None
    }
    sizes = {
        own: (builder.info.splits[own].num_examples, builder.info.splits[own].num_bytes)
        for own in available.values()
        if own is not None
    }
    fingerprint = _fingerprint(builder.info.full_name, feature, sizes, shares)
    return Corpus(f"tfds:{name}", fingerprint, _hold_out(splits, shares))


def _prepare(builder: Any, manual_dir: Path | None = None) -> None:
    import tensorflow_datasets as tfds

    config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
    with contextlib.redirect_stdout(sys.stderr):  # standard output belongs to reports
        builder.download_and_prepare(download_config=config)


def _text_feature(name: str, features: Any) -> str:
    import tensorflow_datasets as tfds

    texts = [key for key, kind in features.items() if isinstance(kind, tfds.features.Text)]
    if "text" in texts:
        return "text"
    if len(texts) == 1:
        return texts[0]
    raise ValueError(
        f"data.corpus='tfds:{name}' has the text features {sorted(texts)}, none of them 'text': "
        "choose a data set with one text feature."
    )


def _tfds_documents(builder: Any, split: str, feature: str) -> Iterator[str]:
    source = builder.as_data_source(split)
    for index in range(len(source)):
        yield source[index][feature].decode()


def _find(patterns: str, split: str, source: Path | None) -> list[Path]:
    """The files that comma-separated paths and globs name, sorted."""
    found: set[Path] = set()
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        path = Path(source or "", os.path.expanduser(pattern))
        matches = [path] if path.is_file() else map(Path, glob.glob(str(path), recursive=True))
        files = [match for match in matches if match.is_file()]
        if not files:
            field = "files" if split == "train" else f"{split}_files"
            raise FileNotFoundError(
                f"data.{field}={pattern!r} names no file at {path}: correct it, or the folder "
                "in --config.data.source_dir."
            )
        found.update(files)
    return sorted(found)


def _refuse_shared_files(paths: dict[str, list[Path]], hashes: dict[str, list[str]]) -> None:
    """A file in two splits would let the model train on what it is tested on."""
    seen: dict[str, tuple[str, Path]] = {}
    for split in paths:
        for path, sha256 in zip(paths[split], hashes[split], strict=True):
            other_split, other_path = seen.setdefault(sha256, (split, path))
            if other_split != split:
                raise ValueError(
                    f"{path} is in split {split} and its content, as {other_path}, in split "
                    f"{other_split}: take it out of one of data.files, valid_files, test_files."
                )


def _file_documents(paths: list[Path], mode: str, field: str) -> Iterator[str]:
    for path in paths:
        if mode == "file":
            yield path.read_bytes().decode()
            continue
        with path.open(encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                line = line.removesuffix("\n").removesuffix("\r")
                if mode == "line":
                    yield line
                elif line.strip():
                    yield _json_field(line, field, path, number)


def _json_field(line: str, field: str, path: Path, number: int) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {number} is not JSON ({error}): correct or delete the line."
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        has = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(
            f"{path}, line {number} has no text field {field!r} but {has}: "
            "set --config.data.document=jsonl:FIELD to one that every line has."
        )
    text = record[field]
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(
            f"{path}, line {number} holds half a surrogate pair, which no text has: "
            "correct or delete the line."
        )
    return text


def _hold_out(splits: dict[str, Documents], shares: dict[str, float]) -> dict[str, Documents]:
    """Takes the splits with a share above zero out of the train split."""
    shares = {split: share for split, share in shares.items() if share > 0}
    if not shares:
        return splits
    train = splits["train"]
    single = len(list(itertools.islice(filter(None, train()), 2))) == 1
    cut = _cut_document if single else _choose_documents
    held = {split: _bind(cut, train, split, shares) for split in ("train", *shares)}
    return {**splits, **held}


def _choose_documents(documents: Documents, split: str, shares: dict[str, float]) -> Iterator[str]:
    """Documents whose content hashes into the split's share, so equal ones stay together."""
    for text in documents():
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        place = int.from_bytes(digest, "big") / 2**64
        chosen, start = "train", 0.0
        for name, share in shares.items():
            if start <= place < start + share:
                chosen = name
            start += share
        if chosen == split:
            yield text


def _cut_document(documents: Documents, split: str, shares: dict[str, float]) -> Iterator[str]:
    """The split's stretch of a single document: train first, then valid, then test."""
    text = "".join(documents())
    # As decimal shares: 0.7 + 0.1 of 20 characters are 16 and not 15.999.
    held_out = {name: fractions.Fraction(str(share)) for name, share in shares.items()}
    share_by_split = {"train": 1 - sum(held_out.values()), **held_out}
    ends = itertools.accumulate(share_by_split.values(), initial=fractions.Fraction(0))
    bounds = [int(end * len(text)) for end in ends]
    place = list(share_by_split).index(split)
    yield text[bounds[place] : bounds[place + 1]]


def _hash_text_file(path: Path) -> str:
    """sha256 of a file that must exist, hold something and be UTF-8."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: correct --config.data.source_dir.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: give the file its text or leave it out.")
    digest = hashlib.sha256()
    offset = 0
    with path.open("rb") as lines:
        for line in lines:
            digest.update(line)
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} is not UTF-8 at byte {offset + error.start} ({error.reason}): "
                    "convert the file to UTF-8."
                ) from error
            offset += len(line)
    return digest.hexdigest()


def _fingerprint(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _bind(documents: Callable[..., Iterator[str]], *arguments: Any) -> Documents:
    return lambda: documents(*arguments)
