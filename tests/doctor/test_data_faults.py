import itertools

import numpy as np
import pytest

from tests.doctor.data_models import (
    SOURCE,
    TEST,
    TRAIN,
    VALID,
    VOCAB,
    T,
    batches,
    cut,
    documents,
    examine,
    held_out,
    read,
    shuffled,
    silent,
    stream,
)
from tests.helpers import batch_hash


@pytest.mark.fault(9, "data.ids")
@pytest.mark.parametrize("wrong", [VOCAB, VOCAB + 7])
def test_a_label_outside_the_vocabulary(wrong):
    rows = cut(stream(TRAIN))
    targets = rows[:, 1:].copy()
    targets[7, 5] = wrong
    pairs = [(rows[i : i + 8, :-1], targets[i : i + 8]) for i in range(0, 64, 8)]
    assert "data.ids" in examine(pairs).failed


@pytest.mark.fault(10, "data.ids")
@pytest.mark.parametrize("wrong", [-1, -100, VOCAB, 2**62])
def test_ids_outside_the_table(wrong):
    rows = cut(stream(TRAIN)).copy()
    rows[7, 5] = wrong
    report = examine(batches(rows))
    assert report.failed == ["data.ids"]
    assert f"({wrong}) in row 7 at 5" in report["data.ids"].evidence
    assert "data.ids" in examine(TRAIN, [np.array([1, wrong])]).failed
    alone = examine([rows], rows[:9])  # the other checks are made all the same
    for name in ("vocabulary", "id_distribution"):
        assert alone[f"data.{name}"].status == "pass", alone[f"data.{name}"].evidence
    assert "data.ids" in examine(TRAIN, table_rows=VOCAB - 1).failed
    silent(examine(TRAIN, table_rows=VOCAB), "data.ids")


# Planted faults: splits.


