"""Tokenises the pieces of a corpus, in several processes, into parts that outlive a kill.

A part is a folder with the ids of one piece of one split, the lengths of its documents and its
counts. It appears under its name only when it is complete, and holds the same bytes whichever
process wrote it.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import pickle
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from lm_jax.data.shards import Documents
from lm_jax.data.tokenizers import Tokenizer, count_words

BATCH_CHARACTERS = 1 << 20  # text tokenised at once
COUNTS = "tokens documents empty_documents bytes words".split()
REPORT_SECONDS = 10.0  # between lines on how far a long preparation is


@dataclasses.dataclass(frozen=True)
class Part:
    """One piece of a split."""

    split: str
    number: int
    of: int
    documents: Documents

    @property
    def name(self) -> str:
        """Name of the part's folder."""
        return f"{self.split}.{self.number:06}-of-{self.of:06}"


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


def write_all(parts: Sequence[Part], tokenizer: Tokenizer, folder: Path, workers: int) -> None:
    """Writes into `folder`, which holds the tokenizer, the parts that are not there yet.

    Where a split has several, `workers` processes (0: one a core) share them.

    Raises:
        ValueError: if the corpus or one of its documents cannot be read or tokenised.
        ChildProcessError: if a process was killed.
    """
    for leftover in folder.glob("partial-*"):
        # Whoever is still at it was left behind by a kill and ends with this part.
        shutil.rmtree(leftover, ignore_errors=True)
    todo = [part for part in parts if not (folder / part.name).exists()]
    workers = min(workers or os.cpu_count() or 1, len(todo))
    report = _Report(folder, len(parts))
    if workers <= 1 or all(part.of == 1 for part in parts):
        for part in todo:
            write(part, tokenizer, folder)
            report()
        return
    tasks: queue.SimpleQueue[Part | None] = queue.SimpleQueue()
    for task in [*todo, *[None] * workers]:
        tasks.put(task)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        drivers = [pool.submit(_drive, tasks, folder, report) for _ in range(workers)]
        try:
            for driver in concurrent.futures.as_completed(drivers):
                driver.result()
        except BaseException:
            with contextlib.suppress(queue.Empty):
                while True:
                    tasks.get_nowait()
            for _ in drivers:  # they stop after the part that they are at
                tasks.put(None)
            raise


def write(part: Part, tokenizer: Tokenizer, folder: Path) -> None:
    """Tokenises one piece."""
    dtype = id_type(tokenizer)
    counts = dict.fromkeys(COUNTS, 0)
    with tempfile.TemporaryDirectory(dir=folder, prefix="partial-") as partial:
        new = Path(partial) / "part"
        new.mkdir()
        with (new / "ids").open("wb") as ids_file, (new / "lengths").open("wb") as lengths_file:
            for texts in _batches(part.documents()):
                encoded = _encode(texts, tokenizer, part.split)
                lengths = [len(ids) for ids in encoded if len(ids)]
                for ids in encoded:
                    ids_file.write(ids.astype(dtype).tobytes())
                lengths_file.write(np.array(lengths, "<i8").tobytes())
                counts["tokens"] += sum(lengths)
                counts["documents"] += len(lengths)
                counts["empty_documents"] += len(texts) - len(lengths)
                for text, ids in zip(texts, encoded, strict=True):
                    if len(ids):
                        counts["bytes"] += len(text.encode())
                        counts["words"] += count_words(text)
            for file in (ids_file, lengths_file):  # or the machine may die after the new name
                file.flush()
                os.fsync(file.fileno())
        (new / "counts.json").write_text(json.dumps(counts))
        try:
            os.replace(new, folder / part.name)
        except OSError:
            if not (folder / part.name).exists():  # else one left behind by a kill was faster
                raise


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    """Documents in groups of about BATCH_CHARACTERS."""
    for first in documents:
        batch, size = [first], len(first)
        while size < BATCH_CHARACTERS and (more := list(itertools.islice(documents, 1))):
            batch += more
            size += len(more[0]) + 1
        yield batch


def _encode(texts: list[str], tokenizer: Tokenizer, split: str) -> list[np.ndarray]:
    try:
        return tokenizer.encode_all(texts)
    except ValueError as error:
        raise ValueError(f"Split {split!r} cannot be tokenised: {error}") from error


class _Report:
    """Says on standard error, now and then, how many parts are written."""

    def __init__(self, folder: Path, total: int) -> None:
        self.folder, self.total = folder, total
        self.due = time.monotonic() + REPORT_SECONDS

    def __call__(self) -> None:
        if time.monotonic() > self.due:
            self.due = time.monotonic() + REPORT_SECONDS
            done = len(list(self.folder.glob("*-of-*")))
            print(f"tokenised {done} of {self.total} parts", file=sys.stderr)


def _drive(tasks: "queue.SimpleQueue[Part | None]", folder: Path, report: _Report) -> None:
    """Feeds one process, which ends with its input: also when this process is killed.

    Not multiprocessing's pool: that runs the caller's script again in every process, and leaves
    its processes behind when it is killed.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "RAYON_NUM_THREADS": "1",  # the processes are the parallelism
        "TOKENIZERS_PARALLELISM": "false",
    }
    with subprocess.Popen(
        [sys.executable, "-c", "from lm_jax.data.parts import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # Ctrl-C is for this process, which then ends the input
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            _send(process.stdin, folder)
            while (part := tasks.get()) is not None:
                _send(process.stdin, part)
                if (error := pickle.load(process.stdout)) is not None:
                    raise error
                report()
        except (EOFError, pickle.UnpicklingError, BrokenPipeError) as error:
            raise ChildProcessError(
                "A process that tokenises was killed, perhaps for lack of memory: set a smaller "
                "--config.data.workers and start again, which goes on from the finished parts."
            ) from error
        finally:
            with contextlib.suppress(BrokenPipeError):  # of a process whose end is reported above
                process.stdin.close()


def serve() -> None:
    """Writes the parts that come from standard input until it ends; answers None or an error."""
    tasks = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get among the answers
    folder = pickle.load(tasks)
    tokenizer = Tokenizer.load(folder)
    while True:
        try:
            part = pickle.load(tasks)
        except EOFError:
            return
        try:
            write(part, tokenizer, folder)
            answer: Exception | None = None
        except (ValueError, OSError) as error:
            answer = error
        try:
            _send(answers, answer)
        except BrokenPipeError:  # the caller was killed
            os._exit(1)


def _send(stream: IO[bytes], value: object) -> None:
    pickle.dump(value, stream)
    stream.flush()
