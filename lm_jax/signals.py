"""SIGINT, SIGTERM and SIGHUP: stop at once, or after what must be whole."""

import contextlib
import functools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lm_jax import console

if TYPE_CHECKING:
    import jax

_NUMBERS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
_PATIENCE = 3.0  # seconds that a program which has nothing to lose may stay deaf
_received: signal.Signals | None = None
_shared: signal.Signals | None = None  # of any process, as all of them read it
_rung = False  # whether one came, be the main thread too busy to hear it
_holding = ""  # what must be whole before a signal stops the program
_installed = False


class Interrupted(KeyboardInterrupt):
    """A signal stopped the program.

    Attributes:
        number: the signal.
        when: what was going on; empty if nothing was told.
        then: what follows from it.
        again: whether it did not wait, as a second one, for what computes.
    """

    def __init__(self, number: signal.Signals, when: str = ""):
        """Note the signal and the phase that it came in."""
        phase = console.going_on()
        self.number, self.when = number, when or (phase and f"while {phase}")
        self.then, self.again = "", False

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: where the loop was is no news."""
        return [str(self)]

    def __str__(self) -> str:
        """As it is told."""
        return f"stopped by {self.number.name} {self.when}".rstrip() + self.then


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Raise `Interrupted` at a signal, in the block; in the main thread only.

    A SIGHUP that is ignored, as under nohup, is still ignored.
    """
    global _installed, _received, _shared, _rung
    if _installed and threading.current_thread() is threading.main_thread():
        for number in _NUMBERS:
            if signal.getsignal(number) is _handle:  # but for XLA, which several processes asked
                signal.signal(number, _handle)
    if _installed or threading.current_thread() is not threading.main_thread():
        yield
        return
    _installed = True
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    old = {number: signal.signal(number, _handle) for number in _NUMBERS - ignored}
    hook, told = sys.unraisablehook, sys.excepthook
    sys.unraisablehook = functools.partial(_raise_again, hook)
    sys.excepthook = functools.partial(_tell, told)
    try:
        yield
    except ImportError as error:
        if _received is None:
            raise
        raise Interrupted(_received) from error  # a C extension gave up for it
    finally:
        sys.unraisablehook, sys.excepthook = hook, told
        for number, handler in old.items():
            signal.signal(number, handler)
        _received, _shared, _rung = None, None, False
        _installed = False  # what trains next may be a thread


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """End a program that has nothing to lose even if it is deaf, as Python is while XLA compiles.

    For the main thread of a command; a notebook must outlive the signal.
    """
    ear, bell = socket.socketpair()
    bell.setblocking(False)
    before = signal.set_wakeup_fd(bell.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(ear,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        bell.close()


def _handle(number: int, frame: Any) -> None:
    global _received
    first, _received = _received is None, signal.Signals(number)
    if not (_holding and first):
        stopped = Interrupted(_received)
        stopped.again = bool(_holding)
        raise stopped


def _raise_again(hook: Callable[[Any], object], lost: Any) -> None:
    """Send a signal again whose exception a destructor, or the garbage collection, has swallowed.

    JAX collects garbage of its own in a callback, so that this is no rare case.
    """
    global _received
    if not isinstance(lost.exc_value, Interrupted):
        hook(lost)
        return
    _received = None
    threading.Timer(0.05, _again, [lost.exc_value.number]).start()


def _tell(hook: Callable[..., object], kind: type, error: BaseException, trace: Any) -> None:
    """Leave out what a C extension prints of a signal before it gives up for it."""
    if not isinstance(error, Interrupted):
        hook(kind, error, trace)


def _again(number: signal.Signals) -> None:
    if _installed:
        signal.pthread_kill(threading.main_thread().ident or 0, number)


def _listen(ear: socket.socket) -> None:
    global _rung
    with ear:
        while byte := ear.recv(1):
            if (number := byte[0]) not in _NUMBERS:
                continue
            _rung = True
            time.sleep(_PATIENCE)
            if _holding:
                console.say(f"{signal.Signals(number).name}: stopping after {_holding}")
            elif _installed and _received is None:
                console.leave(str(Interrupted(signal.Signals(number))))
                os._exit(128 + number)


@contextlib.contextmanager
def held(until: str = "this update") -> Iterator[None]:
    """Only note the first signal in the block, for `agreed`; a second one is not held.

    Args:
        until: what must be whole before; empty: nothing is held.
    """
    global _holding
    before, _holding = _holding, until
    try:
        yield
    finally:
        _holding = before


@contextlib.contextmanager
def let_through(until: str = "the next update") -> Iterator[None]:
    """Raise `Interrupted` at once again, in a block of what is `held`.

    One of several processes must not leave the others, which compute with it: they go on.

    Args:
        until: where several stop together.
    """
    import jax  # late, for the first line of a command comes before it

    with held(until if jax.process_count() > 1 else ""):
        if _received is not None and not _holding:
            raise Interrupted(_received)
        yield


def waits() -> bool:
    """Whether a signal came that the main thread has not answered yet; for another thread."""
    return _rung or _received is not None


class Shared:
    """The signal that any of several processes received, found by their devices.

    The answer is read with the metrics of the same call, so that nothing waits for it, and all
    processes read the same one before the same update.
    """

    def __init__(self, mesh: "jax.sharding.Mesh"):
        """Place "none" on the devices of a mesh; most calls need no more."""
        import jax
        import numpy as np
        from jax.sharding import NamedSharding, PartitionSpec

        rows, whole = (NamedSharding(mesh, PartitionSpec(x)) for x in (mesh.axis_names, None))

        def put(number: int) -> jax.Array:
            mine = np.full(jax.local_device_count(), number, np.int32)
            return jax.make_array_from_process_local_data(rows, mine)

        self._put, self._none = put, put(0)
        self._max = jax.jit(lambda x: x.max(keepdims=True), out_shardings=whole)

    def ask(self) -> "jax.Array":
        """Dispatch the question; the array [1] is for `note`."""
        return self._max(self._none if _received is None else self._put(int(_received)))


def note(answer: Any) -> None:
    """Take what `Shared.ask` gave, once it is on the host, for `agreed`."""
    global _shared
    _shared = signal.Signals(answer.max()) if answer.any() else None


def stop_together(mesh: "jax.sharding.Mesh", when: str) -> None:
    """Raise `Interrupted` in all of several processes if one of them received a signal.

    Args:
        mesh: of the run.
        when: where they are, for a person.
    """
    import jax

    if jax.process_count() > 1:
        note(jax.device_get(Shared(mesh).ask()))
        if number := agreed():
            raise Interrupted(number, when)


def agreed() -> signal.Signals | None:
    """The signal that any process received, so that all stop after the same update."""
    import jax

    return _received if jax.process_count() == 1 else _shared
