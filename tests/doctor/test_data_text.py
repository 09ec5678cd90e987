import re

import numpy as np
import pytest

from lm_jax.data.corpora import Corpus
from lm_jax.data.store import prepare
from lm_jax.data.tokenizers.kinds import BpeTokenizer, ByteTokenizer
from lm_jax.data.tokenizers.load import train_tokenizer
from lm_jax.data.windows import Windows, eval_batches, train_batches
from tests.doctor.data_models import PROSE, TRAIN, T, documents, examine, silent


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Stores that lm_jax prepares of prose, by kind of tokenizer."""
    folder = tmp_path_factory.mktemp("stores")
    splits = {name: [lambda texts=texts: iter(texts)] for name, texts in PROSE.items()}
    corpus = Corpus("prose", "f" * 64, splits)
    sizes = {"byte": 0, "char": 0, "word": 800, "bpe": 600}
    return {
        kind: prepare(corpus, tokenizer_kind=kind, vocab_size=size, cache_dir=str(folder))
        for kind, size in sizes.items()
    }


def of_store(store):
    """One epoch as a run would read it, and the evaluation splits."""
    split = store.split("train")
    options = dict(seq_len=T, batch_size=1, document_mask=True)
    epoch = [range(len(Windows(split, T, True)))]
    rows = next(train_batches(split, seed=0, calls=epoch, threads=0, **options))
    starts = range(0, len(rows["tokens"]), 8)
    train = [{key: value[i : i + 8, 0] for key, value in rows.items()} for i in starts]
    return train, *(list(eval_batches(store.split(s), **options)) for s in ("valid", "test"))


@pytest.mark.parametrize("kind", ["byte", "char", "word", "bpe"])
def test_silent_on_a_store_of_every_tokenizer(stores, kind):
    store = stores[kind]
    unknown = int(store.tokenizer.encode(" qq")[0]) if kind == "word" else None
    report = examine(
        *of_store(store),
        vocab_size=store.tokenizer.vocab_size,
        table_rows=store.tokenizer.vocab_size + 7,
        separator=0,
        unknown=unknown,
        tokenizer=(store.tokenizer.encode, store.tokenizer.decode),
        texts=PROSE["train"],
        round_trip_loss=0.5 if kind == "word" else 0.0,
        byte_counts={name: store.split(name).bytes for name in PROSE},
        epoch_tokens=len(store.split("train").tokens),
        fingerprints={"tokenizer": dict.fromkeys(["store", "run"], store.tokenizer.content_hash)},
    )
    made = "items ids size slots empty_rows vocabulary same_splits round_trip unknown_words"
    made += " bytes_per_token id_distribution near_identical_rows fingerprints"
    if kind in ("word", "bpe"):
        made += " repetition target_overlap gram_containment document_containment"
    silent(report, *(f"data.{name}" for name in made.split()))


def word_table():
    words = sorted({word for text in PROSE["train"] for word in text.split()})
    return {word: i for i, word in enumerate(words, start=1)}


@pytest.mark.fault(38, "data.unknown_words")
def test_words_without_an_id_are_dropped():
    ids = word_table()
    names = [None, *ids]

    def encode(text):
        return np.array([ids[word] for word in text.split() if word in ids], int)

    def decode(tokens):
        return " ".join(names[i] for i in tokens)

    known = [" ".join(text.split()) for text in PROSE["train"]]
    report = examine(None, tokenizer=(encode, decode), texts=known)
    assert report.failed == ["data.unknown_words"]
    unseen = [" ".join(text.split()) for text in PROSE["valid"]]
    unseen[0] += " zyzzyva"
    report = examine(None, tokenizer=(encode, decode), texts=unseen)
    assert {"data.unknown_words", "data.round_trip"} <= set(report.failed)

    def refuse(text):
        return np.array([ids[word] for word in text.split()], int)

    silent(examine(None, tokenizer=(refuse, decode), texts=known), "data.unknown_words")


@pytest.mark.fault(38, "data.unknown_words")
def test_characters_without_an_id_are_dropped(stores):
    tokenizer = stores["char"].tokenizer

    def encode(text):
        return tokenizer.encode("".join(c for c in text if c in tokenizer.characters))

    report = examine(None, tokenizer=(encode, tokenizer.decode), texts=PROSE["train"])
    assert report.failed == ["data.unknown_words"]


@pytest.mark.fault(43, "data.round_trip")
@pytest.mark.parametrize(
    "clean", [lambda text: " ".join(text.split()), str.lower, lambda text: text.replace("\n", " ")]
)
def test_text_changed_before_it_is_tokenised(clean):
    byte = ByteTokenizer()
    report = examine(
        None, tokenizer=(lambda text: byte.encode(clean(text)), byte.decode), texts=PROSE["train"]
    )
    assert "data.round_trip" in report.failed
    assert re.search(r"differs at character \d+", report["data.round_trip"].evidence)
    silent(
        examine(None, tokenizer=(byte.encode, byte.decode), texts=PROSE["train"]),
        "data.round_trip",
        "data.unknown_words",
    )


def test_declared_loss_is_counted(stores):
    tokenizer = stores["word"].tokenizer
    texts = PROSE["train"]
    probe = dict(tokenizer=(tokenizer.encode, tokenizer.decode), texts=texts)
    assert examine(None, **probe).failed == ["data.round_trip"]
    share = examine(None, **probe)["data.round_trip"].values["share"]
    assert examine(None, round_trip_loss=share * 0.9, **probe).failed == ["data.round_trip"]
    silent(examine(None, round_trip_loss=share * 1.1, **probe), "data.round_trip")


@pytest.mark.fault(43, "data.bytes_per_token")
@pytest.mark.fault(41, "data.bytes_per_token")
def test_text_cut_off_before_training():
    tokenizer = BpeTokenizer.train(PROSE["train"], 600)
    whole = tokenizer.encode_all(PROSE["train"])
    options = dict(
        vocab_size=600,
        tokenizer=(tokenizer.encode, tokenizer.decode),
        texts=PROSE["train"],
        byte_counts={"train": sum(len(text.encode()) for text in PROSE["train"])},
    )
    assert "data.bytes_per_token" in examine([ids[:128] for ids in whole], **options).failed
    silent(examine(whole, **options), "data.bytes_per_token")


@pytest.mark.fault(39, "data.id_distribution")
@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_valid_has_another_tokenizer(kind):
    ours = train_tokenizer(kind, PROSE["train"], 600)
    # Ids of words go by frequency, so the ids alone look the same.
    theirs = train_tokenizer(kind, PROSE["valid"] + PROSE["test"], 600)
    train = ours.encode_all(PROSE["train"])
    report = examine(train, theirs.encode_all(PROSE["valid"]), vocab_size=600)
    assert report.failed == ["data.id_distribution"]
    silent(examine(train, ours.encode_all(PROSE["valid"]), vocab_size=600), "data.id_distribution")


@pytest.mark.fault(39, "data.unknown_share")
@pytest.mark.fault(39, "data.vocabulary")
def test_a_tokenizer_that_collapses():
    collapsed = [np.where(d % 9 == 0, 2, 1) for d in TRAIN]
    report = examine(collapsed, vocab_size=30_000, unknown=1)
    assert {"data.unknown_share"} <= set(report.failed)
    wide = [np.where(d % 9 == 0, 2, 1) for d in documents(120, 8)]
    assert "data.vocabulary" in examine(wide, vocab_size=30_000).failed
    words = train_tokenizer("word", PROSE["train"], 800)
    train = words.encode_all(PROSE["train"])
    silent(
        examine(train, vocab_size=800, unknown=int(words.encode(" qq")[0]), table_rows=896),
        "data.vocabulary",
        "data.unknown_share",
    )


@pytest.mark.fault(39, "data.fingerprints")
@pytest.mark.fault(40, "data.fingerprints")
def test_fingerprints_that_differ(stores):
    hashes = {kind: store.tokenizer.content_hash for kind, store in stores.items()}
    tokenizer = {"train": hashes["bpe"], "checkpoint": hashes["char"]}
    report = examine(None, fingerprints={"tokenizer": tokenizer, "corpus": {"a": "1", "b": "1"}})
    assert report.failed == ["data.fingerprints"]
    assert hashes["char"][:12] in report["data.fingerprints"].evidence
    silent(
        examine(None, fingerprints={"tokenizer": dict.fromkeys(tokenizer, "1")}),
        "data.fingerprints",
    )


@pytest.mark.fault(40, "data.size")
@pytest.mark.fault(40, "data.same_splits")
def test_fallback_to_dummy_text():
    def load(found):
        """A loader that hides a failed download."""
        try:
            return [PROSE[name] for name in found]
        except KeyError:
            dummy = ["The quick brown fox jumps over the lazy dog while seven wizards mumble. "]
            return [dummy * 40, dummy, dummy]

    byte = ByteTokenizer()
    declared = dict(epoch_tokens=sum(len(text.encode()) for text in PROSE["train"]))
    train, valid, test = ([byte.encode(t) for t in split] for split in load(("train", "v", "t")))
    report = examine(train, valid, test, **declared)
    assert {"data.size", "data.same_splits"} <= set(report.failed)
    train, valid, test = ([byte.encode(t) for t in split] for split in load(PROSE))
    silent(examine(train, valid, test, **declared), "data.size", "data.same_splits")
