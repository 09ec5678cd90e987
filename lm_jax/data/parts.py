"""Tokenises the pieces of a corpus, in several processes, into parts that outlive a kill.

A part is a folder with the ids of one piece of one split, the lengths of its documents and a record
of its counts and hashes. It gets its name only when it is complete, and holds the same bytes
whichever process wrote it. `join` puts the parts of a split end to end.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lm_jax import console
from lm_jax.data.files import hash_json
from lm_jax.data.shards import Documents
from lm_jax.data.tokenizers.base import Tokenizer, count_words
from lm_jax.data.tokenizers.load import load_tokenizer
from lm_jax.files import whole, write_text

BATCH_CHARACTERS = 1 << 20  # text tokenised at once
BLOCK = 1 << 20  # bytes copied at once
COUNTS = "tokens documents empty_documents bytes words".split()


class Part(NamedTuple):
    """One piece of a split."""

    split: str
    number: int
    of: int
    documents: Documents

    @property
    def name(self) -> str:
        """Name of the part's folder."""
        return f"{self.split}.{self.number:06}-of-{self.of:06}"


class Damaged(Exception):
    """Finished parts do not hold what was written into them; the arguments are their paths."""


def plan(splits: Mapping[str, Sequence[Documents]]) -> list[Part]:
    """All parts of a corpus, in order."""
    return [
        Part(split, number, len(pieces), piece)
        for split, pieces in splits.items()
        for number, piece in enumerate(pieces)
    ]


def id_type(tokenizer: Tokenizer) -> np.dtype:
    """Type in which ids are stored."""
    return np.dtype("<u2" if tokenizer.vocab_size < 1 << 16 else "<u4")


def write_all(
    parts: Sequence[Part], tokenizer: Tokenizer, folder: Path, workers: int, *, alone: bool = True
) -> None:
    """Writes into `folder`, which holds the tokenizer, the parts that are not there yet.

    Where a split has several, `workers` processes (0: one a core) share them. What a kill left is
    removed first if this process is `alone`: it may be what another one writes.

    Raises:
        ValueError: if the corpus or one of its documents cannot be read or tokenised.
        ChildProcessError: if a process ended before its work did.
    """
    for leftover in folder.glob("partial-*") if alone else ():
        # Workers left over from a killed run stop after this part.
        shutil.rmtree(leftover, ignore_errors=True)
    todo = [part for part in parts if not (folder / part.name).exists()]
    workers = min(workers or _cores(), len(todo))
    with console.phase("tokenising", len(parts), len(parts) - len(todo)) as tokenising:

        def report() -> None:
            done = tokenising.done + 1
            tokenising.update(done, f"{done} of {len(parts)} parts")

        if workers > 1 and any(part.of > 1 for part in parts):
            _write_in_processes(todo, folder, workers, report)
        else:
            for part in todo:
                write_part(part, tokenizer, folder)
                report()


def _cores() -> int:
    """Cores that this process may use, where the system tells, else all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def write_part(part: Part, tokenizer: Tokenizer, folder: Path) -> None:
    """Tokenises one piece into a part in `folder`.

    Raises:
        ValueError: if a document cannot be read or tokenised.
    """
    dtype = id_type(tokenizer)
    counts = dict.fromkeys(COUNTS, 0)
    ids_hash, lengths_hash = hashlib.sha256(), hashlib.sha256()
    with tempfile.TemporaryDirectory(dir=folder, prefix="partial-") as partial:
        new = Path(partial) / "part"
        new.mkdir()
        with whole(new / "ids") as ids_file, whole(new / "lengths") as lengths_file:
            for texts in _batches(part.documents()):
                try:
                    encoded = tokenizer.encode_all(texts)
                except ValueError as error:
                    message = f"Split {part.split!r} cannot be tokenised: {error}"
                    raise ValueError(message) from error
                lengths = np.array([len(ids) for ids in encoded if len(ids)], "<i8")
                lengths_file.write(lengths)
                lengths_hash.update(lengths)
                counts["tokens"] += int(lengths.sum())
                counts["documents"] += len(lengths)
                counts["empty_documents"] += len(texts) - len(lengths)
                for text, ids in zip(texts, encoded, strict=True):
                    stored = ids.astype(dtype)
                    ids_file.write(stored)
                    ids_hash.update(stored)
                    if len(ids):
                        counts["bytes"] += len(text.encode())
                        counts["words"] += count_words(text)
        record = {
            **counts,
            "tokenizer": tokenizer.content_hash,
            "ids": ids_hash.hexdigest(),
            "lengths": lengths_hash.hexdigest(),
        }
        write_text(new / "counts.json", json.dumps({**record, "sha256": hash_json(record)}))
        try:
            os.replace(new, folder / part.name)
        except OSError:
            if not (folder / part.name).exists():  # else a worker left over by a kill was faster
                raise


def join(
    folders: Sequence[Path], tokenizer: Tokenizer, tokens_path: Path, starts_path: Path
) -> dict[str, Any]:
    """Writes the ids of parts end to end, and where their documents start, as two .npy files.

    Returns:
        The sum of each of COUNTS, and the `sha256` of both arrays' content.

    Raises:
        Damaged: if parts do not hold what was written into them.
    """
    found = {part: read_part_record(part, tokenizer) for part in folders}
    records = {part: record for part, record in found.items() if record is not None}
    if damaged := [part for part in folders if part not in records]:
        raise Damaged(*damaged)
    counts = {key: sum(record[key] for record in records.values()) for key in COUNTS}
    digest = hashlib.sha256()
    with whole(tokens_path) as file:
        _write_header(file, id_type(tokenizer), counts["tokens"])
        for part, record in records.items():
            of_part = hashlib.sha256()
            with (part / "ids").open("rb") as ids_file:
                while block := ids_file.read(BLOCK):
                    of_part.update(block)
                    digest.update(block)
                    file.write(block)
            if of_part.hexdigest() != record["ids"]:
                damaged.append(part)
    with whole(starts_path) as file:
        _write_header(file, np.dtype("<i8"), counts["documents"] + 1)
        starts = np.zeros(1, "<i8")
        digest.update(starts)
        file.write(starts)
        for part, record in records.items():
            lengths = np.fromfile(part / "lengths", "<i8")
            if hashlib.sha256(lengths).hexdigest() != record["lengths"]:
                damaged.append(part)
            starts = np.cumsum(np.concatenate([starts[-1:], lengths]))
            digest.update(starts[1:])
            file.write(starts[1:])
    if damaged:
        raise Damaged(*dict.fromkeys(damaged))
    return {**counts, "sha256": digest.hexdigest()}


def _write_header(file: BinaryIO, dtype: np.dtype, length: int) -> None:
    header = {"descr": dtype.str, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def read_part_record(folder: Path, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The counts of a part and the sha256 of its `ids` and `lengths`, which are not read.

    None if the record, or the size of a file, is not what was written with this tokenizer.
    """
    try:
        record = json.loads((folder / "counts.json").read_bytes())
        sizes = [(folder / name).stat().st_size for name in ("ids", "lengths")]
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(record, dict) or record.pop("sha256", None) != hash_json(record):
        return None
    expected = [record["tokens"] * id_type(tokenizer).itemsize, record["documents"] * 8]
    return record if (record["tokenizer"], sizes) == (tokenizer.content_hash, expected) else None


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    """Documents in groups of about BATCH_CHARACTERS."""
    for first in documents:
        batch, size = [first], len(first)
        while size < BATCH_CHARACTERS and (more := list(itertools.islice(documents, 1))):
            batch += more
            size += len(more[0]) + 1
        yield batch


