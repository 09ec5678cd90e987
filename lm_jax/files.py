"""Files that are there whole or not at all."""

import json
import math
import os
import pathlib
from pathlib import Path
from typing import IO, Any


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write a readable JSON file in one move, so that a reader never sees half of it.

    What is not finite, as a perplexity beyond float64, becomes null: JSON has no number for it.
    """
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(finite_or_none(value), indent=2, allow_nan=False) + "\n")
    temporary.replace(path)


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


def sync(file: IO) -> None:
    """Puts on the disk what was written: else the machine may die and only the name be there."""
    file.flush()
    os.fsync(file.fileno())
