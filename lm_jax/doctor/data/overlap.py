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
FEW = 3  # fewer copies must be
SURE = 3  # times as telling as others: of many short rows, one or two may be equal by chance
ALIKE = 0.05  # excess over rows of other batches at which rows of a batch are near-identical
BATCHES = 64  # batches compared


@check(
    "Look for a reader that starts over (a take or limit, a cycle of few files). If train was "
    "given for several epochs, set epoch_tokens; if too little was read, raise max_tokens."
)
def repetition(
    copied: Copied,
    index: grams.Index,
    epoch_tokens: int | None = None,
    overlapping: windows.Overlap | None = None,
) -> list[Measure]:
    """Hardly any row or document stands earlier in train, at any offset."""
    train = index.sample
    crops = epoch_tokens is None and overlapping is not None and overlapping.at_random
    if crops and copied.share > copied.limit:
        raise Skip(
            "Rows of train begin anywhere in the text, as random crops do, which repeat it by "
            "nature: set epoch_tokens if they are meant to be one epoch.",
            "epoch_tokens",
        )
    what = f"share of {train.size} in pieces that stand in earlier ones to {grams.SAME_PIECE:.0%}"
    otherwise = "fail" if copied.much else "warn"
    found = [at_most(what, copied.share, copied.limit, otherwise=otherwise, key="share")]
    if epoch_tokens is not None and copied.share <= copied.limit:
        least = epoch_tokens - train.largest_item
        where = "a longer cycle than below cannot be excluded"
        found.append(
            at_least("tokens of the epoch", copied.tokens, least, otherwise="warn", where=where)
        )
    longest = int((1 - COPIED_FAIL) * copied.tokens)
    return [
        *found,
        note("tokens compared", copied.tokens, key="tokens"),
        note("median distance to the copy", copied.distance, key="distance"),
        note("longest cycle that fails here, tokens", longest, key="longest_visible_cycle"),
        note("tokens of an n-gram", index.n, key="n"),
    ]


@check(
    "Cut windows at a stride of their number of targets, or give weight 0 to targets that an "
    "earlier window scored."
)
def target_overlap(overlapping: windows.Overlap, first_epoch: Sample) -> list[Measure]:
    """Windows of train do not overlap, so that an epoch scores each target once."""
    equal = numbers.tied(first_epoch.row_hashes)
    if equal > 0.5 and not overlapping.found:
        raise Skip(
            f"{equal:.0%} of the rows of train equal another one, which hides overlaps: set "
            "epoch_tokens if it was given for several epochs.",
            "epoch_tokens",
        )
    return _overlap("train", overlapping)


@check("Split the text first, by document or with a gap of a window; cut windows after that.")
def window_containment(first_epoch: Sample, evaluation: list[Sample]) -> list[Measure]:
    """Rows of valid and test do not begin inside rows of train."""
    rows = [_overlap(s.name, windows.overlap(s, first_epoch)) for s in evaluation]
    return list(itertools.chain(*rows))


def _overlap(name: str, found: windows.Overlap) -> list[Measure]:
    what = f"rows of train that each of {found.tried:,} rows of {name} begins inside of"
    return [
        at_most(f"{what}, beyond chance", found.excess.value, found.limit, key=name),
        note("tokens between their beginnings", found.stride, key=f"{name}_stride"),
        note("width", found.width, key=f"{name}_width"),
    ]


