"""Who has something where there are no locks: a marker that is renewed while it is held."""

import contextlib
import datetime
import json
import os
import platform
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

REFRESH = 10.0  # seconds between the signs of life of one who holds a marker
SETTLE = 1.0  # seconds after which all who take a marker at once have written theirs
_MISSED = 3  # signs of life without which nobody holds it

_held: set[str] = set()  # tokens of this process


def process_lives(process: int) -> bool:
    """Whether there is a process of this number on this machine."""
    with contextlib.suppress(PermissionError, OverflowError):  # another user's, or no such number
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
    return True


def wall_clock() -> str:
    """The time, in words."""
    return datetime.datetime.now().isoformat(" ", timespec="seconds")


class Marker(Protocol):
    """A place, where there are no locks, for a few bytes that say who has something."""

    @property
    def name(self) -> str:
        """Where it is, in words."""

    def read(self) -> bytes | None:
        """What stands there; None if nothing does."""

    def write(self, content: bytes) -> None:
        """Write it, whole or not at all."""

    def remove(self) -> None:
        """Remove it, if it is there."""


@contextlib.contextmanager
def marked(marker: Marker, taken: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Holds a marker, and renews it by a thread, so that others see a sign of life.

    Who is dead, or gave none for a while, holds it no more. Of machines no clock is compared: a
    sign of life from another one is one that is seen to change.

    Args:
        marker: its place.
        taken: called with the process that has it, in words; if it returns, that one is waited for.

    Returns:
        Whether it is still held: another process takes over what gave no sign of life.

    Raises:
        ValueError: if something else stands there; it stays as it is.
    """
    own = {"process": os.getpid(), "host": platform.node(), "since": wall_clock()}
    own["token"] = token = secrets.token_hex(8)

    def mine() -> bool:
        return (_owner(marker) or {}).get("token") == token

    def sign() -> None:
        marker.write(json.dumps(own | {"sign": time.time()}).encode())

    def renew() -> None:
        while not ended.wait(REFRESH):
            try:
                if not mine():
                    print(f"{marker.name}: taken over by another process", file=sys.stderr)
                    return
                sign()
            except OSError as error:  # it may come back, and others wait for a while
                print(f"{marker.name}: not renewed ({error})", file=sys.stderr)

    while not mine():
        told = False
        while owner := _living(marker):
            if not told:
                taken(_in_words(owner, marker))
            told = True
            time.sleep(REFRESH / 10)
        sign()
        time.sleep(SETTLE)
    _held.add(token)
    ended = threading.Event()
    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield mine
    finally:
        ended.set()
        thread.join()
        _held.discard(token)
        try:
            if mine():
                marker.remove()
        except OSError as error:  # what the block raised says more
            print(f"{marker.name}: not removed ({error})", file=sys.stderr)


def _owner(marker: Marker) -> dict[str, Any] | None:
    """Who has a marker; None if nobody does."""
    content = marker.read()
    if content is None:
        return None
    try:
        found: dict[str, Any] = json.loads(content)
        return {**found, "process": int(found["process"]), "sign": float(found["sign"])}
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"{marker.name} is no marker of lm_jax; move it away, or name another folder."
        ) from error


def _living(marker: Marker) -> dict[str, Any] | None:
    """Who has a marker, once a sign of life was seen; None if nobody does, or gives none."""
    first = found = _owner(marker)
    end = time.monotonic() + _MISSED * REFRESH
    while found is not None and time.monotonic() < end:
        if found != first:
            return found
        # A container that is started again has the same host name, and the same number 1.
        elsewhere = found["process"] == os.getpid() and found.get("token") not in _held
        if found.get("host") == platform.node() and not elsewhere:
            if not process_lives(found["process"]):
                return None
            if time.time() - found["sign"] < _MISSED * REFRESH:
                return found
        time.sleep(REFRESH / 10)
        found = _owner(marker)
    return None


def _in_words(owner: dict[str, Any], marker: Marker) -> str:
    age = max(0, round(time.time() - owner["sign"]))
    return (
        f"process {owner['process']} on {owner.get('host')} (since {owner.get('since')}, "
        f"last sign of life {age} s ago; if it is gone, remove {marker.name})"
    )
