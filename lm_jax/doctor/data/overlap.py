"""Text that is met more often than it should be: within train, within a batch, across splits."""

import itertools
import math

import numpy as np

from lm_jax.doctor import numbers
from lm_jax.doctor.checks import check
from lm_jax.doctor.data import grams, windows
from lm_jax.doctor.data.sample import Sample, locate
from lm_jax.doctor.data.subject import COPIED_FAIL, Copied
from lm_jax.doctor.facts import Skip
from lm_jax.doctor.findings import Measure, at_least, at_most, none, note

CONTAINED = 0.01  # share of an evaluation split that may stand in train for no reason
FEW = 3  # fewer copies must be
SURE = 3  # times as telling as others: of many short rows, one or two may be equal by chance
ALIKE = 0.05  # excess over rows of other batches at which rows of a batch are near-identical
BATCHES = 64  # batches compared
TURNS = 16  # rows of a batch with which each is compared, place by place


@check("Look for a reader that starts over; set epoch_tokens if train is given for several epochs.")
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
        raise Skip("Train is of random crops, which repeat text: set epoch_tokens.", "epoch_tokens")
    what = f"share of {train.size} in pieces that stand in earlier ones to {grams.SAME_PIECE:.0%}"
    otherwise = "fail" if copied.much else "warn"
    found = [at_most(what, copied.share, copied.limit, otherwise=otherwise, key="share")]
    what, where = "tokens of the epoch", "a longer cycle cannot be excluded: raise max_tokens"
    if epoch_tokens is not None and copied.share <= copied.limit:
        least = epoch_tokens - train.largest_item
        found.append(at_least(what, copied.tokens, least, otherwise="warn", where=where))
    longest = int((1 - COPIED_FAIL) * copied.tokens)
    return [
        *found,
        note("tokens compared", copied.tokens, key="tokens"),
        note("median distance to the copy", copied.distance, key="distance"),
        note("longest cycle that fails here, tokens", longest, key="longest_visible_cycle"),
        note("tokens of an n-gram", index.n, key="n"),
    ]


@check("Cut windows at a stride of their number of targets, or score each target in one window.")
def target_overlap(overlapping: windows.Overlap, first_epoch: Sample) -> list[Measure]:
    """Windows of train do not overlap, so that an epoch scores each target once."""
    equal = numbers.tied(first_epoch.row_hashes)
    if equal > 0.5 and not overlapping.found:
        why = "of the rows of train equal another, which hides overlaps: set epoch_tokens."
        raise Skip(f"{equal:.0%} {why}", "epoch_tokens")
    return _overlap("train", overlapping)


@check("Split the text first, by document or with a gap of a window; cut windows after that.")
def window_containment(first_epoch: Sample, evaluation: list[Sample]) -> list[Measure]:
    """Rows of valid and test do not begin inside rows of train."""
    return [m for s in evaluation for m in _overlap(s.name, windows.overlap(s, first_epoch))]


