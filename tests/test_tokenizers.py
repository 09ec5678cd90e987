import pathlib
import re
import subprocess
import sys
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from lm_jax.data.tokenizers import base, kinds
from lm_jax.data.tokenizers.base import count_words
from lm_jax.data.tokenizers.kinds import WordTokenizer
from lm_jax.data.tokenizers.load import load_tokenizer, train_tokenizer
from tests.helpers import TEXTS, shared_data


@pytest.fixture(scope="module", params=["byte", "char", "bpe"])
def exact(request):
    """A tokenizer of a kind that must reproduce any text of its alphabet."""
    training = TEXTS if request.param == "char" else ["low lower lowest new newer newest\n"] * 9
    return train_tokenizer(request.param, training, 270 if request.param == "bpe" else 0)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(exact, text):
    ids = exact.encode(text)
    assert ids.dtype == np.int32
    assert exact.decode(ids) == text
    assert exact.separator not in ids
    assert (ids < exact.vocab_size).all()


def test_the_separator_decodes_to_nothing(exact):
    ids = exact.encode("low ")
    assert exact.decode(np.concatenate([[0], ids, [0], ids, [0]])) == "low low "


def test_encode_all_is_encode_of_each(exact):
    for text, ids in zip(TEXTS, exact.encode_all(TEXTS), strict=True):
        np.testing.assert_array_equal(ids, exact.encode(text))


def test_bpe_pieces_change_no_id(monkeypatch):
    text = "".join(TEXTS) + " ".join(["the newest  low\n lower'll 12 _ _"] * 30)
    tokenizer = train_tokenizer("bpe", [text], 300)
    whole = tokenizer.encode(text)
    monkeypatch.setattr(kinds.BpeTokenizer, "PIECE", 5)
    pieces = list(kinds.BpeTokenizer._pieces(text))
    assert len(pieces) > 50
    assert "".join(pieces) == text
    np.testing.assert_array_equal(tokenizer.encode(text), whole)
    assert train_tokenizer("bpe", [text], 300).content_hash == tokenizer.content_hash


def test_the_library_sees_little_of_a_long_document_at_once(monkeypatch):
    text = "low lower\nnewest 12 _ é👩. " * 60
    tokenizer = train_tokenizer("bpe", [text], 270)
    texts = [text, "", "low", text + "x" * 500 + text, "", text]
    expected = [tokenizer.encode(one) for one in texts]
    monkeypatch.setattr(kinds.BpeTokenizer, "PIECE", 50)
    monkeypatch.setattr(kinds.BpeTokenizer, "AT_ONCE", 200)
    sizes, library = [], tokenizer._library

    def encode_batch_fast(pieces):
        sizes.append(sum(map(len, pieces)))
        return library.encode_batch_fast(pieces)

    tokenizer._library = SimpleNamespace(encode_batch_fast=encode_batch_fast)
    for ids, one in zip(tokenizer.encode_all(texts), expected, strict=True):
        np.testing.assert_array_equal(ids, one)
    assert sum(sizes) == sum(map(len, texts))
    assert sorted(sizes)[-2] <= 200 < sorted(sizes)[-1] < 600  # one word is 500 long
    assert len(sizes) < sum(sizes) / 100


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_words_are_counted_in_bounded_memory(monkeypatch, block):
    expected = [len(text.split()) + text.count("\n") for text in TEXTS]
    monkeypatch.setattr(base, "BLOCK", block)
    assert [count_words(text) for text in TEXTS] == expected
    monkeypatch.setattr(base, "BLOCK", 1000 * block)
    text = "ab cd " * 50_000
    tracemalloc.start()
    assert count_words(text) == 100_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(text) * 2


def test_count_words():
    assert count_words(" a b \n \n c") == 5
    assert count_words("") == 0


def test_byte_ids():
    tokenizer = train_tokenizer("byte", [], 0)
    assert tokenizer.vocab_size == 257
    assert tokenizer.encode("aé").tolist() == [98, 0xC3 + 1, 0xA9 + 1]
    assert tokenizer.decode(np.array([0xC3 + 1])) == "\ufffd"


def test_char_names_the_unseen_character():
    tokenizer = train_tokenizer("char", ["abc", "cd"], 0)
    assert tokenizer.vocab_size == 5
    assert tokenizer.encode("dab").tolist() == [4, 1, 2]
    expected = r"'ß' \(U\+00DF\) at position 2 .*--config.tokenizer.kind=byte or bpe\.$"
    with pytest.raises(ValueError, match=expected):
        tokenizer.encode("abßd")


def test_word_ids_follow_frequency_then_alphabet():
    tokenizer = train_tokenizer("word", [" b a \n", "a c\nc a"], 0)
    assert isinstance(tokenizer, WordTokenizer)
    assert tokenizer.types == ["a", "\n", "c", "b"]
    assert tokenizer.vocab_size == 5
    assert tokenizer.encode("c  b\na").tolist() == [3, 4, 2, 1]


def test_word_decodes_into_the_layout_of_wikitext():
    text = " \n = Title = \n \n a b . \n"
    tokenizer = train_tokenizer("word", [text], 0)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) == count_words(text) == 10


