"""Batches in the forms that loaders have, and windows of one text cut before it is split."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from tests.doctor.data_models import TRAIN, VALID, batches, cut, examine, silent, stream
from tests.helpers import shared_data, thirds

T = 63
ROWS = cut(stream(TRAIN), T + 1, T)


class Pair(NamedTuple):
    x: np.ndarray
    y: np.ndarray


class ByNumber:
    """A map-style data set."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i % len(self.items)]


def in_pairs(rows, make=lambda x, y: (x, y)):
    return [make(part["tokens"][:, :-1], part["tokens"][:, 1:]) for part in batches(rows)]


FORMS = {
    "tuple": in_pairs(ROWS),
    "list": in_pairs(ROWS, lambda x, y: [x, y]),
    "named tuple": in_pairs(ROWS, Pair),
    "plain lists": [(row[:-1].tolist(), row[1:].tolist()) for row in ROWS],
    "plain list": stream(TRAIN).tolist(),
    "one pair": (ROWS[:, :-1], ROWS[:, 1:]),
    "rows": [(row[:-1], row[1:]) for row in ROWS],
    "by number": ByNumber([(row[:-1], row[1:]) for row in ROWS]),
    "generator": (pair for pair in in_pairs(ROWS)),
    "x and y": in_pairs(ROWS, lambda x, y: {"x": x, "y": y}),
    "labels shifted": in_pairs(ROWS, lambda x, y: {"input_ids": x, "labels": y}),
    "labels": [
        {"input_ids": b["tokens"], "labels": b["tokens"], "attention_mask": b["tokens"] >= 0}
        for b in batches(ROWS)
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_inputs_and_targets_are_read_as_windows(form):
    report = examine(FORMS[form], separator=0)
    silent(report, "data.items", "data.ids", "data.repetition")
    if form == "plain list":
        assert f"{len(FORMS[form]):,} tokens in 1 documents" in report["data.items"].evidence
        return
    silent(report, "data.targets", "data.target_overlap", "data.slots")
    rows = len(ROWS) if form in ("plain lists", "one pair", "rows", "by number") else None
    rows = rows or len(batches(ROWS)) * 8
    assert f"{rows * (T + 1):,} tokens" in report["data.items"].evidence


def test_rows_of_a_data_set_of_one_tensor_and_weights_in_low_precision():
    rows = [b["tokens"] for b in batches(ROWS)]
    weights = np.ones(rows[0].shape, jnp.bfloat16)
    for train in ([[part] for part in rows], [{"tokens": x, "weights": weights} for x in rows]):
        report = examine(train, separator=0)
        silent(report, "data.items", "data.ids", "data.repetition")
        assert f"{len(rows) * 8 * (T + 1):,} tokens" in report["data.items"].evidence


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    x, y = torch.tensor(ROWS[:, :-1].copy()), torch.tensor(ROWS[:, 1:].copy())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8, shuffle=True)
    silent(examine(loader, separator=0), "data.targets", "data.ids", "data.repetition")
    valid = torch.tensor(cut(stream(VALID)))
    silent(examine(x, valid, separator=0), "data.items", "data.ids")
    wrong = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x), 8)
    assert examine(wrong, separator=0).failed == ["data.targets"]


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (lambda rows: rows[:, :-2], "not shifted"),
        (lambda rows: np.roll(rows, 1, 1)[:, :-2], "wrong way"),
        (lambda rows: rows[:, 2:], "shifted twice"),
        (lambda rows: rows[::-1, 1:-1], "unrelated"),
    ],
)
@pytest.mark.fault(1, "data.targets")
@pytest.mark.fault(2, "data.targets")
def test_targets_that_are_not_the_next_inputs(targets, said):
    rows = ROWS[: len(ROWS) // 8 * 8]
    x, y = rows[:, :-2], targets(rows)
    pairs = [(x[i : i + 8], y[i : i + 8]) for i in range(0, len(rows), 8)]
    report = examine(pairs, separator=0)
    assert report.failed == ["data.targets"]
    assert said in report["data.targets"].evidence
    assert report["data.targets"].values["train"] < 0.5


def test_labels_of_minus_100_are_padding_or_not_scored():
    rows = ROWS[:80].copy()
    labels = rows.copy()
    labels[:, :5] = -100  # a prompt
    rows[:, 20:], labels[:, 20:] = 0, -100
    whole = [{"input_ids": rows, "labels": labels}]
    shifted = [{"input_ids": rows[:, :-1], "labels": labels[:, 1:]}]
    for train in (whole, shifted):
        report = examine(train)
        assert "data.ids" not in report.failed
        assert report["data.slots"].values["used"] == pytest.approx(20 / 64)
        assert report["data.slots"].values["scored"] == pytest.approx(15 / 64)


@pytest.mark.parametrize(
    "item", [(ROWS[:8], ROWS[:8, 0]), [ROWS[:8], ROWS[:8], ROWS[:8]], {"a": ROWS}]
)
def test_what_is_no_pair_is_refused_with_the_remedy(item):
    report = examine([item])
    assert report.failed == ["data.items"] and report["data.items"].status == "error"
    assert "give rows of ids, pairs (inputs, targets)" in report["data.items"].evidence


def text(start, count):
    """Ids of characters of Shakespeare."""
    part = shared_data("tinyshakespeare/input.txt").read_text()[start : start + count]
    return np.frombuffer(part.encode(), np.uint8).astype(int)


@pytest.mark.parametrize(
    ("width", "rows", "start"), [(6, 200, 400_000), (10, 1000, 200_000), (16, 4000, 200_000)]
)
def test_one_short_row_may_be_equal_by_chance(width, rows, start):
    """Names and common words recur in parts of a text that do not overlap."""
    ids = text(start, (rows + rows // 10 + 1) * width).reshape(-1, width)
    report = examine(list(ids[:rows]), list(ids[rows + 1 :]))
    assert "data.document_containment" not in report.failed


def split_at_random(ids, width, stride):
    rows = np.lib.stride_tricks.sliding_window_view(ids, width)[::stride]
    order = np.random.default_rng(42).permutation(len(rows))
    valid = len(rows) // 10
    return rows[order[valid:]], rows[order[:valid]]


def containment(report):
    return {"data.window_containment", "data.gram_containment"} & set(report.failed)


@pytest.mark.fault(29, "data.window_containment")
@pytest.mark.parametrize(
    ("width", "stride"),
    thirds([(8, 1), (65, 1), (33, 1), (8, 4), (65, 32), (129, 1), (33, 16), (16, 3), (513, 5)]),
)
def test_windows_of_one_text_split_at_random(width, stride):
    ids = text(0, 6000 if stride == 1 else 20_000)
    train, valid = split_at_random(ids, width, stride)
    report = examine(list(train), list(valid))
    assert "data.target_overlap" in report.failed
    assert containment(report)
    # A split of the text, with a gap of a window, before windows are cut.
    gap = len(ids) * 9 // 10
    parts = ids[:gap], ids[gap + width :]
    rows = [np.lib.stride_tricks.sliding_window_view(p, width)[::stride] for p in parts]
    assert not containment(examine(*map(list, rows)))
    apart = examine(*(list(r[::width]) for r in rows))
    assert "data.target_overlap" not in apart.failed and not containment(apart)


def crops(ids, width, count, seed=0):
    """Batches of inputs and targets from random places of a text."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        rows = ids[rng.integers(0, len(ids) - width, 64)[:, None] + np.arange(width)]
        yield rows[:, :-1], rows[:, 1:]


@pytest.mark.parametrize(("width", "count"), thirds([(257, 10), (65, 60)]))
def test_random_crops_are_no_windows_that_overlap(width, count):
    """They repeat the text by nature, and tell all the same where valid stands in it."""
    ids = text(0, 900_000)
    train, valid = ids[:800_000], ids[800_000:]
    report = examine(list(crops(train, width, count)), list(crops(valid, width, 5)))
    silent(report, "data.target_overlap", "data.window_containment", "data.gram_containment")
    leaky = examine(list(crops(ids, width, 4 * count)), list(crops(valid, width, 5, 1)))
    assert containment(leaky)
    if width == 65:
        once = examine(list(crops(train, 257, 30)), epoch_tokens=10**6)
        assert "data.repetition" in once.failed


@pytest.mark.parametrize(("width", "stride"), [(33, 16), (129, 64)])
def test_a_few_equal_rows_hide_no_overlap(width, stride):
    rows = np.lib.stride_tricks.sliding_window_view(text(0, 60_000), width)[::stride]
    rows = np.concatenate([rows, rows[::20]])
    assert "data.target_overlap" in examine(list(rows)).failed
    # Nor does an id that opens every row.
    opened = np.concatenate([np.zeros((len(rows), 1), int), rows], 1)
    assert "data.target_overlap" in examine(list(opened)).failed


@pytest.mark.slow
@pytest.mark.parametrize("width", [33, 65, 513])
def test_more_text_than_is_read_hides_no_overlap(width):
    """Only a part of the windows fits into max_tokens, so few overlap at any one shift."""
    for count in (20_000, 200_000):
        train, valid = split_at_random(text(0, count), width, 1)
        report = examine(batches(train, 64), batches(valid, 64), max_tokens=300_000)
        assert "data.target_overlap" in report.failed
        assert containment(report)