@check("Shuffle windows over the whole corpus before they are batched; look for copies of a row.")
def near_identical_rows(batched: Sample) -> list[Measure]:
    """Rows of a batch are no more alike than rows of other batches, by n-grams and by place."""
    number, counts = np.unique(batched.batches[batched.batches >= 0], return_counts=True)
    batches = number[counts > 1]
    if len(batches) < 2:
        raise Skip("Train is not given in several batches of several rows.")
    width = int(batched.lengths[batched.batches == batches[0]][0])
    n = min(grams.SHORTEST, max(width // 2, 1))
    positions, hashes = batched.grams(n)

    def of_batch(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Its n-grams, the row of each, its ids with their places, and how many rows it has."""
        rows = np.flatnonzero(batched.batches == number)
        here = slice(batched.starts[rows[0]], batched.starts[rows[-1] + 1])
        inside = slice(*np.searchsorted(positions, [here.start, here.stop]).tolist())
        cells = (batched.offset_of[here] << 32) + (batched.tokens[here] & 0xFFFFFFFF)
        row_of = batched.row_of[positions[inside]]
        return hashes[inside], row_of, cells[batched.real[here]], len(rows)

    chosen = batches[:: -(-len(batches) // BATCHES)]
    share, agree = np.zeros((2, len(chosen), 2))
    for i, own in enumerate(chosen):
        held, row_of, cells, rows = of_batch(own)
        others, _, other_cells, other_rows = of_batch(chosen[i - len(chosen) // 2])
        share[i] = [grams.rate(x, n).value for x in (_twice(held, row_of), np.isin(held, others))]
        within, apart = _equal(cells), _equal(other_cells)
        across = (_equal(np.concatenate([cells, other_cells])) - within - apart) / 2
        pairs = rows * max(len(np.unique(cells >> 32)), 1)
        agree[i] = (within - len(cells)) / (pairs * (rows - 1)), across / (pairs * other_rows)
    found = []
    what = {"shared_grams": (f"{n}-grams that rows share", share), "agreement": ("places", agree)}
    for key, (name, values) in what.items():
        excess = numbers.mean(values[:, 0] - values[:, 1])
        limit = ALIKE + numbers.threshold() * excess.error
        told = f"share of {name} with rows of their batch, beyond other rows"
        found += [
            at_most(told, excess.value, limit, key=f"excess_{key}"),
            note("within the batch", float(values[:, 0].mean()), key=key),
        ]
    return found


def _twice(hashes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Whether another row holds a gram as well."""
    _, place = np.unique(hashes, return_inverse=True)
    in_rows = np.bincount(np.unique((place.astype(np.int64) << 32) + rows) >> 32)
    return (in_rows > 1)[place]  # type: ignore[no-any-return]


def _equal(cells: np.ndarray) -> float:
    """Ordered pairs that are equal, each with itself included."""
    return float((np.unique(cells, return_counts=True)[1].astype(float) ** 2).sum())


@check(
    "Split by document, by a hash of its content, before windows are cut; stop the training stream "
    "short of the evaluation documents."
)
def gram_containment(
    index: grams.Index, evaluation: list[Sample], train_repeats: bool
) -> list[Measure]:
    """Train holds no more n-grams of valid and test than it holds of its own elsewhere."""
    n, train = index.n, index.sample
    # A train that repeats itself is no yardstick.
    usual = numbers.Mean(0.0, 0.0) if train_repeats else index.usual
    measures = []
    for sample in evaluation:
        first = index.find(sample.grams(n)[1])
        if not len(first):
            continue
        found = grams.rate(first >= 0, n)
        error = math.hypot(found.error, usual.error)
        limit = usual.value + CONTAINED + numbers.threshold() * error
        what = f"share of {n}-grams of {sample.size} that stand in train"
        at = np.sort(first[first >= 0])
        span = [int(at[len(at) // 20]), int(at[-1 - len(at) // 20])] if len(at) else []
        where = "nearly all between tokens {:,} and {:,} of train".format(*span) if span else ""
        measures.append(at_most(what, found.value, limit, where=where, key=sample.name))
        if span:
            measures.append(note("positions in train", span, key=f"{sample.name}_span"))
    if not measures:
        raise Skip(f"No document or row of valid or test has {n} tokens.")
    rest = "" if train.complete else "; what comes later is not compared"
    return [
        *measures,
        note(f"{n}-grams of train that recur in it, share", usual.value, key="usual"),
        note(f"read: {train.size}{rest}"),
    ]


@check("Take documents of evaluation splits out of train, by a hash, before anything is tokenised.")
def document_containment(
    first_epoch: Sample,
    evaluation: list[Sample],
    row_nats: np.ndarray,
    samples: list[Sample],
    train_repeats: bool,
) -> list[Measure]:
    """Documents or rows of valid and test do not stand in train, token by token.

    Only those count that hold more information than chance repeats. What is left are copies and
    what documents share by custom; how much that is, train shows by what recurs within itself.
    """
    text, least_nats = first_epoch.text, grams.least_of(sum(len(s.tokens) for s in samples))
    telling = row_nats >= least_nats
    hashes, first, number, count = np.unique(first_epoch.row_hashes, True, True, True)
    recurs = text[telling & (count[number] > 1)].sum() / max(float(text[telling].sum()), 1.0)
    usual = 0.0 if train_repeats else float(recurs)
    if usual > 0.5:
        raise Skip(
            f"{usual:.0%} of train stands in it twice, so it is no yardstick: set epoch_tokens if "
            "it was given for several epochs.",
            "epoch_tokens",
        )
    # What is not found in train is judged by its length.
    shortest = least_nats * text.sum() / max(float(row_nats.sum()), 1e-9)
    measures = []
    for sample in evaluation if telling.any() else ():
        place = np.minimum(np.searchsorted(hashes, sample.row_hashes), len(hashes) - 1)
        found, at = hashes[place] == sample.row_hashes, first[place]
        held = found & telling[at]
        judged = np.where(found, held, sample.text >= shortest)
        if held.sum() < FEW:
            held &= row_nats[at] >= SURE * least_nats
        if not judged.any():
            continue
        of = sample.text[judged]
        alike = _spread(text[telling]) + _spread(of)
        limit = numbers.share_limit(usual, 1 / alike) + CONTAINED
        pairs = [(int(i), int(at[i])) for i in np.flatnonzero(held)[:3]]
        what = f"share of {sample.name}'s text in documents or rows that stand in train"
        share = float(sample.text[held].sum() / of.sum())
        aside = f"documents or rows of {sample.name} that are not judged, of less than the "
        aside += f"{least_nats:.0f} nats that rule out coincidence"
        measures += [
            at_most(what, share, limit, key=sample.name),
            note("such documents", int(held.sum()), key=f"{sample.name}_documents"),
            note(aside, int((~judged).sum()), key=f"{sample.name}_aside"),
        ]
        if pairs:
            told = f"numbers of the first in {sample.name} and in train: {pairs}"
            measures.append(note(told, pairs, key=f"{sample.name}_pairs"))
    if not measures:
        why = f"No row of both holds the {least_nats:.0f} nats that rule out coincidence: "
        raise Skip(f"{why}the rows are too short or too predictable.")
    return [*measures, note("share of train that stands in it twice", usual, key="usual")]


def _spread(sizes: np.ndarray) -> float:
    """One over the number of rows of equal size that would say as much as these."""
    return float((sizes.astype(float) ** 2).sum()) / float(sizes.sum()) ** 2


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
