"""Files that are there whole or not at all."""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that takes the name `path` once all of it is on the disk.

    Readers see the old file or the new one, even if the machine dies. Until then the bytes are in a
    hidden file in the same folder; an error removes it, a kill leaves it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a file in UTF-8, whole or not at all."""
    with whole(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes a readable JSON file, whole or not at all.

    Floats that are not finite, such as a perplexity beyond float64, become null: JSON has no number
    for them.
    """
    write_text(path, json.dumps(finite_or_none(value), indent=2, allow_nan=False) + "\n")


def finite_or_none(value: Any) -> Any:
    """The same tree of dicts and lists with None for every float that is not finite."""
    if isinstance(value, dict):
        return {key: finite_or_none(leaf) for key, leaf in value.items()}
    if isinstance(value, list):
        return [finite_or_none(leaf) for leaf in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: if there is no such file or it holds something else.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; copy it into the folder.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); copy the checkpoint again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object; copy the checkpoint again.")
    return values