@pytest.mark.fault(29, "data.gram_containment")
@pytest.mark.parametrize("stride", [1, T // 2, T - 26])
def test_windows_cut_before_the_split(stride):
    docs = TRAIN[:60] if stride == 1 else TRAIN
    windows = shuffled(cut(stream(docs), T + 1, stride))
    windows = windows[:4000]
    train, valid = windows[: len(windows) * 9 // 10], windows[len(windows) * 9 // 10 :]
    report = examine(batches(train), batches(valid), separator=0)
    assert "data.gram_containment" in report.failed
    # Healthy: split by document first.
    train, valid = cut(stream(docs[:-12])), cut(stream(docs[-12:]))
    silent(examine(batches(shuffled(train)), batches(valid), separator=0), "data.gram_containment")


@pytest.mark.fault(30, "data.gram_containment")
@pytest.mark.fault(30, "data.document_containment")
def test_train_stream_runs_into_the_evaluation_documents():
    corpus = documents(140, 4)
    valid = corpus[100:110]
    report = examine(iter(corpus), valid)
    assert {"data.document_containment", "data.gram_containment"} <= set(report.failed)
    assert report["data.document_containment"].values["valid_pairs"][0] == (0, 100)
    assert report["data.gram_containment"].values["valid_span"][0] >= 100 * 300
    # Packed into rows, no row of train equals one of valid, but the text is there.
    report = examine(batches(cut(stream(corpus))), valid, separator=0)
    assert "data.gram_containment" in report.failed
    # Disjoint at first: too short a look passes, and says so.
    look = examine(iter(corpus), valid, max_tokens=90 * 300)
    assert silent(look, "data.gram_containment")
    assert "what comes later is not compared" in look["data.gram_containment"].evidence
    silent(examine(corpus[:100] + corpus[110:], valid), "data.gram_containment")


@pytest.mark.fault(30, "data.split_ids")
def test_document_ranges_that_meet_over_the_budget():
    valid = range(100_000, 101_000)
    report = examine(None, split_ids={"train": range(0, 10**9), "valid": valid})
    assert report.failed == ["data.split_ids"]
    assert "1,000 documents" in report["data.split_ids"].evidence
    silent(examine(None, split_ids={"train": range(101_000, 10**9), "valid": valid}))
    named = {"train": ["a", "b"], "valid": np.array(["b"]), "test": ["c"]}
    assert examine(None, split_ids=named).failed == ["data.split_ids"]


@pytest.mark.fault(42, "data.document_containment")
@pytest.mark.fault(42, "data.gram_containment")
def test_evaluation_documents_in_train():
    report = examine(TRAIN + VALID, VALID)
    assert {"data.document_containment", "data.gram_containment"} <= set(report.failed)
    # One document of twenty is enough.
    report = examine(TRAIN + VALID[3:4], VALID)
    assert "data.document_containment" in report.failed
    assert report["data.document_containment"].values["valid_pairs"] == [(3, len(TRAIN))]
    silent(examine(TRAIN, VALID), "data.document_containment")


@pytest.mark.fault(42, "data.document_containment")
@pytest.mark.parametrize("length", [8, 12, 20, 25, 27, 30])
def test_short_evaluation_documents_in_train(length):
    """Too short for n-grams, but not for whole documents."""
    train, valid = documents(400, 1, length), documents(100, 2, length)
    report = examine(train, train[:100])
    assert "data.document_containment" in report.failed
    assert report["data.document_containment"].values["valid"] == 1
    assert "data.document_containment" in examine(train, valid[3:] + train[:3]).failed
    silent(examine(train, valid), "data.document_containment")


def test_documents_too_short_to_be_judged():
    """No document of two tokens says anything: that is no pass."""
    train = documents(1000, 1, 2)
    finding = examine(train, train[:100])["data.document_containment"]
    assert finding.status == "skip"
    assert "nats that rule out coincidence" in finding.evidence
    # Read twice, train cannot tell what recurs by custom.
    train = documents(400, 1, 12)
    finding = examine(train + train, train[:100])["data.document_containment"]
    assert finding.status == "skip" and "epoch_tokens" in finding.evidence
    once = examine(train + train, train[:100], epoch_tokens=400 * 12)
    assert "data.document_containment" in once.failed


@pytest.mark.fault(42, "data.same_splits")
def test_test_is_valid():
    report = examine(TRAIN, VALID, [d.copy() for d in VALID])
    assert report.failed == ["data.same_splits"]
    assert report["data.same_splits"].values["pairs"] == ["valid and test"]
    assert examine(TRAIN, VALID, VALID[::-1]).failed == ["data.same_splits"]
    silent(examine(TRAIN, VALID, TEST), "data.same_splits")


# Planted faults: repetition and windows.


@pytest.mark.parametrize("cycle", [12, 60, 100])
def test_a_reader_that_starts_over(cycle):
    """Of 120 documents only the first few are read, again and again, in packed rows."""
    repeated = list(itertools.islice(itertools.cycle(TRAIN[:cycle]), 120))
    rows = cut(stream(repeated))
    for train in (repeated, batches(rows), batches(shuffled(rows)), [stream(repeated)]):
        report = examine(train)
        assert "data.repetition" in report.failed
    in_order = examine(batches(rows))["data.repetition"]
    assert in_order.values["distance"] == pytest.approx(cycle * 301 * 64 / 63, rel=0.1)
    silent(examine(batches(cut(stream(TRAIN))), separator=0), "data.repetition")


def test_several_epochs_are_no_repetition_when_the_epoch_is_declared():
    twice = read(epochs=2)
    assert "data.repetition" in examine(twice, separator=0).failed
    tokens = sum(map(len, TRAIN))
    silent(examine(twice, VALID, separator=0, epoch_tokens=tokens), "data.repetition")
    leaky = examine(read(TRAIN + VALID, epochs=2), VALID, separator=0, epoch_tokens=tokens * 7 // 6)
    assert "data.gram_containment" in leaky.failed


@pytest.mark.fault(34, "data.repetition", "warn")
def test_a_sample_too_short_to_see_the_cycle():
    def reader():
        return itertools.cycle(TRAIN)  # starts over after 36,000 tokens

    declared = dict(epoch_tokens=200_000)
    blind = examine(reader(), max_tokens=20_000, **declared)
    assert blind.warned == ["data.repetition"]
    assert blind["data.repetition"].values["longest_visible_cycle"] == pytest.approx(18_000, 350)
    assert "cannot be excluded" in blind["data.repetition"].evidence
    assert "data.repetition" in examine(reader(), max_tokens=60_000, **declared).failed
    fresh = (SOURCE.sample(2000, (9, i)).astype(int) + 1 for i in itertools.count())
    silent(examine(fresh, max_tokens=200_000, **declared), "data.repetition")


@pytest.mark.fault(36, "data.target_overlap")
@pytest.mark.parametrize("stride", [1, 8, T // 2, T - 20])
def test_overlapping_windows(stride):
    docs = TRAIN[:12] if stride < 10 else TRAIN
    tokens = stream(docs)
    rows = cut(tokens, T + 1, stride)
    report = examine(batches(shuffled(rows)))
    assert "data.target_overlap" in report.failed
    assert report["data.target_overlap"].values["train_stride"] == stride
    # Healthy: what an earlier window scored has weight 0.
    weights = np.ones(rows.shape)
    weights[1:, : T + 1 - stride] = 0
    order = np.random.default_rng(0).permutation(len(rows))
    once = [{"tokens": rows[order], "weights": weights[order]}]
    assert examine(once)["data.target_overlap"].status == "pass"
    silent(examine(batches(shuffled(cut(stream(TRAIN))))), "data.target_overlap")


def test_equal_rows_that_hide_an_overlap_are_said():
    rows = shuffled(cut(stream(TRAIN[:60]), T + 1, T // 2))[:576]  # whole batches
    found = examine(batches(rows) + batches(shuffled(rows, 1)))["data.target_overlap"]
    assert found.status == "skip" and found.needs == ("epoch_tokens",)
    declared = examine(batches(rows) + batches(shuffled(rows, 1)), epoch_tokens=len(rows) * T)
    assert "data.target_overlap" in declared.failed


@pytest.mark.fault(37, "data.near_identical_rows")
def test_unshuffled_windows_of_stride_one():
    report = examine(batches(cut(stream(TRAIN[:20]), T + 1, 1), 16))
    assert "data.near_identical_rows" in report.failed
    assert report["data.near_identical_rows"].values["shared_grams"] > 0.5
    # Overlapping but shuffled over the corpus: another fault, not this one.
    mixed = examine(batches(shuffled(cut(stream(TRAIN), T + 1, 1))[:8000], 8))
    assert "data.near_identical_rows" not in mixed.failed
    # Unshuffled rows without overlap are neighbours, not copies.
    silent(examine(batches(cut(stream(TRAIN)), 16), separator=0), "data.near_identical_rows")


@pytest.mark.fault(37, "data.near_identical_rows")
@pytest.mark.parametrize("edited", [0.0, 0.3])
def test_batches_of_copies_of_one_row(edited):
    rng = np.random.default_rng(0)
    rows = np.repeat(cut(stream(TRAIN))[:30], 8, 0)
    noise = rng.random(rows.shape) < edited
    rows = np.where(noise, rng.integers(1, VOCAB, rows.shape), rows)
    report = examine(batches(rows))
    assert "data.near_identical_rows" in report.failed
    agreement = report["data.near_identical_rows"].values["agreement"]
    assert agreement == pytest.approx((1 - edited) ** 2, abs=0.02)
    # One batch of one text has nothing to be compared with.
    assert examine(batches(rows[:8]))["data.near_identical_rows"].status == "skip"


# Planted faults: padding and document ends.


def lines_as_rows(seed, width=64):
    """One line a row, padded: a third of the rows empty, as in raw WikiText."""
    rng = np.random.default_rng(seed)
    lengths = np.where(rng.random(400) < 1 / 3, 0, rng.integers(5, 40, 400))
    rows, segments = np.zeros((2, 400, width), int)
    for row, segment, length in zip(rows, segments, lengths, strict=True):
        row[:length] = SOURCE.sample(int(length), (seed, int(length))) + 1
        segment[:length] = 1
    return rows, segments


@pytest.mark.fault(41, "data.empty_rows")
@pytest.mark.fault(41, "data.slots")
def test_one_line_a_row():
    rows, segments = lines_as_rows(0)
    for train in (
        [{"tokens": rows, "segment_ids": segments}],
        [{"tokens": rows, "weights": (segments > 0) * 1.0, "segment_ids": segments}],
    ):
        report = examine(train)
        assert {"data.empty_rows", "data.slots"} <= set(report.failed)
    report = examine([rows], padding=0)
    assert {"data.empty_rows", "data.slots"} <= set(report.failed)
    empty = report["data.empty_rows"].values["share"]
    assert empty == pytest.approx((segments.sum(-1) == 0).mean())
    silent(examine(read(), separator=0), "data.empty_rows", "data.slots")


def end_of_text_rows(mask):
    """Documents closed by id 0 and padded with id 0; what `mask` names is not scored."""
    rng = np.random.default_rng(0)
    rows = np.zeros((60, 64), int)
    lengths = rng.integers(30, 60, 60)
    for row, document, length in zip(rows, TRAIN, lengths, strict=False):
        row[:length] = document[:length]
    place = np.arange(64)
    by_id = rows != 0
    by_place = place <= lengths[:, None]
    return [{"tokens": rows, "weights": (by_id if mask == "id" else by_place).astype(float)}]


@pytest.mark.fault(7, "data.document_end")
def test_end_of_text_masked_with_the_padding():
    report = examine(end_of_text_rows("id"), end=0, padding=0)
    assert report.failed == ["data.document_end"]
    assert report["data.document_end"].values == {"documents": 60, "scored": 0}
    silent(examine(end_of_text_rows("place"), end=0, padding=0), "data.document_end")


@pytest.mark.fault(7, "data.document_end")
def test_documents_without_their_end():
    closed = [np.append(d, 256) for d in (d[d != 256] for d in TRAIN)]
    silent(examine(closed, end=256), "data.document_end")
    assert "data.document_end" in examine([d[:-1] for d in closed], end=256).failed
    packed = batches(cut(np.concatenate(closed)))
    silent(examine(packed, end=256), "data.document_end")
    without = batches(cut(np.concatenate([d[:-1] for d in closed])))
    assert examine(without, end=256).warned == ["data.document_end"]


def test_lm_jax_separators_are_inputs_only():
    """Where a separator opens documents it is not learnt, and that is no fault."""
    silent(examine(read(), held_out(VALID), separator=0))
    assert examine(read(), separator=0)["data.document_end"].status == "skip"


# Planted faults: readers, epochs, resumption.


def permute_then_filter(n, seed_of):
    """Each worker shuffles with its own seed and keeps every n-th document of its order."""
    streams = []
    for worker in range(n):
        order = np.random.default_rng(seed_of(worker)).permutation(len(TRAIN))
        streams.append([TRAIN[i] for i in order[worker::n]])
    return streams


@pytest.mark.fault(31, "data.coverage")
def test_workers_shuffle_before_they_filter():
    report = examine(TRAIN, readers=lambda n: permute_then_filter(n, lambda worker: 5 + worker))
    assert "data.coverage" in report.failed
    never = report["data.coverage"].values["8_never"]
    assert never == pytest.approx(0.34, abs=0.1)
    silent(
        examine(TRAIN, readers=lambda n: permute_then_filter(n, lambda worker: 5)),
        "data.coverage",
        "data.readers_differ",
    )


@pytest.mark.fault(32, "data.readers_differ")
def test_every_host_reads_the_same():
    report = examine(None, readers=lambda n: [read() for _ in range(n)], reader_counts=(2,))
    assert report.failed == ["data.readers_differ"]
    assert "the first row is the same for all" in report["data.readers_differ"].evidence
    report = examine(None, readers={1: [read()], 2: [read(), read()]})
    assert set(report.failed) == {"data.readers_differ", "data.coverage"}
    own = {n: [read(processes=n, process=i) for i in range(n)] for n in (1, 2, 8)}
    silent(examine(None, readers=own), "data.coverage", "data.readers_differ")


def test_a_last_batch_that_is_dropped_is_a_warning():
    docs = documents(400, 6, length=20)
    streams = {1: [docs], 2: [docs[:199], docs[200:]]}
    assert examine(None, readers=streams).warned == ["data.coverage"]
    assert "data.coverage" in examine(None, readers={1: [docs], 2: [docs[:150], docs[200:]]}).failed


@pytest.mark.fault(33, "data.epoch_order")
def test_same_order_every_epoch():
    epoch = len(read())
    report = examine(None, epochs=[read(), read()])
    assert report.failed == ["data.epoch_order"]
    silent(examine(None, epochs=[read(), read(first=epoch, epochs=2)]), "data.epoch_order")
    # Batches that are made first and shuffled then.
    first, *others = made = read()  # the first stays, by chance
    moved = [first, *others[7:], *others[:7]]
    silent(examine(None, epochs=[made, moved]), "data.epoch_order")
    # One epoch of three that forgot to shuffle anew.
    later = read(first=epoch, epochs=2)
    assert examine(None, epochs=[read(), later, later]).failed == ["data.epoch_order"]


@pytest.mark.fault(35, "data.resume")
def test_resume_starts_the_data_over():
    epoch = len(read())
    whole = [batch_hash(b) for b in read()]
    report = examine(None, resume=(whole, [batch_hash(b) for b in read()[: epoch // 2]]))
    assert report.failed == ["data.resume"]
    assert "the data starts from the beginning" in report["data.resume"].evidence
    shifted = examine(None, resume=(read(), read(first=epoch // 2 - 1)[:-1]))
    assert shifted["data.resume"].values["found"] == epoch // 2 - 1
    silent(examine(None, resume=(whole, whole[epoch // 2 :])), "data.resume")
    silent(examine(None, resume=(read(), read(first=epoch // 2))), "data.resume")
