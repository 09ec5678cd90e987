import pathlib
import re
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from lm_jax.data.windows import (
    Windows,
    eval_batches,
    example_index,
    train_batches,
    window_offset,
)
from tests.helpers import batch_hash

T = 8
LENGTHS = [1, T, 3, 0, 29, 1, 1, T - 1, 17, 2, 2 * T, 5]


def make_split(lengths=LENGTHS, tokens=None):
    """A split in which every token is a different number, so that a target names its place."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    if tokens is None:
        tokens = np.arange(1, starts[-1] + 1, dtype=np.uint16)
    return SimpleNamespace(name="train", tokens=tokens, document_starts=starts, separator=0)


def one_by_one(start, steps):
    return [range(i, i + 1) for i in range(start, steps)]


def train(split, start=0, steps=6, **kwargs):
    kwargs = dict(seq_len=T, batch_size=8, document_mask=True, seed=3, threads=0) | kwargs
    stacked = train_batches(split, calls=one_by_one(start, steps), **kwargs)
    return [{name: x[0] for name, x in batch.items()} for batch in stacked]


def scored_pairs(batches):
    """(previous token, token) of every scored target."""
    pairs: Counter = Counter()
    for batch in batches:
        scored = batch["weights"][..., 1:] == 1
        previous = batch["tokens"][..., :-1][scored]
        pairs.update(zip(previous.tolist(), batch["tokens"][..., 1:][scored].tolist(), strict=True))
    return pairs


def expected_pairs(split):
    pairs: Counter = Counter()
    for first, end in zip(split.document_starts[:-1], split.document_starts[1:], strict=True):
        document = [split.separator, *split.tokens[first:end].tolist()]
        pairs.update(zip(document[:-1], document[1:], strict=True))
    return pairs


def slow_rows(split, seq_len, document_mask, stride):
    """The windows of a split, one position at a time."""
    stream = []
    for document in range(len(split.document_starts) - 1):
        first, end = split.document_starts[document : document + 2]
        stream += [(split.separator, document, 0)]
        stream += [(int(token), document, 1) for token in split.tokens[first:end]]
    scored, start, rows = {0}, 0, []
    while len(scored) < len(stream):
        row = []
        for position in range(start, start + seq_len + 1):
            if position >= len(stream):
                row.append((split.separator, 0, 0))
                continue
            token, document, is_text = stream[position]
            segment = document - stream[start][1] + 1 if document_mask else 1
            row.append((token, segment, int(is_text and position not in scored)))
            scored.add(position)
        rows.append(row)
        start += stride
    tokens, segment_ids, weights = np.moveaxis(np.array(rows), 2, 0)
    return {"tokens": tokens, "segment_ids": segment_ids, "weights": weights}


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("stride", range(1, T + 1))
@pytest.mark.parametrize("lengths", [LENGTHS, [1], [T - 1], [T], [T + 1], [3 * T - 1], [0, 2]])
def test_windows_equal_a_slow_reading_of_the_definition(lengths, stride, document_mask):
    split = make_split(lengths)
    windows = Windows(split, T, document_mask, stride)
    expected = slow_rows(split, T, document_mask, stride)
    assert len(windows) == len(expected["tokens"])
    assert_same([windows.batch(np.arange(len(windows)))], [expected])


def test_windows_have_the_promised_types():
    batch = Windows(make_split(), T, True).batch([0, 2])
    assert {name: (x.dtype, x.shape) for name, x in batch.items()} == {
        "tokens": (np.int32, (2, T + 1)),
        "segment_ids": (np.int32, (2, T + 1)),
        "weights": (np.float32, (2, T + 1)),
    }


def test_segments_restart_in_every_window_and_open_with_a_separator():
    split = make_split([2, 3, 20])
    batch = Windows(split, T, True).batch([0, 1])
    np.testing.assert_array_equal(batch["tokens"][0], [0, 1, 2, 0, 3, 4, 5, 0, 6])
    np.testing.assert_array_equal(batch["segment_ids"][0], [1, 1, 1, 2, 2, 2, 2, 3, 3])
    np.testing.assert_array_equal(batch["weights"][0], [0, 1, 1, 0, 1, 1, 1, 0, 1])
    np.testing.assert_array_equal(batch["segment_ids"][1], np.ones(T + 1))
    unmasked = Windows(split, T, False).batch([0, 1])
    np.testing.assert_array_equal(unmasked["segment_ids"], np.ones((2, T + 1)))
    np.testing.assert_array_equal(unmasked["weights"], batch["weights"])


def test_index_minus_one_is_a_row_of_padding():
    batch = Windows(make_split(), T, False, stride=3).batch([1, -1])
    assert batch["segment_ids"][0].all()
    assert not any(x[1].any() for x in batch.values())


@pytest.mark.parametrize("lengths", [LENGTHS, [T], [5 * T - 1], [1] * 40])
def test_every_token_is_a_target_exactly_once_an_epoch(lengths):
    split = make_split(lengths)
    windows = Windows(split, T, True)
    expected = expected_pairs(split)
    assert sum(expected.values()) == len(split.tokens)
    for epoch in range(3):
        positions = epoch * len(windows) + np.arange(len(windows))
        batch = windows.batch(example_index(positions, len(windows), seed=5))
        assert scored_pairs([batch]) == expected
        assert batch["weights"][:, 1:].sum() == len(split.tokens)


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("earlier", range(T))
@pytest.mark.parametrize("lengths", [LENGTHS, [1], [T - 1], [T], [T + 1], [3 * T - 1], [0, 2]])
def test_windows_of_any_offset_score_every_token_once(lengths, earlier, document_mask):
    split = make_split(lengths)
    windows = Windows(split, T, document_mask, movable=True)
    batch = windows.batch(np.arange(len(windows)), earlier=earlier)
    assert scored_pairs([batch]) == expected_pairs(split)
    padding = batch["segment_ids"] == 0
    assert not batch["weights"][padding].any() and not batch["tokens"][padding].any()
    assert padding[0, :earlier].all() and not padding[0, earlier]
    first = batch["segment_ids"].max(axis=1, where=~padding, initial=0) > 0
    assert (np.where(padding, 99, batch["segment_ids"]).min(axis=1)[first] == 1).all()


def test_every_epoch_of_movable_windows_is_cut_elsewhere():
    split, batch_size, epochs = make_split(), 5, 5
    steps = len(Windows(split, T, True, movable=True))
    moved = train(split, batch_size=batch_size, steps=steps, movable=True)
    assert scored_pairs(moved) == Counter({pair: epochs for pair in expected_pairs(split)})
    offsets = window_offset(np.arange(200), T, seed=3)
    assert set(offsets) == set(range(T))
    np.testing.assert_array_equal(window_offset([7, 7, 3], T, seed=3), offsets[[7, 7, 3]])
    assert (window_offset(np.arange(200), T, seed=4) != offsets).any()


def test_batches_run_on_through_the_end_of_an_epoch():
    split = make_split()
    batch_size = 5
    epochs, steps = batch_size, len(Windows(split, T, True))
    assert steps % batch_size
    pairs = scored_pairs(train(split, batch_size=batch_size, steps=steps))
    assert pairs == Counter({pair: epochs for pair in expected_pairs(split)})


def test_a_batch_may_hold_several_epochs():
    split = make_split([2 * T])
    (batch,) = train(split, batch_size=12, steps=1)
    assert scored_pairs([batch]) == Counter({pair: 6 for pair in expected_pairs(split)})


def test_epochs_and_seeds_differ_and_are_reproducible():
    n = 100
    first, second = example_index(np.arange(2 * n), n, seed=1).reshape(2, n)
    assert sorted(first) == sorted(second) == list(range(n))
    assert (first != second).any()
    assert (first != example_index(np.arange(n), n, seed=2)).any()
    np.testing.assert_array_equal(example_index(np.arange(n, 2 * n), n, seed=1), second)
    scattered = np.array([[150, 3], [99, 100]])
    expected = [[second[50], first[3]], [first[99], second[0]]]
    np.testing.assert_array_equal(example_index(scattered, n, seed=1), expected)


def test_the_order_is_the_same_with_every_numpy_version():
    golden = [[1, 4, 5, 6, 8, 2, 0, 3, 9, 7], [7, 8, 6, 2, 9, 3, 1, 0, 4, 5]]
    order = example_index(np.arange(20), 10, seed=0).reshape(2, 10)
    np.testing.assert_array_equal(order, golden)


@pytest.mark.parametrize("processes", [1, 2, 8])
@pytest.mark.parametrize("threads", [0, 1, 2])
def test_processes_and_threads_see_one_global_sequence(processes, threads):
    split = make_split()
    parts = [
        train(split, process_index=p, process_count=processes, threads=threads)
        for p in range(processes)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, train(split))


@pytest.mark.parametrize("threads", [0, 2])
def test_resuming_at_any_batch_gives_the_rest(threads):
    split = make_split()
    hashes = [batch_hash(batch) for batch in train(split)]
    assert len(set(hashes)) == len(hashes) == 6
    for start in range(8):
        resumed = [batch_hash(batch) for batch in train(split, start=start, threads=threads)]
        assert resumed == hashes[start:]


@pytest.mark.parametrize("threads", [0, 2])
def test_how_batches_are_grouped_in_calls_does_not_matter(threads):
    split = make_split()
    options = dict(seq_len=T, batch_size=8, document_mask=True, seed=3, threads=threads)
    stacked = list(train_batches(split, calls=[range(3), range(3, 4), range(4, 6)], **options))
    assert [len(batch["tokens"]) for batch in stacked] == [3, 1, 2]
    joined = {name: np.concatenate([batch[name] for batch in stacked]) for name in stacked[0]}
    assert_same([{name: x[i] for name, x in joined.items()} for i in range(6)], train(split))


def test_growing_windows_have_the_same_targets_in_shorter_rows():
    split = make_split()
    whole, grown = train(split), train(split, growth=4)
    assert [batch["tokens"].shape for batch in grown] == [
        *[(64, 2)] * 2,
        (32, 3),
        (16, 5),
        *[(8, 9)] * 2,
    ]
    for long, short in zip(whole, grown, strict=True):
        assert scored_pairs([long]) == scored_pairs([short])
        for name, x in short.items():
            inputs = x[:, :-1].reshape(8, T)  # in their places
            np.testing.assert_array_equal(inputs, long[name][:, :-1])
    for start in range(6):
        assert_same(train(split, start=start, growth=4), grown[start:])


@pytest.mark.parametrize("stride", [None, *range(1, T + 1)])
@pytest.mark.parametrize("lengths", [LENGTHS, [1], [2, 1]])
def test_evaluation_scores_every_target_once(lengths, stride):
    split = make_split(lengths)
    options = dict(seq_len=T, batch_size=4, document_mask=True, stride=stride)
    batches = list(eval_batches(split, **options))
    assert {batch["tokens"].shape for batch in batches} == {(4, T + 1)}
    assert scored_pairs(batches) == expected_pairs(split)
    assert not batches[0]["weights"][..., 0].any()
    parts = [list(eval_batches(split, process_index=p, process_count=2, **options)) for p in (0, 1)]
    joined = [
        {name: np.concatenate([low[name], high[name]]) for name in low}
        for low, high in zip(*parts, strict=True)
    ]
    assert_same(joined, batches)


def test_strided_evaluation_scores_with_a_long_context():
    stride = 3
    batch = Windows(make_split([100]), T, True, stride).batch([0, 1, 7])
    scored = [np.flatnonzero(row).tolist() for row in batch["weights"]]
    last = list(range(T + 1 - stride, T + 1))
    assert scored == [list(range(1, T + 1)), last, last]


def test_batch_hash_sees_values_types_and_shapes():
    batch: dict = {"a": np.arange(6, dtype=np.int32), "b": np.zeros(2, np.float32)}
    different = [
        batch | {"a": batch["a"].reshape(2, 3)},
        batch | {"a": batch["a"].astype(np.uint32)},
        batch | {"a": batch["a"][::-1]},
        {"b": batch["a"], "a": batch["b"]},
    ]
    hashes = {batch_hash(other) for other in [batch, *different]}
    assert len(hashes) == 5
    assert batch_hash(dict(reversed(batch.items()))) == batch_hash(batch)


def test_a_training_split_shorter_than_a_window_is_refused():
    split = make_split([T - 1])
    with pytest.raises(ValueError, match=r"config\.data\.seq_len: 8 .* its 7 tokens; lower it"):
        train(split)
    assert train(make_split([T]), steps=1)
    assert scored_pairs(
        eval_batches(split, seq_len=T, batch_size=2, document_mask=True)
    ) == expected_pairs(split)


def test_arguments_that_cannot_work_are_refused_at_the_call():
    split = make_split()
    options: dict = dict(seq_len=T, batch_size=9, document_mask=True, process_count=2)
    message = "--config.data.batch_size=9 .* multiple of 2"
    with pytest.raises(ValueError, match=message):
        train_batches(split, seed=0, calls=[range(1)], **options)
    with pytest.raises(ValueError, match=message):
        eval_batches(split, **options)
    for stride in (0, T + 1):
        with pytest.raises(ValueError, match="between 1 and seq_len=8"):
            Windows(split, T, True, stride)
    with pytest.raises(ValueError, match="'train' holds no tokens"):
        Windows(make_split([0, 0]), T, True)


def test_an_abandoned_iterator_ends_without_noise_and_grain_is_imported_late():
    program = """
