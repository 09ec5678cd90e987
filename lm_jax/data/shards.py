"""Files of text cut into pieces: byte ranges, row groups or ranges of records of one or more files.

A piece is a callable that can be pickled and gives a fresh pass over its documents. The pieces of
a corpus, in their order, hold every document of its files once, and none needs more memory than
its longest document (Parquet: its largest row group).
"""

import codecs
import functools
import glob
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Documents = Callable[[], Iterator[str]]  # each call starts a fresh pass

PIECE = 32 << 20  # bytes of the files in one piece; store.FORMAT rises when it changes
BLOCK = 1 << 20  # bytes read at once
RECORDS = 256  # rows or records read at once
SETTLED = 2 * 10**9  # nanoseconds after which a change of a file is sure to change its time stamp
FORMATS = "file, line, jsonl:FIELD, parquet:FIELD, arrayrecord or arrayrecord:FIELD"


class Stretch(NamedTuple):
    """A part of a file: its bytes, row groups or records from `first` to `end`."""

    path: Path
    first: int
    end: int


def parse(document: str) -> tuple[str, str]:
    """The format and the field that `data.document` names.

    Raises:
        ValueError: if there is no such format, or its package is not installed.
    """
    kind, _, field = document.partition(":")
    needs_field = {"jsonl": True, "parquet": True, "file": False, "line": False}
    if kind not in _CUT or needs_field.get(kind, bool(field)) != bool(field):
        raise ValueError(
            f"data.document={document!r} does not exist: set --config.data.document={FORMATS}."
        )
    if kind == "parquet":
        _pyarrow()
    return kind, field


def pieces(paths: Iterable[Path], document: str) -> list[Documents]:
    """Pieces of about PIECE bytes, in the order of the files and of the documents in them."""
    kind, field = parse(document)
    groups: list[list[Stretch]] = [[]]
    size = 0  # of the last group
    for path in paths:
        for stretch, weight in _CUT[kind](path):
            if size and size + weight > PIECE:
                groups.append([])
                size = 0
            size += weight
            group = groups[-1]
            if group and group[-1].path == path:
                group[-1] = group[-1]._replace(end=stretch.end)
            else:
                group.append(stretch)
    return [functools.partial(_read, tuple(group), kind, field) for group in groups]


def chain(pieces: Sequence[Documents]) -> Iterator[str]:
    """The documents of all pieces."""
    for piece in pieces:
        yield from piece()


def find(patterns: str, name: str, source: Path | None) -> list[Path]:
    """The files that comma-separated paths and globs of the field `data.NAME` name, sorted."""
    found: set[Path] = set()
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        path = Path(source or "", os.path.expanduser(pattern))
        matches = [path] if path.is_file() else map(Path, glob.glob(str(path), recursive=True))
        files = [match for match in matches if match.is_file()]
        if not files:
            raise FileNotFoundError(
                f"data.{name}={pattern!r} names no file at {path}: correct it, or the folder "
                "in --config.data.source_dir."
            )
        found.update(files)
    return sorted(found)


def hash_files(paths: Sequence[Path], cache: Path, *, text: bool) -> list[str]:
    """sha256 of files that must exist, hold something and, if `text`, be UTF-8.

    Those of unchanged files are remembered in the folder `cache`, by path, size and time of the
    last change.
    """
    memory = cache / "file_hashes.json"
    known = json.loads(memory.read_text()) if memory.exists() else {}
    fresh, hashes = {}, []
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: correct --config.data.source_dir.")
        stat, now = path.stat(), time.time_ns()
        stamp = [stat.st_size, stat.st_ctime_ns, text]
        key = str(path.resolve())
        if known.get(key, [])[:-1] == stamp:
            hashes.append(known[key][-1])
            continue
        if stat.st_size == 0:
            raise ValueError(f"{path} is empty: give the file its text or leave it out.")
        hashes.append(_hash(path, text))
        if now - stat.st_ctime_ns > SETTLED:
            fresh[key] = [*stamp, hashes[-1]]
    if fresh:
        cache.mkdir(parents=True, exist_ok=True)
        partial = memory.with_name(f".{memory.name}.{os.getpid()}")
        partial.write_text(json.dumps(known | fresh))
        os.replace(partial, memory)
    return hashes


def refuse_shared(paths: dict[str, list[Path]], hashes: dict[str, list[str]]) -> None:
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


def _hash(path: Path, text: bool) -> str:
    digest = hashlib.sha256()
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            if text:
                _validate(decoder, block, path, offset)
            offset += len(block)
    if text:
        _validate(decoder, b"", path, offset)
    return digest.hexdigest()


def _validate(decoder: codecs.IncrementalDecoder, block: bytes, path: Path, offset: int) -> None:
    held_back = len(decoder.getstate()[0])
    try:
        decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 at byte {offset - held_back + error.start} ({error.reason}): "
            "convert the file to UTF-8."
        ) from error


def _read(stretches: Sequence[Stretch], kind: str, field: str) -> Iterator[str]:
    for path, first, end in stretches:
        yield from _READ[kind](path, first, end, field)


# --- whole files, lines and JSON -----------------------------------------------------------------


def _cut_file(path: Path) -> Iterator[tuple[Stretch, int]]:
    size = path.stat().st_size
    yield Stretch(path, 0, size), size


