"""Corpora: named splits of documents, read lazily and always in the same order."""

import bisect
import codecs
import dataclasses
import fractions
import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from lm_jax import console
from lm_jax.config.section import advice
from lm_jax.data import files as source_files
from lm_jax.data import shards, tfds, wikitext
from lm_jax.data.files import Hashed, hash_json
from lm_jax.data.shards import Documents
from lm_jax.data.synthetic import MarkovSource
from lm_jax.files import is_url

CORPORA = ("synthetic", "wikitext2", "wikitext103", "text", "tfds:NAME")
SYNTHETIC_DOCUMENTS = {"train": 200, "valid": 20, "test": 20}
SYNTHETIC_LENGTH = 10_000  # symbols a document


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents by split: "train", "valid" and perhaps "test".

    A split is a sequence of pieces, which can be pickled, so that several processes can read it.
    """

    name: str
    fingerprint: str  # sha256 of what defines the documents and their splits
    splits: Mapping[str, Sequence[Documents]]
    entropy_rate: float | None = None  # nats per symbol, where it is known
    files: Sequence[Hashed] = ()  # the files it is read from, as they were hashed

    def documents(self, split: str) -> Iterator[str]:
        """All documents of a split, in order."""
        return shards.chain(self.splits[split])


def open_corpus(
    corpus: str,
    *,
    source_dir: str = "",
    files: str = "",
    valid_files: str = "",
    test_files: str = "",
    document: str = "file",
    skip_missing: bool = False,
    valid_fraction: float = 0.1,
    test_fraction: float = 0.0,
    cache_dir: str,
    fetch: bool = True,
) -> Corpus:
    """Opens corpus "synthetic", "wikitext2", "wikitext103", "text" or "tfds:NAME[:VERSION]".

    The options mean what the fields of `config.data` mean that have their names, and:

    source_dir: of a TFDS set, its data_dir.
    valid_fraction, test_fraction: the documents held out are chosen by the hash of their content;
        of a single document the end is held out, as a share of its characters.
    fetch: whether what is not there may be downloaded.

    Raises:
        ValueError: if an option or a file does not fit.
        FileNotFoundError: if a file does not exist or cannot be downloaded.
    """
    cache = Path(cache_dir).expanduser()
    if is_url(source_dir):
        raise ValueError(
            f"data.source_dir={source_dir!r} is no folder: leave it out, and write URLs into "
            "data.files, data.valid_files and data.test_files."
        )
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
        return _wikitext(corpus, source, cache, fetch)
    if corpus == "text":
        patterns = {"train": files, "valid": valid_files, "test": test_files}
        return _text(patterns, source, cache, document, skip_missing, held_out, fetch)
    if corpus.startswith("tfds:"):
        return _tfds(corpus.removeprefix("tfds:"), source or cache / "tfds", held_out, fetch)
    raise ValueError(f"config.data.corpus: {corpus!r} does not exist; {advice(corpus, CORPORA)}")


def _synthetic() -> Corpus:
    source = MarkovSource(seed=0)
    splits = {
        split: [functools.partial(source.documents, count, SYNTHETIC_LENGTH, seed)]
        for seed, (split, count) in enumerate(SYNTHETIC_DOCUMENTS.items(), start=1)
    }
    probabilities = np.round(source.probability_CSS, 9).tolist()
    fingerprint = hash_json([probabilities, SYNTHETIC_DOCUMENTS, SYNTHETIC_LENGTH])
    return Corpus("synthetic", fingerprint, splits, source.entropy_rate)


def _wikitext(name: str, source: Path | None, cache: Path, fetch: bool) -> Corpus:
    source = source or wikitext.download(name, cache, fetch)
    paths = [source / file for file in wikitext.FILES.values()]
    hashed = source_files.hash_files(paths, cache, text=True)
    splits = {split: wikitext.pieces_of(source / file) for split, file in wikitext.FILES.items()}
    source_files.refuse_changed(hashed)  # from here on the stamp alone tells
    fingerprint = hash_json([name, [file.sha256 for file in hashed]])
    return Corpus(name, fingerprint, splits, files=hashed)


def _text(
    patterns: dict[str, str],
    source: Path | None,
    cache: Path,
    document: str,
    skip_missing: bool,
    held_out: dict[str, float],
    fetch: bool,
) -> Corpus:
    kind, field = shards.parse_format(document)
    if skip_missing and not field:
        raise ValueError(
            f"data.skip_missing=True needs documents with a FIELD, but data.document={document!r} "
            "names none: set --config.data.document=jsonl:FIELD or leave skip_missing out."
        )
    fields = {"train": "files", "valid": "valid_files", "test": "test_files"}
    paths = {
        split: source_files.find_files(value, fields[split], source, cache, fetch=fetch)
        for split, value in patterns.items()
        if value or split == "train"
    }
    text = kind in ("file", "line", "jsonl")
    hashed = {split: source_files.hash_files(of, cache, text=text) for split, of in paths.items()}
    hashes = {split: [file.sha256 for file in of] for split, of in hashed.items()}
    # With format "file" a file is a document, and a document may occur twice.
    source_files.refuse_equal(hashed, within_splits=kind != "file")

    splits = {
        split: shards.pieces(of, document, skip_missing=skip_missing) for split, of in paths.items()
    }
    files = list(itertools.chain(*hashed.values()))
    marked = _say_marks(files) if text else False
    if kind == "parquet":
        _say_checksums(files)
    source_files.refuse_changed(files)  # from here on the stamp alone tells
    shares = {split: share for split, share in held_out.items() if split not in paths}
    splits = _hold_out(splits, shares)
    options = [skip_missing, marked]
    definition = [document, shares, hashes, *([options] if any(options) else [])]
    return Corpus("text", hash_json(definition), splits, files=files)


def _say_marks(files: Sequence[Hashed]) -> bool:
    """Says how many files begin with a byte-order mark, which is left out; whether any does."""
    count = 0
    for file in files:
        with file.path.open("rb") as opened:
            count += opened.read(3) == codecs.BOM_UTF8
    if count:
        console.say(f"{count} of {len(files)} files begin with a byte-order mark: it is left out")
    return count > 0


def _say_checksums(files: Sequence[Hashed]) -> None:
    bare = []
    for file in files:
        with source_files.naming(file.path):
            bare += [] if shards.has_checksums(file.path) else [file.path]
    if bare:
        console.say(
            f"{len(bare)} of {len(files)} Parquet files hold no checksums, so a damaged page may "
            f"be read as other text: {bare[0]}"
        )


def _tfds(name: str, data_dir: Path, held_out: dict[str, float], fetch: bool) -> Corpus:
    found = tfds.prepared(name, data_dir, fetch)
    shares = {split: share for split, share in held_out.items() if split not in found.splits}
    fingerprint = hash_json([found.name, found.feature, found.sizes, shares])
    return Corpus(f"tfds:{name}", fingerprint, _hold_out(found.splits, shares))


def _hold_out(
    splits: dict[str, list[Documents]], shares: dict[str, float]
) -> dict[str, list[Documents]]:
    """Takes the splits with a share above zero out of the train split."""
    shares = {split: share for split, share in shares.items() if share > 0}
    if not shares:
        return splits
    train = splits["train"]
    single = len(list(itertools.islice(filter(None, shards.chain(train)), 2))) == 1
    held: dict[str, list[Documents]] = {
        split: [functools.partial(_cut_document, train, split, shares)]
        if single
        else [functools.partial(_choose_documents, piece, split, shares) for piece in train]
        for split in ("train", *shares)
    }
    return {**splits, **held}


def _choose_documents(documents: Documents, split: str, shares: dict[str, float]) -> Iterator[str]:
    """The documents of a split, chosen by the hash of their content.

    Equal documents stay together, and neither the order of the files nor their pieces matter.
    """
    names, ends = [*shares, "train"], list(itertools.accumulate(shares.values()))
    for text in documents():
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        place = int.from_bytes(digest, "big") / 2**64
        if names[bisect.bisect(ends, place)] == split:
            yield text


def _cut_document(
    pieces: Sequence[Documents], split: str, shares: dict[str, float]
) -> Iterator[str]:
    """A split's stretch of a single document: train first, then valid, then test."""
    text = "".join(shards.chain(pieces))
    # Decimal fractions: 0.7 + 0.1 of 20 characters are 16, not 15.999.
    held_out = {name: fractions.Fraction(str(share)) for name, share in shares.items()}
    share_by_split = {"train": 1 - sum(held_out.values()), **held_out}
    ends = itertools.accumulate(share_by_split.values(), initial=fractions.Fraction(0))
    bounds = [int(end * len(text)) for end in ends]
    place = list(share_by_split).index(split)
    text = text[bounds[place] : bounds[place + 1]]  # frees the full text
    yield text
