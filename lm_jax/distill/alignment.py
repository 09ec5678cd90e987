"""A teacher with another tokenizer reads the student's windows as text of its own tokens.

Every position of the student gets the state of the last teacher token that ends at or before the
end of its own token, never a later one. Where both end at the same byte, both models predict what
follows the same text, and their probabilities of the next byte are compared. A teacher token ends
where it does because of what follows, so these are predictions given that a teacher token ends
there: after " the" never "i", if " their" is a token. A student with much finer tokens, which does
not know this, becomes overconfident there; nothing else of later text is read.
"""

import codecs
import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np

from lm_jax.config import Config, rules
from lm_jax.data.store import Split, Store
from lm_jax.data.tokenizers.base import Tokenizer, count_words
from lm_jax.data.windows import Batch, Windows

BYTES = 256  # groups of ids: by their first byte
CONTINUATION = bytes(range(0x80, 0xC0))  # the bytes of a UTF-8 character after its first
WINDOWS = 64  # that are looked at beforehand, all over the split


def first_bytes(*tokenizers: Tokenizer) -> tuple[np.ndarray, ...]:
    """The first byte of each id, int32 [V], of each tokenizer.

    It is `BYTES` for an id that stands for no text, and for a byte that not all of them know: what
    one of two models cannot predict is left out of what they are compared on.
    """
    of_each = []
    for tokenizer in tokenizers:
        pieces = tokenizer.token_bytes(np.arange(tokenizer.vocab_size))
        of_each.append(np.array([piece[0] if piece else BYTES for piece in pieces], np.int32))
    common = functools.reduce(np.intersect1d, of_each)
    return tuple(np.where(np.isin(first, common), first, BYTES) for first in of_each)


