"""Which documents a reader hands out: every epoch, worker, host and resumed run."""

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lm_jax.doctor import numbers, trees
from lm_jax.doctor.checks import check, fixture
from lm_jax.doctor.data.reading import read_all
from lm_jax.doctor.data.sample import Sample
from lm_jax.doctor.data.subject import Subject
from lm_jax.doctor.facts import Broken, Skip, call
from lm_jax.doctor.findings import Measure, at_most, equals, none, note

FEWEST_ROWS = 10  # of fewer, equal orders may be chance: 1/10! = 3e-7
SAME_ORDER = 0.9  # share of rows at the same place, beyond which few batches are enough
DROPPED = 0.01  # share of rows that may be missing or shared where batches are filled up
Streams = dict[int, list[np.ndarray]]


@check("Pass the epoch on to the sampler, also where workers persist between epochs.")
def epoch_order(subject: Subject, epochs: Sequence[Any]) -> list[Measure]:
    """Epochs hand out the rows in different orders."""
    samples = list(read_all("epoch", epochs, subject.reading))
    hashes = [s.row_hashes for s in samples]
    batch = max((s.largest_batch for s in samples), default=1)
    rows = min(map(len, hashes), default=0)
    if len(hashes) < 2 or rows < FEWEST_ROWS:
        raise Skip(f"Orders are compared of two epochs of at least {FEWEST_ROWS} rows.", "epochs")
    measures = []
    for number, (a, b) in enumerate(itertools.pairwise(x[:rows] for x in hashes)):
        # Rows that occur several times agree by chance more often than one in all.
        _, place = np.unique(np.concatenate([a, b]), return_inverse=True)
        counts = [np.bincount(half, minlength=2 * rows) for half in np.split(place, 2)]
        chance = float((counts[0] * counts[1]).sum()) / rows**2
        limit = numbers.share_limit(max(chance, 1 / rows), rows)
        # Where batches are made first and shuffled then, all rows of one agree or none.
        limit = max(limit, min(SAME_ORDER, numbers.share_limit(min(batch / rows, 1), rows / batch)))
        what = f"share of {rows:,} rows at the same place in epochs {number} and {number + 1}"
        measures.append(at_most(what, float((a == b).mean()), limit, key=f"same_{number}"))
    return measures


@fixture
def streams(subject: Subject, readers: Any) -> Streams:
    """Row hashes of each reader, by the number of readers."""
    if callable(readers):
        readers = {n: call(f"readers({n})", readers, n) for n in subject.reader_counts}
    found = {}
    for number, given in readers.items():
        parts: list[Any] = call(f"readers of {number}", list, given)
        if len(parts) != number:
            raise Broken(f"{len(parts)} streams were given for {number} readers")
        samples = read_all(f"of {number} readers number", parts, subject.reading)
        found[number] = [s.row_hashes for s in samples]
    if set(found) <= {1}:
        raise Skip("Only a single reader was given.", "reader_counts")
    return found


@check("Shuffle once, with a seed that all workers and hosts share; slice after that, once.")
def coverage(streams: Streams, training: Sample | None = None) -> list[Measure]:
    """All workers (or hosts) together hand out each row of the corpus once.

    Up to a hundredth that is never read may be a last incomplete batch.
    """
    if 1 in streams:
        corpus = streams[1][0]
    elif training and training.complete:
        corpus = training.row_hashes
    else:
        raise Skip("Neither a single reader nor the whole of train was given to compare.", "train")
    known, expected = np.unique(corpus, return_counts=True)
    measures = []
    for number, parts in streams.items():
        rows = np.concatenate(parts)
        given = rows[np.isin(rows, known)]
        times = np.bincount(np.searchsorted(known, given), minlength=len(known))
        never = float(np.maximum(expected - times, 0).sum() / len(corpus))
        again = float(np.maximum(times - expected, 0).sum() / len(corpus))
        otherwise = "fail" if never > DROPPED else "warn"
        what = f"{number} readers, share of {len(corpus):,} rows"
        measures += [
            equals(f"{what} never read", never, 0, otherwise=otherwise, key=f"{number}_never"),
            equals(f"{what} read too often", again, 0, key=f"{number}_again"),
            equals(f"{number} readers, foreign rows", len(rows) - len(given), 0),
        ]
    return measures


