"""What a tokenizer made of the text: ids used, bytes per token, what does not come back."""

import collections
import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lm_jax.doctor import numbers, trees
from lm_jax.doctor.checks import check, fixture
from lm_jax.doctor.data.sample import Sample
from lm_jax.doctor.facts import Broken, Skip, call, give
from lm_jax.doctor.findings import Measure, at_least, at_most, holds, none, note

UNKNOWN_FAIL, UNKNOWN_WARN = 0.5, 0.25  # share of tokens that are the unknown id
DISTINCT = 0.01  # share of the table's ids that a text uses
LEAST_TABLE = 1000  # below it, 1 % is less than ten ids and says nothing
LONGEST_TOKEN = 16  # bytes per token on average: no tokenizer's tokens are longer than words
DEVIATION = 0.1  # of bytes per token between a split and what the tokenizer gives
FEWEST_PIECES = 10  # of train, to compare a part of it with the rest
MOST_WORDS = 400  # around an unseen one
NEVER_SEEN = ("zqxjvkqz", "\u2042\u2042")  # a word of letters and one of a rare sign
Encode = Callable[[str], np.ndarray]


@check("Encode with the tokenizer that was trained on this corpus, or enlarge its vocabulary.")
def unknown_share(samples: list[Sample], unknown: int) -> list[Measure]:
    """At most a quarter of each split is the unknown id."""
    shares = {s.name: float((s.tokens[s.real] == unknown).mean()) for s in samples}
    measures = []
    for name, share in shares.items():
        otherwise = "fail" if share > UNKNOWN_FAIL else "warn"
        what = f"share of {name} that is the unknown id"
        measures.append(at_most(what, share, UNKNOWN_WARN, otherwise=otherwise, key=name))
    return measures


@check("Check that the text was encoded by the intended tokenizer and is the intended text.")
def vocabulary(training: Sample, vocab_size: int) -> list[Measure]:
    """Train uses at least a hundredth of the vocabulary."""
    counts = _histogram(training, training.real, vocab_size)[1:-1]
    total = int(counts.sum())
    if not total:
        raise Skip(f"No id of train is from 0 to {vocab_size - 1}.")
    # Too few tokens or ids say nothing.
    powerless = vocab_size < LEAST_TABLE or total < vocab_size
    least = 1 if powerless else math.ceil(DISTINCT * vocab_size)
    what = f"distinct ids of {vocab_size:,} in train"
    return [
        at_least(what, int((counts > 0).sum()), least, key="distinct"),
        note(f"share of the most frequent, {np.argmax(counts)}", float(np.max(counts)) / total),
    ]


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
    of_part = _among(_pairs(training, tenth), _pairs(training, ~tenth))
    measures, whole = [], _pairs(training, training.real)
    for sample in evaluation:
        name = sample.name
        part = rank < pieces * min(0.5, float(sample.real.sum()) / float(training.real.sum()))
        usual = _distance(*(_histogram(training, p, vocab_size) for p in (part, ~part)))
        found = _distance(*(_histogram(s, s.real, vocab_size) for s in (training, sample)))
        limit = (1 + usual) / 2 if usual < 0.5 else 1.0
        mixed = sample.tokens.copy()
        mixed[sample.real] = np.random.default_rng(0).permutation(mixed[sample.real])
        known, by_chance = (
            _among(_pairs(dataclasses.replace(sample, tokens=tokens), sample.real), whole)
            for tokens in (sample.tokens, mixed)
        )
        what = f"total variation of {name} from train"
        measures.append(at_most(what, found, limit, key=f"{name}_distance"))
        if not len(known) or not len(of_part):
            continue
        error = math.sqrt(0.25 / len(known) + 0.25 / len(of_part))
        least = float(of_part.mean() + by_chance.mean()) / 2 - numbers.threshold() * error
        what = f"share of neighbours of {name} that are neighbours in train"
        measures += [
            at_least(what, float(known.mean()), least, key=f"{name}_known_pairs"),
            note("of the same tokens in random order", float(by_chance.mean())),
        ]
    return measures


