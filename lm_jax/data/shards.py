"""Files of text cut into pieces: byte ranges, row groups or ranges of records of one or more files.

A piece is a callable that can be pickled; each call is a fresh pass over its documents. The pieces
of a corpus, in order, hold every document of its files once. Reading one needs the memory of its
longest document (Parquet: of its largest row group).
"""

import codecs
import functools
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm_jax.data import files
from lm_jax.data.records import decode_record, field_of_json, no_field, not_utf8

Documents = Callable[[], Iterator[str]]

PIECE = 32 << 20  # bytes of the files in one piece; store.FORMAT rises when it changes
RECORDS = 256  # rows or records read at once

Cut = tuple[int, int, int]  # first, end, and the size in bytes
Read = Callable[[Path, int, int], Iterator[str]]  # the documents from first to end


class Stretch(NamedTuple):
    """A part of a file: its bytes, row groups or records from `first` to `end`."""

    path: Path
    stamp: files.Stamp
    first: int
    end: int


def parse_format(document: str) -> tuple[str, str]:
    """The format and the field that `data.document` names.

    Raises:
        ValueError: if there is no such format, or its package is not installed.
    """
    kind, _, field = document.partition(":")
    if (f"{kind}:FIELD" if field else kind) not in _FORMATS:
        *others, last = _FORMATS
        raise ValueError(
            f"data.document={document!r} does not exist: set --config.data.document="
            f"{', '.join(others)} or {last}."
        )
    if kind == "parquet":
        _pyarrow()
    return kind, field


def pieces(paths: Iterable[Path], document: str, *, skip_missing: bool = False) -> list[Documents]:
    """Pieces of about PIECE bytes, in the order of the files and of the documents in them.

    With `skip_missing` a document whose field is null or missing is "".
    """
    kind, field = parse_format(document)
    cut, read = _FORMATS[f"{kind}:FIELD" if field else kind]
    if field:
        read = functools.partial(read, field=field, skip_missing=skip_missing)
    return cut_into_pieces(paths, cut, read)


def cut_into_pieces(
    paths: Iterable[Path], cut: Callable[[Path], Iterator[Cut]], read: Read
) -> list[Documents]:
    """Pieces of files that `cut` divides and `read` reads; `read` can be pickled."""
    groups: list[list[Stretch]] = [[]]
    size = 0  # of the last group
    for path in paths:
        stamp = files.stamp(path)
        with files.naming(path):
            cuts = list(cut(path))
        for first, end, weight in cuts:
            if size and size + weight > PIECE:
                groups.append([])
                size = 0
            size += weight
            group = groups[-1]
            if group and group[-1].path == path:
                group[-1] = group[-1]._replace(end=end)
            else:
                group.append(Stretch(path, stamp, first, end))
    return [functools.partial(_read, tuple(group), read) for group in groups]


def chain(pieces: Sequence[Documents]) -> Iterator[str]:
    """The documents of all pieces."""
    for piece in pieces:
        yield from piece()


def heads(pieces: Sequence[Documents], characters: int) -> Iterator[str]:
    """Texts of `characters` characters in all, in equal shares from the start of every piece."""
    share = -(-characters // len(pieces))
    for piece in pieces:
        left = share
        for text in piece():
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break


def _read(stretches: Sequence[Stretch], read: Read) -> Iterator[str]:
    for path, stamp, first, end in stretches:
        with files.naming(path):
            try:
                yield from read(path, first, end)
            except Exception:
                files.refuse_other(path, stamp)  # a change explains any error
                raise
        files.refuse_other(path, stamp)


# --- whole files, lines and JSON -----------------------------------------------------------------


def _cut_file(path: Path) -> Iterator[Cut]:
    size = path.stat().st_size
    yield 0, size, size


def cut_lines(path: Path) -> Iterator[Cut]:
    """Ranges of PIECE bytes; a line is in the range in which it begins."""
    size = path.stat().st_size
    for first in range(0, size, PIECE):
        end = min(first + PIECE, size)
        yield first, end, end - first


def _read_file(path: Path, first: int, end: int) -> Iterator[str]:
    content = path.read_bytes()
    if len(content) != end:
        raise _cut_short(path, len(content), end)
    yield content.decode("utf-8-sig")


def _read_lines(path: Path, first: int, end: int) -> Iterator[str]:
    for _, line in lines(path, first, end):
        yield line.removesuffix("\n").removesuffix("\r")


def _cut_jsonl(path: Path) -> Iterator[Cut]:
    with path.open("rb") as file:
        if file.read(files.BLOCK).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            raise ValueError(
                f"{path} is a JSON array and not one object a line: convert it by "
                f"jq -c '.[]' {shlex.quote(str(path))} > NEW.jsonl."
            )
    return cut_lines(path)


def _read_jsonl(path: Path, first: int, end: int, field: str, skip_missing: bool) -> Iterator[str]:
    for offset, line in lines(path, first, end):
        if line.strip():
            name = functools.partial(_line_name, path, offset)
            yield field_of_json(line, field, skip_missing, name)


def lines(path: Path, first: int, end: int) -> Iterator[tuple[int, str]]:
    """Offset and text, with its end, of each line that begins in bytes `first` to `end`.

    The file's byte-order mark is left out.
    """
    with path.open("rb") as file:
        if first:  # A line begins here only if the byte before ends one.
            file.seek(first - 1)
            first += len(file.readline()) - 1
        for line in file:
            if first >= end:
                return
            yield first, (line if first else line.removeprefix(codecs.BOM_UTF8)).decode()
            first += len(line)
    if first < end:
        raise _cut_short(path, first, end)


def _cut_short(path: Path, size: int, end: int) -> ValueError:
    return ValueError(
        f"{path} holds {size} bytes where it held {end}: leave the files of a corpus alone while "
        "it is prepared, and start again."
    )


def _line_name(path: Path, offset: int) -> str:
    return f"{path}, line {1 + sum(1 for _ in lines(path, 0, offset))}"


# --- Parquet -------------------------------------------------------------------------------------


def _pyarrow() -> Any:
    try:
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            "data.document=parquet:FIELD needs the package pyarrow: pip install 'lm_jax[parquet]'."
        ) from error
    return pyarrow