import sys
import numpy as np
from types import SimpleNamespace
from lm_jax.data.windows import train_batches
assert "grain" not in sys.modules and "jax" not in sys.modules
split = SimpleNamespace(name="train", tokens=np.ones(10_000, np.uint16),
                        document_starts=np.array([0, 10_000]), separator=0)
batches = train_batches(split, seq_len=64, batch_size=8, document_mask=True, seed=0,
                        calls=[range(100)] * 100, threads=2)
next(batches)
"""
    result = subprocess.run(
        [sys.executable, "-X", "dev", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.fixture
def mapped_split(tmp_path):
    lengths, path = [500] * 4000, tmp_path / "tokens.bin"
    np.random.default_rng(0).integers(1, 2**16, sum(lengths), np.uint16).tofile(path)
    return make_split(lengths, np.memmap(path, np.uint16, "r"))


def test_a_memory_map_is_not_read_into_memory(mapped_split):
    tracemalloc.start()
    Windows(mapped_split, T, True).batch(np.arange(4))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < mapped_split.tokens.nbytes / 10


@pytest.mark.parametrize("stride", [1, 5, T])
@pytest.mark.parametrize("lengths", [LENGTHS, [1], [T + 1], [0, 2]])
def test_windows_of_a_file_equal_those_of_an_array(tmp_path, lengths, stride):
    split = make_split(lengths)
    np.save(tmp_path / "tokens.npy", split.tokens)
    mapped = make_split(lengths, np.load(tmp_path / "tokens.npy", mmap_mode="r"))
    batches = [Windows(s, T, True, stride) for s in (split, mapped)]
    indices = np.arange(-1, len(batches[0])).reshape(1, -1)
    assert_same([batches[1].batch(indices)], [batches[0].batch(indices)])


def resident(path):
    """Bytes of a file that this process holds in memory through maps."""
    maps = pathlib.Path("/proc/self/smaps").read_text().split(str(path))[1:]
    return sum(1024 * int(re.search(r"Rss: +(\d+) kB", rest)[1]) for rest in maps)


def test_an_epoch_leaves_no_page_of_the_file_in_memory(mapped_split):
    path = mapped_split.tokens.filename
    batches = train_batches(
        mapped_split,
        seq_len=256,
        batch_size=32,
        document_mask=True,
        seed=0,
        calls=one_by_one(0, 250),
        threads=1,
    )
    assert sum(batch["tokens"].size for batch in batches) > len(mapped_split.tokens)
    assert resident(path) == 0
    assert (
        mapped_split.tokens[::2000].sum() and resident(path) > 1e6
    )  # the map is what was looked at


def test_throughput_from_a_memory_map(mapped_split):
    seq_len, batch_size = 256, 32
    steps = len(Windows(mapped_split, seq_len, True)) // batch_size
    options: dict = dict(seq_len=seq_len, batch_size=batch_size, document_mask=True)
    batches = train_batches(mapped_split, **options, seed=0, calls=one_by_one(0, steps), threads=0)
    next(batches)
    began = time.perf_counter()
    for batch in batches:
        assert type(batch["tokens"]) is np.ndarray
    rate = (steps - 1) * batch_size * seq_len / (time.perf_counter() - began)
    print(f"{rate / 1e6:.1f}M tokens/s")
    assert rate > 2e6
