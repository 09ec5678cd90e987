"""From a tokenised split to batches: windows, global shuffle, process slice.

The stream of a split is, for each document, one separator and then the document's tokens. A window
is T + 1 consecutive stream positions. Windows follow each other at a stride of T, so that every
position but the first is a target exactly once: the first token of a document is predicted from
the separator that opens it, and separators themselves are inputs only. With a window offset every
epoch cuts the stream elsewhere: its windows start 0 to T - 1 positions before the stream does.

Batch number i of training holds the samples i*B ... (i+1)*B - 1 of an endless sequence that is a
function of the seed alone. The position in the data is therefore one integer, the batch number, and
neither the number of processes nor the number of threads can change what a step sees.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from lm_jax.data.store import Split

Batch = dict[str, np.ndarray]
PADDING_ROW = -1
READ_AHEAD_PER_THREAD = 2


class Windows:
    """The windows of a split, by number; keeps 8 bytes for each document and no tokens in memory.

    With a stride shorter than T (evaluation), the first window scores all its targets and every
    later one only its last `stride`: each target is scored once and, past the first window, with
    at least T - stride + 1 positions of the stream before it.
    """

    def __init__(
        self,
        split: "Split",
        seq_len: int,
        document_mask: bool,
        stride: int | None = None,
        *,
        movable: bool = False,
    ):
        """Indexes a split; the stride is `seq_len` unless given.

        Only windows of the usual stride may be movable. There is one more of these, so that they
        reach the end of the stream at any offset.
        """
        if not len(split.tokens):
            raise ValueError(f"split '{split.name}' holds no tokens: prepare its corpus again.")
        self.split = split
        self.seq_len = seq_len
        self.document_mask = document_mask
        self.stride = seq_len if stride is None else stride
        self.movable = movable
        assert not movable or stride is None
        if not 1 <= self.stride <= seq_len:
            raise ValueError(
                f"stride={self.stride} would skip or repeat targets: "
                f"choose it between 1 and seq_len={seq_len}."
            )
        documents = len(split.document_starts) - 1
        self._separators = np.arange(documents)
        self._separators += split.document_starts[:-1]
        self.stream_len = len(split.tokens) + documents

    def __len__(self) -> int:
        """The number of windows that scores every token once."""
        after_first_window = max(self.stream_len - 1 - self.seq_len, 0)
        return 1 + self.movable + -(-after_first_window // self.stride)

    def batch(self, indices: ArrayLike, earlier: ArrayLike = 0) -> Batch:
        """Gathers windows [..., B] into tokens, segment ids and weights [..., B, T+1].

        `weights[b, t]` says whether `tokens[b, t]` is scored as a target. Segments count the
        documents of a window from 1; padding is segment 0. Index -1 gives a row of padding.
        Movable windows start `earlier` by less than T positions; positions before the stream are
        padding.
        """
        indices_B = np.asarray(indices, np.int64)
        start_B = indices_B * self.stride - np.asarray(earlier, np.int64)
        position_BT = start_B[..., None] + np.arange(self.seq_len + 1)
        document_BT = np.searchsorted(self._separators, position_BT, side="right") - 1
        document_BT = np.maximum(document_BT, 0)
        inside_BT = (position_BT >= 0) & (position_BT < self.stream_len)
        real_BT = (indices_B != PADDING_ROW)[..., None] & inside_BT
        text_BT = real_BT & (self._separators[document_BT] != position_BT)

        offset_BT = np.clip(position_BT - document_BT - 1, 0, len(self.split.tokens) - 1)
        tokens_BT = np.where(text_BT, _take(self.split.tokens, offset_BT), self.split.separator)

        segment_ids_BT = real_BT.astype(np.int32)
        if self.document_mask:
            segment_ids_BT *= (document_BT - document_BT[..., :1] + 1).astype(np.int32)

        # Column 0 of the first window is a separator and has weight 0 already.
        weights_BT = text_BT.astype(np.float32)
        weights_BT[indices_B > 0, : self.seq_len + 1 - self.stride] = 0
        return {
            "tokens": tokens_BT.astype(np.int32),
            "segment_ids": segment_ids_BT,
            "weights": weights_BT,
        }


def count_windows(split: "Split", seq_len: int, movable: bool) -> int:
    """Windows of an epoch of training.

    Raises:
        ValueError: if the split does not fill one.
    """
    windows = Windows(split, seq_len, False, movable=movable)
    if windows.stream_len < seq_len + 1:
        raise ValueError(
            f"config.data.seq_len: {seq_len:,} is more than the split {split.name!r} fills with "
            f"its {len(split.tokens):,} tokens; lower it, or take a larger corpus."
        )
    return len(windows)


def _take(tokens: np.ndarray, offset_BT: np.ndarray) -> np.ndarray:
    """tokens[offset_BT], where the offsets of a row never fall.

    A row of a file is read as one stretch: pages touched through its map would stay in memory.
    """
    if not isinstance(tokens, np.memmap):
        return tokens[offset_BT]
    assert tokens.filename is not None
    taken = np.empty(offset_BT.shape, tokens.dtype)
    width = offset_BT.shape[-1]
    with open(tokens.filename, "rb", buffering=0) as file:
        for row_T, offset_T in zip(
            taken.reshape(-1, width), offset_BT.reshape(-1, width), strict=True
        ):
            first, last = offset_T[0], offset_T[-1]
            place = tokens.offset + first * tokens.itemsize
            read = os.pread(file.fileno(), (last + 1 - first) * tokens.itemsize, place)
            row_T[:] = np.frombuffer(read, tokens.dtype)[offset_T - first]
    return taken


def parts(update: int, growth: int) -> int:
    """Parts into which windows are cut: 8, 4 and 2 in equal shares of `growth` updates, then 1."""
    return 8 >> (3 * update // growth) if update < growth else 1


def cut(batch: Batch, number: int) -> Batch:
    """Windows [..., B, T + 1] in N parts each, [..., B N, T / N + 1], with the same targets.

    A text is learnt sooner from many short stretches at once; contexts as long as those that are
    scored are needed only at the end (Li et al. 2022, arXiv 2108.06084; Jin et al. 2023, arXiv
    2310.00576).
    """
    length = (batch["tokens"].shape[-1] - 1) // number
    at_NT = length * np.arange(number)[:, None] + np.arange(length + 1)
    return {k: x[..., at_NT].reshape(*x.shape[:-2], -1, length + 1) for k, x in batch.items()}


def example_index(position: ArrayLike, num_windows: int, seed: int) -> np.ndarray:
    """Maps positions in the endless sequence of samples to window numbers.

    Every epoch has its own permutation, a function of (seed, epoch).
    """
    epoch, offset = np.divmod(np.asarray(position, np.int64), num_windows)
    index = np.empty_like(offset)
    for e in np.unique(epoch):
        here = epoch == e
        index[here] = _permutation(num_windows, seed, int(e))[offset[here]]
    return index


def window_offset(epoch: ArrayLike, seq_len: int, seed: int) -> np.ndarray:
    """Positions in [0, T) by which an epoch's windows start earlier, from (seed, epoch) alone."""
    epochs, place = np.unique(epoch, return_inverse=True)
    offsets = [
        np.random.Philox(np.random.SeedSequence(seed, spawn_key=(int(e), 1))).random_raw() % seq_len
        for e in epochs
    ]
    return np.array(offsets, np.int64)[place]