def _open_parquet(path: Path) -> Any:
    pyarrow = _pyarrow()
    try:
        return pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(
            f"{path} is no complete Parquet file ({error}): replace it or leave it out."
        ) from error


def _cut_parquet(path: Path) -> Iterator[Cut]:
    with _open_parquet(path) as file:
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).total_byte_size
            yield group, group + 1, size


def has_checksums(path: Path) -> bool:
    """Whether the pages of a Parquet file hold checksums; those of its first stand for all."""
    with _open_parquet(path) as file:
        if not file.num_row_groups:
            return True
        column = file.metadata.row_group(0).column(0)
    with path.open("rb") as pages:
        pages.seek(column.dictionary_page_offset or column.data_page_offset)
        # The checksum is the fourth number of a page header (parquet.thrift, PageHeader).
        return re.match(rb"(\x15[\x80-\xff]*[\x00-\x7f]){4}", pages.read(64)) is not None


def _read_parquet(
    path: Path, first: int, end: int, field: str, skip_missing: bool
) -> Iterator[str]:
    pyarrow = _pyarrow()
    with _open_parquet(path) as file:
        schema = file.metadata.schema
        names = [schema.column(i).path for i in range(len(schema))]
        if names.count(field) != 1:
            if field in names:
                raise ValueError(f"{path} has {names.count(field)} columns {field!r}: rename one.")
            raise no_field(str(path), field, sorted(names))
        row = sum(file.metadata.row_group(group).num_rows for group in range(first))
        groups = range(first, end)
        for batch in file.iter_batches(RECORDS, groups, columns=[field], use_threads=False):
            column = batch.column(0)
            while pyarrow.types.is_struct(column.type):  # which holds this field alone
                column = pyarrow.compute.struct_field(column, 0)
            try:
                texts = column.to_pylist()
            except UnicodeDecodeError as error:
                raise not_utf8(f"{path}, after row {row}", error) from error
            for text in texts:
                row += 1
                if isinstance(text, bytes):
                    text = decode_record(text, f"{path}, row {row}")
                elif text is None and skip_missing:
                    text = ""
                if not isinstance(text, str):
                    kind, missing = type(text).__name__, text is None
                    raise no_field(f"{path}, row {row}", field, kind, missing=missing)
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


def _cut_array_record(path: Path) -> Iterator[Cut]:
    reader = _open_array_record(path)
    count, size = reader.num_records(), path.stat().st_size
    reader.close()
    step = max(1, count * PIECE // size)
    for first in range(0, count, step):
        end = min(first + step, count)
        yield first, end, (end - first) * size // count


def _read_array_record(
    path: Path, first: int, end: int, field: str = "", skip_missing: bool = False
) -> Iterator[str]:
    reader = _open_array_record(path)
    for start in range(first, end, RECORDS):
        for number, record in enumerate(reader.read(start, min(start + RECORDS, end)), start + 1):
            name = f"{path}, record {number}"
            text = decode_record(record, name)
            if field:
                text = field_of_json(text, field, skip_missing, functools.partial(str, name))
            yield text
    reader.close()


_FORMATS: dict[str, tuple[Callable[[Path], Iterator[Cut]], Callable[..., Iterator[str]]]] = {
    "file": (_cut_file, _read_file),
    "line": (cut_lines, _read_lines),
    "jsonl:FIELD": (_cut_jsonl, _read_jsonl),
    "parquet:FIELD": (_cut_parquet, _read_parquet),
    "arrayrecord": (_cut_array_record, _read_array_record),
    "arrayrecord:FIELD": (_cut_array_record, _read_array_record),
}
