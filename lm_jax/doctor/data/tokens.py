"""What a tokenizer made of the text: ids used, bytes per token, what does not come back."""

import collections
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm_jax.doctor.data.sample import Sample
from lm_jax.doctor.data.subject import Inputs
from lm_jax.doctor.old import Skip, Verdict, call, check, verdict

ERRORS = 5  # standard errors
UNKNOWN_FAIL, UNKNOWN_WARN = 0.5, 0.25  # share of tokens that are the unknown id
DISTINCT = 0.01  # share of the table's ids that a text uses
LEAST_TABLE = 1000  # below it, 1 % is less than ten ids and says nothing
LONGEST_TOKEN = 16  # bytes per token on average: no tokenizer's tokens are longer than words
DEVIATION = 0.1  # of bytes per token between a split and what the tokenizer gives
FEWEST_PIECES = 10  # of train, to compare a part of it with the rest
MOST_WORDS = 400  # around an unseen one
NEVER_SEEN = ("zqxjvkqz", "\u2042\u2042")  # a word of letters and one of a rare sign


@check(
    "data.unknown_share",
    remedy="Encode with the tokenizer that was trained on this corpus, or enlarge its vocabulary.",
)
def unknown_share(data: Inputs) -> Verdict:
    """Share of the unknown id among the tokens of each split."""
    if data.unknown is None:
        raise Skip("no unknown id was named")
    shares = {s.name: float((s.tokens[s.real] == data.unknown).mean()) for s in data.samples()}
    worst = max(shares.values())
    return verdict(
        worst <= UNKNOWN_WARN,
        "Unknown tokens: "
        + ", ".join(f"{share:.2%} of {name}" for name, share in shares.items())
        + f" (limits {UNKNOWN_WARN:.0%} and {UNKNOWN_FAIL:.0%}).",
        otherwise="fail" if worst > UNKNOWN_FAIL else "warn",
        shares=shares,
    )


@check(
    "data.vocabulary",
    remedy="Check that the text was encoded by the intended tokenizer and is the intended text.",
)
def vocabulary(data: Inputs) -> Verdict:
    """Distinct ids and their entropy."""
    sample = data.sample("train")
    counts = _histogram(sample, sample.real, data.vocab_size)[1:-1]
    total = int(counts.sum())
    if not total:
        raise Skip(f"no id of train is from 0 to {data.vocab_size - 1}")
    p: np.ndarray = counts[counts > 0] / total
    entropy = float(-(p * np.log(p)).sum())
    used = len(p) / data.vocab_size
    powerless = data.vocab_size < LEAST_TABLE or total < data.vocab_size
    evidence = (
        f"{len(p):,} of {data.vocab_size:,} ids ({used:.1%}) occur among {total:,} tokens "
        f"of train, with a unigram entropy of {entropy:.2f} nats; the most frequent is "
        f"{np.argmax(counts)} with {np.max(p):.1%}"
    )
    if powerless:
        evidence += ". Too few tokens or ids to expect more"
    return verdict(
        used >= DISTINCT or powerless,
        f"{evidence} (limit {DISTINCT:.0%} of ids).",
        distinct=len(p),
        entropy=entropy,
    )


