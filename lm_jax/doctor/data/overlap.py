"""Text that is met more often than it should be: within train, within a batch, across splits."""

import itertools
import math
from typing import Any

import numpy as np

from lm_jax.doctor.data import grams
from lm_jax.doctor.data.sample import Sample
from lm_jax.doctor.data.subject import CONTAINED, COPIED_FAIL, COPIED_WARN, Inputs
from lm_jax.doctor.old import Skip, Verdict, check, verdict

ERRORS = 5  # standard errors
ALIKE = 0.05  # excess over rows of other batches at which rows of a batch are near-identical
BATCHES = 64  # batches compared
NO_YARDSTICK = "train repeats itself and is no yardstick"


@check(
    "data.repetition",
    remedy="Look for a reader that starts over (a take or limit, a cycle of few files, a restart "
    "without its position). If train was given for several epochs, set epoch_tokens; if too "
    "little was read, raise max_tokens.",
)
def repetition(data: Inputs) -> Verdict:
    """Rows and documents that stand earlier in train, at any offset."""
    share, limit, distance, read = data.copied
    longest = int((1 - COPIED_FAIL) * read)
    declared, train = data.epoch_tokens, data.index.sample
    evidence = (
        f"{share:.2%} of {train.size} is in pieces of which at least "
        f"{grams.SAME_PIECE:.0%} stands in earlier ones, by {data.index.n}-grams (limits "
        f"{limit:.2%}, which is {COPIED_WARN:.0%} and {ERRORS} standard errors, and "
        f"{COPIED_FAIL:.0%}). "
    )
    if share > limit:
        evidence += f"The median distance to the copy is {distance:,} tokens. "
    power = (
        f"A stream that starts over after up to {longest:,} tokens fails here; "
        "a longer cycle cannot be seen in this sample."
    )
    blind = share <= limit and declared is not None and read + train.largest_item < declared
    if blind:
        power = f"An epoch is declared to have {declared:,} tokens, of which {read:,} were " + (
            f"read: a cycle longer than {longest:,} tokens cannot be excluded."
        )
    return verdict(
        share <= limit and not blind,
        evidence + power,
        otherwise="fail" if share > max(COPIED_FAIL, limit) else "warn",
        share=share,
        distance=distance,
        tokens=read,
        longest_visible_cycle=longest,
        n=data.index.n,
    )


@check(
    "data.target_overlap",
    remedy="Cut windows at a stride of their number of targets, so that each token is scored once "
    "an epoch; or give weight 0 to targets that an earlier window scored.",
)
def target_overlap(data: Inputs) -> Verdict:
    """Windows of train that overlap, so that an epoch scores targets several times."""
    share, stride, rows, tried = data.index.windows
    sample = data.index.sample
    measured = f"{rows} of {tried:,} rows begin inside another row and continue to "
    return verdict(
        not data.windows_overlap,
        f"{share:.1%} of the targets of {sample.name} are scored again in an overlapping window "
        f"(limit {grams.limit(CONTAINED, tried):.2%}, {CONTAINED:.0%} and {ERRORS} standard "
        f"errors): {measured}its end" + f", {stride} tokens later" * bool(rows) + ".",
        share=share,
        stride=stride,
        rows=rows,
        width=int(np.median(sample.lengths)),
    )


