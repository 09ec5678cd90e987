"""The files of a corpus: found, hashed, and refused if they change or are equal."""

import codecs
import contextlib
import glob
import hashlib
import json
import os
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm_jax import remote
from lm_jax.files import can_write, is_url, read_json, write_text

BLOCK = 1 << 20  # bytes read at once
SETTLED = 2 * 10**9  # nanoseconds after which a change of a file is sure to change its time stamp

# What files that are not UTF-8 begin with, what they are then, and what to do.
_ICONV = "convert it by iconv -f {} -t UTF-8 {{}} > NEW.txt"
_OTHERS = {
    b"\x1f\x8b": ("compressed by gzip", "write its text beside it by gunzip -k {}"),
    b"\xfd7zXZ": ("compressed by xz", "write its text beside it by unxz -k {}"),
    b"\x28\xb5\x2f\xfd": ("compressed by Zstandard", "write its text beside it by unzstd {}"),
    b"BZh": ("compressed by bzip2", "write its text beside it by bunzip2 -k {}"),
    b"PK\x03\x04": ("a zip archive", "write its files beside it by unzip {}"),
    b"PAR1": ("a Parquet file", "set --config.data.document=parquet:FIELD"),
    codecs.BOM_UTF32_LE: ("UTF-32", _ICONV.format("UTF-32")),  # before UTF-16, which it begins with
    codecs.BOM_UTF32_BE: ("UTF-32", _ICONV.format("UTF-32")),
    codecs.BOM_UTF16_LE: ("UTF-16", _ICONV.format("UTF-16")),
    codecs.BOM_UTF16_BE: ("UTF-16", _ICONV.format("UTF-16")),
}

Stamp = tuple[int, int]  # size and time of the last change, which no program can set back


class Hashed(NamedTuple):
    """A file as it was when its content was hashed."""

    path: Path
    stamp: Stamp
    sha256: str
    settled: bool  # any later change gives another stamp


def stamp(path: Path) -> Stamp:
    """Size and change time of a file; a change of the file changes it."""
    stat = path.stat()
    return stat.st_size, stat.st_ctime_ns


def find_files(
    patterns: str, name: str, source: Path | None, cache: Path | None = None, *, fetch: bool = True
) -> list[Path]:
    """The files that comma-separated paths and globs of the field `data.NAME` name, sorted.

    A file with several names, by links for example, is listed once, under the first. After all
    others come the files of URLs, in the order of these.

    Args:
        patterns: the paths, globs and URLs.
        name: of the field.
        source: folder of the relative ones.
        cache: folder into which the files of URLs are fetched.
        fetch: whether they may be.

    Raises:
        ValueError: if there is no pattern.
        FileNotFoundError: if a pattern matches no file, or may not be fetched.
        OSError: if it cannot be.
    """
    # A name may hold a comma; `os.path` takes also what is too long to be one.
    if os.path.isfile(Path(source or "", os.path.expanduser(patterns))):
        split = [patterns]
    else:
        split = [pattern for part in patterns.split(",") if (pattern := part.strip())]
    if not split:
        raise ValueError(
            f'data.{name} is empty: corpus "text" needs --config.data.{name}=PATH, a path or a '
            "glob."
        )
    found: set[Path] = set()
    fetched: dict[str, Path] = {}
    for pattern in split:
        if is_url(pattern):
            fetched |= remote.fetch(pattern, cache or Path(), allowed=fetch)
            continue
        path = Path(source or "", os.path.expanduser(pattern))
        # The source folder is no pattern: it may be called [1].
        matches = glob.glob(os.path.expanduser(pattern), root_dir=source, recursive=True)
        named = [path] if path.is_file() else [Path(source or "", match) for match in matches]
        files = [match for match in named if match.is_file()]
        if not files:
            raise FileNotFoundError(
                f"data.{name}={pattern!r} names no file at {path}: correct it, or the folder "
                "in --config.data.source_dir."
            )
        found.update(files)
    once = {path.resolve(): path for path in sorted(found, reverse=True)}  # the first name wins
    return sorted(once.values()) + [fetched[url] for url in sorted(fetched, key=_url_parts)]


def _url_parts(url: str) -> list[str]:
    return url.split("/")  # the order of paths


