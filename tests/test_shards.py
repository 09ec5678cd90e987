"""Files cut into pieces: no document is lost, repeated or changed, whatever the format or cut."""

import hashlib
import json
import pickle
import re
import sys
import tracemalloc

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from lm_jax.data import files, shards
from lm_jax.data.corpora import open_corpus

TEXTS = [f"text {i} é👩\u2028\n" * (i % 5 + 1) for i in range(40)]
LINES = ["one", "", "é two 👩", "\x0b three\u2028", "", "four", "  ", "five five five"]


def parquet(path, texts, rows=3, checksums=False, **columns):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": texts, "id": list(range(len(texts))), **columns})
    pyarrow.parquet.write_table(table, path, row_group_size=rows, write_page_checksum=checksums)


def array_record(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def write(folder, document, texts):
    """Two files of so many texts in a format, and the glob that names them."""
    kind, _, field = document.partition(":")
    folder.mkdir()
    for number, part in enumerate((texts[:25], texts[25:])):
        path = folder / f"{number}.data"
        records = [json.dumps({field: text, "id": 1}) for text in part]
        if kind == "jsonl":
            path.write_text("\n".join(records) + "\n")
        elif kind == "parquet":
            parquet(path, part)
        elif kind == "arrayrecord":
            array_record(path, [text.encode() for text in (records if field else part)])
    return str(folder / "*.data")


def read(paths, document, **options):
    return list(shards.chain(shards.pieces(paths, document, **options)))


FORMATS = ["jsonl:text", "parquet:text", "arrayrecord", "arrayrecord:text"]


@pytest.mark.parametrize("piece", [1, 100, 1000, 1 << 25])
@pytest.mark.parametrize("document", FORMATS)
def test_every_format_gives_the_same_documents(tmp_path, monkeypatch, document, piece):
    files = write(tmp_path / "files", document, TEXTS)
    monkeypatch.setattr(shards, "PIECE", piece)
    corpus = open_corpus(
        "text",
        files=files,
        document=document,
        valid_fraction=0.3,
        cache_dir=str(tmp_path / "cache"),
    )
    found = {name: list(corpus.documents(name)) for name in corpus.splits}
    assert len(corpus.splits["train"]) == len(corpus.splits["valid"]) > 0
    assert (len(corpus.splits["train"]) > 1) == (piece < 1 << 25)
    assert sorted(found["train"] + found["valid"]) == sorted(TEXTS)
    assert [text for text in TEXTS if text in found["train"]] == found["train"]
    expected = held_out(tmp_path)  # the same whatever the format
    assert 3 <= len(expected) <= 25
    assert found["valid"] == [text for text in TEXTS if text in expected]
    again = pickle.loads(pickle.dumps(corpus.splits["train"]))
    assert list(shards.chain(again)) == found["train"]


def held_out(tmp_path):
    (tmp_path / "lines").mkdir(exist_ok=True)
    for i, text in enumerate(TEXTS):
        (tmp_path / "lines" / f"{i}.txt").write_text(text, newline="")
    corpus = open_corpus(
        "text",
        files=str(tmp_path / "lines" / "*.txt"),
        valid_fraction=0.3,
        cache_dir=str(tmp_path / "cache"),
    )
    return set(corpus.documents("valid"))


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_cuts_of_a_file_lose_and_repeat_no_line(tmp_path, newline, end):
    path = tmp_path / "lines.txt"
    path.write_bytes((newline.join(LINES) + end).encode())
    size = path.stat().st_size
    whole = [line for _, line in shards.lines(path, 0, size)]
    with path.open(encoding="utf-8", newline="\n") as file:
        assert whole == list(file)
    assert read([path], "line") == ([*LINES, ""] if end == "\n\n" else LINES)
    for cut in range(size + 1):
        parts = [shards.lines(path, 0, cut), shards.lines(path, cut, size)]
        assert [line for part in parts for _, line in part] == whole, cut
    offsets = [offset for offset, _ in shards.lines(path, 0, size)]
    content = path.read_bytes()
    assert all(offset == 0 or content[offset - 1 : offset] == b"\n" for offset in offsets)


@pytest.mark.parametrize("piece", range(1, 40))
def test_pieces_of_any_size_lose_and_repeat_nothing(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(shards, "PIECE", piece)
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes("\r\n".join([path.name, *LINES]).encode())
    for document in ("line", "file"):
        found = shards.pieces(paths, document)
        assert read(paths, document) == [
            text
            for path in paths
            for text in (
                [path.name, *LINES] if document == "line" else [path.read_bytes().decode()]
            )
        ]
        assert len(found) == 3 if document == "file" else len(found) >= 3


def test_small_files_share_a_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PIECE", 10)
    paths = [tmp_path / f"{i}" for i in range(7)]
    for path, size in zip(paths, [3, 3, 3, 3, 25, 4, 6], strict=True):
        path.write_text("x" * size)
    sizes = [[len(text) for text in piece()] for piece in shards.pieces(paths, "file")]
    assert sizes == [[3, 3, 3], [3], [25], [4, 6]]


def test_a_long_file_is_read_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PIECE", 1 << 18)
    monkeypatch.setattr(files, "BLOCK", 1 << 16)
    path, count = tmp_path / "long.jsonl", 4000
    with path.open("w") as file:
        for i in range(count):
            file.write(json.dumps({"text": f"{i} " * 200}) + "\n")
    parquet(tmp_path / "long.parquet", [f"{i} " * 200 for i in range(count)], rows=100)
    for document, name in (("jsonl:text", "long.jsonl"), ("parquet:text", "long.parquet")):
        pieces = shards.pieces([tmp_path / name], document)
        list(pieces[0]())  # imports
        tracemalloc.start()
        assert sum(1 for piece in pieces for _ in piece()) == count
        files.hash_files([tmp_path / name], tmp_path, text=False)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < path.stat().st_size / 4, document


def test_errors_name_the_place_in_a_later_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PIECE", 20)
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n\n' * 10 + '{"text": 3}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl, line 21 has no text field 'text' but"):
        read([path], "jsonl:text")
    parquet(path, [f"{i}" for i in range(8)] + [None])
    with pytest.raises(ValueError, match=r"t\.jsonl, row 9 has no text field 'text' but NoneType"):
        read([path], "parquet:text")
    with pytest.raises(ValueError, match=r"row 1 has no text field 'id' but int"):
        read([path], "parquet:id")
    with pytest.raises(ValueError, match=r"no text field 'body' but \['id', 'text'\]"):
        read([path], "parquet:body")
    array_record(path, [b'{"text": "a"}'] * 3 + [b"{", b"\xff"])
    with pytest.raises(ValueError, match=r"t\.jsonl, record 4 is not JSON"):
        read([path], "arrayrecord:text")
    with pytest.raises(ValueError, match=r"t\.jsonl, record 5 is not UTF-8"):
        read([path], "arrayrecord")


@pytest.mark.parametrize("count", [255, 256, 257, 700])
def test_no_record_is_lost_between_two_reads(tmp_path, count):
    texts = [f"record {i}" for i in range(count)]
    array_record(tmp_path / "a.data", [text.encode() for text in texts])
    parquet(tmp_path / "a.parquet", texts, rows=300)
    assert read([tmp_path / "a.data"], "arrayrecord") == texts
    assert read([tmp_path / "a.parquet"], "parquet:text") == texts


def change(path, how):
    """Another content; of the same size, longer, shorter or none, and with a new time stamp."""
    content, before = path.read_bytes(), files.stamp(path)
    other = {
        "same": content[:5] + b"!" + content[6:],
        "longer": content + content,
        "shorter": content[: len(content) // 2],
        "empty": b"",
    }
    while files.stamp(path) == before:
        path.write_bytes(other[how])


@pytest.mark.parametrize("how", ["same", "longer", "shorter", "empty"])
@pytest.mark.parametrize("document", ["file", "line", *FORMATS])
def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, monkeypatch, document, how):
    monkeypatch.setattr(shards, "PIECE", 1000)
    path = tmp_path / "0.data"
    if document in ("file", "line"):
        path.write_text("some lines\n" * 200)
    else:
        write(tmp_path / "files", document, TEXTS)
        (tmp_path / "files" / "0.data").rename(path)
    pieces = shards.pieces([path], document)
    list(shards.chain(pieces))
    change(path, how)
    for piece in pieces:
        with pytest.raises(ValueError, match=r"0\.data has changed since it was hashed: .*\.$"):
            list(piece())


@pytest.mark.parametrize("size", [0, 7, 12, 16])
def test_a_file_that_ends_too_early_is_named(tmp_path, size):
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\n" * 5)
    read_both = [shards.lines(path, 0, 20), shards.lines(path, 14, 20)]
    path.write_bytes((b"abc\n" * 5)[:size])
    for lines in read_both:
        with pytest.raises(ValueError, match=r"a\.txt holds \d+ bytes where it held 20: .*\.$"):
            list(lines)
    with pytest.raises(ValueError, match=rf"a\.txt holds {size} bytes where it held 20: "):
        list(shards._read_file(path, 0, 20))


@pytest.mark.parametrize("checksums", [True, False])
def test_a_flipped_bit_of_parquet_is_noticed_where_there_are_checksums(tmp_path, checksums):
    path = tmp_path / "a.parquet"
    texts = [hashlib.sha512(bytes([i])).hexdigest() for i in range(200)]
    parquet(path, texts, rows=50, checksums=checksums)
    content = path.read_bytes()
    assert shards.has_checksums(path) == checksums
    rng, others = np.random.default_rng(0), 0
    for place in [*rng.integers(len(content), size=60), *range(len(content) - 12, len(content))]:
        flipped = content[place] ^ (1 << int(rng.integers(8)))
        path.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
        try:
            others += read([path], "parquet:text") != texts
        except (ValueError, OSError) as error:
            assert re.search(r"a\.parquet.*: .*\.$", str(error)) and "\n" not in str(error)
    assert (others == 0) == checksums
    for size in (len(content) // 2, len(content) - 1, 4, 0):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"a\.parquet is no complete Parquet file .*\.$"):
            read([path], "parquet:text")


@pytest.mark.parametrize("pages", ["1.0", "2.0"])
@pytest.mark.parametrize("use_dictionary", [True, False])
@pytest.mark.parametrize("checksums", [True, False])
def test_parquet_pages_of_any_kind_tell_whether_they_have_checksums(
    tmp_path, pages, use_dictionary, checksums
):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    options = {"use_dictionary": use_dictionary, "data_page_version": pages}
    table = pyarrow.table({"text": ["abc" * i for i in range(900)]})
    pyarrow.parquet.write_table(table, path, write_page_checksum=checksums, **options)
    assert shards.has_checksums(path) == checksums


@pytest.mark.parametrize("document", ["arrayrecord", "parquet:text"])
def test_damage_that_only_the_library_sees_is_told_with_the_file(tmp_path, document):
    path = tmp_path / "a.data"
    texts = [hashlib.sha512(bytes([i])).hexdigest() for i in range(200)]  # not to be compressed
    if document == "arrayrecord":
        array_record(path, [text.encode() for text in texts])
    else:
        parquet(path, texts, rows=50)
    content = path.read_bytes()
    path.write_bytes(content[:2000] + bytes(5000) + content[7000:])
    with pytest.raises((ValueError, OSError), match=r"a\.data cannot be read \(.*\): replace.*\.$"):
        read([path], document)


def test_json_that_nests_too_deeply_is_one_sentence(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b", "c": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2 nests too deeply to be read: .*\.$"):
        read([path], "jsonl:text")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("parquet", r"data\.document='parquet' does not exist: set .*parquet:FIELD"),
        ("line:text", "does not exist"),
        ("file:text", "does not exist"),
        ("parquet:text", "a.data is no complete Parquet file"),
        ("arrayrecord", "a.data is no complete ArrayRecord file"),
    ],
)
def test_errors_are_one_sentence(tmp_path, document, message):
    (tmp_path / "a.data").write_bytes(b"neither of them")
    with pytest.raises(ValueError, match=message) as raised:
        open_corpus(
            "text",
            files="a.data",
            source_dir=str(tmp_path),
            document=document,
            cache_dir=str(tmp_path),
        )
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")


def test_parquet_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"pip install 'lm_jax\[parquet\]'\.$"):
        shards.parse_format("parquet:text")


