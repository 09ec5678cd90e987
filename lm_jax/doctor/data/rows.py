"""What the rows hold: readable ids, targets, text rather than padding, ends of documents."""

import numpy as np

from lm_jax.doctor.checks import check
from lm_jax.doctor.data.reading import FITS
from lm_jax.doctor.data.sample import LAGS, Sample
from lm_jax.doctor.facts import Skip
from lm_jax.doctor.findings import Measure, at_least, at_most, none, note

EMPTY_FAIL, EMPTY_WARN = 0.10, 0.01  # share of rows without a target
USED_SLOTS = 0.5  # share of a batch's places that hold text
ENDS = 0.9  # share of documents that end in their end id; others may be cut off
SHIFTS = {
    -1: "they are the inputs one place back: shifted the wrong way",
    0: "they are the inputs themselves: labels are not shifted",
    2: "they are the inputs two places on: labels are shifted twice",
}


@check("Correct the reader so that it yields integer ids, as documents, rows or batches.")
def items(samples: list[Sample]) -> list[Measure]:
    """Every split can be read."""
    return [note(sample.size) for sample in samples]


@check(
    "Let inputs = ids[:-1] and targets = ids[1:] of the same rows; shift either in the data or in "
    "the model, not in both."
)
def targets(samples: list[Sample]) -> list[Measure]:
    """Targets that are handed along are the inputs, one place on."""
    found = []
    for sample in samples:
        if sample.shifts is None:
            continue
        equal, compared = sample.shifts
        shares = dict(zip(LAGS, equal / np.maximum(compared, 1), strict=True))
        best = max(LAGS, key=lambda lag: shares[lag])
        where = SHIFTS.get(best, "") if shares[best] >= FITS else "they are unrelated to the inputs"
        lag = max(sample.lags, key=lambda lag: shares[lag])
        what = f"share of {sample.name}'s targets that are the input {lag} place on"
        found.append(at_least(what, shares[lag], FITS, where=where, key=sample.name))
    if not found:
        raise Skip("No targets are handed along with the inputs.")
    return found


@check(
    "Tokenise with the tokenizer of the model, and give the table at least as many rows as "
    "the tokenizer has ids. JAX would clamp, wrap or return NaN without an error."
)
def ids(samples: list[Sample], vocab_size: int, table_rows: int | None = None) -> list[Measure]:
    """Every id is at least 0 and below vocab_size, which is at most table_rows."""
    outside = []
    for s in samples:
        wrong = np.flatnonzero((s.tokens < 0) | (s.tokens >= vocab_size))
        if len(wrong):
            first = f"the first ({s.tokens[wrong[0]]}) in row {s.row_of[wrong[0]]}"
            outside.append(f"{len(wrong):,} of {s.name}, {first} at {s.offset_of[wrong[0]]}")
        if s.top >= vocab_size:
            outside.append(f"targets of {s.name}, up to {s.top}")
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
def empty_rows(training: Sample) -> list[Measure]:
    """Hardly any row of train is without a target."""
    targets = training.by_row(training.scored) if training.slots else training.lengths
    share = float((targets == 0).mean())
    what = f"share of {len(targets):,} rows of train without a target"
    otherwise = "fail" if share > EMPTY_FAIL else "warn"
    return [
        at_most(what, share, EMPTY_WARN, otherwise=otherwise, key="share"),
        note("targets of a row on average", float(targets.mean()), key="mean_targets"),
    ]


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
    if not documents:
        what = f"documents that end in {end} within a row of {training.size}"
        return [at_least(what, 0, 1, otherwise="warn", key="documents")]
    scored = int((ends & training.scored).sum())
    what = f"documents of train whose end {end} is a scored target, of {documents:,} that end"
    return [
        at_least(what, scored, ENDS * documents, key="scored"),
        note("documents", documents, key="documents"),
    ]