def hash_files(paths: Sequence[Path], cache: Path, *, text: bool) -> list[Hashed]:
    """Hashes files, which must not be empty and, if `text`, must be UTF-8.

    The sha256 of unchanged files are remembered in the folder `cache`, by path and stamp.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if a file is empty, or not UTF-8.
    """
    memory = cache / "file_hashes.json"
    known = _remembered(memory)
    fresh, hashed = {}, []
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: correct --config.data.source_dir.")
        now, (size, changed) = time.time_ns(), stamp(path)
        key, entry = str(path.resolve()), [size, changed, text]
        settled = now - changed > SETTLED
        before = known.get(key)
        if isinstance(before, list) and before[:-1] == entry and isinstance(before[-1], str):
            sha256 = before[-1]
        elif size == 0:
            raise ValueError(f"{path} is empty: give the file its text or leave it out.")
        else:
            sha256 = _hash(path, text)
            if settled:
                fresh[key] = [*entry, sha256]
        hashed.append(Hashed(path, (size, changed), sha256, settled))
    if fresh and can_write(cache):
        cache.mkdir(parents=True, exist_ok=True)
        write_text(memory, json.dumps(known | fresh))
    return hashed


def _remembered(memory: Path) -> dict[str, Any]:
    try:
        return read_json(memory)
    except ValueError:  # a damaged one counts as empty: the files are hashed again
        return {}


def refuse_changed(files: Iterable[Hashed]) -> None:
    """Raises ValueError if one of the files has changed since it was hashed."""
    for file in files:
        refuse_other(file.path, file.stamp)
        # Two changes within a tick of the clock leave the same stamp.
        if not file.settled and _hash(file.path, text=False) != file.sha256:
            raise _changed(file.path)


def refuse_other(path: Path, before: Stamp) -> None:
    """Raises ValueError if a file no longer has its stamp."""
    if stamp(path) != before:
        raise _changed(path)


def refuse_equal(files: Mapping[str, Sequence[Hashed]], *, within_splits: bool) -> None:
    """Refuses files of equal content: they would be trained on twice, or trained and tested on.

    Raises:
        ValueError: if two splits hold the same file or, with `within_splits`, one holds it twice.
    """
    seen: dict[str, tuple[str, Path]] = {}
    for split, of_split in files.items():
        for path, _, sha256, _ in of_split:
            other_split, other_path = seen.setdefault(sha256, (split, path))
            if other_split != split:
                raise ValueError(
                    f"{path} is in split {split} and its content, as {other_path}, in split "
                    f"{other_split}: take it out of one of data.files, valid_files, test_files."
                )
            if other_path != path and within_splits:
                raise ValueError(
                    f"{path} and {other_path} hold the same bytes, which split {split} would have "
                    "twice: take one of them out of data.files, valid_files or test_files."
                )


@contextlib.contextmanager
def naming(name: str | Path) -> Iterator[None]:
    """Puts `name`, that of what is read, into errors that lack it.

    Libraries leave it out, and raise other errors than one expects: ArrayRecord RuntimeError.

    Raises:
        OSError: for an OSError without the name.
        ValueError: for any other error without the name, except MemoryError.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or str(name) in str(error):
            raise
        kind = OSError if isinstance(error, OSError) else ValueError
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise kind(f"{name} cannot be read ({what}): replace it or leave it out.") from error


def hash_json(value: Any) -> str:
    """sha256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _changed(path: Path) -> ValueError:
    return ValueError(
        f"{path} has changed since it was hashed: leave the files of a corpus alone while it is "
        "prepared, and start again."
    )


def _hash(path: Path, text: bool) -> str:
    digest = hashlib.sha256()
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb", buffering=0) as file:
        try:
            while block := file.read(BLOCK):
                digest.update(block)
                if text:
                    decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            # The error's object is what was read last, and before it what the decoder held back.
            place = file.tell() - len(error.object) + error.start
            with path.open("rb") as head:
                start = head.read(8)
            for magic, (what, command) in _OTHERS.items():
                if start.startswith(magic):
                    remedy = command.format(shlex.quote(str(path)))
                    raise ValueError(f"{path} is {what}: {remedy}.") from error
            raise ValueError(
                f"{path} is not UTF-8 at byte {place} ({error.reason}): convert the file to UTF-8."
            ) from error
    return digest.hexdigest()