@check(
    "data.id_distribution",
    remedy="Encode all splits with the same tokenizer; compare the hashes of its files.",
)
def id_distribution(data: Inputs) -> Verdict:
    """Do ids mean the same in valid and test as in train? By unigrams and by neighbours.

    Limits are half way between a part of train against its rest and texts without relation: total
    variation 1, and the pairs of the split's own tokens in random order (less standard errors).
    Where parts of train differ by more than 0.5, unigrams tell nothing.
    """
    evaluation = data.evaluation()
    train = data.sample("train")
    pieces = int(train.piece_of[-1]) + 1
    if pieces < FEWEST_PIECES:
        raise Skip(f"{train.size} are too few to compare a part with the rest")
    rank = np.random.default_rng(0).permutation(pieces)
    whole = np.unique(_pairs(train, train.real))
    tenth = (rank < math.ceil(pieces / 10))[train.piece_of]
    known_of_part = np.isin(_pairs(train, tenth), np.unique(_pairs(train, ~tenth)))
    ok, evidence = True, []
    values: dict[str, Any] = {}
    for sample in evaluation:
        share = min(0.5, int(sample.real.sum()) / int(train.real.sum()))
        part = (rank < math.ceil(share * pieces))[train.piece_of]
        usual = _distance(*(_histogram(train, p, data.vocab_size) for p in (part, ~part)))
        found = _distance(*(_histogram(s, s.real, data.vocab_size) for s in (train, sample)))
        limit = (1 + usual) / 2 if usual < 0.5 else 1.0
        known, by_chance = (_known_pairs(sample, whole, seed) for seed in (None, 0))
        error = math.sqrt(0.25 / len(known) + 0.25 / len(known_of_part))
        between = (known_of_part.mean() + by_chance.mean()) / 2
        least = between - ERRORS * error
        powerful = by_chance.mean() < least
        ok &= found <= limit and known.mean() >= least
        values[sample.name] = {"distance": found, "known_pairs": float(known.mean())}
        evidence.append(
            f"{sample.name} differs from train by {found:.2f} in the total variation of unigrams "
            f"({usual:.2f} within train, limit {limit:.2f}); {known.mean():.1%} of its pairs of "
            f"neighbours occur in train ({known_of_part.mean():.1%} within train, "
            f"{by_chance.mean():.1%} in random order, "
            + (f"limit {least:.1%})." if powerful else "too close to tell them apart).")
        )
    return verdict(ok, " ".join(evidence), **values)