def test_parquet_columns_of_other_string_types(tmp_path):
    import pyarrow

    path = tmp_path / "a.parquet"
    large = pyarrow.array(TEXTS, pyarrow.large_string())
    coded = pyarrow.array(TEXTS).dictionary_encode()
    parquet(path, TEXTS, large=large, coded=coded)
    assert read([path], "parquet:large") == read([path], "parquet:coded") == TEXTS
    assert np.array_equal(read([path], "parquet:text"), TEXTS)
    raw = [text.encode() for text in TEXTS]
    parquet(path, TEXTS, raw=raw, long=pyarrow.array(raw, pyarrow.large_binary()))
    assert read([path], "parquet:raw") == read([path], "parquet:long") == TEXTS
    parquet(path, ["a", "b"], raw=[b"a", b"\xff"])
    with pytest.raises(ValueError, match=r"a\.parquet, row 2 is not UTF-8 .*\.$"):
        read([path], "parquet:raw")


def test_fields_within_fields(tmp_path):
    import pyarrow

    path = tmp_path / "a.data"
    nested = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    records = [{"meta": one, "a.b": "flat", "a": {"b": "deep"}} for one in nested]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert read([path], "jsonl:meta.text") == TEXTS
    assert set(read([path], "jsonl:a.b")) == {"flat"}
    with pytest.raises(
        ValueError, match=r"line 1 has no text field 'meta\.text\.more' but \['a', "
    ):
        read([path], "jsonl:meta.text.more")
    parquet(path, TEXTS, meta=nested, list=[["a"]] * len(TEXTS))
    assert read([path], "parquet:meta.text") == TEXTS
    for field in ("meta", "meta.id", "meta.body", "list"):
        with pytest.raises(ValueError, match=rf"a\.data.* has no text field '{field}' but "):
            read([path], f"parquet:{field}")
    parquet(path, TEXTS[:2], meta=pyarrow.array([None, {"text": "b"}]))
    assert read([path], "parquet:meta.text", skip_missing=True) == ["", "b"]