def _write_in_processes(
    todo: Sequence[Part], folder: Path, workers: int, report: Callable[[], None]
) -> None:
    """Writes parts, each in the next of several processes that is idle.

    Not multiprocessing's pool: that runs the caller's script again in every process, and leaves
    its processes behind when it is killed.
    """
    idle: queue.SimpleQueue[Callable[[Part, Path], None]] = queue.SimpleQueue()
    failed = threading.Event()

    def write(part: Part) -> None:
        if failed.is_set():  # begin no other part
            return
        write_in_process = idle.get()
        try:
            write_in_process(part, folder)
        except BaseException:
            failed.set()
            raise
        finally:
            idle.put(write_in_process)

    with contextlib.ExitStack() as stack:
        for _ in range(workers):
            idle.put(stack.enter_context(_process()))
        pool = concurrent.futures.ThreadPoolExecutor(workers)
        stack.callback(pool.shutdown, cancel_futures=True)  # waits for parts that are being written
        for written in concurrent.futures.as_completed([pool.submit(write, part) for part in todo]):
            written.result()
            report()


@contextlib.contextmanager
def _process() -> Iterator[Callable[[Part, Path], None]]:
    """A process that writes parts; it ends with its connection, also when this one is killed."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "RAYON_NUM_THREADS": "1",  # the processes are the parallelism
        "TOKENIZERS_PARALLELISM": "false",
    }
    connection, theirs = multiprocessing.Pipe()
    program = f"from lm_jax.data.parts import serve; serve({theirs.fileno()})"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.DEVNULL,
        stdout=2,  # standard output belongs to reports
        pass_fds=[theirs.fileno()],
        env=environment,
        start_new_session=True,  # Ctrl-C is for this process, which then ends the connection
    )
    theirs.close()

    def write(part: Part, folder: Path) -> None:
        try:
            connection.send((part, folder))
            answer = connection.recv()
        except (EOFError, ConnectionError) as error:
            raise _ended(process.wait()) from error
        if answer is not None:
            raise answer

    with process, connection:
        yield write


def _ended(code: int) -> ChildProcessError:
    how = f"ended with return code {code}, and may have said why on standard error:"
    if code == -signal.SIGKILL:
        how = "was killed, perhaps for lack of memory: set a smaller --config.data.workers and"
    return ChildProcessError(
        f"A process that tokenises {how} start again, which goes on from the finished parts."
    )


def serve(descriptor: int) -> None:
    """Writes the parts that come through a connection and answers None or an error to each.

    It ends when the caller has no more tasks, or was killed.
    """
    load = functools.cache(load_tokenizer)
    with Connection(descriptor) as connection, contextlib.suppress(EOFError, ConnectionError):
        while True:
            task, answer = connection.recv_bytes(), None
            try:
                part, folder = pickle.loads(task)
                write_part(part, load(folder), folder)
            except Exception as error:
                answer = _sendable(error)
            connection.send(answer)


def _sendable(error: Exception) -> Exception:
    """The error with its traceback; where pickle would lose something of it, its text alone."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")
