"""Errors of orbax and tensorstore: told once, by those who catch them, and those of the disk."""

import functools
import logging
import re
import sys
from collections.abc import Callable
from typing import Any


def hush_orbax() -> None:
    """Leave the errors of orbax to those who catch them; it tells each several times."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_unlike_raised)
    if getattr(sys.unraisablehook, "func", None) is not _unraisable:
        sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)


def disk_error(error: Exception) -> int | None:
    """The number of the system's error that tensorstore tells in words; None if there is none."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return number and int(number[1])


def _unlike_raised(record: logging.LogRecord) -> bool:
    """Whether orbax tells something else than the traceback of an error that it raises anyway."""
    return not (record.exc_info and "orbax" in record.pathname + record.getMessage())


def _unraisable(otherwise: Callable[[Any], object], lost: Any) -> None:
    """Leave out what orbax has left of a checkpoint that it gave up, pages for every leaf.

    Coroutines say it when they are collected, and threads that look for their loop; the error
    itself was raised before.
    """
    source = getattr(getattr(lost.object, "cr_code", None), "co_filename", "")
    own = "orbax" in source or str(lost.exc_value) == "Event loop is closed"
    if not own or isinstance(lost.exc_value, KeyboardInterrupt):
        otherwise(lost)
