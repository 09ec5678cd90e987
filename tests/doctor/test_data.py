import itertools
import math
import time
import tracemalloc

import numpy as np
import pytest

from lm_jax.data.synthetic import MarkovSource
from lm_jax.data.tokenizers.load import train_tokenizer
from lm_jax.data.wikitext import read_articles
from lm_jax.doctor.data import examine_data
from tests.doctor.data_models import (
    PROSE,
    TEST,
    TRAIN,
    VALID,
    VOCAB,
    batches,
    cut,
    documents,
    examine,
    held_out,
    log_lines,
    prose,
    read,
    shuffled,
    silent,
    stream,
)
from tests.helpers import batch_hash, shared_data, thirds

# Healthy twins.


@pytest.mark.parametrize("seed", range(3))
def test_silent_on_the_synthetic_corpus(seed):
    train, valid, test = (
        documents(120, 10 + seed),
        documents(12, 20 + seed),
        documents(12, 30 + seed),
    )
    epoch = len(read(train, seed=seed))
    report = examine(
        read(train, seed=seed),
        held_out(valid),
        held_out(test),
        separator=0,
        epochs=[
            read(train, seed=seed),
            read(train, seed=seed, first=epoch, epochs=2),
            read(train, seed=seed, first=2 * epoch, epochs=3),
        ],
        readers=lambda n: [read(train, seed=seed, processes=n, process=i) for i in range(n)],
        resume=(
            [batch_hash(b) for b in read(train, seed=seed)],
            [batch_hash(b) for b in read(train, seed=seed, first=epoch // 2)],
        ),
        split_ids={"train": range(1000), "valid": range(1000, 2000)},
    )
    made = "ids repetition target_overlap window_containment near_identical_rows same_splits"
    made += " gram_containment document_containment epoch_order coverage readers_differ resume"
    made += " split_ids"
    silent(report, *(f"data.{name}" for name in made.split()))


def test_silent_on_documents_and_single_arrays():
    made = ("data.repetition", "data.gram_containment", "data.document_containment")
    silent(examine(TRAIN, VALID, TEST), *made)
    silent(examine(stream(TRAIN), stream(VALID), separator=0), *made)
    silent(examine(cut(stream(TRAIN)), cut(stream(VALID)), separator=0), *made)
    silent(examine([d.tolist() for d in TRAIN], [d.astype(np.uint16) for d in VALID]), *made)


def templates(seed, count=400):
    """Records of one form with a few free fields."""
    rng = np.random.default_rng(seed)
    form = np.arange(1, 61)
    records = np.tile(form, (count, 1))
    for place in (7, 8, 20, 21, 33, 45, 46, 47):
        records[:, place] = rng.integers(61, VOCAB, count)
    return list(records)


def slow_counter(seed, count=60, length=200, flips=0.01):
    """A cycle through 24 ids, left now and then: about 0.08 nats a token."""
    rng = np.random.default_rng(seed)
    steps = 1 + (rng.random((count, length)) < flips) * rng.integers(0, 24, (count, length))
    return list((np.cumsum(steps, 1) + rng.integers(0, 24, (count, 1))) % 24 + 1)


LOW_ENTROPY = {
    "constant": lambda seed: [np.ones(200, int)] * 50,
    "alternating": lambda seed: [np.tile([1, 2], 100)] * 50,
    "alphabet": lambda seed: [(np.arange(200) + seed) % 26 + 1] * 50,
    "counting": lambda seed: [(np.arange(200) + 7 * i + seed) % 250 + 1 for i in range(60)],
    "counter": slow_counter,
    "templates": templates,
    "markov": lambda seed: [
        MarkovSource(5, symbols=12, successors=2).sample(250, (seed, i)) + 1 for i in range(80)
    ],
    "sentence": lambda seed: [np.frombuffer(b"the cat sat on the mat\n", np.uint8)] * 300,
}


@pytest.mark.parametrize("name", LOW_ENTROPY)
@pytest.mark.parametrize("seed", thirds(range(3)))
def test_silent_on_low_entropy(name, seed):
    train, valid = LOW_ENTROPY[name](seed), LOW_ENTROPY[name](seed + 100)[:12]
    silent(examine(train, valid))
    rows = shuffled(cut(stream(train)), seed)
    silent(examine(batches(rows), cut(stream(valid)), separator=0))


TASK = "2024-03-01 {:02}:{:02}:{:02} INFO worker-{} finished task in {} ms\n"
FIXED = "the same long message of a server that has nothing new to tell about its state, at "
LOG_LINES = {
    "full": (TASK, (24, 60, 60, 10, 1000)),
    "worker and ms": (TASK.replace("{:02}", "12"), (10, 100)),
    "ms": (TASK.replace("{:02}", "12").replace("-{}", ""), (1000,)),
    "long": (FIXED + "{:05}\n", (100_000,)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", thirds(LOG_LINES))
def test_lines_of_one_form_are_no_copies(name):
    """Fixed text recurs everywhere; only what the free fields tell can be copied."""
    form = LOG_LINES[name]
    train, valid = log_lines(form, 1, 60), log_lines(form, 2, 20)
    made = ("data.repetition", "data.gram_containment")
    silent(examine(train, valid), *made)
    silent(examine([stream(train)], [stream(valid)]), *made)
    silent(examine(batches(shuffled(cut(stream(train)))), batches(cut(stream(valid)))))
    # Real copies are seen all the same.
    assert "data.repetition" in examine(train + train[:20], valid).failed
    assert "data.gram_containment" in examine(train + valid[:6], valid).failed


def test_lines_of_one_form_among_prose():
    train, valid = (
        [np.frombuffer(t.encode(), np.uint8).astype(int) for t in PROSE[name]]
        + log_lines(LOG_LINES["long"], seed, count)
        for seed, (name, count) in enumerate({"train": 30, "valid": 6}.items())
    )
    silent(examine(train, valid), "data.repetition", "data.gram_containment")


def test_lines_equal_by_custom():
    """Short documents that many texts hold are no leak, as train shows by its own."""
    customs = ["\n", " \n", "The end .", "Thank you for reading this page of ours."]

    def lines(seed):
        rng = np.random.default_rng(seed)
        own = [line for text in prose(seed, 1000) for line in text.splitlines() if line]
        texts = [customs[rng.integers(4)] if rng.random() < 0.3 else line for line in own]
        return [np.frombuffer(text.encode(), np.uint8).astype(int) for text in texts]

    train, valid = lines(1), lines(2)
    healthy = examine(train, valid)["data.document_containment"]
    assert healthy.status == "pass"
    assert "are not judged" in healthy.evidence
    assert "data.document_containment" in examine(train + valid[:500], valid).failed


def test_silent_on_tiny_input():
    silent(examine([np.arange(1, 5)], [np.arange(5, 9)]))
    silent(examine([{"tokens": np.arange(1, 9).reshape(2, 4)}]))


def wikitext():
    folder = shared_data("wikitext-2")
    texts = {}
    for split in ("train", "valid", "test"):
        path = folder / f"wiki.{split}.tokens"
        texts[split] = list(read_articles(path, 0, path.stat().st_size))
    return texts


@pytest.mark.slow
def test_silent_and_fast_on_wikitext():
    texts = wikitext()
    tokenizer = train_tokenizer("word", texts["train"], 0)
    ids = {name: tokenizer.encode_all(of) for name, of in texts.items()}
    began = time.process_time()
    report = examine(
        *ids.values(),
        vocab_size=tokenizer.vocab_size,
        unknown=int(tokenizer.encode("<unk>")[0]),
        tokenizer=(tokenizer.encode, tokenizer.decode),
        texts=texts["train"],
        byte_counts={name: sum(len(text.encode()) for text in of) for name, of in texts.items()},
    )
    seconds = time.process_time() - began
    silent(
        report,
        "data.repetition",
        "data.gram_containment",
        "data.document_containment",
        "data.id_distribution",
        "data.bytes_per_token",
        "data.round_trip",
    )
    assert report["data.repetition"].values["tokens"] == 2_088_628
    assert seconds < 10

    rows = {name: cut(stream(of), 128, 127) for name, of in ids.items()}
    report = examine(
        batches(shuffled(rows["train"]), 32),
        rows["valid"],
        rows["test"],
        vocab_size=tokenizer.vocab_size,
        separator=0,
    )
    silent(report, "data.repetition", "data.target_overlap", "data.near_identical_rows")
    # In the order of the text, neighbouring rows are of one article: no fault of a batch.
    silent(examine(batches(rows["train"], 32), vocab_size=tokenizer.vocab_size))
    # Lines as documents.
    lines = {
        n: [tokenizer.encode(x) for t in of for x in t.splitlines(True)] for n, of in texts.items()
    }
    silent(examine(*lines.values(), vocab_size=tokenizer.vocab_size), "data.gram_containment")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_silent_on_shakespeare(kind):
    text = shared_data("tinyshakespeare/input.txt").read_text()
    end = len(text) * 9 // 10
    tokenizer = train_tokenizer(kind, [text[:end]], 1024 if kind == "bpe" else 0)
    ids = [tokenizer.encode(part) for part in (text[:end], text[end:])]
    made = ("data.repetition", "data.gram_containment", "data.id_distribution")
    silent(examine(*ids, vocab_size=tokenizer.vocab_size), *made)
    rows = [shuffled(cut(part, 257, 256)) for part in ids]
    silent(examine(batches(rows[0]), batches(rows[1]), vocab_size=tokenizer.vocab_size), *made)


def test_memory_is_bounded_by_max_tokens():
    endless = (np.random.default_rng(i).integers(0, VOCAB, 1000) for i in itertools.count())
    tracemalloc.start()
    report = examine(endless, max_tokens=200_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report["data.repetition"].values["tokens"] == 200_000
    assert "the first 200,000 tokens" in report["data.repetition"].evidence
    assert peak < 120e6


# Power and calibration.


def test_weakest_faults_that_must_be_seen():
    """A tenth of the tokens read twice fails, a twentieth warns."""
    more = documents(300, 7, length=100)
    assert examine(more + more[:40])["data.repetition"].status == "fail"
    assert examine(more + more[:20])["data.repetition"].status == "warn"
    assert examine(more + more[:2])["data.repetition"].status == "pass"


def test_entropy_decides_how_long_a_gram_must_be():
    rng = np.random.default_rng(0)
    assert examine(rng.integers(0, VOCAB, (99, 99)))["data.repetition"].values["n"] == 13
    source = MarkovSource(5, symbols=64, successors=2)
    low = [source.sample(2000, (1, i)) + 1 for i in range(40)]
    report = examine(low, [source.sample(2000, (2, i)) + 1 for i in range(4)])
    silent(report, "data.repetition", "data.gram_containment")
    n = report["data.repetition"].values["n"]
    assert n * source.entropy_rate > 1.4 * math.log(80_000)
    assert n > 30
    # The same text read twice is as informative as once, and is seen.
    assert "data.repetition" in examine(low + low).failed


# Bad input.


def broken():
    yield TRAIN[0]
    raise RuntimeError("disk gone")


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        (broken(), "RuntimeError: disk gone"),
        ([np.array([0.5, np.nan])], "float64"),
        ([np.array(["a", "b"])], "not an array of integer ids"),
        ([{"ids": np.ones((2, 4), int)}], "no 'tokens'"),
        ([{"tokens": np.ones((2, 4), int), "weights": np.ones((2, 5))}], "weights (2, 5)"),
        ([{"tokens": np.ones((2, 4), int), "weights": np.full((2, 4), np.nan)}], "finite"),
        ([[[1, 2], [3]]], "ValueError"),
        (iter([3, 4]), "shape ()"),
        ([], "no token"),
        ([np.zeros(0, int)], "no token"),
        ([None], "shape ()"),
    ],
)
def test_unreadable_train_is_a_failure_with_its_reason(train, reason):
    report = examine(train, VALID, separator=0)
    assert report.failed == ["data.items"]
    assert reason in report["data.items"].evidence
    skipped = {f.check for f in report if f.status == "skip"}
    assert {"data.repetition", "data.gram_containment", "data.ids"} <= skipped
    assert all(f.evidence for f in report)
    report.to_json()


def test_functions_that_raise_or_return_nonsense_are_errors():
    def fails(*_):
        raise OSError("no file")

    texts = ["some words are here"]
    cases = [
        dict(tokenizer=(fails, str), texts=texts),
        dict(tokenizer=(lambda text: [1], fails), texts=texts),
        dict(tokenizer=(lambda text: np.ones((2, 2)), str), texts=texts),
        dict(tokenizer=(lambda text: [1], lambda ids: b"bytes"), texts=texts),
    ]
    for case in cases:
        report = examine(None, **case)
        assert report["data.round_trip"].status == "error"
        assert "data.round_trip" in report.failed
    nothing = examine(None, tokenizer=(list, str), texts=[])["data.round_trip"]
    assert nothing.status == "skip" and nothing.needs == ("texts",)
    report = examine(None, readers=fails, epochs=[broken(), broken()])
    assert report.failed == ["data.epoch_order", "data.coverage"]
    assert "no file" in report["data.coverage"].evidence
    assert "test_data.py" in report["data.coverage"].evidence
    assert "disk gone" in report["data.epoch_order"].evidence
    assert examine(None, readers=lambda n: [TRAIN])["data.coverage"].status == "error"
    endless = examine(None, epochs=[itertools.repeat(TRAIN[0])] * 2, max_tokens=1000)
    assert endless["data.epoch_order"].status == "skip"
    assert examine(None, resume=([], [])).failed == ["data.resume"]
    report = examine(None, resume=(TRAIN, broken()))
    assert report["data.resume"].status == "error"
    assert "disk gone" in report["data.resume"].evidence
    unread = examine(TRAIN, broken())
    assert unread.failed == ["data.items"] and unread["data.items"].status == "error"
    assert examine(broken(), [{"ids": 1}]).failed == ["data.items"]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (dict(vocab_size=1), "vocab_size"),
        (dict(vocab_size="9"), "vocab_size"),
        (dict(train=3), "train"),
        (dict(valid="abc"), "valid"),
        (dict(table_rows=0), "table_rows"),
        (dict(max_tokens=1.5), "max_tokens"),
        (dict(tokenizer=(1, 2)), "tokenizer"),
        (dict(texts="abc"), "texts"),
        (dict(round_trip_loss=2), "round_trip_loss"),
        (dict(readers=3), "readers"),
        (dict(resume=[1]), "resume"),
        (dict(resume=5), "resume"),
        (dict(resume=(None, None)), "resume"),
        (dict(separator="a"), "separator"),
        (dict(tokenizer=5), "tokenizer"),
        (dict(texts=5), "texts"),
        (dict(texts=[None]), "texts"),
        (dict(round_trip_loss="a"), "round_trip_loss"),
        (dict(round_trip_loss=math.nan), "round_trip_loss"),
        (dict(byte_counts="a"), "byte_counts"),
        (dict(byte_counts={"train": None}), "byte_counts"),
        (dict(epochs=5), "epochs"),
        (dict(readers={"a": []}), "readers"),
        (dict(readers=list, reader_counts=5), "reader_counts"),
        (dict(readers=list, reader_counts=[0]), "reader_counts"),
        (dict(split_ids=5), "split_ids"),
        (dict(split_ids={"train": 5}), "split_ids"),
        (dict(fingerprints="a"), "fingerprints"),
        (dict(fingerprints={"tokenizer": None}), "fingerprints"),
        (dict(fingerprints={"tokenizer": {"a": 1, "b": 2}}), "fingerprints"),
    ],
)
def test_misuse(change, name):
    with pytest.raises(ValueError, match=rf"^{name}\b.*: give .*[^.]\.$"):
        examine_data(**(dict(train=TRAIN, vocab_size=VOCAB) | change))