@check("Pass the index of a worker or host, and their number, on to the reader.")
def readers_differ(streams: Streams) -> list[Measure]:
    """Workers (or hosts) read different rows."""
    measures = []
    for number, parts in streams.items():
        own = np.concatenate([np.unique(stream) for stream in parts])
        times = np.unique(own, return_counts=True)[1]
        # Rows of equal content: so many within a reader make so many between any two.
        total = sum(map(len, parts))
        repeated = min((number - 1) * max(1 - len(own) / total, 1 / total), 1)
        limit = DROPPED + numbers.share_limit(repeated, total)
        one_first = len({int(stream[0]) for stream in parts}) == 1
        where = "the first row is the same for all" if one_first else ""
        what = f"{number} readers, share of {len(times):,} rows that several read"
        share = float((times > 1).mean())
        measures.append(at_most(what, share, limit, where=where, key=f"{number}_shared"))
    return measures


@check("Save the position in the data with the checkpoint and start the reader from it.")
def resume(resume: tuple) -> list[Measure]:
    """A resumed run reads the batches that a run without interruption reads."""
    whole, resumed = map(_hashes, ("whole", "resumed"), resume)
    offset = len(whole) - len(resumed)
    if not resumed or offset < 0:
        told = f"{len(resumed)} batches of a resumed run for {len(whole)} of an uninterrupted one"
        raise Broken(f"{told} cannot be compared: both must end at the same step")
    wrong = [i for i, (a, b) in enumerate(zip(whole[offset:], resumed, strict=True)) if a != b]
    what = f"batches of {len(resumed)} that differ from the uninterrupted run's"
    if not wrong:
        return [equals(what, 0, 0)]
    at = wrong[0]
    position = whole.index(resumed[at]) if resumed[at] in whole else None
    place = "does not occur in it" if position is None else f"is batch {position} of it"
    place += ": the data starts from the beginning" if position == 0 else ""
    found = equals(what, len(wrong), 0, where=f"the first, batch {offset + at}, {place}")
    return [found, note("found at batch", position, key="found")]


def _hashes(name: str, run: Iterable[Any]) -> list[str]:
    """A hash is taken as it is; of a batch the names and arrays are hashed."""

    def of_batch(batch: Any) -> str:
        if isinstance(batch, str | int | bytes | np.integer):
            return str(batch)
        if not isinstance(batch, Mapping):
            several = isinstance(batch, tuple | list) and all(hasattr(x, "shape") for x in batch)
            batch = dict(enumerate(batch)) if several else {"tokens": batch}
        digest = hashlib.blake2b(digest_size=8)
        for key, part in sorted(batch.items()):
            array = trees.as_array(part)
            array = array.astype(np.int64) if array.dtype.kind in "iu" else array
            digest.update(f"{key} {array.shape}".encode() + array.tobytes())
        return digest.hexdigest()

    return call(f"Reading the {name} run", lambda: [of_batch(batch) for batch in run])


@check("Assign documents to splits by a hash; bounds of a stream must hold over the whole budget.")
def split_ids(split_ids: Mapping[str, Iterable[Any]]) -> Measure:
    """No document belongs to two splits by its number."""
    common = []
    for (a, ids), (b, others) in itertools.combinations(split_ids.items(), 2):
        both = _common(ids, others)
        common += [f"{len(both):,} documents in {a} and {b}, {both[0]!r} for one"] if both else []
    return none("pairs of splits with documents in common", common, key="common")


def _common(a: Iterable[Any], b: Iterable[Any]) -> Sequence[Any]:
    """The common ids in order; long ranges of step 1 are not unrolled."""
    if isinstance(a, range) and isinstance(b, range) and a.step == b.step == 1:
        return range(max(a.start, b.start), min(a.stop, b.stop))
    kinds = ({x.item() if isinstance(x, np.generic) else x for x in ids} for ids in (a, b))
    return sorted(set.intersection(*kinds), key=str)


@check("Rebuild what differs from one corpus and one tokenizer; refuse to fall back to others.")
def fingerprints(fingerprints: Mapping[str, Mapping[str, str]]) -> Measure:
    """The hashes of one thing, such as the tokenizer of train and of a checkpoint, are equal."""
    differ = [
        f"{what} ({', '.join(f'{place} {value:.12}' for place, value in places.items())})"
        for what, places in fingerprints.items()
        if len(set(places.values())) > 1
    ]
    return none("things that differ", differ, of=len(fingerprints), key="differ")