@functools.lru_cache(maxsize=2)
def _permutation(num_windows: int, seed: int, epoch: int) -> np.ndarray:
    """Sorts raw words of the generator: NumPy may change `permutation` between versions, not these.

    Two are cached, since a batch may span the end of an epoch.
    """
    words = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch,)))
    order = np.argsort(words.random_raw(num_windows), kind="stable")
    order.flags.writeable = False
    return order


def train_batches(
    split: "Split",
    *,
    seq_len: int,
    batch_size: int,
    document_mask: bool,
    seed: int,
    calls: Sequence[range],
    movable: bool = False,
    growth: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 1,
    extend: Callable[[Batch], Batch] = dict,
) -> Iterator[Batch]:
    """Yields, for each call, the training batches of its numbers: [K, B/P, T+1], K = len(call).

    The rows are those of this process. `threads` threads read ahead; 0 reads on demand. With
    `movable` windows every epoch has its own offset. A call in the first `growth` updates has its
    windows `cut` in the `parts` of its first update. `extend` adds arrays to a call's batches.

    Raises:
        ValueError: if the split does not fill one window, or the batch cannot be divided.
    """
    rows = _process_rows(batch_size, process_index, process_count)
    windows = Windows(split, seq_len, document_mask, movable=movable)
    epoch = count_windows(split, seq_len, movable)

    def read(call: range) -> Batch:
        first_K1 = batch_size * np.asarray(call)[:, None]
        position_KB = first_K1 + np.arange(batch_size)[rows]
        indices_KB = example_index(position_KB, epoch, seed)
        epoch_KB = position_KB // epoch
        earlier = window_offset(epoch_KB, seq_len, seed) if movable else 0
        batch = windows.batch(indices_KB, earlier)
        number = parts(call[0], growth)
        return extend(batch if number == 1 else cut(batch, number))

    return _read_ahead(read, calls, threads)


def _read_ahead(
    read: Callable[[range], Batch], calls: Sequence[range], threads: int
) -> Iterator[Batch]:
    """Yield `read(call)` for each call in order; grain's threads stop when the reader stops."""
    import grain

    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=READ_AHEAD_PER_THREAD * threads
    )
    dataset = grain.MapDataset.source(calls).map(read).to_iter_dataset(options)
    with contextlib.closing(iter(dataset)) as batches:
        yield from batches


def eval_batches(
    split: "Split",
    *,
    seq_len: int,
    batch_size: int,
    document_mask: bool,
    stride: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Yields the whole split in order, each target scored once, the last batch padded with rows."""
    rows = _process_rows(batch_size, process_index, process_count)
    windows = Windows(split, seq_len, document_mask, stride)

    def batch(first: int) -> Batch:
        indices_B = np.arange(first, first + batch_size)
        indices_B[indices_B >= len(windows)] = PADDING_ROW
        return windows.batch(indices_B[rows])

    return map(batch, range(0, len(windows), batch_size))


def _process_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """The rows of a global batch that belong to one process."""
    assert 0 <= process_index < process_count
    if batch_size % process_count:
        raise ValueError(
            f"--config.data.batch_size={batch_size} cannot be divided among {process_count} "
            f"processes: choose a multiple of {process_count}."
        )
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)
