import functools
import json
import os
import re
import shutil
import tracemalloc
from typing import Any

import numpy as np
import pytest

from lm_jax import config
from lm_jax.config import Config
from lm_jax.data import files, parts
from lm_jax.data import store as store_module
from lm_jax.data.corpora import Corpus, open_corpus
from lm_jax.data.open import open_data
from lm_jax.data.references import references
from lm_jax.data.store import open_store, prepare, same_data
from lm_jax.data.tokenizers.base import count_words
from lm_jax.data.tokenizers.load import train_tokenizer
from tests.helpers import read_only_folder, shared_data

DOCUMENTS = {
    "train": ["the cat\n", "", "the dog 👩 and\nthe cat", "x"],
    "valid": ["dog and cat\n", ""],
    "test": ["the x"],
}


def _corpus(documents: dict[str, list[str]] = DOCUMENTS, fingerprint="f" * 64, **options: Any):
    splits = {name: [functools.partial(iter, texts)] for name, texts in documents.items()}
    return Corpus("tfds:some/set", fingerprint, splits, **options)


def _prepare(tmp_path, corpus=None, kind="byte", vocab_size=0):
    corpus = corpus or _corpus()
    return prepare(corpus, tokenizer_kind=kind, vocab_size=vocab_size, cache_dir=str(tmp_path))


@pytest.mark.parametrize(("kind", "vocab_size"), [("byte", 0), ("char", 0), ("bpe", 260)])
def test_a_store_holds_the_documents_exactly(tmp_path, kind, vocab_size):
    store = _prepare(tmp_path, kind=kind, vocab_size=vocab_size)
    for name, documents in DOCUMENTS.items():
        split = store.split(name)
        texts = [text for text in documents if text]
        bounds = zip(split.document_starts[:-1], split.document_starts[1:], strict=True)
        assert [store.tokenizer.decode(split.tokens[a:b]) for a, b in bounds] == texts
        assert split.bytes == sum(len(text.encode()) for text in texts)
        assert split.words == sum(count_words(text) for text in texts)
        assert split.separator == 0
        assert split.tokens.min() > 0
        assert store.manifest["splits"][name]["empty_documents"] == documents.count("")
        assert sum(map(len, store.tokenizer.token_bytes(split.tokens))) == split.bytes


def test_manifest(tmp_path):
    store = _prepare(tmp_path, _corpus(entropy_rate=1.5))
    assert store.path.parent == tmp_path / "stores"
    assert store.path.name.startswith("tfds-some-set-")
    assert store.manifest["corpus"] == "tfds:some/set"
    assert store.manifest["corpus_fingerprint"] == "f" * 64
    assert store.manifest["entropy_rate"] == 1.5
    assert store.manifest["vocab_size"] == 257
    assert store.manifest["tokenizer_hash"] == store.tokenizer.content_hash
    written = json.loads((store.path / "manifest.json").read_text())
    del written["sha256"]
    assert store.manifest == written and {*store_module.MANIFEST_KEYS} < {*written}
    assert [path.name for path in store.path.parent.iterdir()] == [store.path.name]


def test_the_tokens_cannot_be_written_to(tmp_path):
    split = _prepare(tmp_path).split("train")
    assert isinstance(split.tokens, np.memmap)
    assert split.tokens.dtype == np.uint16
    assert split.document_starts.dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        split.tokens[0] = 1


def test_large_vocabularies_take_four_bytes(tmp_path):
    words = " ".join(f"w{i}" for i in range(65_536))
    store = _prepare(tmp_path, _corpus({"train": [words]}), kind="word")
    assert store.manifest["vocab_size"] == 65_537
    assert store.split("train").tokens.dtype == np.uint32
    assert store.split("train").tokens.max() == 65_536


def test_a_finished_store_is_reused(tmp_path):
    first = _prepare(tmp_path)

    def refuse():
        raise AssertionError("the corpus was read again")

    again = _prepare(tmp_path, Corpus("tfds:some/set", "f" * 64, {"train": [refuse]}))
    assert again.path == first.path
    assert again.manifest == first.manifest


def test_content_tokenizer_and_format_each_have_their_own_store(tmp_path, monkeypatch):
    stores = [
        _prepare(tmp_path),
        _prepare(tmp_path, _corpus(fingerprint="0" * 64)),
        _prepare(tmp_path, kind="char"),
        _prepare(tmp_path, kind="bpe", vocab_size=260),
        _prepare(tmp_path, kind="bpe", vocab_size=261),
    ]
    monkeypatch.setattr(store_module, "FORMAT", store_module.FORMAT + 1)
    stores.append(_prepare(tmp_path))
    assert len({store.path for store in stores}) == 6


