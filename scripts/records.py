"""The records in `scripts/results/`, and how their figures are written in Markdown."""

import functools
import json
import pathlib
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import gpu_table
from gpu_table import table

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results"
__all__ = ["ROOT", "RESULTS", "bullets", "figure", "measured", "prose", "record", "tabled", "told"]


@functools.cache
def record(name: str) -> Any:
    """What a file of `scripts/results/` holds; of a `.jsonl`, its rows."""
    path = RESULTS / name
    return gpu_table.read(path) if path.suffix == ".jsonl" else json.loads(path.read_text())


def figure(name: str) -> Any:
    """A figure that has no file of its own, from `measured.json`."""
    return record("measured.json")["figures"][name]


def prose(*sentences: str) -> str:
    """Sentences as a paragraph of lines of at most 100 columns."""
    return textwrap.fill(" ".join(sentences), 100, break_long_words=False, break_on_hyphens=False)


def tabled(heads: Sequence[str], lines: Iterable[Sequence[object]], *sentences: str) -> str:
    """A table, and sentences below it."""
    return table(heads, lines) + "\n" + prose(*sentences)


def bullets(*points: str) -> str:
    """A list; each point begins with a dash."""
    fill = functools.partial(textwrap.fill, width=100, subsequent_indent="  ")
    return "\n".join(fill(f"- {p}", break_long_words=False, break_on_hyphens=False) for p in points)


def told(found: dict[str, Any]) -> str:
    """Device, date and command of a record in one sentence."""
    return f"Measured on {found['device']}, {found['date']}, by `{found['command']}`."


def measured(*names: str) -> str:
    """The same of files of `scripts/results/` that were measured on one device, and their names."""
    about = [record("measured.json")["files"][name] for name in names]
    commands = " and ".join(f"`{command}`" for command in {a["command"]: 0 for a in about})
    places = " and ".join(f"`scripts/results/{name}`" for name in names)
    when = f"{about[0]['device']}, {about[0]['date']}"
    return f"Measured on {when}, by {commands}; recorded in {places}."
