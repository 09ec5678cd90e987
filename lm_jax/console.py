"""What a person sees while a command works: lines that stay, and one that says what goes on.

On a terminal that line is kept up to date in place, in a notebook in an output of its own.
Elsewhere a plain line is written when a phase begins, and whenever `QUIET` seconds passed.
"""

import contextlib
import dataclasses
import errno
import math
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

QUIET = 5.0  # seconds without a sign that nobody has to bear
_KEPT = 30.0  # seconds between the lines of a phase that stay on a terminal
_TICK = 0.25  # seconds between looks at the clock
_WORTH = 1.0  # seconds of a phase that is told after its end
_BAR = 30  # most columns of a bar


@dataclasses.dataclass
class Phase:
    """Work that goes on, how far it is and what is known of it."""

    name: str
    total: int = 0  # of what is counted; 0: nothing is
    done: int = 0
    figures: tuple[str, ...] = ()  # most important first

    def __post_init__(self) -> None:
        """Start its clocks."""
        self.opened = time.monotonic()
        self.restart(self.done)

    def restart(self, done: int) -> None:
        """Measure the remaining time from here on, as after a compilation."""
        self.done = self._from = done
        self._began = time.monotonic()

    def update(self, done: int, *figures: str) -> None:
        """Say how far it is, and its figures, most important first."""
        self.done, self.figures = done, tuple(filter(None, figures))

    def line(self, width: float = math.inf) -> str:
        """One line of at most `width` columns; figures that do not fit are left out."""
        now = time.monotonic()
        share = [f"{100 * self.done // self.total}%"] if self.total else []
        if self._from < self.done < self.total:
            left = (now - self._began) / (self.done - self._from) * (self.total - self.done)
            rest = f"eta {clock(left)}"
        else:
            rest = clock(now - self.opened)
        figures = list(self.figures)
        while True:
            line = "  ".join([self.name, *share, *figures, rest])
            if len(line) <= width or not figures:
                return line
            figures.pop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The line, with a bar where there is room for one."""
        line = self.line(options.max_width - 1)
        room = min(_BAR, options.max_width - len(line) - 3)
        grid = Table.grid(padding=(0, 1))
        grid.add_column(no_wrap=True)
        if self.total and room >= 10:
            grid.add_row(line, ProgressBar(self.total, self.done, width=room))
        else:
            grid.add_row(line)
        yield grid


class _Lasting:
    """A stream that leads nowhere once its reader has gone: after `| head`, with its terminal.

    A training is worth more than its lines.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        self._try(self._stream.write, text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, method: Callable[..., Any], *arguments: str) -> None:
        try:
            method(*arguments)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class _Plain:
    """Lines in a file or a pipe."""

    def __init__(self, stream: TextIO):
        self.stream, self.phases = stream, list[Phase]()
        self.lock = threading.RLock()
        self.said = time.monotonic()

    def print(self, text: str) -> None:
        with self.lock:
            print(text, file=self.stream, flush=True)
            self.said = time.monotonic()

    def begin(self) -> None:
        self.print(self.phases[-1].name)

    def tick(self) -> None:
        if time.monotonic() - self.said > QUIET - 2 * _TICK:
            self.print(self.phases[-1].line())

    def end(self, phase: Phase) -> None:
        if phase.figures:
            self.print(phase.line())


class _Terminal(_Plain):
    """Lines on a terminal of any width."""

    def __init__(self, stream: TextIO):
        super().__init__(stream)
        self.console = Console(file=stream, highlight=False)
        self.live = Live(console=self.console, auto_refresh=False, transient=True)

    def print(self, text: str) -> None:
        with self.lock:
            width = self.console.width
            lines = textwrap.wrap(
                text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
            )
            self.console.print("\n".join(lines), markup=False, soft_wrap=True)
            self.said = time.monotonic()

    def begin(self) -> None:
        self.live.start()
        self.live.update(self.phases[-1], refresh=True)

    def tick(self) -> None:
        phase = self.phases[-1]
        if phase.figures and time.monotonic() - self.said > _KEPT:
            self.print(phase.line(self.console.width))
        self.live.update(phase, refresh=True)

    def end(self, phase: Phase) -> None:
        if not self.phases:
            self.live.stop()
        if phase.figures or time.monotonic() - phase.opened > _WORTH:
            self.print(phase.line(self.console.width))


