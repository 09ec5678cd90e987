"""The ids: readable, in range, targets and text rather than padding, as the tokenizer meant."""

import collections
import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lm_jax.doctor import numbers, trees
from lm_jax.doctor.checks import check, fixture
from lm_jax.doctor.data.reading import FITS
from lm_jax.doctor.data.sample import LAGS, Sample, locate
from lm_jax.doctor.facts import Broken, Skip, call, give
from lm_jax.doctor.findings import Measure, at_least, at_most, holds, none, note

EMPTY_FAIL, EMPTY_WARN = 0.10, 0.01  # share of rows without a target
USED_SLOTS = 0.5  # share of a batch's places that hold text
ENDS = 0.9  # share of documents that end in their end id; others may be cut off
SHIFTS = {
    -1: "they are the inputs one place back: shifted the wrong way",
    0: "they are the inputs themselves: labels are not shifted",
    2: "they are the inputs two places on: labels are shifted twice",
}
UNKNOWN_FAIL, UNKNOWN_WARN = 0.5, 0.25  # share of tokens that are the unknown id
DISTINCT = 0.01  # share of the table's ids that a text uses
LEAST_TABLE = 1000  # below it, 1 % is less than ten ids and says nothing
LONGEST_TOKEN = 16  # bytes per token on average: no tokenizer's tokens are longer than words
DEVIATION = 0.1  # of bytes per token between a split and what the tokenizer gives
FEWEST_PIECES = 10  # of train, to compare a part of it with the rest
MOST_WORDS = 400  # around an unseen one
NEVER_SEEN = ("zqxjvkqz", "\u2042\u2042")  # a word of letters and one of a rare sign
Encode = Callable[[str], np.ndarray]


@check("Correct the reader so that it yields integer ids, as documents, rows or batches.")
def items(samples: list[Sample]) -> list[Measure]:
    """Every split can be read."""
    return [note(sample.size) for sample in samples]


@check("Let targets = ids[1:] for inputs = ids[:-1]; shift in the data or in the model, not both.")
def targets(samples: list[Sample]) -> list[Measure]:
    """Targets that are handed along are the inputs, one place on."""
    found = []
    for sample in samples:
        if not sample.shifts:
            continue
        equal, compared = np.sum([x.counts for x in sample.shifts], 0)
        shares = dict(zip(LAGS, equal / np.maximum(compared, 1), strict=True))
        best = max(LAGS, key=lambda lag: shares[lag])
        where = SHIFTS.get(best, "") if shares[best] >= FITS else "they are unrelated to the inputs"
        lag = max(sample.shifts[-1].lags, key=lambda lag: shares[lag])
        what = f"share of {sample.name}'s targets that are the input {lag} place on"
        found.append(at_least(what, shares[lag], FITS, where=where, key=sample.name))
    if not found:
        raise Skip("No targets are handed along with the inputs.")
    return found


@check("Use the tokenizer of the model, and give the table at least as many rows as it has ids.")
def ids(samples: list[Sample], vocab_size: int, table_rows: int | None = None) -> list[Measure]:
    """Every id is at least 0 and below vocab_size, which is at most table_rows."""
    outside = []
    for s in samples:
        wrong = np.flatnonzero((s.tokens < 0) | (s.tokens >= vocab_size))
        if len(wrong):
            first = f"the first ({s.tokens[wrong[0]]}) in row {s.row_of[wrong[0]]}"
            outside.append(f"{len(wrong):,} of {s.name}, {first} at {s.offset_of[wrong[0]]}")
        top = max((x.top for x in s.shifts), default=-1)
        if top >= vocab_size:
            outside.append(f"targets of {s.name}, up to {top}")
    found = [none(f"splits with ids outside 0 to {vocab_size - 1}", outside, of=len(samples))]
    if table_rows is not None:
        found.append(at_least("rows of the table", table_rows, vocab_size))
    return found + [note(f"{s.name} {s.tokens.min()} to {s.tokens.max()}") for s in samples]


@check("Look for a download that is incomplete and for a fallback to a small replacement.")
def size(training: Sample, epoch_tokens: int) -> Measure:
    """Train has as many tokens as an epoch is declared to have, but for a last row or batch."""
    found = int(training.real.sum())
    if not training.complete and found < epoch_tokens:
        raise Skip(f"Only {found:,} of {epoch_tokens:,} tokens were read.", "max_tokens")
    return at_least("tokens of train", found, epoch_tokens - training.largest_item, key="tokens")


@check("Leave empty documents out and pack documents into rows.")
def empty_rows(training: Sample) -> Measure:
    """Hardly any row of train is without a target."""
    targets = training.by_row(training.scored) if training.slots else training.lengths
    share = float((targets == 0).mean())
    what = f"share of {len(targets):,} rows of train without a target"
    otherwise = "fail" if share > EMPTY_FAIL else "warn"
    return at_most(what, share, EMPTY_WARN, otherwise=otherwise, key="share")