@dataclasses.dataclass(frozen=True)
class Aligner:
    """Adds the teacher's rows to batches, and where their tokens end in the student's rows.

    From the first character on that the teacher's tokenizer would change, a document has no teacher
    in this row: the next one is read as if the rest of it were not there.

    `teacher_tokens`, `teacher_segment_ids` and `teacher_positions`, int32 [..., U], are rows of the
    teacher; `teacher_place`, int32 [..., T], the teacher's position for each of the student's, -1
    where there is none; `aligned`, float32 [..., T], 1 where both tokens end at the same byte.
    """

    student: Tokenizer
    teacher: Tokenizer
    length: int  # U; text that needs more teacher tokens is cut off there

    def __call__(self, batch: Batch) -> Batch:
        """Align a batch of windows [..., T + 1]."""
        tokens, segments = batch["tokens"], batch["segment_ids"]
        width = tokens.shape[-1]
        rows = zip(tokens.reshape(-1, width), segments.reshape(-1, width), strict=True)
        made = [self.row(row[:-1], ids[:-1]) for row, ids in rows]
        stacked = {name: np.stack([row[name] for row in made]) for name in made[0]}
        return batch | {name: x.reshape(*tokens.shape[:-1], -1) for name, x in stacked.items()}

    def row(self, tokens_T: np.ndarray, segment_ids_T: np.ndarray) -> Batch:
        """Align one row of inputs."""
        ids: list[int] = []
        segments: list[int] = []
        positions: list[int] = []
        place_T = np.full(len(tokens_T), -1, np.int32)
        aligned_T = np.zeros(len(tokens_T), np.float32)
        for first, end in _pieces(tokens_T, segment_ids_T, self.student.separator):
            segment = int(segment_ids_T[first])
            ids_U, ends_U, ends_T = self._read(tokens_T[first:end])
            # The last teacher token that ends at or before the student's.
            last_T = np.searchsorted(ends_U, ends_T, side="right") - 1
            found_T = last_T >= 0
            place_T[first:end] = np.where(found_T, len(ids) + last_T, -1)
            aligned_T[first:end][found_T] = ends_U[last_T[found_T]] == ends_T[found_T]
            position = segments.count(segment)
            ids += ids_U.tolist()
            segments += [segment] * len(ids_U)
            positions += range(position, position + len(ids_U))
        aligned_T[place_T >= self.length] = 0
        place_T[place_T >= self.length] = -1
        return {
            "teacher_tokens": self._fixed(ids, self.teacher.separator),
            "teacher_segment_ids": self._fixed(segments, 0),
            "teacher_positions": self._fixed(positions, 0),
            "teacher_place": place_T,
            "aligned": aligned_T,
        }

    def _read(self, tokens_T: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A piece of one document as teacher ids, and the byte at which each id and token ends.

        That is -1 for tokens from the first character on that the teacher would change.
        """
        ends_T = np.cumsum(self.student.bytes_V[tokens_T], dtype=np.int64)
        skipped, text = _whole_characters(b"".join(self.student.token_bytes(tokens_T)))
        (ids_U,), cut = self.teacher.encode_kept([text]), len(text)
        while ids_U is None:
            cut = min(self.teacher.kept(text[:cut]), cut - 1)
            (ids_U,) = self.teacher.encode_kept([text[:cut]])
        if cut < len(text):
            ends_T[ends_T > skipped + len(text[:cut].encode())] = -1
        ends_U = skipped + np.cumsum(self.teacher.bytes_V[ids_U], dtype=np.int64)
        if tokens_T[0] == self.student.separator:
            ids_U = np.concatenate([[self.teacher.separator], ids_U])
            ends_U = np.concatenate([[0], ends_U])
        return ids_U, ends_U, ends_T

    def _fixed(self, values: list[int], filling: int) -> np.ndarray:
        values = values[: self.length]
        return np.array(values + [filling] * (self.length - len(values)), np.int32)


def _pieces(
    tokens_T: np.ndarray, segment_ids_T: np.ndarray, separator: int
) -> Iterator[tuple[int, int]]:
    """(first, end) of each stretch of one document; it begins with the separator if that is there.

    Padding is left out.
    """
    starts = (tokens_T == separator) & (segment_ids_T > 0)
    starts[1:] |= segment_ids_T[1:] != segment_ids_T[:-1]
    starts[0] = True
    for first, end in itertools.pairwise([*np.flatnonzero(starts), len(tokens_T)]):
        if segment_ids_T[first] > 0:
            yield int(first), int(end)


def _whole_characters(text: bytes) -> tuple[int, str]:
    """The bytes that a cut character at the start takes, and the text without cut characters."""
    rest = text.lstrip(CONTINUATION)
    # The decoder keeps a cut character at the end to itself.
    return len(text) - len(rest), codecs.getincrementaldecoder("utf-8")().decode(rest)


@dataclasses.dataclass(frozen=True)
class Retokenised(Store):
    """The splits of a store in the ids of another tokenizer, in memory.

    Documents that it would change are left out.
    """

    original: Store

    def split(self, name: str) -> Split:
        """The split of that name.

        Raises:
            ValueError: if the ids do not tell its text, or the tokenizer keeps less than half.
        """
        split = self.original.split(name)
        starts = itertools.pairwise(split.document_starts)
        texts = [self.original.tokenizer.decode(split.tokens[a:b]) for a, b in starts]
        if sum(len(text.encode()) for text in texts) != split.bytes:
            raise ValueError(
                f"The tokenizer of the student ({self.original.tokenizer.kind}) drops part of the "
                "text; use config.tokenizer.kind=bpe."
            )
        encoded = zip(texts, self.tokenizer.encode_kept(texts), strict=True)
        kept = [(text, ids) for text, ids in encoded if ids is not None]
        size = sum(len(text.encode()) for text, _ in kept)
        if 2 * size < split.bytes:
            self.tokenizer.encode_all(texts)  # tells what changes the text
        return dataclasses.replace(
            split,
            tokens=np.concatenate([ids for _, ids in kept]),
            document_starts=np.cumsum([0, *(len(ids) for _, ids in kept)]),
            bytes=size,
            words=sum(count_words(text) for text, _ in kept),
            separator=self.tokenizer.separator,
        )


def open_aligner(cfg: Config, store: Store, teacher: Tokenizer, limit: int | None) -> Aligner:
    """An aligner whose rows hold the teacher's tokens of some windows, and a tenth more.

    They hold at most `limit` tokens, if there is a limit to what the teacher can read.

    Raises:
        ValueError: if the student's ids do not tell the text, or the teacher changes most of it.
    """
    if teacher.kind in ("char", "word"):  # what it lacks may turn up anywhere in the text
        raise ValueError(
            f"A tokenizer of kind {teacher.kind} does not know all text; "
            "give a teacher of kind bpe or byte."
        )
    again = Retokenised(store.path, store.manifest, teacher, store)
    # What is scored by the teacher: before the first update, and at the end.
    for name in sorted({"valid", rules.eval_splits(cfg, store.manifest["splits"])[-1]}):
        again.split(name)
    batch = _some_windows(cfg, store)
    long = Aligner(store.tokenizer, teacher, 32 * cfg.data.seq_len)
    needed = int(np.max((long(batch)["teacher_segment_ids"] > 0).sum(-1)))
    length = 64 * -(-int(1.1 * needed) // 64)
    return Aligner(store.tokenizer, teacher, min(length, limit or length))


def aligned_shares(aligner: Aligner, cfg: Config, store: Store) -> tuple[float, float]:
    """Shares of the scored tokens of some windows.

    At whose start a teacher token ends, and for which the teacher has no state.
    """
    batch = aligner(_some_windows(cfg, store))
    each = batch["aligned"], batch["teacher_place"] < 0
    aligned, untaught = (float(np.average(x, weights=batch["weights"][:, 1:])) for x in each)
    return aligned, untaught


def common_tokens(one: Tokenizer, other: Tokenizer) -> float:
    """The share that both have of the tokens of more than a byte that either has.

    All byte-level tokenizers have those of a byte.
    """
    both = [t.token_bytes(np.arange(t.vocab_size)) for t in (one, other)]
    mine, theirs = ({piece for piece in pieces if len(piece) > 1} for pieces in both)
    return len(mine & theirs) / max(1, len(mine | theirs))


def _some_windows(cfg: Config, store: Store) -> Batch:
    windows = Windows(store.split("train"), cfg.data.seq_len, cfg.data.document_mask)
    chosen = np.linspace(0, len(windows) - 1, min(len(windows), WINDOWS))
    return windows.batch(chosen.astype(np.int64))