def _histogram(sample: Sample, chosen: np.ndarray, vocab_size: int) -> np.ndarray:
    """Counts of ids, after those below 0 and before those beyond the vocabulary [V + 2]."""
    bins = np.clip(sample.tokens[chosen & sample.real], -1, vocab_size) + 1
    return np.bincount(bins, minlength=vocab_size + 2)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Total variation between two histograms."""
    p, q = (x / max(x.sum(), 1) for x in (a, b))
    return float(np.abs(p - q).sum()) / 2


def _pairs(sample: Sample, chosen: np.ndarray) -> np.ndarray:
    """Neighbours within a document, both among the chosen, as one number each."""
    both = chosen[1:] & chosen[:-1] & (sample.units[1:] == sample.units[:-1])
    return (sample.tokens[:-1][both] << 32) + (sample.tokens[1:][both] & 0xFFFFFFFF)


def _among(pairs: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which pairs, in order, are known; for millions both sorted are ten times as fast."""
    if not len(known):
        return np.zeros(len(pairs), bool)
    pairs, known = np.sort(pairs), np.sort(known)
    return known[np.minimum(np.searchsorted(known, pairs), len(known) - 1)] == pairs


@fixture
def tried_texts(texts: list[str]) -> list[str]:
    """The texts that are not empty."""
    found = [text for text in texts if text]
    if not found:
        raise Skip("No texts were given to try the tokenizer on.", "texts")
    return found


@fixture
def encode(tokenizer: tuple[Callable[..., Any], ...]) -> Encode:
    """The tokenizer's function from text to ids [N]."""

    def ids_of(text: str) -> np.ndarray:
        ids = call("encode's result", trees.as_array, call("encode", tokenizer[0], text))
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise Broken(f"encode gives {ids.dtype} of shape {ids.shape}, not a sequence of ids")
        return ids

    return ids_of


@check(
    "Keep white space and case when text is cleaned. If the loss is intended, declare it "
    "(round_trip_loss) and report per byte."
)
def round_trip(
    tried_texts: list[str], encode: Encode, tokenizer: tuple, round_trip_loss: float
) -> list[Measure]:
    """decode(encode(text)) is the text, but for a declared share of its bytes."""
    lost, examples = 0, []
    for text in tried_texts:
        back = call("decode", tokenizer[1], encode(text))
        if not isinstance(back, str):
            raise Broken(f"decode gives {type(back).__name__}, not str")
        if back != text:
            lost += _lost(text, back)
            at = len(os.path.commonprefix([text, back]))
            here = slice(max(at - 10, 0), at + 10)
            examples.append(f"character {at}: {text[here]!r} becomes {back[here]!r}")
    total = sum(len(text.encode()) for text in tried_texts)
    what = f"share of {total:,} bytes that do not come back"
    where = f"the first differs at {examples[0]}" if examples else ""
    return [
        at_most(what, lost / total, round_trip_loss, where=where, key="share"),
        note(f"changed of {len(tried_texts):,} texts", len(examples), key="changed"),
        note("bytes lost", lost, key="lost"),
    ]


def _lost(text: str, back: str) -> int:
    """Bytes of the words and of the white space that do not come back, at least 1."""
    there, here = (
        collections.Counter(x.split()) + collections.Counter(c for c in x if c.isspace())
        for x in (text, back)
    )
    return max(1, sum(len(x.encode()) * count for x, count in (there - here).items()))


@check("Map what has no id to an unknown id that is scored, or refuse it; never drop it.")
def unknown_words(tried_texts: list[str], encode: Encode) -> Measure:
    """A word that no text holds leaves a trace in the ids."""
    words = " ".join(tried_texts).split()[:MOST_WORDS]
    before, after = (" ".join(x) for x in np.array_split(words, 2))
    try:
        without = encode(f"{before}  {after}")
    except Broken as refusal:
        raise Skip(f"The texts have no spaces between words: {refusal}.") from refusal
    dropped = []
    for unseen in NEVER_SEEN:
        try:
            ids = encode(f"{before} {unseen} {after}")
        except Broken:  # a tokenizer may refuse what it does not know
            continue
        dropped += [repr(unseen)] * bool(np.array_equal(ids, without))
    what = f"words between {len(words)} of the texts that are dropped without a trace"
    return none(what, dropped, of=len(NEVER_SEEN), key="dropped")


@check("Look for text that is cut off or dropped before it is encoded, and for a wrong tokenizer.")
def bytes_per_token(
    samples: list[Sample],
    byte_counts: dict[str, int],
    tried_texts: Sequence[str] = (),
    encode: Encode | None = None,
) -> list[Measure]:
    """A split has as many bytes of text per token as the tokenizer gives on the texts."""
    given = {sample.name: sample for sample in samples}
    least, most, variance, tried = 1.0 - DEVIATION, float(LONGEST_TOKEN), 0.0, 1  # of any tokenizer
    if tried_texts and encode is not None:
        sizes = np.array([len(text.encode()) for text in tried_texts])
        counts = np.array([len(encode(text)) for text in tried_texts])
        tried = int(counts.sum())
        if not tried:
            raise Broken("encode gives no id for any of the texts")
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