@check("Pack documents end to end into rows, or sort rows by length into batches.")
def slots(batched: Sample) -> list[Measure]:
    """At least half of a batch's places hold text."""
    if not batched.slots:
        raise Skip("Train is given as documents, not as rows of batches.")
    what = f"share of {len(batched.tokens):,} places of train that hold text"
    return [
        at_least(what, float(batched.real.mean()), USED_SLOTS, key="used"),
        note("that are scored targets", float(batched.scored.mean()), key="scored"),
    ]


@check("Mask padding by its position, or use an id of its own for it, so that ends stay targets.")
def document_end(training: Sample, end: int) -> list[Measure]:
    """The id that ends documents is learnt as a target."""
    is_end = training.real & (training.tokens == end)
    # In a row a run of the id is one end and padding; the first place is no target.
    ends = is_end & (np.roll(training.tokens, 1) != end) & (training.offset_of > 0)
    documents = len(training.lengths)
    if training.slots:
        following = np.roll(training.segments, -1)
        inside = np.roll(training.offset_of, -1) > 0
        closed = training.real & inside & (following != training.segments)
        documents = max(int(closed.sum()), int(ends.sum()))
    what = f"documents that end in {end} within a row of {training.size}"
    found = at_least(what, documents, 1, otherwise="warn", key="documents")
    scored = int((ends & training.scored).sum())
    what = f"of them, those whose end {end} is a scored target"
    return [found, at_least(what, scored, ENDS * documents, key="scored")]


# ---- What the tokenizer made of the text ----------------------------------------------------


@check("Encode with the tokenizer that was trained on this corpus, or enlarge its vocabulary.")
def unknown_share(samples: list[Sample], unknown: int) -> list[Measure]:
    """At most a quarter of each split is the unknown id."""
    measures = []
    for s in samples:
        share = float((s.tokens[s.real] == unknown).mean())
        otherwise = "fail" if share > UNKNOWN_FAIL else "warn"
        what = f"share of {s.name} that is the unknown id"
        measures.append(at_most(what, share, UNKNOWN_WARN, otherwise=otherwise, key=s.name))
    return measures


@check("Check that the text was encoded by the intended tokenizer and is the intended text.")
def vocabulary(training: Sample, vocab_size: int) -> Measure:
    """Train uses at least a hundredth of the vocabulary."""
    counts = _histogram(training, training.real, vocab_size)[1:-1]
    # Too few tokens or ids say nothing.
    telling = vocab_size >= LEAST_TABLE and counts.sum() >= vocab_size
    least = math.ceil(DISTINCT * vocab_size) if telling else 1
    what = f"distinct ids of {vocab_size:,} in train"
    return at_least(what, int(np.count_nonzero(counts)), least, key="distinct")


@check("Encode all splits with the same tokenizer; compare the hashes of its files.")
def id_distribution(training: Sample, evaluation: list[Sample], vocab_size: int) -> list[Measure]:
    """Ids mean the same in valid and test as in train, by unigrams and by neighbours.

    Limits are half way between a part of train against its rest and texts without relation: total
    variation 1, and the pairs of the split's own tokens in random order (less standard errors).
    Where parts of train differ by more than 0.5, unigrams tell nothing.
    """
    pieces = int(training.piece_of[-1]) + 1
    if pieces < FEWEST_PIECES:
        raise Skip(f"{training.size} are too few to compare a part with the rest.")
    rank = np.random.default_rng(0).permutation(pieces)[training.piece_of]
    tenth = rank < pieces / 10
    of_part = _among(training.pairs(tenth), training.pairs(~tenth))
    measures, whole = [], training.pairs(training.real)
    for sample in evaluation:
        name = sample.name
        part = rank < pieces * min(0.5, float(sample.real.sum()) / float(training.real.sum()))
        usual = _distance(*(_histogram(training, p, vocab_size) for p in (part, ~part)))
        found = _distance(*(_histogram(s, s.real, vocab_size) for s in (training, sample)))
        limit = (1 + usual) / 2 if usual < 0.5 else 1.0
        tokens = sample.tokens.copy()
        tokens[sample.real] = np.random.default_rng(0).permutation(tokens[sample.real])
        mixed = dataclasses.replace(sample, tokens=tokens)
        known, by_chance = (_among(s.pairs(s.real), whole) for s in (sample, mixed))
        what = f"total variation of {name} from train"
        measures.append(at_most(what, found, limit, key=f"{name}_distance"))
        if not len(known) or not len(of_part):
            continue
        error = math.sqrt(0.25 / len(known) + 0.25 / len(of_part))
        least = float(of_part.mean() + by_chance.mean()) / 2 - numbers.threshold() * error
        what = f"share of neighbours of {name} that are neighbours in train"
        measures.append(at_least(what, float(known.mean()), least, key=f"{name}_known_pairs"))
    return measures


