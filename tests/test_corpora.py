import codecs
import dataclasses
import gzip
import hashlib
import json
import lzma
import pickle
import re
import shutil
import sys
import zipfile
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lm_jax.data import corpora, parts, recipe, shards, store, wikitext
from lm_jax.data.corpora import open_corpus
from lm_jax.data.files import hash_json
from lm_jax.data.synthetic import MarkovSource
from tests.helpers import shared_data, source_nats, source_symbols

ARTICLE = " \n = {} = \n \n {} \n \n"


def _open(tmp_path, corpus="text", **options):
    return open_corpus(corpus, cache_dir=str(tmp_path / "cache"), **options)


def _documents(corpus):
    return {name: list(corpus.documents(name)) for name in corpus.splits}


def _wikitext_files(folder, **texts):
    folder.mkdir()
    for split in ("train", "valid", "test"):
        text = texts.get(split, ARTICLE.format(split, "words of the article"))
        (folder / f"wiki.{split}.tokens").write_text(text, encoding="utf-8", newline="")
    return str(folder)


# --- WikiText ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wikitext2(tmp_path_factory):
    source = str(shared_data("wikitext-2"))
    return open_corpus("wikitext2", source_dir=source, cache_dir=str(tmp_path_factory.mktemp("c")))


@pytest.mark.parametrize(("split", "articles"), [("train", 600), ("valid", 60), ("test", 60)])
def test_wikitext2_has_the_published_articles_and_every_byte(wikitext2, split, articles):
    """A level-one heading with a blank line on both sides gives the published counts.

    Without the second condition the train split has 601: one heading-like line of a reference list
    follows a blank line; 28 more, from formulas and table legends, follow text.
    """
    documents = list(wikitext2.documents(split))
    assert len(documents) == articles
    assert all(re.match(r" \n = [^=].* = \n \n", text) for text in documents)
    original = (shared_data("wikitext-2") / f"wiki.{split}.tokens").read_bytes()
    assert "".join(documents).encode() == original


def test_only_a_heading_between_blank_lines_starts_an_article(tmp_path):
    body = " = = Section = = \n \n where : \n = Played , W = \n \n"
    body += " = Not followed by a blank = \n text \n"
    first = ARTICLE.format("A = B", "x") + body
    source = _wikitext_files(tmp_path / "s", train=first + ARTICLE.format("Second", "y"))
    train = _documents(_open(tmp_path, "wikitext2", source_dir=source))["train"]
    assert train == [first, ARTICLE.format("Second", "y")]