def test_rare_words_become_unk():
    tokenizer = train_tokenizer("word", ["a a a b b c"], 3)
    assert isinstance(tokenizer, WordTokenizer)
    assert tokenizer.types == ["a", "<unk>"]
    assert tokenizer.encode("a b c d").tolist() == [1, 2, 2, 2]


def test_unknown_word_without_unk_is_an_error():
    with pytest.raises(ValueError, match=r"Word 'zebra', number 1 .*--config.tokenizer.kind=bpe"):
        train_tokenizer("word", ["a a b"], 0).encode("a zebra")


def test_the_word_eos_is_not_a_newline():
    tokenizer = train_tokenizer("word", ["a <eos>\n"], 0)
    assert tokenizer.decode(tokenizer.encode("<eos>\n")) == " <eos> \n"


def test_bpe_has_the_size_asked_for_and_merges_frequent_words():
    tokenizer = train_tokenizer("bpe", ["low lower lowest"] * 5, 262)
    assert tokenizer.vocab_size == 262
    assert len(tokenizer.encode("low low")) == 2
    assert (
        tokenizer.encode("\x00").tolist() == train_tokenizer("bpe", [], 257).encode("\x00").tolist()
    )


@pytest.mark.parametrize("run", ["a", " ", "!?", "ACGTTGCAAC", "\u5317\u4eac"])
def test_bpe_learns_from_a_long_run_and_encodes_it_in_linear_time(run):
    text = run * (200_000 // len(run))
    begun = time.process_time()
    tokenizer = train_tokenizer("bpe", [text], 262)
    ids = tokenizer.encode(text)
    assert time.process_time() - begun < 8
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode()) / 2


def test_bpe_learns_uncut_from_runs_that_are_not_long(monkeypatch):
    texts = ["ab" * 512, "\u5317\u4eac" * 170, "new " * 9]
    tokenizer = train_tokenizer("bpe", texts, 266)
    monkeypatch.setattr(kinds.BpeTokenizer, "LONGEST", 1 << 30)
    assert train_tokenizer("bpe", texts, 266).content_hash == tokenizer.content_hash


def test_bpe_training_is_deterministic():
    documents = [" ".join(TEXTS)] * 3
    hashes = {train_tokenizer("bpe", documents, 400).content_hash for _ in range(3)}
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("kind", "vocab_size", "message"),
    [
        ("bpe", 256, "vocab_size=257, the 256 bytes"),
        ("bpe", 5000, r"vocab_size=5000 does not fit.*finds 258 ids.*vocab_size=258\.$"),
        ("byte", 300, r"vocab_size=0\.$"),
        ("char", 300, r"finds 3 ids.*vocab_size=0\.$"),
        ("word", 300, r"finds 2 ids"),
        ("bytes", 0, "did you mean byte"),
    ],
)
def test_sizes_that_cannot_be_are_refused(kind, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(kind, ["ab", "ab"], vocab_size)


@pytest.mark.parametrize("kind", ["byte", "char", "word", "bpe"])
def test_save_and_load(tmp_path, kind):
    text = "low lower 👩 newest\n" * 4
    tokenizer = train_tokenizer(kind, [text], 265 if kind == "bpe" else 0)
    tokenizer.save(tmp_path / "deep" / "folder")
    loaded = load_tokenizer(tmp_path / "deep" / "folder")
    assert loaded.kind == kind
    assert loaded.content_hash == tokenizer.content_hash
    np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))
    assert [path.name for path in (tmp_path / "deep" / "folder").iterdir()] == ["tokenizer.json"]


def test_content_hash_tells_tokenizers_apart():
    documents = [["ab"], ["abc"], ["a b"]]
    hashes = {train_tokenizer("char", of, 0).content_hash for of in documents}
    hashes |= {train_tokenizer("word", of, 0).content_hash for of in documents}
    hashes.add(train_tokenizer("byte", [], 0).content_hash)
    assert len(hashes) == 7


def test_loading_names_what_is_missing_or_broken(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "tokenizer.json"))):
        load_tokenizer(tmp_path)
    for broken in ("{", "{}", '{"kind": "char"}', "[]", '{"kind": "byte", "more": 1}'):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(ValueError, match="not a complete tokenizer file"):
            load_tokenizer(tmp_path)


def test_bpe_compresses_english():
    path = shared_data("tinyshakespeare") / "input.txt"
    text = path.read_text(encoding="utf-8")
    tokenizer = train_tokenizer("bpe", [text[:1_000_000]], 4096)
    assert tokenizer.content_hash.startswith("5e186e75122a")  # stores and runs hold it
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert 3.0 < len(text) / len(ids) < 5.0
    assert len(np.unique(ids)) > 3000


def test_the_modules_need_no_library_until_it_is_used():
    code = (
        "import sys, lm_jax.data.corpora, lm_jax.data.store, lm_jax.data.tokenizers\n"
        "heavy = {'grain', 'jax', 'tensorflow_datasets'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    root = pathlib.Path(__file__).parents[1]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout.strip() == "[]"