class _Notebook(_Plain):
    """Lines under a cell, the live one in an output that is replaced."""

    def begin(self) -> None:
        if len(self.phases) > 1:
            self._update(self.phases[-1])
            return
        from IPython.display import display

        self.handle = display({"text/plain": self.phases[-1].line()}, raw=True, display_id=True)

    def tick(self) -> None:
        if time.monotonic() - self.said > 1:
            self._update(self.phases[-1])
            self.said = time.monotonic()

    def end(self, phase: Phase) -> None:
        self._update(self.phases[-1] if self.phases else phase)

    def _update(self, phase: Phase) -> None:
        self.handle.update({"text/plain": phase.line()}, raw=True)


_screen: _Plain | None = None  # while a phase is open
_silent = False
_aside = False


def use(*, silent: bool = False, aside: bool = False) -> None:
    """Choose where lines go.

    Args:
        silent: nowhere, as in all processes but the first.
        aside: to standard error, as for commands whose product is on standard output.
    """
    global _silent, _aside
    _silent, _aside = silent, aside


def say(text: str) -> None:
    """Print a line that stays."""
    if not _silent:
        (_screen or _open()).print(text)


def sheet() -> Console:
    """Where rich draws on standard output what is more than a line; for when no phase is open."""
    return Console(file=cast(TextIO, _Lasting(sys.stdout)))


def complain(text: str) -> None:
    """Print a line to standard error; for the end of a command, when no phase is open."""
    _open(sys.stderr).print(text)


def leave(text: str) -> None:
    """End what is shown, and complain; for a program that ends in the middle of a phase."""
    if (screen := _screen) and screen.phases:
        with screen.lock:
            phase = screen.phases[-1]
            screen.phases.clear()
            screen.end(phase)
    complain(text)


@contextlib.contextmanager
def phase(name: str, total: int = 0, done: int = 0) -> Iterator[Phase]:
    """Tell what goes on until the end of the block; a phase may hold others.

    Args:
        name: the work, as "tokenising".
        total: of what `Phase.update` counts; 0: nothing is counted.
        done: how much of it is done already.
    """
    global _screen
    one = Phase(name, total, done)
    if _silent:
        yield one
        return
    outermost = _screen is None
    screen = _screen or _open()
    ended = threading.Event()
    ticker = threading.Thread(target=_tick, args=(screen, ended), daemon=True)
    try:  # a signal may come at any moment from here on
        _screen = screen
        with screen.lock:
            screen.phases.append(one)
            screen.begin()
        if outermost:
            ticker.start()
        yield one
    finally:
        ended.set()
        screen.phases[:] = [phase for phase in screen.phases if phase is not one]
        if outermost:
            _screen = None
        if ticker.is_alive():
            ticker.join()
        with screen.lock:
            screen.end(one)


def going_on() -> str:
    """Name of the phase that goes on; empty if there is none."""
    return _screen.phases[-1].name if _screen and _screen.phases else ""


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _tick(screen: _Plain, ended: threading.Event) -> None:
    while not ended.wait(_TICK):
        with screen.lock:
            if screen.phases:
                screen.tick()


def _open(stream: TextIO | None = None) -> _Plain:
    stream = stream or (sys.stderr if _aside else sys.stdout)
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None and hasattr(shell, "kernel"):
        return _Notebook(stream)
    lasting = cast(TextIO, _Lasting(stream))
    return _Terminal(lasting) if stream.isatty() else _Plain(lasting)