def test_null_and_missing_fields_are_refused_or_empty(tmp_path):
    path = tmp_path / "a.data"
    records = [{"text": "a"}, {"text": None}, {}, {"text": ""}, {"text": "b"}]
    lines = [json.dumps(record) for record in records]
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"line 2 has no .*--config\.data\.skip_missing=True\.$"):
        read([path], "jsonl:text")
    assert read([path], "jsonl:text", skip_missing=True) == ["a", "", "", "", "b"]
    array_record(path, [line.encode() for line in lines])
    assert read([path], "arrayrecord:text", skip_missing=True) == ["a", "", "", "", "b"]
    parquet(path, ["a", None, "b"])
    assert read([path], "parquet:text", skip_missing=True) == ["a", "", "b"]
    for record, field in (('{"text": 3}', "text"), ('{"meta": "oops"}', "meta.text")):
        path.write_text(record + "\n")
        with pytest.raises(ValueError, match=rf"line 1 has no text field '{field}' but \['"):
            read([path], f"jsonl:{field}", skip_missing=True)
    path.write_text('{"meta": null}\n')
    assert read([path], "jsonl:meta.text", skip_missing=True) == [""]


def test_keys_and_columns_that_occur_twice_are_named(tmp_path):
    import pyarrow

    path = tmp_path / "a.data"
    path.write_text('{"text": "a"}\n{"text": "a", "text": "b"}\n')
    with pytest.raises(
        ValueError, match=r"a\.data, line 2 has the key 'text' twice: delete one\.$"
    ):
        read([path], "jsonl:text")
    table = pyarrow.table([["a"], ["b"], ["c"]], names=["text", "text", "id"])
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(ValueError, match=r"a\.data has 2 columns 'text': rename one\.$"):
        read([path], "parquet:text")


def test_a_byte_order_mark_is_no_text(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text('\ufeff{"text": "\ufeffa"}\n\ufeff\n'.replace("\n\ufeff", "\n"))
    assert read([path], "file") == ['{"text": "\ufeffa"}\n\n']
    assert read([path], "line") == ['{"text": "\ufeffa"}', ""]
    assert read([path], "jsonl:text") == ["\ufeffa"]
    monkeypatch.setattr(shards, "PIECE", 1)
    assert read([path], "line") == ['{"text": "\ufeffa"}', ""]


@pytest.mark.parametrize("text", ['[{"text": "a"}]', '\ufeff\n [\n{"text": "a"}\n]\n'])
def test_a_json_array_is_told_with_its_conversion(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a\.json is a JSON array .* jq -c '\.\[\]' \S*a\.json "):
        read([path], "jsonl:text")
