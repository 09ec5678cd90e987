"""Signs of life of the processes of a run: when one hangs or dies, the others say so and end.

Each writes a small file in the workdir once a second, from a thread, and reads those of the others.
Nothing else would end a process that waits on its devices for one that is gone.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import json
import os
import pathlib
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lm_jax import console, rundir, signals, together

SIGNS = ".alive"  # in the workdir, while several processes train there
_BEAT = 1.0  # seconds between signs, up to 16 processes
_SILENT = 60.0  # most seconds without a sign: the thread that gives them waits for no device
_GONE = 5  # signs that may be missing where a computation failed, as it does if a process is gone
_SHOWN = 300  # characters of an error
_RESTS, _READS, _COMPUTES = "", "it waits for its next batch", "it waits for its devices"
_SCORES = "it scores"


@dataclasses.dataclass(frozen=True)
class Sign:
    """What a process says of itself."""

    run: int  # a number that no earlier run in the folder had
    process: int
    host: str
    beat: int = 0
    calls: int = 0  # of the step, and batches that were scored
    update: int = 0  # the last that was dispatched
    doing: str = _RESTS  # what should be done soon; nothing while it rests
    ended: str = ""  # why it left the others

    def __str__(self) -> str:
        """Who it is."""
        return f"process {self.process} (host {self.host})"


class Watch:
    """Judges the signs of all processes.

    It knows no clock, but counts the signs that this process gave meanwhile: a machine that slept
    and a file system that hung took the time of both.
    """

    def __init__(self, mine: Sign, count: int, seconds: float, beat: float):
        """Begin with nothing missed.

        Args:
            mine: the first sign of this process.
            count: number of processes.
            seconds: `train.hang_seconds`.
            beat: seconds between two signs.
        """
        self._seconds, self._beat = seconds, beat
        self.urgent = False  # whether a computation failed
        unknown = {n: Sign(mine.run, n, "unknown") for n in range(count)}
        self._signs = unknown | {mine.process: mine}
        self._missed, self._still = dict.fromkeys(unknown, 0), 0

    def judge(self, signs: Mapping[int, Sign | None], *, stopping: bool = False) -> str:
        """Why this process must end; empty if all is well.

        Args:
            signs: by process; None is unreadable. One that is not there has not settled yet, or has
                finished.
            stopping: whether a signal waits, for which no rest and no scoring may be longer than
                `seconds`.
        """
        moved = False
        for n, old in self._signs.items():
            new = signs.get(n) or old
            self._missed[n] = 0 if new != old or n not in signs else self._missed[n] + 1
            scores = stopping and new.doing == old.doing == _SCORES
            moved |= (new.calls, new.doing) != (old.calls, old.doing) and not scores
            self._signs[n] = new
        everyone = list(self._signs.values())
        silent = _GONE if self.urgent else max(2, round(min(self._seconds, _SILENT) / self._beat))
        for one in everyone:
            if one.ended:
                return one.ended
            if self._missed[one.process] >= silent:
                return (
                    f"{one} gave no sign of life for {silent * self._beat:.0f} s, after update "
                    f"{one.update:,}: it was killed, stopped or cut off"
                )
        rests = any(one.doing == _RESTS for one in everyone) and not stopping
        self._still = 0 if moved or rests else self._still + 1
        if self._still * self._beat < self._seconds:
            return ""
        self._still = 0
        return self._standstill(everyone)

    def _standstill(self, everyone: list[Sign]) -> str:
        last = min(one.calls for one in everyone)
        behind = [one for one in everyone if one.calls == last]
        who = str(behind[0]) if len(behind) < len(everyone) else "the run"
        why = f", {behind[0].doing}" if len({one.doing for one in behind}) == 1 else ""
        return (
            f"{who} has not moved since update {behind[0].update:,}, for {self._seconds:g} s{why} "
            "(config.train.hang_seconds says how long an update may take)"
        )


class Heartbeat:
    """The signs of this process, and the thread that watches those of the others.

    A process alone has nobody to leave: it says that it stands still, and goes on.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        seconds: float,
        *,
        process: int = 0,
        count: int = 1,
        run: int = 0,
        end: Callable[[int], object] = os._exit,
    ):
        """Note who this is.

        Args:
            folder: the workdir, which all processes see.
            seconds: `train.hang_seconds`; 0: nobody watches.
            process: number of this process.
            count: number of processes.
            run: a number that all of them got, and no earlier run in the folder.
            end: ends the program at once.
        """
        self._folder, self._seconds, self._count, self._end = folder, seconds, count, end
        self._together = count > 1 and seconds > 0
        self._mine, self._beats = Sign(run, process, socket.gethostname()), 0
        self.beat = min(_BEAT * max(1.0, count / 16), (seconds or 1) / 8)
        self._watch = Watch(self._mine, count, seconds, self.beat)
        self._compiled: set[tuple[int, ...]] = set()  # shapes of calls
        self._open, self._stop = contextlib.ExitStack(), threading.Event()
        self._thread = threading.Thread(target=self._go_on, daemon=True)
        self._seen, self._settled, self._heard = {process}, False, ""

    def __enter__(self) -> "Heartbeat":
        """Begin, in a folder that may be another run's, or not there: errors alone are told."""
        if self._together:
            self._open.enter_context(_before_abort(self._last_words))
        if self._seconds > 0:
            self._thread.start()
        return self

    def settles(self) -> None:
        """The folder is this run's: its signs may lie there."""
        if self._together:
            (self._folder / SIGNS).mkdir(exist_ok=True)
            self._settled = True
            self._write()

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        """Leave the others in order, or tell them why."""
        if self._together and error is not None and not _agreed(error):
            self._part(error)
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._open.close()
        if self._settled and not self._mine.ended:
            self._path(self._mine.process).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the last one takes the folder
                (self._folder / SIGNS).rmdir()

    def reads(self) -> None:
        """The loop waits for a batch; the first may take long."""
        self._now(doing=_READS if self._compiled else _RESTS)

    def computes(self, shape: tuple[int, ...]) -> None:
        """It dispatches a call with tokens of this shape, and compiles the first one."""
        self._now(doing=_COMPUTES if shape in self._compiled else _RESTS)

    def dispatched(self, updates: range, shape: tuple[int, ...]) -> None:
        """It did, and waits for the call before."""
        self._compiled.add(shape)
        self._now(calls=self._mine.calls + 1, update=updates.stop, doing=_COMPUTES)

    def scored(self, more: bool) -> None:
        """It has scored a batch; before the first one, which is compiled, and the last it rests."""
        self._now(calls=self._mine.calls + 1, doing=_SCORES if more else _RESTS)

    def rests(self) -> None:
        """It saves, or does what else may take long."""
        self._now(doing=_RESTS)

    def tick(self) -> None:
        """One turn of the thread: give a sign, and judge those of all."""
        self._beats += 1
        if self._together:
            self._write()
            unheard = signals.waits() and signals.agreed() is None  # else they save for it
            early, signs = self._heard, self._read()
            why = early or self._watch.judge(signs, stopping=unheard)
            self._listen({*signs})  # a turn before, so that an error of all is told by each
            if why and not self._mine.ended:
                self._leave(why)
        elif why := self._watch.judge({0: self.sign()}):
            console.say(why)

    def _go_on(self) -> None:
        while not self._stop.wait(self.beat):
            self.tick()

    def _now(self, **news: Any) -> None:
        self._mine = dataclasses.replace(self._mine, **news)

    def sign(self) -> Sign:
        """What it says now."""
        return dataclasses.replace(self._mine, beat=self._beats)

    def _path(self, process: int) -> pathlib.Path:
        return self._folder / SIGNS / f"{process}.json"

    def _listen(self, told: set[int]) -> None:
        """Until each has given a sign in the folder, an error of one may be known without it."""
        self._seen |= told
        if len(self._seen) < self._count and not self._heard:
            self._heard = together.told(f"left/{self._mine.run}")

    def _write(self) -> None:
        """In place and of one length: no new block of a full disk, and seen at once over NFS."""
        if not self._settled:
            return
        text = json.dumps(dataclasses.asdict(self.sign())).ljust(2048)
        with contextlib.suppress(OSError):  # the next save tells it, and the others miss the sign
            file = os.open(self._path(self._mine.process), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(file, text.encode(), 0)
            finally:
                os.close(file)

    def _read(self) -> dict[int, Sign | None]:
        found: dict[int, Sign | None] = {self._mine.process: self.sign()}
        for process in set(range(self._count)) - set(found):
            try:
                sign = Sign(**json.loads(self._path(process).read_text()))
            except FileNotFoundError:
                continue
            except (OSError, ValueError, TypeError):  # the next turn reads it, or misses it
                found[process] = None
            else:
                if sign.run == self._mine.run:
                    found[process] = sign
        return found

    def _part(self, error: BaseException) -> None:
        """Tell the others of an error, unless it comes from one of them that is gone."""
        if _of_computing(error):
            self._watch.urgent = True
            time.sleep((_GONE + 3) * self.beat)  # the thread ends the program meanwhile
        what = str(error).partition("\n")[0].rstrip(".")[:_SHOWN] or type(error).__name__
        self._now(ended=f"{self._mine} ended: {what}")
        if not self._settled or len(self._seen) < self._count:
            together.tell(f"left/{self._mine.run}", self._mine.ended)
        self._write()
        time.sleep(3 * self.beat)  # where process 0 is gone nobody reads on
        code = 2 if isinstance(error, ValueError | OSError) else 1
        if isinstance(error, signals.Interrupted):
            code = 128 + error.number
        # JAX would wait at exit for the others, which have left.
        atexit.register(self._quit, code)

    def _leave(self, why: str) -> None:
        self._now(ended=why)
        self._write()
        if self._mine.process == 0:  # with it JAX would end the others, before they have read it
            time.sleep(3 * self.beat)
        newest = rundir.newest_update(self._folder)
        saved = f"the same command goes on from update {newest:,}" if newest else "nothing is saved"
        console.leave(f"{why}; {saved}")
        self._quit(1)

    def _last_words(self) -> None:
        """JAX ends every process when the first one is gone, from a thread of its own."""
        told = [one.ended for one in self._read().values() if one and one.ended]
        told += [self._heard] * bool(self._heard)
        usual = (
            f"JAX ended {self._mine} after update {self._mine.update:,}, as it does when process 0 "
            "is gone"
        )
        self._now(ended=next(iter(told), usual))
        self._leave(self._mine.ended)

    def _quit(self, code: int) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        self._end(code)


def watched(folder: pathlib.Path, seconds: float) -> Heartbeat:
    """The heartbeat of this process in a run; all processes call it together."""
    import jax

    return Heartbeat(
        folder,
        seconds,
        process=jax.process_index(),
        count=jax.process_count(),
        run=together.first_alone("run", lambda: time.time_ns() // 1000),
    )


def _agreed(error: BaseException) -> bool:
    """Whether all processes end with this error."""
    return isinstance(error, signals.Interrupted) and signals.agreed() is not None


def _of_computing(error: BaseException) -> bool:
    """Whether a computation failed, as it does in the others when a process is gone."""
    import jax

    return isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)


@contextlib.contextmanager
def _before_abort(action: Callable[[], object]) -> Iterator[None]:
    """Do `action` where a thread of C++ aborts the program, which no handler of Python hears."""
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: action())
    before = libc.signal(int(signal.SIGABRT), handler)
    try:
        yield
    finally:
        libc.signal(int(signal.SIGABRT), ctypes.c_void_p(before))