def _histogram(sample: Sample, chosen: np.ndarray, vocab_size: int) -> np.ndarray:
    """Counts of ids, after those below 0 and before those beyond the vocabulary [V + 2]."""
    bins = np.clip(sample.tokens[chosen & sample.real], -1, vocab_size) + 1
    return np.bincount(bins, minlength=vocab_size + 2)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Total variation between two histograms."""
    p, q = (x / max(x.sum(), 1) for x in (a, b))
    return float(np.abs(p - q).sum()) / 2


def _pairs(sample: Sample, chosen: np.ndarray, tokens: np.ndarray | None = None) -> np.ndarray:
    """Neighbours within a document, both among the chosen, as one number each."""
    tokens = sample.tokens if tokens is None else tokens
    both = chosen[1:] & chosen[:-1] & (sample.units[1:] == sample.units[:-1])
    return (tokens[:-1][both] << 32) + (tokens[1:][both] & 0xFFFFFFFF)


def _known_pairs(sample: Sample, known: np.ndarray, seed: int | None) -> np.ndarray:
    """Which pairs of neighbours are among the known; with a seed, of tokens in random order."""
    tokens = sample.tokens
    if seed is not None:
        real = np.flatnonzero(sample.real)
        tokens = tokens.copy()
        tokens[real] = tokens[np.random.default_rng(seed).permutation(real)]
    pairs = _pairs(sample, sample.real, tokens)
    if not len(pairs) or not len(known):
        return np.zeros(1, bool)
    place = np.minimum(np.searchsorted(known, pairs), len(known) - 1)
    return known[place] == pairs


@check(
    "data.bytes_per_token",
    remedy="Compare the splits with their texts: look for text that is cut off, dropped or "
    "replaced before it is encoded, and for the wrong tokenizer.",
)
def bytes_per_token(data: Inputs) -> Verdict:
    """Bytes of the raw text per token, against what the tokenizer gives on the texts."""
    if data.byte_counts is None:
        raise Skip("byte_counts was not given")
    if data.tokenizer is not None and data.texts:
        expected, variance, tried = _fertility(data)
        source = f"{expected:.3f} on the texts, {DEVIATION:.0%} and {ERRORS} standard errors"
    else:
        expected = 0.0
        source = "of any tokenizer"
    ok, evidence = True, []
    values: dict[str, Any] = {}
    for name, size in data.byte_counts.items():
        sample = data.sample(name)
        if not sample.complete:
            raise Skip(f"only a part of {name} was read: raise max_tokens")
        tokens = max(sample.targets, 1)
        low, high = 1 - DEVIATION, float(LONGEST_TOKEN)
        if expected:
            margin = DEVIATION * expected
            margin += ERRORS * math.sqrt(variance * (1 / tokens + 1 / tried))
            low, high = expected - margin, expected + margin
        ratio = size / tokens
        ok &= low <= ratio <= high
        values[name] = {"ratio": ratio, "low": low, "high": high}
        evidence.append(f"{ratio:.3f} of {name} (allowed {low:.2f} to {high:.2f})")
    return verdict(ok, f"Bytes of text per token: {', '.join(evidence)}; {source}.", **values)


def _fertility(data: Inputs) -> tuple[float, float, int]:
    """Bytes per token on the texts, the variance of that ratio over one token, and the tokens."""
    texts = _texts(data)
    sizes = np.array([len(text.encode()) for text in texts])
    tokens = np.array([len(_encode(data, text)) for text in texts])
    total = int(tokens.sum())
    if not total:
        raise Skip("encode gives no id for any of the texts")
    ratio = float(sizes.sum()) / total
    # Of a ratio of sums over texts (Cochran 1977, section 2.11).
    return ratio, float(((sizes - ratio * tokens) ** 2).sum()) / total, total


def _texts(data: Inputs) -> Sequence[str]:
    texts = [text for text in data.texts or () if text]
    if not texts:
        raise Skip("no texts were given to try the tokenizer on")
    return texts


def _encode(data: Inputs, text: str) -> np.ndarray:
    if data.tokenizer is None:
        raise Skip("no tokenizer was given")
    ids = np.asarray(call("encode", data.tokenizer[0], text))
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise Skip(f"encode gives {ids.dtype} of shape {ids.shape}, not a sequence of ids")
    return ids


@check(
    "data.round_trip",
    remedy="Keep white space, newlines and case when text is cleaned, and map what has no id to an "
    "unknown id. If the loss is intended, declare it (round_trip_loss) and report per byte.",
)
def round_trip(data: Inputs) -> Verdict:
    """decode(encode(text)) == text, or the bytes that are lost."""
    if data.tokenizer is None:
        raise Skip("no tokenizer was given")
    total = lost = changed = 0
    example = ""
    texts = _texts(data)
    for text in texts:
        back: Any = call("decode", data.tokenizer[1], _encode(data, text))
        if not isinstance(back, str):
            raise Skip(f"decode gives {type(back).__name__}, not str")
        total += len(text.encode())
        if back != text:
            changed += 1
            lost += _lost(text, back)
            example = example or _first_difference(text, back)
    share = lost / total
    return verdict(
        share <= data.round_trip_loss if data.round_trip_loss else not changed,
        f"{changed} of {len(texts)} texts do not come back; at least {lost:,} of {total:,} bytes "
        f"({share:.2%}) are lost, {data.round_trip_loss:.2%} are declared." + example,
        changed=changed,
        lost=lost,
        total=total,
    )


def _lost(text: str, back: str) -> int:
    """Bytes of the words and of the white space that do not come back, at least 1."""
    missing = collections.Counter(text.split()) - collections.Counter(back.split())
    words = sum(len(word.encode()) * count for word, count in missing.items())
    space = collections.Counter(c for c in text if c.isspace())
    space -= collections.Counter(c for c in back if c.isspace())
    return max(1, words + sum(len(c.encode()) * count for c, count in space.items()))


def _first_difference(text: str, back: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), None)
    at = min(len(text), len(back)) if at is None else at
    here = slice(max(at - 10, 0), at + 10)
    return f" The first differs at character {at}: {text[here]!r} becomes {back[here]!r}."


@check(
    "data.unknown_words",
    remedy="Map what has no id to an unknown id that is scored, or refuse it; never drop it.",
)
def unknown_words(data: Inputs) -> Verdict:
    """A word that no text holds must leave a trace in the ids."""
    words = " ".join(_texts(data)).split()[:MOST_WORDS]
    half = len(words) // 2
    before, after = " ".join(words[:half]), " ".join(words[half:])
    without = _encode(data, f"{before}  {after}")
    outcome = {}
    for unseen in NEVER_SEEN:
        try:
            ids = _encode(data, f"{before} {unseen} {after}")
        except Skip as refused:
            outcome[unseen] = f"refused ({refused})"
            continue
        dropped = np.array_equal(ids, without)
        outcome[unseen] = "dropped without a trace" if dropped else "kept"
    texts = ", ".join(f"{word!r} {what}" for word, what in outcome.items())
    return verdict(
        "dropped without a trace" not in outcome.values(),
        f"Put between {half} and {len(words) - half} words of the texts: {texts}.",
        outcome=outcome,
    )


CHECKS = (
    unknown_share,
    vocabulary,
    id_distribution,
    bytes_per_token,
    round_trip,
    unknown_words,
)
