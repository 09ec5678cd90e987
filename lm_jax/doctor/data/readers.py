"""Which documents a reader hands out: every epoch, worker, host and resumed run."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lm_jax.doctor import old as findings
from lm_jax.doctor.data.sample import read_all
from lm_jax.doctor.data.subject import Inputs
from lm_jax.doctor.old import Skip, Verdict, check, verdict

ERRORS = 5  # standard errors
FEWEST_ROWS = 10  # of fewer, equal orders may be chance: 1/10! = 3e-7
DROPPED = 0.01  # share of rows that may be missing or shared where batches are filled up


@check(
    "data.epoch_order",
    remedy="Make the order a function of (seed, epoch): pass the epoch on to the sampler, also "
    "where workers persist between epochs.",
)
def epoch_order(data: Inputs) -> Verdict:
    """Epochs that hand out the rows in the same order."""
    if data.epochs is None:
        raise Skip("no epochs were given")
    hashes = [s.row_hashes for s in read_all("epoch", data.epochs, **data.reading)]
    if len(hashes) < 2:
        raise Skip("two epochs are needed to compare their order")
    rows = min(map(len, hashes))
    if rows < FEWEST_ROWS:
        raise Skip(f"an epoch of {rows} rows has too few orders (needs {FEWEST_ROWS} rows)")
    same, expected, limit = 0.0, 0.0, 1.0
    pair = (0, 1)
    for number, (a, b) in enumerate(zip(hashes[:-1], hashes[1:], strict=True)):
        equal = float((a[:rows] == b[:rows]).mean())
        # Rows that occur several times agree by chance more often than one in all.
        _, place = np.unique(np.concatenate([a[:rows], b[:rows]]), return_inverse=True)
        counts = [
            np.bincount(half, minlength=int(np.max(place)) + 1) for half in np.split(place, 2)
        ]
        chance = float((counts[0] * counts[1]).sum()) / rows**2
        if chance > 0.5:
            raise Skip(f"{chance:.0%} of rows agree in any order: most have the same content")
        allowed = chance + ERRORS * math.sqrt(max(chance, 1 / rows) / rows)
        if equal - allowed > same - limit:
            same, expected, limit, pair = equal, chance, allowed, (number, number + 1)
    return verdict(
        same <= limit,
        f"{same:.1%} of {rows:,} rows stand at the same place in epochs {pair[0]} and {pair[1]} "
        f"({expected:.1%} in random orders; limit {limit:.1%}, {ERRORS} standard errors).",
        same=same,
        expected=expected,
        epochs=pair,
    )


@check(
    "data.coverage",
    remedy="Shuffle once, with a seed that all workers and hosts share, and take the slice of a "
    "worker after that; do not combine it with sharding by the library.",
)
def coverage(data: Inputs) -> Verdict:
    """The rows that all workers (or hosts) together hand out, against the corpus."""
    counts = _reader_hashes(data)
    reference = counts.pop(1, None)
    if reference is None:
        train = data.sample("train")
        if not train.complete:
            raise Skip("neither a single reader nor the whole of train was given to compare with")
        reference = [train.row_hashes]
    if not counts:
        raise Skip("only a single reader was given")
    known, expected = np.unique(np.concatenate(reference), return_counts=True)
    worst = "pass"
    evidence = []
    values: dict[str, Any] = {}
    for number, streams in counts.items():
        rows = np.concatenate(streams)
        given = rows[np.isin(rows, known)]
        times = np.bincount(np.searchsorted(known, given), minlength=len(known))
        never = np.maximum(expected - times, 0).sum() / expected.sum()
        again = np.maximum(times - expected, 0).sum() / expected.sum()
        foreign = len(rows) - len(given)
        if again or foreign or never > DROPPED:
            worst = "fail"
        elif never and worst == "pass":
            worst = "warn"
        evidence.append(
            f"{number} readers: {never:.1%} of {expected.sum():,} rows never, {again:.1%} once too "
            f"often or more, {foreign} rows that one reader does not give"
        )
        values[str(number)] = {"never": never, "again": again, "foreign": foreign}
    return verdict(
        worst == "pass",
        "; ".join(evidence) + ". All must be 0; "
        f"up to {DROPPED:.0%} never read may be a last incomplete batch.",
        otherwise="warn" if worst == "warn" else "fail",
        **values,
    )


@check(
    "data.readers_differ",
    remedy="Give every worker and host its own slice: pass its index and their number on to the "
    "reader.",
)
def readers_differ(data: Inputs) -> Verdict:
    """Workers (or hosts) that read the same rows."""
    counts = {number: s for number, s in _reader_hashes(data).items() if number > 1}
    if not counts:
        raise Skip("only a single reader was given")
    ok, evidence = True, []
    values: dict[str, Any] = {}
    for number, streams in counts.items():
        own = np.concatenate([np.unique(stream) for stream in streams])
        kinds, times = np.unique(own, return_counts=True)
        shared = float((times > 1).mean())
        # Rows of equal content: so many within a reader make so many between any two.
        total = sum(map(len, streams))
        repeated = (number - 1) * (1 - len(own) / max(total, 1))
        if repeated > 0.5:
            raise Skip(f"{repeated:.0%} of rows equal others by chance, as within a reader")
        limit = repeated + ERRORS * math.sqrt(max(repeated, (number - 1) / total) / total)
        limit += DROPPED
        bad = shared > limit
        ok &= not bad
        first = "; the first row is the same for all" * (len({int(s[0]) for s in streams}) == 1)
        evidence.append(
            f"{number} readers: {shared:.1%} of {len(kinds):,} different rows are read by more "
            f"than one (limit {limit:.1%}){first}"
        )
        values[str(number)] = {"shared": shared, "limit": limit}
    return verdict(ok, "; ".join(evidence) + ".", **values)


def _reader_hashes(data: Inputs) -> dict[int, list[np.ndarray]]:
    """Row hashes of each reader, by the number of readers."""
    readers = data.readers
    if readers is None:
        raise Skip("no readers were given")
    if callable(readers):
        made = {n: findings.call(f"readers({n})", readers, n) for n in data.reader_counts}
    else:
        made = dict(readers)
    result = {}
    for number, streams in made.items():
        streams = list(findings.call(f"readers of {number}", iter, streams))
        if len(streams) != number:
            raise Skip(f"{len(streams)} streams were given for {number} readers")
        name = f"of {number} readers number"
        result[number] = [s.row_hashes for s in read_all(name, streams, **data.reading)]
    return result


@check(
    "data.resume",
    remedy="Save the position in the data with the checkpoint and start the reader from it.",
)
def resume(data: Inputs) -> Verdict:
    """Batches of a resumed run against those of a run without interruption."""
    if data.resume is None:
        raise Skip("no batches of a resumed run were given")
    whole, resumed = ([_batch_hash(batch) for batch in run] for run in data.resume)
    if not resumed or len(resumed) > len(whole):
        raise Skip(
            f"{len(resumed)} batches of a resumed run cannot be compared with {len(whole)} of the "
            "uninterrupted one: both must end at the same step"
        )
    expected = whole[len(whole) - len(resumed) :]
    wrong = [i for i, (a, b) in enumerate(zip(expected, resumed, strict=True)) if a != b]
    offset = len(whole) - len(resumed)
    if not wrong:
        evidence = f"All {len(resumed)} batches equal those of the uninterrupted run."
        if len(set(whole)) <= len(whole) / 2:
            raise Skip("most batches of the uninterrupted run are equal: any position would fit")
        return verdict(True, evidence, batches=len(resumed))
    at = wrong[0]
    position = whole.index(resumed[at]) if resumed[at] in whole else None
    where = f"is batch {position} of it" if position is not None else "does not occur in it"
    if position == 0:
        where += ": the data starts from the beginning"
    return verdict(
        False,
        f"{len(wrong)} of {len(resumed)} batches differ from the uninterrupted run; the first, at "
        f"its batch {offset + at}, {where}.",
        first=offset + at,
        found=position,
        wrong=len(wrong),
    )


def _batch_hash(batch: Any) -> str:
    """A hash is taken as it is; of a batch the names and arrays are hashed."""
    if isinstance(batch, str | int | bytes | np.integer):
        return str(batch)
    digest = hashlib.blake2b(digest_size=8)
    parts = batch if isinstance(batch, Mapping) else {"tokens": batch}
    for name in sorted(parts):
        array = findings.call(f"{name} of a batch", np.asarray, parts[name])
        digest.update(f"{name} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


@check(
    "data.split_ids",
    remedy="Assign documents to splits by a hash of their id or content; bounds of a stream must "
    "hold over the whole budget, not only at its start.",
)
def split_ids(data: Inputs) -> Verdict:
    """Documents that by their numbers belong to several splits."""
    if data.split_ids is None:
        raise Skip("no ids of documents were given")
    names = list(data.split_ids)
    common = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            count, example = _intersection(data.split_ids[a], data.split_ids[b])
            if count:
                common.append(f"{count:,} documents are in {a} and in {b}, {example!r} for one")
    sizes = ", ".join(f"{name} {_length(data.split_ids[name]):,}" for name in names)
    return verdict(
        not common,
        ("; ".join(common) or "No document is in two splits") + f" (documents: {sizes}).",
        common=common,
    )


def _length(ids: Iterable[Any]) -> int:
    return len(ids) if isinstance(ids, Sequence | np.ndarray) else len(set(ids))


def _intersection(a: Iterable[Any], b: Iterable[Any]) -> tuple[int, Any]:
    """Number of common ids and the smallest; long ranges of step 1 are not unrolled."""
    if isinstance(a, range) and isinstance(b, range) and a.step == b.step == 1:
        both = range(max(a.start, b.start), min(a.stop, b.stop))
        return len(both), both.start
    common = {_key(x) for x in a} & {_key(x) for x in b}
    return len(common), min(common, key=str) if common else None


def _key(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


@check(
    "data.fingerprints",
    remedy="Rebuild what differs from one corpus and one tokenizer, and store their hashes with "
    "the checkpoint; refuse to fall back to other data.",
)
def fingerprints(data: Inputs) -> Verdict:
    """Hashes of one thing, such as the tokenizer of train and of a checkpoint, that differ."""
    if not data.fingerprints:
        raise Skip("no fingerprints were given")
    differ = {
        what: dict(by_place)
        for what, by_place in data.fingerprints.items()
        if len(set(by_place.values())) > 1
    }
    texts = [
        f"{what} differs: " + ", ".join(f"{place} {value:.12}" for place, value in places.items())
        for what, places in differ.items()
    ]
    equal = ", ".join(f"{k} ({len(v)} places)" for k, v in data.fingerprints.items())
    return verdict(
        not differ, ("; ".join(texts) or f"Equal everywhere: {equal}") + ".", differ=differ
    )


CHECKS = (epoch_order, coverage, readers_differ, resume, split_ids, fingerprints)
