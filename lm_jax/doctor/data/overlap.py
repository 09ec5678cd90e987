"""Text that is met more often than it should be: within train, within a batch, across splits."""

import itertools
import math

import numpy as np

from lm_jax.doctor import numbers
from lm_jax.doctor.checks import check
from lm_jax.doctor.data import grams, windows
from lm_jax.doctor.data.sample import Sample
from lm_jax.doctor.data.subject import COPIED_FAIL, Copied
from lm_jax.doctor.facts import Skip
from lm_jax.doctor.findings import Measure, at_least, at_most, none, note

CONTAINED = 0.01  # share of an evaluation split that may stand in train for no reason
ALIKE = 0.05  # excess over rows of other batches at which rows of a batch are near-identical
BATCHES = 64  # batches compared


@check(
    "Look for a reader that starts over (a take or limit, a cycle of few files, a restart "
    "without its position). If train was given for several epochs, set epoch_tokens; if too "
    "little was read, raise max_tokens."
)
def repetition(
    copied: Copied, index: grams.Index, epoch_tokens: int | None = None
) -> list[Measure]:
    """Hardly any row or document stands earlier in train, at any offset."""
    train = index.sample
    longest = int((1 - COPIED_FAIL) * copied.tokens)
    found = [
        at_most(
            f"share of {train.size} in pieces that stand in earlier ones to {grams.SAME_PIECE:.0%}",
            copied.share,
            copied.limit,
            otherwise="fail" if copied.much else "warn",
            key="share",
        )
    ]
    if epoch_tokens is not None and copied.share <= copied.limit:
        read, least = copied.tokens, epoch_tokens - train.largest_item
        where = "a longer cycle than below cannot be excluded"
        found.append(at_least("tokens of the epoch", read, least, otherwise="warn", where=where))
    return [
        *found,
        note("tokens compared", copied.tokens, key="tokens"),
        note("median distance to the copy", copied.distance, key="distance"),
        note("longest cycle that fails here, tokens", longest, key="longest_visible_cycle"),
        note("tokens of an n-gram", index.n, key="n"),
    ]


@check(
    "Cut windows at a stride of their number of targets, so that each token is scored once "
    "an epoch; or give weight 0 to targets that an earlier window scored."
)
def target_overlap(overlapping: windows.Overlap) -> list[Measure]:
    """Windows of train do not overlap, so that an epoch scores each target once."""
    return _overlap("train", overlapping)


@check(
    "Split the text first, by document or with a gap of a window, and cut windows of each part "
    "then; windows of one text that are split at random share nearly all their tokens."
)
def window_containment(evaluation: list[Sample], first_epoch: Sample) -> list[Measure]:
    """Rows of valid and test do not begin inside rows of train."""
    rows = [_overlap(s.name, windows.overlap(s, first_epoch)) for s in evaluation]
    return list(itertools.chain(*rows))


def _overlap(name: str, found: windows.Overlap) -> list[Measure]:
    what = f"rows of train that each of {found.tried:,} rows of {name} begins inside of"
    excess = f"{what}, beyond chance"
    return [
        at_most(excess, found.excess.value, found.limit, key=name),
        note("tokens between their beginnings", found.stride, key=f"{name}_stride"),
        note("width", found.width, key=f"{name}_width"),
    ]