def _histogram(sample: Sample, chosen: np.ndarray, vocab_size: int) -> np.ndarray:
    """Counts of ids, after those below 0 and before those beyond the vocabulary [V + 2]."""
    bins = np.clip(sample.tokens[chosen & sample.real], -1, vocab_size) + 1
    return np.bincount(bins, minlength=vocab_size + 2)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Total variation between two histograms."""
    p, q = (x / max(x.sum(), 1) for x in (a, b))
    return float(np.abs(p - q).sum()) / 2


def _among(pairs: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which of the sorted pairs are known; for millions, sorted ones are ten times as fast."""
    return locate(np.sort(pairs), np.sort(known))[1]


@fixture
def encode(tokenizer: tuple[Callable[..., Any], ...]) -> Encode:
    """The tokenizer's function from text to ids [N]."""

    def ids_of(text: str) -> np.ndarray:
        ids = call("encode's result", trees.as_array, call("encode", tokenizer[0], text))
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise Broken(f"encode gives {ids.dtype} of shape {ids.shape}, not a sequence of ids")
        return ids

    return ids_of


@check("Keep white space and case when text is cleaned, or declare the loss (round_trip_loss).")
def round_trip(
    texts: list[str], encode: Encode, tokenizer: tuple, round_trip_loss: float
) -> Measure:
    """decode(encode(text)) is the text, but for a declared share of its bytes."""
    lost, where = 0, ""
    for text in texts:
        back = call("decode", tokenizer[1], encode(text))
        if not isinstance(back, str):
            raise Broken(f"decode gives {type(back).__name__}, not str")
        if back != text:
            lost += _lost(text, back)
            at = len(os.path.commonprefix([text, back]))
            here = slice(max(at - 10, 0), at + 10)
            told = f"the first differs at character {at}: {text[here]!r} becomes {back[here]!r}"
            where = where or told
    total = sum(len(text.encode()) for text in texts)
    what = f"share of {total:,} bytes that do not come back"
    return at_most(what, lost / total, round_trip_loss, where=where, key="share")


def _lost(text: str, back: str) -> int:
    """Bytes of the words and of the white space that do not come back, at least 1."""
    there, here = (
        collections.Counter(x.split()) + collections.Counter(c for c in x if c.isspace())
        for x in (text, back)
    )
    return max(1, sum(len(x.encode()) * count for x, count in (there - here).items()))


@check("Map what has no id to an unknown id that is scored, or refuse it; never drop it.")
def unknown_words(texts: list[str], encode: Encode) -> Measure:
    """A word that no text holds leaves a trace in the ids."""
    words = " ".join(texts).split()[:MOST_WORDS]
    before, after = (" ".join(x) for x in np.array_split(words, 2))
    dropped = []
    for unseen in NEVER_SEEN:
        with contextlib.suppress(Broken):  # a tokenizer may refuse what it does not know
            ids, without = (encode(f"{before} {word} {after}") for word in (unseen, ""))
            dropped += [repr(unseen)] * np.array_equal(ids, without)
    what = f"words between {len(words)} of the texts that are dropped without a trace"
    return none(what, dropped, of=len(NEVER_SEEN), key="dropped")


@check("Look for text that is cut off or dropped before it is encoded, and for a wrong tokenizer.")
def bytes_per_token(
    samples: list[Sample],
    byte_counts: dict[str, int],
    texts: Sequence[str] = (),
    encode: Encode | None = None,
) -> list[Measure]:
    """A split has as many bytes of text per token as the tokenizer gives on the texts."""
    given = {sample.name: sample for sample in samples}
    least, most, variance, tried = 1.0 - DEVIATION, float(LONGEST_TOKEN), 0.0, 1  # of any tokenizer
    if texts and encode is not None:
        sizes = np.array([len(text.encode()) for text in texts])
        counts = np.array([len(encode(text)) for text in texts])
        tried = max(int(counts.sum()), 1)
        expected = float(sizes.sum()) / tried
        least, most = (1 - DEVIATION) * expected, (1 + DEVIATION) * expected
        # Of a ratio of sums over texts (Cochran 1977, section 2.11).
        variance = float(((sizes - expected * counts) ** 2).sum()) / tried
    measures = []
    for name, size in byte_counts.items():
        if name not in given:
            raise give(name)
        if not given[name].complete:
            raise Skip(f"Only a part of {name} was read: raise max_tokens.", "max_tokens")
        tokens = max(int(given[name].learnt.sum()), 1)
        margin = numbers.threshold() * math.sqrt(variance * (1 / tokens + 1 / tried))
        low, high = least - margin, most + margin
        what, ratio = f"bytes of text per token of {name}", size / tokens
        limit = f"{low:.2f} to {high:.2f}"
        measures.append(holds(low <= ratio <= high, what, ratio, limit=limit, key=name))
    return measures
