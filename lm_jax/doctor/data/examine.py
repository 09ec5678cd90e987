"""Checks of training data: ids, splits, windows, tokenizer, and the order they are read in."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lm_jax.doctor.data import overlap, tokens
from lm_jax.doctor.data import readers as coverage
from lm_jax.doctor.data.sample import Sample, read
from lm_jax.doctor.data.subject import (
    Inputs,
    require_names,
    require_sizes,
    require_streams,
    require_text,
)
from lm_jax.doctor.old import Report, Skip, Verdict, check, require, run_all, verdict

EMPTY_FAIL, EMPTY_WARN = 0.10, 0.01  # share of rows without a target
USED_SLOTS = 0.5  # share of a batch's places that hold text
ENDS = 0.9  # share of documents that end in their end id; others may be cut off
MOST_TEXT = 1_000_000  # characters of `texts` that are tried


def examine_data(
    train: Iterable[Any] | None,
    valid: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
    *,
    vocab_size: int,
    table_rows: int | None = None,
    separator: int | None = None,
    end: int | None = None,
    unknown: int | None = None,
    padding: int | None = None,
    epoch_tokens: int | None = None,
    tokenizer: tuple[Callable[[str], Any], Callable[[Any], str]] | None = None,
    texts: Iterable[str] | None = None,
    round_trip_loss: float = 0.0,
    byte_counts: Mapping[str, int] | None = None,
    epochs: Sequence[Iterable[Any]] | None = None,
    readers: Callable[[int], Iterable[Any]] | Mapping[int, Iterable[Any]] | None = None,
    reader_counts: Sequence[int] = (1, 2, 8),
    resume: tuple[Sequence[Any], Sequence[Any]] | None = None,
    split_ids: Mapping[str, Iterable[Any]] | None = None,
    fingerprints: Mapping[str, Mapping[str, str]] | None = None,
    max_tokens: int = 1 << 22,
) -> Report:
    """Examines what a model is trained and evaluated on.

    Args:
        train: one epoch, an iterable of items. An item is a document or row of ids [T], a batch of
            rows [..., B, T], or a mapping with "tokens" and perhaps "segment_ids" (0 is padding)
            and "weights" (whether tokens[b, t] is scored as a target), all [..., B, T].
        valid, test: the evaluation splits, likewise.
        vocab_size: number of ids that the tokenizer has.
        table_rows: rows of the embedding table, where it is padded.
        separator: id that opens every document and is not learnt.
        end: id that ends every document and must be learnt as a target.
        unknown: id that stands for what the tokenizer has no id for.
        padding: id that fills up rows, for items without segment ids.
        epoch_tokens: tokens that one epoch of train is declared to have. What train holds beyond
            is a repetition by right and not compared; fewer are a failure.
        tokenizer: the functions (encode, decode), text to ids and back.
        texts: raw texts of the corpus to try the tokenizer on.
        round_trip_loss: share of the texts' bytes that may be lost, of a tokenizer meant to.
        byte_counts: UTF-8 bytes of the text of a split, by its name, where it is given whole.
        epochs: the items of successive epochs.
        readers: function from a number of workers or hosts to their streams, called for
            `reader_counts`; or the streams by number of readers. Streams of one epoch of a small
            corpus, of documents or rows that do not depend on the reader.
        reader_counts: numbers of readers that `readers` is called with.
        resume: batches, or hashes of them, of a run without interruption and of a resumed run that
            ended at the same step.
        split_ids: document numbers of each split over the whole budget; ranges may be long.
        fingerprints: for "tokenizer", "corpus" and the like, hashes by the place they are from,
            such as {"train": …, "checkpoint": …}, which must be equal.
        max_tokens: how much of each split is read; a finding says when there was more.

    Raises:
        ValueError: an argument has the wrong type or range.
    """
    given = {"train": train, "valid": valid, "test": test}
    given = {name: stream for name, stream in given.items() if stream is not None}
    require_sizes(
        vocab_size,
        counts={"table_rows": table_rows, "epoch_tokens": epoch_tokens, "max_tokens": max_tokens},
        ids={"separator": separator, "end": end, "unknown": unknown, "padding": padding},
    )
    require_text(tokenizer, texts, round_trip_loss, byte_counts)
    require_streams(given, epochs, readers, reader_counts, resume)
    require_names(split_ids, fingerprints)

    reading = {
        "max_tokens": max_tokens,
        "padding": padding,
        "separator": separator,
        "end": end,
    }
    data = Inputs(
        splits={name: _read(name, stream, reading) for name, stream in given.items()},
        reading=reading,
        vocab_size=vocab_size,
        table_rows=table_rows,
        separator=separator,
        end=end,
        unknown=unknown,
        epoch_tokens=epoch_tokens,
        tokenizer=tokenizer,
        texts=None if texts is None else _head(texts),
        round_trip_loss=round_trip_loss,
        byte_counts=byte_counts,
        epochs=epochs,
        readers=readers,
        reader_counts=reader_counts,
        resume=resume,
        split_ids=split_ids,
        fingerprints=fingerprints,
    )
    return run_all(CHECKS + tokens.CHECKS + overlap.CHECKS + coverage.CHECKS, data)


def _read(name: str, stream: Any, reading: Mapping[str, Any]) -> Sample | Skip:
    try:
        return read(name, stream, **reading)
    except Skip as reason:
        return reason


def _head(texts: Iterable[str]) -> list[str]:
    """The first texts, about `MOST_TEXT` characters in all; a longer one is cut between words."""
    kept: list[str] = []
    for text in texts:
        require(isinstance(text, str), f"texts holds {text!r:.60}", "give strings only")
        if len(text) > MOST_TEXT:
            text = text[:MOST_TEXT].rsplit(maxsplit=1)[0]
        kept.append(text)
        if sum(map(len, kept)) >= MOST_TEXT:
            break
    return kept


@check(
    "data.items",
    remedy="Correct the reader so that it yields integer ids, as documents or batches.",
)
def items(data: Inputs) -> Verdict:
    """What can be read of each split."""
    if not data.splits:
        raise Skip("no split was given")
    unreadable = [
        f"{name}: {found}" for name, found in data.splits.items() if isinstance(found, Skip)
    ]
    read_ones = [f.size for f in data.splits.values() if isinstance(f, Sample)]
    return verdict(not unreadable, "; ".join(unreadable + read_ones) + ".", unreadable=unreadable)


@check(
    "data.ids",
    remedy="Tokenise with the tokenizer of the model, and give the table at least as many rows as "
    "the tokenizer has ids. JAX would clamp, wrap or return NaN without an error.",
)
def ids(data: Inputs) -> Verdict:
    """0 <= id < vocab_size <= table_rows, everywhere."""
    size, rows = data.vocab_size, data.table_rows
    problems = []
    if rows is not None and rows < size:
        problems.append(f"the table has {rows:,} rows for {size:,} ids")
    ranges, values = [], {}
    for sample in data.samples():
        low, high = int(sample.tokens.min()), int(sample.tokens.max())
        values[sample.name] = (low, high)
        ranges.append(f"{sample.name} {low} to {high}")
        wrong = (sample.tokens < 0) | (sample.tokens >= size)
        if wrong.any():
            at = int(np.argmax(wrong))
            problems.append(
                f"{wrong.sum():,} ids of {sample.name} are outside 0 to {size - 1}, the first "
                f"({sample.tokens[at]}) in row {sample.row_of[at]} at {sample.offset_of[at]}"
            )
    evidence = "; ".join(problems) + ". " if problems else ""
    return verdict(
        not problems, f"{evidence}Ids: {', '.join(ranges)}; allowed 0 to {size - 1}.", ranges=values
    )


@check(
    "data.size",
    remedy="Check that the download and the preparation are complete and that nothing fell back to "
    "a small replacement.",
)
def size(data: Inputs) -> Verdict:
    """Tokens of train against those declared."""
    sample = data.sample("train")
    if data.epoch_tokens is None:
        raise Skip("epoch_tokens was not given")
    slack = sample.largest_item
    found = int(sample.real.sum())
    if not sample.complete and found < data.epoch_tokens:
        raise Skip(f"only {found:,} of {data.epoch_tokens:,} tokens were read: raise max_tokens")
    return verdict(
        found + slack >= data.epoch_tokens,
        f"train ends after {found:,} tokens, {data.epoch_tokens:,} are declared (one row or batch, "
        f"{slack:,}, may be missing).",
        tokens=found,
    )


@check(
    "data.empty_rows",
    remedy="Leave empty documents out and pack documents into rows.",
)
def empty_rows(data: Inputs) -> Verdict:
    """Rows of train in which nothing is scored."""
    sample = data.sample("train")
    targets = np.bincount(sample.row_of[sample.scored], minlength=len(sample.lengths))
    if not sample.slots:
        targets = sample.lengths
    share = float((targets == 0).mean())
    return verdict(
        share <= EMPTY_WARN,
        f"{(targets == 0).sum():,} of {len(targets):,} rows of train ({share:.1%}) hold no target "
        f"(limits {EMPTY_WARN:.0%} and {EMPTY_FAIL:.0%}); on average a row holds "
        f"{targets.mean():.1f}.",
        otherwise="fail" if share > EMPTY_FAIL else "warn",
        share=share,
        mean_targets=float(targets.mean()),
    )


@check(
    "data.slots",
    remedy="Pack documents end to end into rows instead of one a row, or sort rows by length into "
    "batches.",
)
def slots(data: Inputs) -> Verdict:
    """How much of a batch is text."""
    sample = data.sample("train")
    if not sample.slots:
        raise Skip("train is given as documents, not as rows of batches")
    used = float(sample.real.mean())
    scored = float(sample.scored.mean())
    return verdict(
        used >= USED_SLOTS,
        f"{used:.1%} of the {len(sample.tokens):,} places in rows of up to {sample.lengths.max()} "
        f"hold text and {scored:.1%} are scored targets (limit {USED_SLOTS:.0%}).",
        used=used,
        scored=scored,
    )


@check(
    "data.document_end",
    remedy="Mask padding by its position, not by its id: use an id of its own for padding, so that "
    "the end of a document stays a target.",
)
def document_end(data: Inputs) -> Verdict:
    """Whether the id that ends documents is learnt as a target."""
    if data.end is None:
        raise Skip("no id was named that ends documents and is to be learnt")
    sample = data.sample("train")
    is_end = sample.real & (sample.tokens == data.end)
    # In a row a run of the id is one end and padding; the first place is no target.
    ends = is_end & (np.roll(sample.tokens, 1) != data.end) & (sample.offset_of > 0)
    if sample.slots:
        following = np.roll(sample.segments, -1)
        inside = np.roll(sample.offset_of, -1) > 0
        closed = sample.real & inside & (following != sample.segments)
        documents = max(int(closed.sum()), int(ends.sum()))
    else:
        documents = len(sample.lengths)
    if not documents:
        raise Skip(f"no document ends within a row of {sample.size}")
    scored = int((ends & sample.scored).sum())
    return verdict(
        scored >= ENDS * documents,
        f"Of {documents:,} documents of train that are seen to end, {scored:,} have id {data.end} "
        f"as a scored target there ({scored / documents:.1%}, limit {ENDS:.0%}); it is "
        f"{scored / max(int(sample.scored.sum()), 1):.3%} of all targets.",
        documents=documents,
        scored=scored,
    )


CHECKS = (items, ids, size, empty_rows, slots, document_end)