def test_two_preparations_agree_bit_for_bit(tmp_path):
    one = _prepare(tmp_path / "one", kind="bpe", vocab_size=262)
    two = _prepare(tmp_path / "two", kind="bpe", vocab_size=262)
    assert one.manifest == two.manifest


def test_batching_changes_nothing(tmp_path, monkeypatch):
    whole = _prepare(tmp_path / "one", kind="char")
    monkeypatch.setattr(parts, "BATCH_CHARACTERS", 1)
    assert _prepare(tmp_path / "two", kind="char").manifest == whole.manifest


def test_the_tokenizer_learns_from_the_train_split_alone(tmp_path):
    corpus = _corpus({"train": ["abc"], "valid": ["ab", "abz"]})
    with pytest.raises(ValueError, match="Split 'valid' cannot be tokenised: Character 'z'"):
        _prepare(tmp_path, corpus, kind="char")
    assert list((tmp_path / "stores").iterdir()) == []


def test_a_crash_leaves_only_what_is_finished(tmp_path):
    def breaks_off():
        yield "text"
        raise KeyboardInterrupt

    def refuse():
        raise AssertionError("a finished part was read again")

    train, valid = (functools.partial(iter, [text]) for text in ("text", "more"))
    with pytest.raises(KeyboardInterrupt):
        _prepare(tmp_path, Corpus("c", "f", {"train": [train], "valid": [breaks_off]}))
    (left,) = (tmp_path / "stores").iterdir()
    assert sorted(path.name for path in left.iterdir()) == [
        "tokenizer.json",
        "train.000000-of-000001",
    ]
    with pytest.raises(FileNotFoundError):
        open_store(left)
    store = _prepare(tmp_path, Corpus("c", "f", {"train": [refuse], "valid": [valid]}))
    assert [path.name for path in (tmp_path / "stores").iterdir()] == [store.path.name]
    assert [store.tokenizer.decode(store.split(name).tokens) for name in ("train", "valid")] == [
        "text",
        "more",
    ]


def _left_over(tmp_path):
    return [path.name for path in (tmp_path / "stores").iterdir() if path.suffix == ".parts"]


def test_what_a_kill_left_of_the_parts_is_removed_later(tmp_path, monkeypatch):
    replace = os.replace

    def replace_and_stop(old, new):
        replace(old, new)
        if old.name == "store":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_and_stop)
        with pytest.raises(KeyboardInterrupt):
            _prepare(tmp_path)
    assert len(_left_over(tmp_path)) == 1 < len(list((tmp_path / "stores").iterdir()))
    _prepare(tmp_path)
    assert not _left_over(tmp_path)


def test_a_store_gets_its_name_only_once_it_is_checked(tmp_path, monkeypatch):
    join = parts.join

    def join_badly(folders, tokenizer, tokens_path, starts_path):
        counts = join(folders, tokenizer, tokens_path, starts_path)
        if tokens_path.name == "train.tokens.npy":
            _damage_tokens(tokens_path.parent)
        return counts

    with monkeypatch.context() as patch:
        patch.setattr(parts, "join", join_badly)
        with pytest.raises(OSError, match=r"not come back .*differs from the sha256.*again\.$"):
            _prepare(tmp_path)
    assert len(_left_over(tmp_path)) == len(list((tmp_path / "stores").iterdir())) == 1
    monkeypatch.setattr(parts, "write_part", lambda *_: pytest.fail("tokenised again"))
    assert _prepare(tmp_path).manifest["splits"]["train"]["documents"] == 3


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: events.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd),
    )
    monkeypatch.setattr(os, "replace", lambda a, b: events.append(str(b)) or replace(a, b))
    path = _prepare(tmp_path, _corpus({"train": ["text"]})).path
    names = [re.sub(r"^\.(.*)\.\d+-[0-9a-f]+$", r"\1", event.rsplit("/", 1)[1]) for event in events]
    of_part = ["lengths", "lengths", "ids", "ids", "counts.json", "counts.json"]
    arrays = [f"train.{name}.npy" for name in ("tokens", "documents") for _ in range(2)]
    of_store = [*arrays, "manifest.json", "manifest.json"]
    tokenizer = ["tokenizer.json"] * 2  # on the disk, then under its name
    part = "train.000000-of-000001"
    assert names == [*tokenizer, *of_part, part, *tokenizer, *of_store, path.name]