@check(
    "data.near_identical_rows",
    remedy="Shuffle windows over the whole corpus before they are batched, and check that rows of "
    "a batch are not copies or shifts of one row.",
)
def near_identical_rows(data: Inputs) -> Verdict:
    """Rows of a batch against rows of other batches: shared n-grams and tokens at equal places."""
    sample = data.sample("train")
    numbers, counts = np.unique(sample.batches[sample.batches >= 0], return_counts=True)
    numbers = numbers[counts > 1]
    if not len(numbers):
        raise Skip("train was not given in batches of several rows")
    alone = len(numbers) == 1
    # Other batches are the yardstick; without them only an n-gram that tells anything will do.
    width = int(sample.lengths[sample.batches == numbers[0]][0])
    n = data.index.n if alone else min(grams.SHORTEST, max(width // 2, 1))
    chosen = numbers[:: -(-len(numbers) // BATCHES)]
    far = np.roll(chosen, len(chosen) // 2)
    positions, hashes = sample.grams(n)
    share = np.zeros((len(chosen), 2))
    agree = np.zeros((len(chosen), 2))
    p = np.zeros(1)
    if alone:
        _, times = np.unique(sample.tokens[sample.real], return_counts=True)
        p = times / max(int(times.sum()), 1)
    for i, (own, other) in enumerate(zip(chosen, far, strict=True)):
        a, b = _of_batch(sample, positions, own), _of_batch(sample, positions, other)
        share[i] = _in_other_row(hashes[a], sample.row_of[positions[a]]), 0.0
        agree[i] = _agreement(*_columns(sample, own)), (p**2).sum()
        if not alone:
            share[i, 1] = np.isin(hashes[a], hashes[b]).mean() if a.stop > a.start else 0.0
            agree[i, 1] = _agreement(*_columns(sample, own), *_columns(sample, other))
    excess_share, share_error = _mean(share[:, 0] - share[:, 1])
    excess_agree, agree_error = _mean(agree[:, 0] - agree[:, 1])
    limit_share = ALIKE + ERRORS * share_error
    limit_agree = ALIKE + ERRORS * agree_error
    return verdict(
        excess_share <= limit_share and excess_agree <= limit_agree,
        f"Rows of a batch share {share[:, 0].mean():.1%} of their {n}-grams and agree at "
        f"{agree[:, 0].mean():.1%} of places; "
        + ("by chance" if alone else "with rows of other batches it is")
        + f" {share[:, 1].mean():.1%} and {agree[:, 1].mean():.1%} (excess allowed: "
        f"{limit_share:.1%} and {limit_agree:.1%}; {len(chosen)} batches, {ERRORS} standard "
        "errors).",
        shared_grams=float(share[:, 0].mean()),
        agreement=float(agree[:, 0].mean()),
        excess_shared_grams=excess_share,
        excess_agreement=excess_agree,
        n=n,
    )


def _mean(values: np.ndarray) -> tuple[float, float]:
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), float(error)


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
    groups = int(np.max(place)) + 1
    lowest = np.full(groups, np.max(rows))
    highest = np.zeros(groups, rows.dtype)
    np.minimum.at(lowest, place, rows)
    np.maximum.at(highest, place, rows)
    return float((lowest != highest)[place].mean())


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
    "data.gram_containment",
    remedy="Split by document before windows are cut, by a hash of the document's content, and "
    "stop the training stream short of the evaluation documents over its whole budget.",
)
def gram_containment(data: Inputs) -> Verdict:
    """Share of valid's and test's n-grams that train holds, against train's own recurrence."""
    evaluation = data.evaluation()
    index = data.index
    n, train = index.n, index.sample
    if data.train_repeats:
        usual, yardstick = grams.Rate(0.0, 0.0), NO_YARDSTICK
    else:
        usual = index.usual
        yardstick = f"{usual.mean:.2%} recur within train itself"
    ok, evidence = True, []
    values: dict[str, Any] = {}
    for sample in evaluation:
        positions, hashes = sample.grams(n)
        if not len(hashes):
            evidence.append(f"{sample.name} has no {n}-gram.")
            continue
        first = index.find(hashes)
        found = grams.rate(first >= 0, n)
        limit = usual.mean + CONTAINED + ERRORS * math.hypot(found.error, usual.error)
        values[sample.name] = {"share": found.mean, "limit": limit}
        text = f"{found.mean:.2%} of the {n}-grams of {sample.size} stand in train (limit "
        text += f"{limit:.2%}: {yardstick}, {CONTAINED:.0%} and {ERRORS} standard errors)"
        if found.mean > limit:
            ok = False
            at = np.sort(first[first >= 0])
            low, high = at[len(at) // 20], at[-1 - len(at) // 20]
            values[sample.name] |= {"from": int(low), "to": int(high)}
            text += f", nearly all of them between tokens {low:,} and {high:,} of train"
        evidence.append(text + ".")
    evidence.append(f"Read: {train.size}" + "." * train.complete)
    if not train.complete:
        evidence[-1] += "; what comes later is not compared."
    return verdict(ok, " ".join(evidence), n=n, usual=usual.mean, **values)


@check(
    "data.document_containment",
    remedy="Take documents that stand in an evaluation split out of train, by a hash of their "
    "content, before anything is tokenised or windowed.",
)
def document_containment(data: Inputs) -> Verdict:
    """Documents or rows of valid and test that stand in train, token by token.

    Only those count that hold more information than chance repeats. What is left are copies and
    what documents share by custom; how much that is, train shows by what recurs within itself.
    """
    evaluation = data.evaluation()
    train, nats = data.first_epoch, data.row_nats
    least_nats = grams.least_of(data.total)
    telling = nats >= least_nats
    if not telling.any():
        raise Skip(
            f"no row of {train.size} holds the {least_nats:.0f} nats that rule out coincidence: "
            "the rows are too short or too predictable"
        )
    # What is not found in train is judged by its length.
    shortest = least_nats * train.real.sum() / nats.sum()
    known, first, count = np.unique(train.row_hashes, return_index=True, return_counts=True)
    size = _text_of_rows(train)
    twice = telling & np.isin(train.row_hashes, known[count > 1])
    recurs = float(size[twice].sum()) / max(int(size[telling].sum()), 1)
    usual, yardstick = recurs, f"{recurs:.2%} of train stand in it twice"
    if data.known_to_repeat:
        usual, yardstick = 0.0, NO_YARDSTICK
    if usual > 0.5:
        raise Skip(
            f"{usual:.0%} of train stands in it twice, so it is no yardstick: set epoch_tokens if "
            "it was given for several epochs"
        )
    ok, evidence = True, []
    values: dict[str, Any] = {}
    for sample in evaluation:
        text = _text_of_rows(sample)
        place = np.minimum(np.searchsorted(known, sample.row_hashes), len(known) - 1)
        found = known[place] == sample.row_hashes
        held = found & telling[first[place]]
        judged = np.where(found, held, text >= shortest)
        aside = f"{(~judged).sum():,} of {len(judged):,} documents or rows of {sample.name} "
        aside += f"are not judged: fewer than {least_nats:.0f} nats may be equal by chance"
        if not judged.any():
            evidence.append(f"{aside}.")
            continue
        share = float(text[held].sum()) / max(int(text[judged].sum()), 1)
        error = math.sqrt(usual * (1 - usual) * (_spread(size[telling]) + _spread(text[judged])))
        limit = usual + CONTAINED + ERRORS * error
        values[sample.name] = {
            "share": share,
            "documents": int(held.sum()),
            "judged": int(judged.sum()),
            "limit": limit,
        }
        told = f"{held.sum():,} of {judged.sum():,} documents or rows of {sample.name}, "
        told += f"{share:.2%} of their tokens, stand in train as they are (limit {limit:.2%}: "
        told += f"{yardstick}, {CONTAINED:.0%} and {ERRORS} standard errors)"
        if share > limit:
            ok = False
            examples = np.flatnonzero(held)[:3]
            pairs = list(zip(examples.tolist(), first[place[examples]].tolist(), strict=True))
            values[sample.name]["pairs"] = pairs
            told += " (number in the split, number in train: "
            told += "; ".join(f"{a}, {b}" for a, b in pairs) + ")"
        evidence += [f"{told}."] + [f"{aside}."] * (not judged.all())
    if not values:
        raise Skip(" ".join(evidence))
    return verdict(ok, " ".join(evidence), **values)


def _text_of_rows(sample: Sample) -> np.ndarray:
    """Tokens of each row without its padding [R]."""
    return np.bincount(sample.row_of[sample.real], minlength=len(sample.lengths))


def _spread(sizes: np.ndarray) -> float:
    """One over the number of rows of equal size that would say as much as these."""
    return float((sizes.astype(float) ** 2).sum()) / max(float(sizes.sum()) ** 2, 1.0)


@check(
    "data.same_splits",
    remedy="Give each split its own documents; look for a fallback that serves one file for all.",
)
def same_splits(data: Inputs) -> Verdict:
    """Two splits with the same content."""
    data.evaluation()
    samples = data.samples()
    if len(samples) < 2:
        raise Skip("only one split was given")
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
                f"{a.name} equals another split, but fewer than half of its "
                f"{grams.SHORTEST}-grams are distinct: text this predictable may be equal by chance"
            )
    compared = ", ".join(f"{s.name} ({len(s.lengths):,} rows)" for s in samples)
    pairs = [f"{a.name} and {b.name}" for a, b in same]
    return verdict(
        not same,
        f"{' as well as '.join(pairs)} are equal in content." if same else f"{compared} differ.",
        pairs=pairs,
    )


CHECKS = (
    repetition,
    target_overlap,
    near_identical_rows,
    same_splits,
    document_containment,
    gram_containment,
)
