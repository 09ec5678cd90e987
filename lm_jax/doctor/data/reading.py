"""Token streams of any form that loaders have, read into a `Sample`."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lm_jax.doctor import trees
from lm_jax.doctor.data.sample import LAGS, Sample
from lm_jax.doctor.facts import Broken, Skip, call

NAMES = {  # of the parts of a batch, as trainers call them
    "tokens": ("tokens", "input_ids", "inputs", "input", "x"),
    "targets": ("targets", "labels", "target", "label", "y"),
    "segment_ids": ("segment_ids", "attention_mask"),
    "weights": ("weights", "loss_mask"),
}
FORMS = (
    "give rows of ids, pairs (inputs, targets) of one shape, or mappings with tokens and perhaps "
    "targets, segment_ids and weights"
)
FITS = 0.9  # share of targets that are the input so many places on, to take them for it
_END = object()


class Options(NamedTuple):
    """How streams are read."""

    max_tokens: int
    padding: int | None
    separator: int | None
    end: int | None


class Item(NamedTuple):
    """One document, row or batch; all arrays [..., T] but `shifts`."""

    tokens: np.ndarray
    segments: np.ndarray | None = None
    weights: np.ndarray | None = None
    shifts: np.ndarray | None = None  # [2, LAGS]
    lags: tuple[int, ...] = ()


def read(name: str, stream: Any, options: Options) -> Sample:
    """Read a stream until it ends or `max_tokens` are exceeded.

    Raises:
        Broken: it raises, or holds something else than ids.
    """
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    widths: list[np.ndarray] = []
    batches: list[np.ndarray] = []
    shifts: list[np.ndarray] = []
    total = batch = 0
    slots = options.padding is not None
    lags: tuple[int, ...] = ()
    items = call(f"Reading {name}", iter, _items(stream))
    while (item := call(f"Reading {name}", next, items, _END)) is not _END:
        if total >= options.max_tokens:
            break
        found = _parse(item, f"item {len(columns)} of {name}")
        tokens, segments, weights = found.tokens, found.segments, found.weights
        slots |= tokens.ndim > 1 or isinstance(item, Mapping) or found.shifts is not None
        if found.shifts is not None:
            shifts.append(found.shifts)
            lags = found.lags
        if segments is None:
            segments = _without_padding(tokens, options)
        if weights is None:
            weights = np.full(tokens.shape, np.nan, np.float32)
        columns.append((tokens.ravel(), segments.ravel(), weights.ravel()))
        count = math.prod(tokens.shape[:-1])
        widths.append(np.full(count, tokens.shape[-1]))
        per_batch = max(tokens.shape[-2], 1) if tokens.ndim > 1 else 0
        batches.append(batch + np.arange(count) // per_batch if per_batch else np.full(1, -1))
        batch += count // per_batch if per_batch else 0
        total += tokens.size
    if not total:
        raise Broken(f"{name} holds no token in {len(columns)} items")
    lengths = np.concatenate(widths)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    flat, segments, weights = (np.concatenate(column) for column in zip(*columns, strict=True))
    # Where no weights are given, whatever follows text and is text is scored.
    scored = np.where(np.isnan(weights), (segments > 0) & (np.roll(segments, 1) > 0), weights > 0)
    scored[starts[:-1][lengths > 0]] = False
    return Sample(
        name=name,
        tokens=flat,
        starts=starts,
        segments=segments,
        scored=scored,
        batches=np.concatenate(batches),
        boundaries=tuple(i for i in (options.separator, options.end) if i is not None),
        complete=item is _END,
        slots=slots,
        shifts=sum(shifts) if shifts else None,  # type: ignore[arg-type]
        lags=lags,
    )


def read_all(name: str, streams: Iterable[Any], options: Options) -> Iterator[Sample]:
    """Each of several streams, whole; `Skip` if one does not end before `max_tokens`."""
    for number, stream in enumerate(streams):
        sample = read(f"{name} {number}", stream, options)
        if not sample.complete:
            raise Skip(
                f"{name} {number} goes on after {options.max_tokens:,} tokens: give streams of a "
                "small finite corpus, for each must be read whole, or a larger max_tokens."
            )
        yield sample


def _items(stream: Any) -> Iterable[Any]:
    """The items of a stream; a single document, batch or pair is a stream of one."""
    if isinstance(stream, Mapping) or getattr(stream, "ndim", None) == 1:
        return [stream]
    if isinstance(stream, tuple | list) and len(stream) == 2 and all(map(_is_array, stream)):
        x, y = map(trees.as_array, stream)
        if x.shape == y.shape and x.ndim and _fits(_shifts(x, y), 1):
            return [(x, y)]
    if not hasattr(stream, "__iter__"):  # a data set that is read by number
        return (stream[i] for i in range(len(stream)))
    return stream  # type: ignore[no-any-return]


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and len(value.shape) > 0


def _parse(item: Any, where: str) -> Item:
    """An item as arrays; `Broken` if it is none."""
    arrays = {name: _array(name, part, where) for name, part in _parts(item, where).items()}
    tokens, targets = arrays["tokens"], arrays.get("targets")
    for name in ("tokens", "targets"):
        ids = arrays.get(name, tokens)
        if ids.ndim == 0 or (ids.size and ids.dtype.kind not in "iu"):
            raise Broken(
                f"{where} is {ids.dtype} of shape {ids.shape}, not an array of integer ids"
            )
    for name, array in arrays.items():
        if array.shape != tokens.shape:
            raise Broken(f"{where}: {name} {array.shape} for tokens {tokens.shape}; {FORMS}")
    tokens, weights = tokens.astype(np.int64), arrays.get("weights")
    found = Item(tokens, arrays.get("segment_ids"), weights)
    if targets is None or not tokens.size:
        return found
    # Trainers that shift inside the model hand the inputs along as labels.
    unshifted = isinstance(item, Mapping) and any(name in item for name in ("labels", "label"))
    return _joined(found, targets.astype(np.int64), (0, 1) if unshifted else (1,))


def _parts(item: Any, where: str) -> Mapping[str, Any]:
    """The parts of an item by their names here."""
    item = item._asdict() if hasattr(item, "_asdict") else item
    if isinstance(item, Mapping):
        known = {
            name: next((item[other] for other in others if item.get(other) is not None), None)
            for name, others in NAMES.items()
        }
        if known["tokens"] is None:
            raise Broken(f"{where} has the keys {sorted(map(str, item))} and no 'tokens'; {FORMS}")
        return {name: part for name, part in known.items() if part is not None}
    if isinstance(item, tuple | list) and item and all(map(_is_array, item)):
        shapes = [tuple(part.shape) for part in item]
        several = len(shapes[0]) > 1 or isinstance(item, tuple)
        if len(item) == 2 and shapes[0] == shapes[1]:
            if several or _fits(_shifts(*map(trees.as_array, item)), 1):
                return {"tokens": item[0], "targets": item[1]}
        elif several and len(shapes[0]) > 1 or len(set(shapes)) > 1:
            raise Broken(f"{where} has arrays of shapes {shapes}, not inputs and targets; {FORMS}")
    if isinstance(item, tuple) and len(item) == 2 and all(isinstance(x, list) for x in item):
        x, y = (_array("tokens", part, where) for part in item)
        if x.shape == y.shape and _fits(_shifts(x, y), 1):
            return {"tokens": x, "targets": y}
    return {"tokens": item}


def _array(name: str, part: Any, where: str) -> np.ndarray:
    if isinstance(part, list | tuple) and part and all(map(_is_array, part)):
        array = call(f"{name} of {where}", lambda: np.stack([*map(trees.as_array, part)]))
    else:
        array = call(f"{name} of {where}", trees.as_array, part)
    if name in ("segment_ids", "weights") and (
        array.dtype.kind not in "iufb" or not np.isfinite(array).all()
    ):
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


def _joined(item: Item, targets: np.ndarray, lags: tuple[int, ...]) -> Item:
    """Inputs and targets as one window; a negative target, such as -100, is not scored."""
    tokens, segments, weights, *_ = item
    shifts = _shifts(tokens, targets)
    known = targets >= 0
    lag = next((lag for lag in lags if _fits(shifts, lag)), None)
    if lag is None:
        return item._replace(shifts=shifts, lags=lags)
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
    return Item(tokens, segments, scored, shifts, lags)


def _without_padding(tokens: np.ndarray, options: Options) -> np.ndarray:
    """Segment 1 for text, 0 for the run of padding at a row's end.

    Where padding doubles as the id that ends a document, the first of the run is that end.
    """
    padding = options.padding
    if padding is None:
        return np.ones(tokens.shape, np.int32)
    run = np.logical_and.accumulate((tokens == padding)[..., ::-1], axis=-1)[..., ::-1]
    if padding in (options.separator, options.end):
        run[..., 1:] &= run[..., :-1].copy()
        run[..., :1] &= run.all(-1, keepdims=True)
    return (~run).astype(np.int32)