def test_a_tokenizer_that_is_not_whole_is_learnt_again(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    whole = _prepare(tmp_path / "other", kind="char")
    with monkeypatch.context() as patch:
        patch.setattr(parts, "join", stop)
        with pytest.raises(KeyboardInterrupt):
            _prepare(tmp_path, kind="char")
    (unfinished,) = (tmp_path / "stores").iterdir()
    (unfinished / "tokenizer.json").write_text("")
    monkeypatch.setattr(parts, "write_part", lambda *_: pytest.fail("tokenised again"))
    assert _prepare(tmp_path, kind="char").manifest == whole.manifest


def test_blocks_are_read_one_at_a_time(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(8 * store_module.BLOCK, dtype=np.uint16))
    array = np.load(tmp_path / "a.npy", mmap_mode="r")
    tracemalloc.start()
    total = sum(len(block) for block in store_module._blocks(array))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == len(array)
    assert peak < array.nbytes / 3


def test_another_process_may_finish_first(tmp_path, monkeypatch):
    """The slower of two identical preparations opens what the faster one wrote."""
    rival = _prepare(tmp_path / "rival")

    def train():
        target = tmp_path / "stores" / rival.path.name
        if not target.exists():
            shutil.copytree(rival.path, target)
        return iter(DOCUMENTS["train"])

    corpus = _corpus()
    corpus = Corpus(corpus.name, corpus.fingerprint, {**corpus.splits, "train": [train]})
    assert _prepare(tmp_path, corpus).manifest == rival.manifest
    assert len(list((tmp_path / "stores").iterdir())) == 1


def test_an_empty_split_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"Split 'valid' .* holds no token \(2 empty documents\)"):
        _prepare(tmp_path, _corpus({"train": ["a"], "valid": ["", ""]}))
    with pytest.raises(ValueError, match=r"Split 'train' .* holds no token"):
        _prepare(tmp_path, _corpus({"train": [""], "valid": ["a"]}), kind="bpe", vocab_size=300)
    assert list((tmp_path / "stores").iterdir()) == []


def test_an_unknown_split_is_named(tmp_path):
    store = _prepare(tmp_path, _corpus({"train": ["a"], "valid": ["b"]}))
    with pytest.raises(ValueError, match="no split 'test' but train, valid: .*data.test_fraction"):
        store.split("test")


def _edit(path, *dropped, **changes):
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    for key in dropped:
        del manifest[key]
    (path / "manifest.json").write_text(json.dumps(manifest))


def _damage_tokens(path):
    tokens = np.load(path / "train.tokens.npy")
    tokens[[0, 1]] = tokens[[1, 0]]
    np.save(path / "train.tokens.npy", tokens)


def _add_token(path):
    tokens = np.load(path / "valid.tokens.npy")
    np.save(path / "valid.tokens.npy", np.append(tokens, tokens[:1]))


def _put_id(value):
    def put(path):
        tokens = np.load(path / "train.tokens.npy")
        tokens[3] = value
        np.save(path / "train.tokens.npy", tokens)

    return put


def _shift_document(path):
    starts = np.load(path / "train.documents.npy")
    starts[1] = starts[2]
    np.save(path / "train.documents.npy", starts)


def _swap_documents(path):
    starts = np.load(path / "train.documents.npy")
    starts[[1, 2]] = starts[[2, 1]]
    np.save(path / "train.documents.npy", starts)


def _truncate(path):
    whole = (path / "train.tokens.npy").read_bytes()
    (path / "train.tokens.npy").write_bytes(whole[:-5])


def _header(shape, name="tokens", kind="<u2"):
    def put(path):
        path = path / f"train.{name}.npy"
        header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}".ljust(118)
        path.write_bytes(b"\x93NUMPY\x01\x00\x76\x00" + header.encode() + path.read_bytes()[128:])

    return put


def _drop_key(path):
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["splits"]["test"]["words"]
    (path / "manifest.json").write_text(json.dumps(manifest))