def _cut_lines(path: Path) -> Iterator[tuple[Stretch, int]]:
    size = path.stat().st_size
    for first in range(0, size, PIECE):
        end = min(first + PIECE, size)
        yield Stretch(path, first, end), end - first


def _read_file(path: Path, first: int, end: int, field: str) -> Iterator[str]:
    yield path.read_bytes().decode()


def _read_lines(path: Path, first: int, end: int, field: str) -> Iterator[str]:
    for _, line in _lines(path, first, end):
        yield line


def _read_jsonl(path: Path, first: int, end: int, field: str) -> Iterator[str]:
    for offset, line in _lines(path, first, end):
        if line.strip():
            yield _json_field(line, field, functools.partial(_line_name, path, offset))


def _lines(path: Path, first: int, end: int) -> Iterator[tuple[int, str]]:
    """Offset and text of the lines that begin in bytes `first` to `end`."""
    with path.open("rb") as file:
        if first:  # A line begins here only if the byte before ends one.
            file.seek(first - 1)
            first += len(file.readline()) - 1
        for line in file:
            if first >= end:
                return
            yield first, line.decode().removesuffix("\n").removesuffix("\r")
            first += len(line)


def _line_name(path: Path, offset: int) -> str:
    number = 1
    with path.open("rb") as file:
        while offset:
            block = file.read(min(offset, BLOCK))
            number += block.count(b"\n")
            offset -= len(block)
    return f"{path}, line {number}"


def _json_field(record: str | bytes, field: str, name: Callable[[], str]) -> str:
    try:
        value = json.loads(record)
    except ValueError as error:
        raise ValueError(f"{name()} is not JSON ({error}): correct or delete it.") from error
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        has = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise _no_field(name(), field, has)
    text = value[field]
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(
            f"{name()} holds half a surrogate pair, which no text has: correct or delete it."
        )
    return text


def _no_field(name: str, field: str, has: Any) -> ValueError:
    return ValueError(
        f"{name} has no text field {field!r} but {has}: set the FIELD of --config.data.document "
        "to one that every document has."
    )


# --- Parquet -------------------------------------------------------------------------------------


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            "data.document=parquet:FIELD needs the package pyarrow: pip install 'lm_jax[parquet]'."
        ) from error
    return pyarrow


def _open_parquet(path: Path) -> Any:
    pyarrow = _pyarrow()
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(
            f"{path} is no complete Parquet file ({error}): replace it or leave it out."
        ) from error


def _cut_parquet(path: Path) -> Iterator[tuple[Stretch, int]]:
    with _open_parquet(path) as file:
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).total_byte_size
            yield Stretch(path, group, group + 1), size


def _read_parquet(path: Path, first: int, end: int, field: str) -> Iterator[str]:
    with _open_parquet(path) as file:
        if field not in file.schema_arrow.names:
            raise _no_field(str(path), field, sorted(file.schema_arrow.names))
        row = sum(file.metadata.row_group(group).num_rows for group in range(first))
        groups = range(first, end)
        for batch in file.iter_batches(RECORDS, groups, columns=[field], use_threads=False):
            try:
                texts = batch.column(0).to_pylist()
            except UnicodeDecodeError as error:
                raise _not_utf8(f"{path}, after row {row}", error) from error
            for text in texts:
                row += 1
                if not isinstance(text, str):
                    raise _no_field(f"{path}, row {row}", field, type(text).__name__)
                yield text


# --- ArrayRecord ---------------------------------------------------------------------------------


def _open_array_record(path: Path) -> Any:
    from array_record.python import array_record_module

    # One reader a process, which needs no threads of its own.
    reader = array_record_module.ArrayRecordReader(
        str(path), "readahead_buffer_size:0,max_parallelism:0"
    )
    if not reader.ok():
        raise ValueError(
            f"{path} is no complete ArrayRecord file: replace the file or leave it out."
        )
    return reader


def _cut_array_record(path: Path) -> Iterator[tuple[Stretch, int]]:
    reader = _open_array_record(path)
    count, size = reader.num_records(), path.stat().st_size
    reader.close()
    step = max(1, count * PIECE // size)
    for first in range(0, count, step):
        end = min(first + step, count)
        yield Stretch(path, first, end), (end - first) * size // count


def _read_array_record(path: Path, first: int, end: int, field: str) -> Iterator[str]:
    reader = _open_array_record(path)
    for start in range(first, end, RECORDS):
        for number, record in enumerate(reader.read(start, min(start + RECORDS, end)), start + 1):
            name = f"{path}, record {number}"
            try:
                text = record.decode()
            except UnicodeDecodeError as error:
                raise _not_utf8(name, error) from error
            yield _json_field(text, field, functools.partial(str, name)) if field else text
    reader.close()


def _not_utf8(name: str, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{name} is not UTF-8 ({error.reason}): write the file again as UTF-8.")


# Each stretch comes with its size in bytes.
_CUT: dict[str, Callable[[Path], Iterator[tuple[Stretch, int]]]] = {
    "file": _cut_file,
    "line": _cut_lines,
    "jsonl": _cut_lines,
    "parquet": _cut_parquet,
    "arrayrecord": _cut_array_record,
}
_READ: dict[str, Callable[[Path, int, int, str], Iterator[str]]] = {
    "file": _read_file,
    "line": _read_lines,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "arrayrecord": _read_array_record,
}