@check(
    "Shuffle windows over the whole corpus before they are batched, and check that rows of "
    "a batch are not copies or shifts of one row."
)
def near_identical_rows(training: Sample, index: grams.Index | None = None) -> list[Measure]:
    """Rows of a batch are no more alike than rows of other batches, by n-grams and by place."""
    number, counts = np.unique(training.batches[training.batches >= 0], return_counts=True)
    batches = number[counts > 1]
    if not len(batches):
        raise Skip("Train is not given in batches of several rows.")
    alone = len(batches) == 1
    # Other batches are the yardstick; without them only an n-gram that tells anything will do.
    if alone and index is None:
        raise Skip("One batch has no other to be compared with, and no n-gram of it is telling.")
    width = int(training.lengths[training.batches == batches[0]][0])
    n = index.n if alone and index else min(grams.SHORTEST, max(width // 2, 1))
    chosen = batches[:: -(-len(batches) // BATCHES)]
    positions, hashes = training.grams(n)
    share, agree = np.zeros((2, len(chosen), 2))
    _, times = np.unique(training.tokens[training.real], return_counts=True)
    chance = float(((times / max(int(times.sum()), 1)) ** 2).sum())
    for i, (own, other) in enumerate(zip(chosen, np.roll(chosen, len(chosen) // 2), strict=True)):
        a, b = _of_batch(training, positions, own), _of_batch(training, positions, other)
        share[i] = _in_other_row(hashes[a], training.row_of[positions[a]]), 0.0
        agree[i] = _agreement(*_columns(training, own)), chance
        if not alone:
            share[i, 1] = np.isin(hashes[a], hashes[b]).mean() if a.stop > a.start else 0.0
            agree[i, 1] = _agreement(*_columns(training, own), *_columns(training, other))
    found = []
    what = {"shared_grams": (f"{n}-grams that rows share", share), "agreement": ("places", agree)}
    for key, (name, values) in what.items():
        excess = numbers.mean(values[:, 0] - values[:, 1])
        limit = ALIKE + (0.0 if alone else numbers.threshold() * excess.error)
        told = f"share of {name} with rows of their batch, beyond other rows"
        found += [
            at_most(told, excess.value, limit, key=f"excess_{key}"),
            note("within the batch", float(values[:, 0].mean()), key=key),
        ]
    return found


def _of_batch(sample: Sample, positions: np.ndarray, number: int) -> slice:
    """The grams of a batch."""
    rows = np.flatnonzero(sample.batches == number)
    bounds = np.searchsorted(positions, sample.starts[[rows[0], rows[-1] + 1]])
    return slice(*bounds.tolist())


def _in_other_row(hashes: np.ndarray, rows: np.ndarray) -> float:
    """Share of grams that another row holds as well."""
    if not len(hashes):
        return 0.0
    _, place = np.unique(hashes, return_inverse=True)
    in_rows = np.bincount(np.unique((place.astype(np.int64) << 32) + rows) >> 32)
    return float((in_rows > 1)[place].mean())


def _columns(sample: Sample, number: int) -> tuple[np.ndarray, int]:
    """The (place, id) of each real token of a batch as one number, and its number of rows."""
    rows = np.flatnonzero(sample.batches == number)
    here = slice(sample.starts[rows[0]], sample.starts[rows[-1] + 1])
    real = sample.real[here]
    cells = (sample.offset_of[here] << 32) + (sample.tokens[here] & 0xFFFFFFFF)
    return cells[real], len(rows)


def _agreement(
    cells: np.ndarray,
    rows: int,
    other_cells: np.ndarray | None = None,
    other_rows: int = 0,
) -> float:
    """Mean over places and pairs of rows of the agreement of their ids."""
    value, count = np.unique(cells, return_counts=True)
    places = max(len(np.unique(cells >> 32)), 1)
    if other_cells is None:
        return float((count * (count - 1)).sum()) / (places * rows * (rows - 1))
    other_value, other_count = np.unique(other_cells, return_counts=True)
    _, a, b = np.intersect1d(value, other_value, assume_unique=True, return_indices=True)
    return float((count[a] * other_count[b]).sum()) / (places * rows * other_rows)


@check(
    "Split by document before windows are cut, by a hash of the document's content, and "
    "stop the training stream short of the evaluation documents over its whole budget."
)
def gram_containment(
    evaluation: list[Sample], index: grams.Index, train_repeats: bool
) -> list[Measure]:
    """Train holds no more n-grams of valid and test than it holds of its own elsewhere."""
    n, train = index.n, index.sample
    # A train that repeats itself is no yardstick.
    usual = numbers.Mean(0.0, 0.0) if train_repeats else index.usual
    measures = [note(f"{n}-grams of train that recur in it, share", usual.value, key="usual")]
    for sample in evaluation:
        _, hashes = sample.grams(n)
        if not len(hashes):
            measures.append(note(f"{sample.name} has no {n}-gram"))
            continue
        first = index.find(hashes)
        found = grams.rate(first >= 0, n)
        error = math.hypot(found.error, usual.error)
        limit = usual.value + CONTAINED + numbers.threshold() * error
        at = np.sort(first[first >= 0])
        span = [int(at[len(at) // 20]), int(at[-1 - len(at) // 20])] if len(at) else []
        where = "nearly all between tokens {:,} and {:,} of train".format(*span) if span else ""
        what = f"share of {n}-grams of {sample.size} that stand in train"
        measures += [
            at_most(what, found.value, limit, where=where, key=sample.name),
            *([note("positions in train", span, key=f"{sample.name}_span")] if span else ()),
        ]
    rest = "" if train.complete else "; what comes later is not compared"
    return [*measures, note(f"read: {train.size}{rest}")]


@check(
    "Take documents that stand in an evaluation split out of train, by a hash of their "
    "content, before anything is tokenised or windowed."
)
def document_containment(
    evaluation: list[Sample],
    first_epoch: Sample,
    row_nats: np.ndarray,
    samples: list[Sample],
    train_repeats: bool,
) -> list[Measure]:
    """Documents or rows of valid and test do not stand in train, token by token.

    Only those count that hold more information than chance repeats. What is left are copies and
    what documents share by custom; how much that is, train shows by what recurs within itself.
    """
    train = first_epoch
    least_nats = grams.least_of(sum(len(s.tokens) for s in samples))
    telling = row_nats >= least_nats
    if not telling.any():
        raise Skip(
            f"No row of {train.size} holds the {least_nats:.0f} nats that rule out coincidence: "
            "the rows are too short or too predictable."
        )
    # What is not found in train is judged by its length.
    shortest = least_nats * train.real.sum() / row_nats.sum()
    known, first, count = np.unique(train.row_hashes, return_index=True, return_counts=True)
    twice = telling & np.isin(train.row_hashes, known[count > 1])
    recurs = float(train.text[twice].sum()) / max(int(train.text[telling].sum()), 1)
    usual = 0.0 if train_repeats else recurs
    if usual > 0.5:
        raise Skip(
            f"{usual:.0%} of train stands in it twice, so it is no yardstick: set epoch_tokens if "
            "it was given for several epochs.",
            "epoch_tokens",
        )
    measures = [note("share of train that stands in it twice", usual, key="usual")]
    for sample in evaluation:
        text = sample.text
        place = np.minimum(np.searchsorted(known, sample.row_hashes), len(known) - 1)
        found = known[place] == sample.row_hashes
        held = found & telling[first[place]]
        judged = np.where(found, held, text >= shortest)
        if not judged.all():
            aside = f"of {sample.name}'s {len(judged):,} documents or rows are not judged, of less"
            aside += f" than the {least_nats:.0f} nats that rule out coincidence"
            measures.append(note(aside, int((~judged).sum())))
        if not judged.any():
            continue
        share = float(text[held].sum()) / max(int(text[judged].sum()), 1)
        alike = _spread(train.text[telling]) + _spread(text[judged])
        limit = numbers.share_limit(usual, 1 / alike) + CONTAINED
        examples = np.flatnonzero(held)
        pairs = list(zip(examples.tolist(), first[place[examples]].tolist(), strict=True))[:3]
        what = f"share of {sample.name}'s text in documents or rows that stand in train"
        where = f"number in {sample.name} and in train: {pairs}"
        measures += [
            at_most(what, share, limit, where=where, key=sample.name),
            note(f"documents of {sample.name}", int(held.sum()), key=f"{sample.name}_documents"),
            note(f"judged of {sample.name}", int(judged.sum())),
            note("some of them", pairs, key=f"{sample.name}_pairs"),
        ]
    if not any(m.key in ("valid", "test") for m in measures):
        raise Skip("; ".join(map(str, measures)) + ".")
    return measures


def _spread(sizes: np.ndarray) -> float:
    """One over the number of rows of equal size that would say as much as these."""
    return float((sizes.astype(float) ** 2).sum()) / max(float(sizes.sum()) ** 2, 1.0)


@check("Give each split its own documents; look for a fallback that serves one file for all.")
def same_splits(samples: list[Sample], evaluation: list[Sample]) -> Measure:
    """No two splits have the same content."""
    if len(samples) < 2:
        raise Skip("Only one split was given.", "train")
    same = [
        (a, b)
        for a, b in itertools.combinations(samples, 2)
        if np.array_equal(a.tokens[a.real], b.tokens[b.real])
        or np.array_equal(np.sort(a.row_hashes), np.sort(b.row_hashes))
    ]
    for a, _ in same:
        _, hashes = a.grams(grams.SHORTEST)
        if len(np.unique(hashes)) <= len(hashes) / 2:
            raise Skip(
                f"{a.name} equals another split, but fewer than half of its {grams.SHORTEST}-grams "
                "are distinct: text this predictable may be equal by chance."
            )
    pairs = [f"{a.name} and {b.name}" for a, b in same]
    return none("pairs of splits that are equal in content", pairs, key="pairs")
