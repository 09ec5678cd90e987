"""Token streams of any form that loaders have, read into a `Sample`."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lm_jax.doctor import trees
from lm_jax.doctor.data.sample import LAGS, Sample, Shifts
from lm_jax.doctor.facts import Broken, Skip, call

NAMES = {  # of the parts of a batch, as trainers call them
    "tokens": ("tokens", "input_ids", "inputs", "input", "x"),
    "targets": ("targets", "labels", "target", "label", "y"),
    "segment_ids": ("segment_ids", "attention_mask"),
    "weights": ("weights", "loss_mask"),
}
FORMS = "give rows of ids, pairs (inputs, targets) of one shape, or mappings with tokens"
FITS = 0.9  # share of targets that are the input so many places on, to take them for it
_END = object()


class Options(NamedTuple):
    """How streams are read."""

    max_tokens: int
    padding: int | None
    boundaries: tuple[int, ...]  # ids that open or end a document


class Item(NamedTuple):
    """One document, row or batch [..., T]."""

    tokens: np.ndarray
    segments: Any = None  # array or None
    weights: Any = None
    shifts: Shifts | None = None


def read(name: str, stream: Any, options: Options) -> Sample:
    """Read a stream until it ends or `max_tokens` are reached; `Broken` if it holds no ids."""
    parts: list[Item] = []
    total, slots = 0, options.padding is not None
    items = call(f"Reading {name}", iter, _items(stream))
    while (item := call(f"Reading {name}", next, items, _END)) is not _END:
        if total >= options.max_tokens:
            break
        parts.append(part := _parse(item, f"item {len(parts)} of {name}", options))
        total += part.tokens.size
        slots |= part.tokens.ndim > 1 or isinstance(item, Mapping) or part.shifts is not None
    if not total:
        raise Broken(f"{name} holds no token in {len(parts)} items")
    columns = zip(*([x.ravel() for x in part[:3]] for part in parts), strict=True)
    tokens, segments, weights = map(np.concatenate, columns)
    lengths, batches = _rows([part.tokens.shape for part in parts])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    # Where no weights are given, whatever follows text and is text is scored.
    scored = np.where(np.isnan(weights), (segments > 0) & (np.roll(segments, 1) > 0), weights > 0)
    scored[starts[:-1][lengths > 0]] = False
    return Sample(
        name=name,
        tokens=tokens,
        starts=starts,
        segments=segments,
        scored=scored,
        batches=batches,
        boundaries=options.boundaries,
        complete=item is _END,
        slots=slots,
        shifts=tuple(part.shifts for part in parts if part.shifts),
    )


def _rows(shapes: list[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """Length of each row and number of its batch, -1 for rows that came alone."""
    counts = np.array([math.prod(shape[:-1]) for shape in shapes])
    lengths = np.repeat([shape[-1] for shape in shapes], counts)
    heights = np.repeat([shape[-2] if len(shape) > 1 else 0 for shape in shapes], counts)
    number = np.arange(len(lengths))
    place = number - np.repeat(np.cumsum(counts) - counts, counts)
    return lengths, np.where(heights, number - place % np.maximum(heights, 1), -1)


def read_all(name: str, streams: Iterable[Any], options: Options) -> Iterator[Sample]:
    """Each of several streams, whole; `Skip` if one does not end before `max_tokens`."""
    for number, stream in enumerate(streams):
        sample = read(f"{name} {number}", stream, options)
        if not sample.complete:
            why = f"goes on after {options.max_tokens:,} tokens: give streams of a small corpus."
            raise Skip(f"{name} {number} {why}", "max_tokens")
        yield sample


def _items(stream: Any) -> Iterable[Any]:
    """The items of a stream; a single document, batch or pair is a stream of one."""
    ids = isinstance(stream, list) and stream and all(isinstance(x, int) for x in stream)
    if isinstance(stream, Mapping) or getattr(stream, "ndim", None) == 1 or ids:
        return [stream]
    if isinstance(stream, tuple | list) and len(stream) == 2 and _are_arrays(stream):
        if _follow(*map(trees.as_array, stream)):
            return [tuple(stream)]
    if not hasattr(stream, "__iter__"):  # a data set that is read by number
        return (stream[i] for i in range(len(stream)))
    return stream  # type: ignore[no-any-return]


def _are_arrays(parts: Any) -> bool:
    listed = isinstance(parts, list | tuple) and len(parts) > 0
    return listed and all(hasattr(x, "shape") and len(x.shape) > 0 for x in parts)


def _parse(item: Any, where: str, options: Options) -> Item:
    """An item as arrays; `Broken` if it is none."""
    item = item._asdict() if hasattr(item, "_asdict") else item
    arrays = _parts(item, where)
    tokens, targets = arrays["tokens"], arrays.get("targets")
    for name, array in arrays.items():
        if array.shape != tokens.shape:
            raise Broken(f"{where}: {name} {array.shape} for tokens {tokens.shape}; {FORMS}")
    found = Item(tokens, arrays.get("segment_ids"), arrays.get("weights"))
    if targets is not None and tokens.size:
        # Trainers that shift inside the model hand the inputs along as labels.
        unshifted = isinstance(item, Mapping) and not {"labels", "label"}.isdisjoint(item)
        found = _joined(found, targets, (0, 1) if unshifted else (1,))
    if found.segments is None:
        found = found._replace(segments=_without_padding(found.tokens, options))
    if found.weights is None:
        found = found._replace(weights=np.full(found.tokens.shape, np.nan, np.float32))
    return found


def _parts(item: Any, where: str) -> dict[str, np.ndarray]:
    """The arrays of an item by their names here."""
    if isinstance(item, Mapping):
        known = {
            name: next((item[other] for other in others if item.get(other) is not None), None)
            for name, others in NAMES.items()
        }
        if known["tokens"] is None:
            raise Broken(f"{where} has the keys {sorted(map(str, item))} and no 'tokens'; {FORMS}")
        return {name: _array(name, x, where) for name, x in known.items() if x is not None}
    arrays = _are_arrays(item)
    lists = isinstance(item, tuple) and all(isinstance(x, list) for x in item)
    if (arrays or lists) and len(item) == 2:
        x, y = (_array("tokens", part, where) for part in item)
        told = x.ndim > 1 or (arrays and isinstance(item, tuple))
        if x.shape == y.shape and (told or _follow(x, y)):
            return {"tokens": x, "targets": y}
    if arrays:
        shapes = [tuple(part.shape) for part in item]
        if len(item) == 1 and len(shapes[0]) > 1:  # of a data set of one tensor
            return {"tokens": _array("tokens", item[0], where)}
        if len(shapes[0]) > 1 or len(set(shapes)) > 1:
            raise Broken(f"{where} has arrays of shapes {shapes}, not inputs and targets; {FORMS}")
    return {"tokens": _array("tokens", item, where)}


def _array(name: str, part: Any, where: str) -> np.ndarray:
    """A part of an item: ids in int64, others in float64; `Broken` if they are none."""
    listed = _are_arrays(part)
    read = (lambda x: np.stack([*map(trees.as_array, x)])) if listed else trees.as_array
    array = call(f"{name} of {where}", read, part)
    if name in ("tokens", "targets"):
        if array.ndim == 0 or (array.size and array.dtype.kind not in "iu"):
            what = f"{array.dtype} of shape {array.shape}"
            raise Broken(f"{where} is {what}, not an array of integer ids")
        return array.astype(np.int64)
    array = call(f"{name} of {where}", array.astype, np.float64)
    if not np.isfinite(array).all():
        raise Broken(f"{where}: {name} holds values that are not finite numbers")
    return array


def _shifts(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """How many targets [..., T] equal the input at each lag, and how many were compared."""
    width = inputs.shape[-1]
    counts = np.zeros((2, len(LAGS)))
    for i, lag in enumerate(LAGS):
        here = targets[..., max(-lag, 0) : width - max(lag, 0)]
        there = inputs[..., max(lag, 0) : width + min(lag, 0)]
        counts[:, i] = ((here == there) & (here >= 0)).sum(), (here >= 0).sum()
    return counts


def _fits(shifts: np.ndarray, lag: int) -> bool:
    equal, compared = shifts[:, LAGS.index(lag)]
    return bool(compared and equal >= FITS * compared)


def _follow(inputs: np.ndarray, targets: np.ndarray) -> bool:
    """Whether the targets are the inputs one place on."""
    return inputs.shape == targets.shape and _fits(_shifts(inputs, targets), 1)


def _joined(item: Item, targets: np.ndarray, lags: tuple[int, ...]) -> Item:
    """Inputs and targets as one window; a negative target, such as -100, is not scored."""
    tokens, segments, weights, _ = item
    shifts = Shifts(_shifts(tokens, targets), lags, int(targets.max(initial=-1)))
    known = targets >= 0
    lag = next((lag for lag in lags if _fits(shifts.counts, lag)), None)
    if lag is None:
        return item._replace(shifts=shifts)
    scored = known.astype(float) if weights is None else known * weights
    # Nothing is predicted after the last target, so without a mask that is padding.
    text = np.logical_or.accumulate(known[..., ::-1], -1)[..., ::-1].astype(np.int32)
    if lag == 1:
        tokens = np.concatenate([tokens, np.where(known, targets, 0)[..., -1:]], -1)
        scored = np.concatenate([np.zeros_like(scored[..., :1]), scored], -1)
        text = np.concatenate([text[..., :1], text], -1)
        if segments is not None:
            segments = np.concatenate([segments, segments[..., -1:] * known[..., -1:]], -1)
    if segments is None and not known.all():
        segments = text
    return Item(tokens, segments, scored, shifts)


def _without_padding(tokens: np.ndarray, options: Options) -> np.ndarray:
    """Segment 1 for text, 0 for the run of padding at a row's end, behind an end of that id."""
    if options.padding is None:
        return np.ones(tokens.shape, np.int32)
    is_padding = tokens == options.padding
    run = np.logical_and.accumulate(is_padding[..., ::-1], axis=-1)[..., ::-1]
    if options.padding in options.boundaries:
        run[..., 1:] &= run[..., :-1].copy()
    return (~run).astype(np.int32)