def _overlap(name: str, found: windows.Overlap) -> list[Measure]:
    what = f"rows of train that one of {found.tried:,} rows of {name} begins inside, beyond chance"
    stride = note("tokens between their beginnings", found.stride, key=f"{name}_stride")
    return [at_most(what, found.excess, found.limit, key=name), stride]


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

    def of_batch(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Its n-grams, the row of each, and its ids [B, T], -1 at padding."""
        rows = np.flatnonzero(batched.batches == number)
        here = slice(batched.starts[rows[0]], batched.starts[rows[-1] + 1])
        inside = slice(*np.searchsorted(positions, [here.start, here.stop]).tolist())
        ids = np.where(batched.real[here], batched.tokens[here], -1).reshape(len(rows), -1)
        return hashes[inside], batched.row_of[positions[inside]], ids

    chosen = batches[:: 1 + len(batches) // BATCHES]
    share, agree = np.zeros((2, len(chosen), 2))
    for i, own in enumerate(chosen):
        held, row_of, ids = of_batch(own)
        others, _, apart = of_batch(chosen[i - len(chosen) // 2])
        share[i] = [grams.rate(x, n).value for x in (_twice(held, row_of), np.isin(held, others))]
        height, width = np.minimum(ids.shape, apart.shape)
        turned = [np.roll(ids, k, 0) for k in range(1, len(ids), 1 + len(ids) // TURNS)]
        agree[i, 0] = np.mean([(x == ids) & (ids >= 0) for x in turned])
        apart, ids = apart[:height, :width], ids[:height, :width]
        agree[i, 1] = ((apart == ids) & (ids >= 0)).mean()
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


@check("Split by document before windows are cut; stop train short of the evaluation documents.")
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
    return [*measures, note(f"read: {train.size}{rest}")]


@check("Take documents of evaluation splits out of train, by a hash, before anything is tokenised.")
def document_containment(
    first_epoch: Sample,
    evaluation: list[Sample],
    row_nats: np.ndarray,
    least_nats: float,
    train_repeats: bool,
) -> list[Measure]:
    """Documents or rows of valid and test do not stand in train, token by token.

    Only those count that hold more information than chance repeats. What is left are copies and
    what documents share by custom; how much that is, train shows by what recurs within itself.
    """
    text, telling = first_epoch.text, row_nats >= least_nats
    hashes, first, number, count = np.unique(first_epoch.row_hashes, True, True, True)
    recurs = text[telling & (count[number] > 1)].sum() / max(float(text[telling].sum()), 1.0)
    usual = 0.0 if train_repeats else float(recurs)
    if usual > 0.5:
        why = "of train stands in it twice, so it is no yardstick: set epoch_tokens to one epoch."
        raise Skip(f"{usual:.0%} {why}", "epoch_tokens")
    # What is not found in train is judged by its length.
    shortest = least_nats * text.sum() / max(float(row_nats.sum()), 1e-9)
    measures = []
    for sample in evaluation if telling.any() else ():
        place, found = locate(sample.row_hashes, hashes)
        at = first[place]
        held = found & telling[at]
        judged = np.where(found, held, sample.text >= shortest)
        if held.sum() < FEW:
            held &= row_nats[at] >= SURE * least_nats
        if not judged.any():
            continue
        of = sample.text[judged]
        alike = _spread(text[telling]) + _spread(of)
        limit = numbers.share_limit(usual, 1 / alike) + CONTAINED
        what = f"share of {sample.name}'s text in documents or rows that stand in train"
        share = float(sample.text[held].sum() / of.sum())
        first_held = [(int(i), int(at[i])) for i in np.flatnonzero(held)[:3]]
        told = f"numbers of the first in {sample.name} and in train: {first_held}"
        aside = f"of {sample.name}, with less than {least_nats:.0f} nats, are not judged"
        measures += [
            at_most(what, share, limit, key=sample.name),
            *([note(told, first_held, key=f"{sample.name}_pairs")] if first_held else []),
            note(f"{(~judged).sum():,} {aside}"),
        ]
    if not measures:
        why = f"No row of both holds the {least_nats:.0f} nats that rule out coincidence: "
        raise Skip(f"{why}the rows are too short or too predictable.")
    return measures


def _spread(sizes: np.ndarray) -> float:
    """One over the number of rows of equal size that would say as much as these."""
    return float((sizes.astype(float) ** 2).sum()) / float(sizes.sum()) ** 2


@check("Give each split its own documents; look for a fallback that serves one file for all.")
def same_splits(samples: list[Sample], evaluation: list[Sample]) -> Measure:
    """No two splits have the same content."""
    if len(samples) < 2:
        raise Skip("Only one split was given.", "train")
    rows = {sample.name: np.sort(sample.row_hashes) for sample in samples}
    several = itertools.combinations(rows, 2)
    same = [f"{a} and {b}" for a, b in several if np.array_equal(rows[a], rows[b])]
    return none("pairs of splits that are equal in content", same, key="pairs")
