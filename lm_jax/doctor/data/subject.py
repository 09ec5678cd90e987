"""What `examine_data` is given, and what its checks share."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np

from lm_jax.doctor import numbers
from lm_jax.doctor.checks import fixture
from lm_jax.doctor.data import grams, windows
from lm_jax.doctor.data.reading import Options, read
from lm_jax.doctor.data.sample import Sample
from lm_jax.doctor.facts import Bound, Facts, give, instance, real, require, whole

COPIED_FAIL, COPIED_WARN = 0.10, 0.01  # share of train that stands earlier in train
MOST_TEXT = 1_000_000  # characters of `texts` that are tried

Test = Callable[[Any], bool]
Stream = Iterable[Any]
Tokenizer = tuple[Callable[[str], Any], Callable[[Any], str]]
Readers = Callable[[int], Stream] | Mapping[int, Stream]
Runs = tuple[Sequence[Any], Sequence[Any]]
Documents = Mapping[str, Stream]
Hashes = Mapping[str, Mapping[str, str]]
Number = int | None


def _is_stream(value: Any) -> bool:
    """Whether it can be iterated over, or read by number, and is no text."""
    listed = hasattr(value, "__iter__") or (hasattr(value, "__getitem__") and len(value) >= 0)
    return listed and not isinstance(value, str | bytes)


def _pair(remedy: str, holds: Test) -> Bound:
    return Bound(remedy, lambda x: isinstance(x, Sequence) and len(x) == 2 and all(map(holds, x)))


def _by_name(remedy: str, holds: Test) -> Bound:
    return Bound(remedy, lambda x: isinstance(x, Mapping) and all(map(holds, x.values())))


_number = instance(int | np.integer, "give an integer id")
_stream = Bound("give an iterable, a single item in a list", _is_stream)
_share = Bound("give a share from 0 to below 1", lambda x: real(x) and 0 <= x < 1)
_functions = _pair("give two functions (encode, decode)", callable)
_readers = Bound(
    "give a function of the number of readers, or streams by that number",
    lambda x: callable(x) or (isinstance(x, Mapping) and all(map(whole(1).holds, x))),
)
_counts = Bound("give positive integers", lambda x: _is_stream(x) and all(map(whole(1).holds, x)))
_bytes = _by_name("give numbers of bytes by split", whole().holds)
_runs = _pair("give two lists of batches or their hashes, whole and resumed", _is_stream)
_documents = _by_name("give document numbers by split", _is_stream)
_places = _by_name("give hashes by place", lambda x: isinstance(x, str))
_hashes = _by_name("give hashes by thing and place", _places.holds)


@dataclasses.dataclass
class Subject(Facts):
    """Examine what a model is trained and evaluated on.

    A split is an iterable of items. An item is a document or row of ids [T], a batch of rows
    [..., B, T], a pair (inputs, targets) of one shape, where targets[b, t] is inputs[b, t + 1], or
    a mapping with "tokens" (or "input_ids") and perhaps "targets" (or "labels"; negative ones are
    not scored), "segment_ids" (or "attention_mask"; 0 is padding) and "weights" (whether
    tokens[b, t] is scored as a target), all [..., B, T], of NumPy, JAX or PyTorch.
    """

    train: Annotated[Stream | None, "one epoch.", _stream] = None
    valid: Annotated[Stream | None, "an evaluation split.", _stream] = None
    test: Annotated[Stream | None, "another.", _stream] = None
    _: dataclasses.KW_ONLY
    vocab_size: Annotated[int, "number of ids that the tokenizer has.", whole(2)]
    table_rows: Annotated[Number, "of the embedding, where it is padded.", whole(1)] = None
    separator: Annotated[Number, "id that opens documents and is not learnt.", _number] = None
    end: Annotated[Number, "id that ends documents and must be learnt.", _number] = None
    unknown: Annotated[Number, "id of what the tokenizer has no id for.", _number] = None
    padding: Annotated[Number, "id that fills rows without segment ids.", _number] = None
    epoch_tokens: Annotated[Number, "of train's first epoch; no more is compared.", whole(1)] = None
    tokenizer: Annotated[Tokenizer | None, "(encode, decode) of text and ids.", _functions] = None
    texts: Annotated[Iterable[str] | None, "raw text to try the tokenizer on.", _stream] = None
    round_trip_loss: Annotated[float, "share of bytes that it is meant to lose.", _share] = 0.0
    byte_counts: Annotated[Mapping[str, int] | None, "UTF-8 bytes of whole splits.", _bytes] = None
    epochs: Annotated[Sequence[Stream] | None, "items of successive epochs.", _stream] = None
    readers: Annotated[
        Readers | None, "workers or hosts -> their streams, one epoch of a small corpus.", _readers
    ] = None
    reader_counts: Annotated[Sequence[int], "with which `readers` is called.", _counts] = (1, 2, 8)
    resume: Annotated[
        Runs | None, "batches, or hashes, of a whole and a resumed run that end at one step.", _runs
    ] = None
    split_ids: Annotated[
        Documents | None, "document numbers of splits over the whole budget.", _documents
    ] = None
    fingerprints: Annotated[
        Hashes | None, 'that must be equal: {"tokenizer": {"train": ..., "run": ...}}.', _hashes
    ] = None
    max_tokens: Annotated[int, "of each split that are read.", whole(1)] = 1 << 22

    def __post_init__(self) -> None:
        """Refuse what no check could use, and keep the first texts, cut between words."""
        super().__post_init__()
        kept: list[str] = []
        for text in self.texts or ():
            require(isinstance(text, str), f"texts holds {text!r:.60}", "give strings only")
            cut = text if len(text) <= MOST_TEXT else text[:MOST_TEXT].rsplit(maxsplit=1)[0]
            kept += [cut] if cut else []
            if sum(map(len, kept)) >= MOST_TEXT:
                break
        self.texts = kept or None

    @property
    def reading(self) -> Options:
        """How streams are read."""
        ends = tuple(x for x in (self.separator, self.end) if x is not None)
        return Options(self.max_tokens, self.padding, ends)


@fixture
def training(subject: Subject, train: Any) -> Sample:
    """What was read of train."""
    return read("train", train, subject.reading)


@fixture
def evaluation(subject: Subject) -> list[Sample]:
    """What was read of valid and test."""
    given = {"valid": subject.valid, "test": subject.test}
    found = [read(name, x, subject.reading) for name, x in given.items() if x is not None]
    if not found:
        raise give("valid")
    return found


@fixture
def samples(training: Sample | None = None, evaluation: Sequence[Sample] = ()) -> list[Sample]:
    """The splits that were given."""
    found = [*([training] if training else []), *evaluation]
    if not found:
        raise give("train")
    return found


@fixture
def batched(training: Sample, subject: Subject) -> Sample:
    """Train in rows of batches: as it was given, else as its first epoch begins."""
    first = next(iter(subject.epochs or ()), None)
    if training.slots or not isinstance(first, Sequence):
        return training
    return read("train", first, subject.reading)


@fixture
def first_epoch(training: Sample, subject: Subject) -> Sample:
    """What was read of train's first epoch."""
    return training if subject.epoch_tokens is None else training.head(subject.epoch_tokens)


class Copied(NamedTuple):
    """Pieces of train that stand earlier in train."""

    share: float  # of its tokens
    limit: float
    much: bool  # more than any corpus may have
    distance: int  # tokens, median
    tokens: int  # read


@fixture
def copied(index: grams.Index) -> Copied:
    """How much of train is copied."""
    sizes = np.bincount(index.sample.piece_of)
    lags = index.lag[index.earlier & index.copied[index.sample.piece_of[index.positions]]]
    read = int(sizes.sum())
    limit = numbers.share_limit(COPIED_WARN, read**2 / float((sizes.astype(float) ** 2).sum()))
    distance = int(np.median(lags)) if len(lags) else 0
    share = float(sizes[index.copied].sum()) / read
    return Copied(share, limit, share > max(COPIED_FAIL, limit), distance, read)


@fixture
def overlapping(first_epoch: Sample) -> windows.Overlap:
    """How far rows of train begin inside others."""
    return windows.overlap(first_epoch, first_epoch)


@fixture
def train_repeats(copied: Copied | None = None, overlapping: windows.Overlap | None = None) -> bool:
    """Whether train holds so many copies that it is no yardstick for others."""
    return bool((copied and copied.much) or (overlapping and overlapping.found))
