"""SIGTERM and SIGINT: save and stop."""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class Interrupted(SystemExit):
    """The run was asked to stop, saved its state and can be resumed."""


class Signals:
    """Turns SIGTERM and SIGINT into a request to save and stop; a second one stops at once."""

    received: str | None = None

    def __enter__(self) -> "Signals":
        """Install the handlers (in the main thread only: notebooks may train in another)."""
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: Any) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def agreed(self) -> str | None:
        """The signal that any process received, so that all stop after the same update."""
        if jax.process_count() == 1:
            return self.received
        number = signal.Signals[self.received] if self.received else 0
        numbers = multihost_utils.process_allgather(number)
        return signal.Signals(numbers.max()).name if numbers.any() else None

    def __exit__(self, *error: object) -> None:
        """Put the old handlers back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