def _other_tokenizer(path):
    train_tokenizer("char", ["abc"], 0).save(path / "tokenizer")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "manifest.json").unlink(), "There is no .*manifest.json"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is not JSON"),
        (lambda path: (path / "manifest.json").write_text("0"), "manifest.json is not JSON of a"),
        (lambda path: (path / "manifest.json").write_text("[" * 9**5), "manifest.json is not JSON"),
        (lambda path: _edit(path, splits=[1]), "manifest.json is not JSON of a store"),
        (lambda path: _edit(path, splits={"test": {"tokens": "a"}}), "lacks splits.test.tokens"),
        (_drop_key, "lacks splits.test.words"),
        (lambda path: _edit(path, format=99), "has format 99"),
        (lambda path: _edit(path, vocab_size=300), "manifest.json is not what was written"),
        (lambda path: _edit(path, "sha256"), "manifest.json is not what was written"),
        (_other_tokenizer, "not the tokenizer that the store was made"),
        (lambda path: (path / "valid.documents.npy").unlink(), "There is no .*valid.documents"),
        (_truncate, "train.tokens.npy is cut short"),
        (_header("()"), r"train.tokens.npy holds an array \(\) of uint16, no row of uint16"),
        (_header(f"({1 << 63},)"), "train.tokens.npy is cut short or damaged"),
        (
            _header("(2, 2)", name="documents", kind="<f4"),
            r"train.documents.npy holds an array \(2, 2\)",
        ),
        (_add_token, "valid.tokens.npy holds 13 tokens, the manifest says 12"),
        (_put_id(257), "holds the separator, or an id that is not below 257"),
        (_put_id(0), "holds the separator"),
        (_shift_document, "train.documents.npy does not divide"),
        (_swap_documents, "train.documents.npy does not divide"),
        (_damage_tokens, "train.tokens.npy differs from the sha256"),
    ],
)
@pytest.mark.parametrize("block", [2, 1 << 20])
def test_a_damaged_store_is_refused(tmp_path, monkeypatch, damage, message, block):
    monkeypatch.setattr(store_module, "BLOCK", block)
    path = _prepare(tmp_path).path
    open_store(path)
    damage(path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        _prepare(tmp_path)
    assert str(path) in str(raised.value)
    assert "delete the folder" in str(raised.value)


def test_a_store_of_version_0_3_opens(tmp_path):
    written = _prepare(tmp_path)
    _edit(written.path, "sha256", "tokenizer_identity")
    del written.manifest["tokenizer_identity"]
    assert open_store(written.path).manifest == written.manifest


def test_half_a_file_of_a_killed_preparation_does_not_stay(tmp_path):
    path = _prepare(tmp_path).path
    names = sorted(os.listdir(path))
    half = path.with_name(f"{path.name}.parts") / "store" / ".train.tokens.npy.7-0a1b2c3d"
    shutil.rmtree(path)
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    assert sorted(os.listdir(_prepare(tmp_path).path)) == names


def test_a_cache_that_cannot_be_written_to_is_read(monkeypatch):
    with read_only_folder() as (folder, as_nobody):
        (folder / "a.txt").write_text("some text\nmore\n" * 9)
        cache = folder / "cache"
        cfg = config.replace(
            Config(),
            data__corpus="text",
            data__source_dir=str(folder),
            data__files="a.txt",
            data__cache_dir=str(cache),
            tokenizer__kind="byte",
        )
        manifest = open_data(cfg).manifest
        monkeypatch.setattr(files, "SETTLED", -1)  # so that the hash of the source is to be kept
        before = sorted(cache.rglob("*"))
        with as_nobody():
            store = open_data(cfg)
            found = references(store, "valid")
            with pytest.raises(
                PermissionError, match=r"has no tokens .*--config\.data\.cache_dir.*\.$"
            ):
                open_data(config.replace(cfg, tokenizer__kind="char"))
        assert store.manifest == manifest
        assert sorted(cache.rglob("*")) == before
        assert references(store, "valid") == found


@pytest.fixture(scope="module")
def wikitext2(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    source = str(shared_data("wikitext-2"))
    return open_corpus("wikitext2", source_dir=source, cache_dir=cache), cache


PUBLISHED = {  # tokens, bytes
    "train": (2_088_628, 10_797_148),
    "valid": (217_646, 1_121_681),
    "test": (245_569, 1_256_449),
}


def test_wikitext2_by_words_has_the_published_counts(wikitext2):
    corpus, cache = wikitext2
    store = prepare(corpus, tokenizer_kind="word", vocab_size=0, cache_dir=cache)
    assert store.tokenizer.vocab_size == 33_278 + 1
    for name, (tokens, n_bytes) in PUBLISHED.items():
        split = store.split(name)
        assert (len(split.tokens), split.words, split.bytes) == (tokens, tokens, n_bytes)
        assert sum(map(len, store.tokenizer.token_bytes(split.tokens))) == n_bytes
    text = (shared_data("wikitext-2") / "wiki.valid.tokens").read_text(encoding="utf-8")
    assert store.tokenizer.decode(store.split("valid").tokens) == text


@pytest.mark.slow
def test_wikitext2_by_bpe_loses_nothing(wikitext2):
    corpus, cache = wikitext2
    store = prepare(corpus, tokenizer_kind="bpe", vocab_size=8192, cache_dir=cache)
    assert store.tokenizer.vocab_size == 8192
    for name, (words, n_bytes) in PUBLISHED.items():
        split = store.split(name)
        assert (split.words, split.bytes) == (words, n_bytes)
        assert 3.5 < n_bytes / len(split.tokens) < 4.5
    valid = store.split("valid")
    text = (shared_data("wikitext-2") / "wiki.valid.tokens").read_text(encoding="utf-8")
    assert store.tokenizer.decode(valid.tokens) == text


def test_data_are_the_same_whatever_the_last_bits_of_their_entropy_rate():
    one = {"entropy_rate": 1.8036170964696578, "splits": {"train": {"sha256": "a"}}}
    one["tokenizer_hash"] = "b"
    assert same_data(one, one | {"entropy_rate": 1.803617096469658})
    assert not same_data(one, one | {"splits": {"train": {"sha256": "b"}}})