@pytest.mark.parametrize("piece", [1, 7, 20, 50, 1000])
@pytest.mark.parametrize(
    "articles",
    [
        ["\n = One ( film ) = \n\n a \n", " \n = Two = \n \n"],
        [" = At once = \n", " \n = Next = \n \n é \n \n", "\u3000\n = Third = "],
        [" no heading \n = Nor here = \n \n", "\r\n = One = \n\r\n text \r\n"],
        ["\n\n\n"],
    ],
)
def test_pieces_of_any_size_lose_and_repeat_no_article(tmp_path, monkeypatch, articles, piece):
    monkeypatch.setattr(shards, "PIECE", piece)
    source = _wikitext_files(tmp_path / "s", train="".join(articles))
    corpus = _open(tmp_path, "wikitext2", source_dir=source)
    size = len("".join(articles).encode())
    assert len(corpus.splits["train"]) == -(-size // piece)
    pieces = pickle.loads(pickle.dumps(corpus.splits["train"]))
    assert list(shards.chain(pieces)) == articles


def test_wikitext2_in_pieces_holds_the_same_articles(wikitext2, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PIECE", 100_003)
    source = str(shared_data("wikitext-2"))
    corpus = _open(tmp_path, "wikitext2", source_dir=source)
    assert corpus.fingerprint == wikitext2.fingerprint
    assert len(corpus.splits["valid"]) == 12
    assert _documents(corpus) == _documents(wikitext2)


def test_the_corpus_follows_its_source(tmp_path):
    one = _open(tmp_path, "wikitext2", source_dir=_wikitext_files(tmp_path / "one"))
    changed = _wikitext_files(tmp_path / "two", valid=ARTICLE.format("Other", "text"))
    two = _open(tmp_path, "wikitext2", source_dir=changed)
    assert one.fingerprint != two.fingerprint
    assert _documents(two)["valid"] == [ARTICLE.format("Other", "text")]
    assert _documents(one)["valid"] != _documents(two)["valid"]

    (tmp_path / "two" / "wiki.valid.tokens").write_text(ARTICLE.format("Third", "text"))
    edited_in_place = _open(tmp_path, "wikitext2", source_dir=changed)
    assert _documents(edited_in_place)["valid"] == [ARTICLE.format("Third", "text")]


@pytest.mark.parametrize("text", [ARTICLE.format("Other", "text, and longer"), "short"])
def test_a_wikitext_file_that_changes_while_it_is_read_is_refused(tmp_path, text):
    source = _wikitext_files(tmp_path / "s")
    corpus = _open(tmp_path, "wikitext2", source_dir=source)
    (tmp_path / "s" / "wiki.valid.tokens").write_text(text)
    changed = r"wiki\.valid\.tokens has changed since it was hashed: .*\.$"
    with pytest.raises(ValueError, match=changed):
        list(corpus.documents("valid"))
    options: dict[str, Any] = {"tokenizer_kind": "byte", "vocab_size": 0}
    with pytest.raises(ValueError, match=changed):
        store.prepare(corpus, **options, cache_dir=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache" / "stores").iterdir())


def test_a_wikitext_file_that_changes_while_the_corpus_is_opened_is_refused(tmp_path, monkeypatch):
    source = _wikitext_files(tmp_path / "s")
    pieces = wikitext.pieces_of

    def change_then(path):
        (tmp_path / "s" / "wiki.train.tokens").write_text(ARTICLE.format("Other", "text"))
        return pieces(path)

    monkeypatch.setattr(wikitext, "pieces_of", change_then)
    with pytest.raises(ValueError, match=r"wiki\.train\.tokens has changed since it was hashed"):
        _open(tmp_path, "wikitext2", source_dir=source)


def test_wikitext_source_must_be_whole(tmp_path):
    source = _wikitext_files(tmp_path / "s")
    (tmp_path / "s" / "wiki.valid.tokens").write_bytes(b"good \xc3\xa9\nbad \xff\n")
    with pytest.raises(ValueError, match=r"wiki\.valid\.tokens is not UTF-8 at byte 12 "):
        _open(tmp_path, "wikitext2", source_dir=source)
    (tmp_path / "s" / "wiki.valid.tokens").write_bytes(b"")
    with pytest.raises(ValueError, match=r"wiki\.valid\.tokens is empty: "):
        _open(tmp_path, "wikitext2", source_dir=source)
    (tmp_path / "s" / "wiki.valid.tokens").unlink()
    with pytest.raises(FileNotFoundError, match=r"wiki\.valid\.tokens .*config.data.source_dir"):
        _open(tmp_path, "wikitext2", source_dir=source)
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Serves a small archive in place of the published one."""
    _wikitext_files(tmp_path / "wikitext-2")
    path = tmp_path / "published.zip"
    with zipfile.ZipFile(path, "w") as contents:
        for file in (tmp_path / "wikitext-2").iterdir():
            contents.write(file, f"wikitext-2/{file.name}")

    def serve(url=None, sha256=None):
        url = url or path.as_uri()
        sha256 = sha256 or hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setitem(
            wikitext.ARCHIVES, "wikitext2", wikitext.Archive(url, sha256, "wikitext-2")
        )
        return path

    return serve


def test_the_archive_is_downloaded_once(tmp_path, archive):
    path = archive()
    corpus = _open(tmp_path, "wikitext2")
    assert _documents(corpus)["test"] == [ARTICLE.format("test", "words of the article")]
    path.unlink()
    assert _open(tmp_path, "wikitext2").fingerprint == corpus.fingerprint


def test_a_wrong_archive_is_refused_and_removed(tmp_path, archive):
    archive(sha256="0" * 64)
    with pytest.raises(ValueError, match="instead of the published 0000.*config.data.source_dir"):
        _open(tmp_path, "wikitext2")
    assert list((tmp_path / "cache").rglob("*.*")) == []


def test_no_network_is_one_sentence_and_no_other_data(tmp_path, archive):
    archive(url="http://127.0.0.1:9/wikitext-2-v1.zip")
    with pytest.raises(FileNotFoundError, match=r"127\.0\.0\.1.*--config\.data\.source_dir=FOLDER"):
        _open(tmp_path, "wikitext2")
    assert list((tmp_path / "cache").rglob("*.*")) == []


# --- text ----------------------------------------------------------------------------------------


def test_tiny_shakespeare_is_cut_at_nine_tenths(tmp_path):
    path = shared_data("tinyshakespeare") / "input.txt"
    text = path.read_text(encoding="utf-8")
    splits = _documents(_open(tmp_path, files=str(path)))
    assert list(splits) == ["train", "valid"]
    assert [len(documents[0]) for documents in splits.values()] == [1_003_854, 111_540]
    assert splits["train"][0] == text[: int(0.9 * len(text))]
    assert splits["train"][0] + splits["valid"][0] == text


def test_a_single_document_ends_in_valid_then_test(tmp_path):
    (tmp_path / "one.txt").write_text("0123456789" * 2)
    splits = _documents(
        _open(tmp_path, files="one.txt", source_dir=str(tmp_path), test_fraction=0.2)
    )
    assert splits == {"train": ["01234567890123"], "valid": ["45"], "test": ["6789"]}


def test_many_documents_are_held_out_by_content(tmp_path):
    lines = [f"line {i % 2000}" for i in range(4000)]
    (tmp_path / "lines.txt").write_text("\n".join(lines) + "\n")
    options = {"files": str(tmp_path / "lines.txt"), "document": "line", "test_fraction": 0.05}
    splits = _documents(_open(tmp_path, **options))
    assert sorted(sum(splits.values(), [])) == sorted(lines)
    kinds = {name: set(documents) for name, documents in splits.items()}
    assert sum(map(len, kinds.values())) == 2000, "equal documents must share a split"
    assert abs(len(kinds["valid"]) - 200) < 5 * np.sqrt(180)
    assert abs(len(kinds["test"]) - 100) < 5 * np.sqrt(95)
    assert _documents(_open(tmp_path, **options)) == splits

    (tmp_path / "lines.txt").write_text("\n".join(["new", *reversed(lines)]) + "\n")
    reordered = _documents(_open(tmp_path, **options))
    assert set(reordered["valid"]) - {"new"} == kinds["valid"]


def test_lines_keep_everything_but_their_end(tmp_path):
    (tmp_path / "a.txt").write_bytes("one \u2028x\x0by\r\n\n two\x85\nend".encode())
    (tmp_path / "b.txt").write_text("held out")
    corpus = _open(
        tmp_path, files="a.txt", valid_files="b.txt", source_dir=str(tmp_path), document="line"
    )
    assert _documents(corpus)["train"] == ["one \u2028x\x0by", "", " two\x85", "end"]


def test_files_are_documents_in_sorted_order_with_every_character(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_bytes(f"{name}\r\n\n".encode())
    (tmp_path / "held.md").write_text("v")
    (tmp_path / "odd[1].txt").write_text("odd")
    corpus = _open(
        tmp_path, files="[ab].txt, c.txt,odd[1].txt", valid_files="*.md", source_dir=str(tmp_path)
    )
    assert _documents(corpus) == {"train": ["a\r\n\n", "b\r\n\n", "c\r\n\n", "odd"], "valid": ["v"]}


def test_jsonl_field(tmp_path):
    records = [{"text": f"d{i}\n", "id": i} for i in range(5)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    (tmp_path / "v.jsonl").write_text('{"text": "v"}')
    options = {"files": "t.jsonl", "valid_files": "v.jsonl", "source_dir": str(tmp_path)}
    corpus = _open(tmp_path, document="jsonl:text", **options)
    assert _documents(corpus) == {"train": [f"d{i}\n" for i in range(5)], "valid": ["v"]}
    with pytest.raises(ValueError, match=r"t\.jsonl, line 1 has no text field 'body' but \['id', "):
        _documents(_open(tmp_path, document="jsonl:body", **options))
    with pytest.raises(ValueError, match=r"t\.jsonl, line 1 has no text field 'id'"):
        _documents(_open(tmp_path, document="jsonl:id", **options))
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"t\.jsonl, line 2 is not JSON"):
        _documents(_open(tmp_path, document="jsonl:text", **options))
    (tmp_path / "t.jsonl").write_text('{"text": "a \\ud800 b"}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl, line 1 holds half a surrogate pair"):
        _documents(_open(tmp_path, document="jsonl:text", **options))


def test_the_fingerprint_follows_content_and_division(tmp_path):
    (tmp_path / "a.txt").write_text("some text\nmore\n")
    base: dict[str, Any] = {"files": str(tmp_path / "a.txt")}
    variants = [base, base | {"valid_fraction": 0.2}, base | {"test_fraction": 0.2}]
    variants.append(base | {"document": "line"})
    prints = [_open(tmp_path, **variant).fingerprint for variant in variants]
    assert len(set(prints)) == 4
    assert _open(tmp_path, **base).fingerprint == prints[0]
    (tmp_path / "a.txt").write_text("some text\nMore\n")
    assert _open(tmp_path, **base).fingerprint != prints[0]


def test_the_fingerprint_follows_the_order_of_the_files(tmp_path):
    prints = []
    for texts in ("one", "two"), ("two", "one"):
        for name, text in zip("ab", texts, strict=True):
            (tmp_path / f"{name}.txt").write_text(text)
        prints.append(_open(tmp_path, files="?.txt", source_dir=str(tmp_path)).fingerprint)
    assert prints[0] != prints[1]


def _jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.mark.parametrize("moment", ["learning", "tokenising", "joining"])
def test_a_file_that_changes_during_the_preparation_gives_no_store(tmp_path, monkeypatch, moment):
    path, texts = tmp_path / "a.jsonl", [f"document {i}" for i in range(50)]
    _jsonl(path, texts)
    options = {"files": "a.jsonl", "document": "jsonl:text", "source_dir": str(tmp_path)}
    module, name = {
        "learning": (recipe, "train_tokenizer"),
        "tokenising": (parts, "write_all"),
        "joining": (parts, "join"),
    }[moment]
    original = getattr(module, name)

    def change_then(*arguments):
        _jsonl(path, texts[:20])
        return original(*arguments)

    def prepare():
        corpus = _open(tmp_path, **options)
        cache = str(tmp_path / "cache")
        return store.prepare(corpus, tokenizer_kind="byte", vocab_size=0, cache_dir=cache)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, change_then)
        if moment == "learning":  # a tokenizer is not kept that has learnt from other text
            patch.setattr(parts, "write_all", lambda *_: pytest.fail("went on"))
        with pytest.raises(ValueError, match=r"a\.jsonl has changed since it was hashed: .*\.$"):
            prepare()
    assert not list((tmp_path / "cache" / "stores").iterdir())
    _jsonl(path, texts)
    splits = prepare().manifest["splits"]
    assert splits["train"]["documents"] + splits["valid"]["documents"] == 50


def test_a_file_that_changes_while_the_corpus_is_opened_is_refused(tmp_path, monkeypatch):
    _jsonl(tmp_path / "a.jsonl", ["one", "two"])
    cut = shards.pieces

    def grow_then(paths, document, **options):
        _jsonl(tmp_path / "a.jsonl", ["one", "two", "three"])
        return cut(paths, document, **options)

    monkeypatch.setattr(shards, "pieces", grow_then)
    with pytest.raises(ValueError, match=r"a\.jsonl has changed since it was hashed"):
        _open(tmp_path, files=str(tmp_path / "a.jsonl"), document="jsonl:text")


def test_equal_shards_are_refused_but_not_equal_documents(tmp_path):
    for name in ("a", "b"):
        _jsonl(tmp_path / f"{name}.jsonl", ["one", "two"])
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    _jsonl(tmp_path / "v.jsonl", ["three"])
    options = {"source_dir": str(tmp_path), "valid_files": "v.jsonl"}
    with pytest.raises(ValueError, match=r"b\.jsonl and \S*a\.jsonl hold the same bytes, .*\.$"):
        _open(tmp_path, files="[ab].jsonl", document="jsonl:text", **options)
    once = _open(tmp_path, files="a.jsonl, link.jsonl", document="jsonl:text", **options)
    assert list(once.documents("train")) == ["one", "two"]
    twice = _open(tmp_path, files="[ab].jsonl", document="file", **options)
    assert len(list(twice.documents("train"))) == 2


def test_one_file_cannot_be_in_two_splits(tmp_path):
    (tmp_path / "a.txt").write_text("same")
    (tmp_path / "b.txt").write_text("same")
    (tmp_path / "c.txt").write_text("other")
    options = {"source_dir": str(tmp_path), "files": "[ac].txt"}
    with pytest.raises(ValueError, match=r"b\.txt is in split valid .*a\.txt, in split train"):
        _open(tmp_path, valid_files="b.txt", **options)
    with pytest.raises(ValueError, match=r"c\.txt is in split test "):
        _open(tmp_path, valid_files="a*", test_files="c.txt", **options | {"files": "c.txt"})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"files": ""}, ValueError, "--config.data.files=PATH"),
        ({"files": ","}, ValueError, "data.files is empty: .*--config.data.files=PATH"),
        ({"files": "absent/*.txt"}, FileNotFoundError, r"data.files='absent/\*.txt' names no file"),
        ({"files": "a.txt", "valid_files": "b"}, FileNotFoundError, "data.valid_files='b'"),
        ({"files": "empty.txt"}, ValueError, "empty.txt is empty: "),
        ({"files": "latin.txt"}, ValueError, "latin.txt is not UTF-8 at byte 3 .*convert"),
        ({"files": "a.txt", "document": "page"}, ValueError, "document='page' does not exist"),
        ({"files": "a.txt", "document": "jsonl"}, ValueError, "jsonl:FIELD"),
        ({"files": "a.txt", "valid_fraction": 1.5}, ValueError, "data.valid_fraction=1.5"),
        ({"files": "a.txt", "test_fraction": 0.95}, ValueError, "sum below 1"),
        ({"files": "a.txt", "test_fraction": -0.1}, ValueError, "data.test_fraction=-0.1"),
    ],
)
def test_errors_name_the_cause_and_the_remedy(tmp_path, options, error, message):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(error, match=message) as raised:
        _open(tmp_path, source_dir=str(tmp_path), **options)
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith(".")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"text"), r"compressed by gzip: .*gunzip -k \S+a\.txt\.$"),
        (lzma.compress(b"text"), r"compressed by xz: .*unxz -k \S+a\.txt\.$"),
        (b"\x28\xb5\x2f\xfd\x04\x00", r"compressed by Zstandard: .*unzstd \S+a\.txt\.$"),
        ("text".encode("utf-16"), r"UTF-16: convert it by iconv -f UTF-16 -t UTF-8 \S+a\.txt > "),
        ("text".encode("utf-32"), r"UTF-32: convert it by iconv -f UTF-32 -t UTF-8 \S+a\.txt > "),
        (codecs.BOM_UTF16_BE + "text".encode("utf-16-be"), "UTF-16: "),
    ],
    ids="gzip xz zstandard utf-16 utf-32 utf-16-be".split(),
)
def test_files_of_another_kind_are_told_with_their_conversion(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.txt is " + message):
        _open(tmp_path, files="a.txt", source_dir=str(tmp_path))


def test_byte_order_marks_are_counted_and_make_another_corpus(tmp_path, capsys):
    options = {"files": "?.txt", "source_dir": str(tmp_path), "valid_fraction": 0.5}
    for name, text in ("a", "\ufeffone"), ("b", "two"), ("c", "\ufeffthree"):
        (tmp_path / f"{name}.txt").write_text(text)
    documents = _documents(_open(tmp_path, **options))
    assert sorted(sum(documents.values(), [])) == ["one", "three", "two"]
    assert "2 of 3 files begin with a byte-order mark" in capsys.readouterr().out
    for name, same in (("a", False), ("b", True)):
        corpus = _open(tmp_path, **options | {"files": f"{name}.txt"})
        definition = ["file", {"valid": 0.5, "test": 0.0}, {"train": [corpus.files[0].sha256]}]
        assert (corpus.fingerprint == hash_json(definition)) == same


def test_parquet_files_without_checksums_are_told(tmp_path, capsys):
    import pyarrow
    import pyarrow.parquet

    options = {"document": "parquet:text", "source_dir": str(tmp_path)}
    for name, checksums in (("a", True), ("b", False)):
        table = pyarrow.table({"text": [name]})
        path = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(table, path, write_page_checksum=checksums)
    _open(tmp_path, files="a.parquet", **options)
    assert not capsys.readouterr().out
    _open(tmp_path, files="?.parquet", **options)
    assert "1 of 2 Parquet files hold no checksums" in capsys.readouterr().out


def test_a_file_with_a_comma_in_its_name(tmp_path):
    for name in ("one, two.txt", "one", "two.txt"):
        (tmp_path / name).write_text(name)
    for files, expected in (
        ("one, two.txt", ["one, two.txt"]),
        ("one? two.txt, one", ["one", "one, two.txt"]),
        ("one,two.txt", ["one", "two.txt"]),
    ):
        corpus = _open(tmp_path, files=files, valid_fraction=0.0, source_dir=str(tmp_path))
        assert list(corpus.documents("train")) == expected


def test_documents_without_text_are_left_out_and_counted(tmp_path, capsys):
    lines = ['{"text": "a"}', '{"text": null}', "{}", '{"text": "b"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    options = {"files": "a.jsonl", "source_dir": str(tmp_path), "valid_fraction": 0.0}
    corpus = _open(tmp_path, document="jsonl:text", skip_missing=True, **options)
    kept = store.prepare(corpus, tokenizer_kind="byte", vocab_size=0, cache_dir=str(tmp_path))
    assert kept.manifest["splits"]["train"]["documents"] == 2
    assert kept.manifest["splits"]["train"]["empty_documents"] == 2
    assert "train: 2 documents without text are left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"data\.skip_missing=True needs .*jsonl:FIELD"):
        _open(tmp_path, document="line", skip_missing=True, **options)


@pytest.mark.parametrize(
    ("corpus", "nearest"),
    [("wikitext-2", "wikitext2"), ("wikitext-103", "wikitext103"), ("sythetic", "synthetic")],
)
def test_unknown_corpus(tmp_path, corpus, nearest):
    with pytest.raises(ValueError, match=rf"config\.data\.corpus: .* did you mean {nearest}\?"):
        _open(tmp_path, corpus)


# --- synthetic -----------------------------------------------------------------------------------


def test_synthetic_splits_come_from_one_source(tmp_path):
    corpus = _open(tmp_path, "synthetic")
    source = MarkovSource(seed=0)
    assert corpus.entropy_rate == source.entropy_rate
    sizes = {"train": 200, "valid": 20, "test": 20}
    seen: set[str] = set()
    for name, count in sizes.items():
        documents = list(corpus.documents(name))
        assert [len(text) for text in documents] == [10_000] * count
        assert not seen & {text[:50] for text in documents}
        seen |= {text[:50] for text in documents}
        nats = np.concatenate([source_nats(source, source_symbols(text)) for text in documents])
        assert abs(nats.mean() - source.entropy_rate) < 0.01
    again = _open(tmp_path, "synthetic")
    assert next(corpus.documents("train")) == next(again.documents("train"))


# --- any TensorFlow data set ---------------------------------------------------------------------


def _text_builders():
    import tensorflow_datasets as tfds

    class Notes(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.2.0")
        FEATURES: tuple[str, ...] = ("text", "title")
        SPLITS: tuple[str, ...] = ("train", "test")

        def _info(self):
            features = {name: tfds.features.Text() for name in self.FEATURES} | {"id": np.int64}
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(name) for name in self.SPLITS}

        def _generate_examples(self, split):
            for i in range(300 if split == "train" else 3):
                yield i, {name: f"{split} {name} {i} é" for name in self.FEATURES} | {"id": i}

    class Validated(Notes):
        FEATURES = ("body",)
        SPLITS = ("train", "validation", "test")

    class Ambiguous(Notes):
        FEATURES = ("question", "answer")

    class Trainless(Notes):
        SPLITS = ("test",)

    return Notes, Validated, Ambiguous, Trainless


def test_tfds_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match=r"^data\.corpus='tfds:lm1b' .*'lm_jax\[tfds\]'\.$"):
        _open(tmp_path, "tfds:lm1b")


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A data_dir with small prepared text sets, which are found by name alone."""
    import tensorflow_datasets as tfds

    data_dir = tmp_path_factory.mktemp("tfds")
    with tfds.core.registered.skip_registration():
        builders = _text_builders()
    for builder in builders:
        builder(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return str(data_dir)


@pytest.mark.parametrize("name", ["tfds:notes", "tfds:notes:1.2.0"])
@pytest.mark.parametrize("piece", [1000, 1 << 25])
def test_tfds_holds_out_a_missing_valid_split(tmp_path, monkeypatch, tfds_dir, name, piece):
    monkeypatch.setattr(shards, "PIECE", piece)
    corpus = _open(tmp_path, name, source_dir=tfds_dir)
    assert (len(corpus.splits["train"]) > 5) == (piece == 1000)
    splits = _documents(
        dataclasses.replace(corpus, splits=pickle.loads(pickle.dumps(corpus.splits)))
    )
    assert set(splits) == {"train", "valid", "test"}
    assert splits["test"] == [f"test text {i} é" for i in range(3)]
    assert set(splits["train"]) | set(splits["valid"]) == {f"train text {i} é" for i in range(300)}
    assert len(splits["train"]) + len(splits["valid"]) == 300
    assert 10 < len(splits["valid"]) < 60


def test_tfds_maps_its_own_splits_and_only_text_feature(tmp_path, tfds_dir):
    splits = _documents(_open(tmp_path, "tfds:validated", source_dir=tfds_dir))
    assert {name: documents[0] for name, documents in splits.items()} == {
        "train": "train body 0 é",
        "valid": "validation body 0 é",
        "test": "test body 0 é",
    }
    assert len(splits["train"]) == 300


def test_an_error_of_a_tfds_reader_names_the_set(tmp_path, tfds_dir):
    (of_no_such_feature,) = corpora.tfds._pieces(
        SimpleNamespace(
            data_dir=f"{tfds_dir}/notes/1.2.0",
            info=SimpleNamespace(splits={"test": SimpleNamespace(num_examples=3, num_bytes=9)}),
        ),
        "test",
        "body",
    )
    with pytest.raises(
        ValueError, match=r"^Split test of \S+notes/1\.2\.0 cannot be read \(KeyErr"
    ):
        list(of_no_such_feature())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ambiguous", r"text features \['answer', 'question'\]"),
        ("trainless", r"no train split but \['test'\]"),
        ("no_such_set", "neither a TensorFlow Datasets name nor prepared in "),
    ],
)
def test_tfds_sets_that_do_not_fit(tmp_path, tfds_dir, name, message):
    with pytest.raises(ValueError, match=message):
        _open(tmp_path, f"tfds:{name}", source_dir=tfds_dir)


@pytest.mark.parametrize("case", ["of a feature", "of all", "within text", "snake case"])
@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
def test_no_class_of_a_foreign_set_is_imported(tmp_path, monkeypatch, tfds_dir, case, file):
    shutil.copytree(tfds_dir, tmp_path / "sets")
    folder = tmp_path / "sets" / "notes" / "1.2.0"
    tree = json.loads((folder / "features.json").read_text())
    feature = tree if case == "of all" else tree["featuresDict"]["features"]["title"]
    own, foreign = feature.pop("pythonClassName"), "planted.Text"
    feature["python_class_name" if case == "snake case" else "pythonClassName"] = foreign
    if case == "within text":
        inner = {"feature": dict(feature)}
        feature.clear()
        feature["pythonClassName"] = own.replace("text_feature.Text", "sequence_feature.Sequence")
        feature["jsonFeature"] = {"json": json.dumps(inner)}
    if file == "dataset_info.json":
        tree = json.loads((folder / file).read_text()) | {"features": tree}
    (folder / file).write_text(json.dumps(tree))
    (tmp_path / "planted.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=rf"{file} names the class 'planted\.Text', .* Text\.$"):
        _open(tmp_path, "tfds:notes", source_dir=str(tmp_path / "sets"))
    assert "planted" not in sys.modules


@pytest.mark.parametrize("name", ["huggingface:x", "kaggle:a/b", "x/a=1", "../x", "X", ""])
def test_only_sets_of_tfds_itself_are_opened(tmp_path, name):
    with pytest.raises(ValueError, match=r"names no set of TensorFlow Datasets itself: give tfds:"):
        _open(tmp_path, f"tfds:{name}")


@pytest.mark.parametrize("name", ["tfds:lm1b", "wikitext2"])
def test_nothing_is_downloaded_that_a_record_names(tmp_path, monkeypatch, name):
    import requests

    def refuse(*_, **__):
        pytest.fail("it was asked for")

    monkeypatch.setattr(requests.Session, "send", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(FileNotFoundError, match=r"is not downloaded: give .*data\.source_dir"):
        _open(tmp_path, name, fetch=False)
    assert not list(tmp_path.rglob("*"))


def test_a_prepared_set_needs_no_fetching(tmp_path, tfds_dir):
    corpus = _open(tmp_path, "tfds:notes", source_dir=tfds_dir, fetch=False)
    assert corpus.fingerprint == _open(tmp_path, "tfds:notes", source_dir=tfds_dir).fingerprint


def test_tfds_without_network(tmp_path, monkeypatch):
    import requests

    def refuse(*args, **kwargs):
        raise requests.exceptions.ConnectionError("name resolution failed")

    monkeypatch.setattr(requests.Session, "send", refuse)
    with pytest.raises(FileNotFoundError, match=r"'tfds:lm1b' could not .*data\.source_dir\.$"):
        _open(tmp_path, "tfds:lm1b")
