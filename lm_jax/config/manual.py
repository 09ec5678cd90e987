"""What `--help` tells: the flags of a command, the shipped configs and the fields of a config."""

import argparse
import ast
import inspect
import itertools
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from absl import flags
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import lm_jax
from lm_jax.config import fields
from lm_jax.config.fields import Config
from lm_jax.config.section import field_types, get, marks

WIDEST = 110  # columns; text in wider ones is hard to read
Row = tuple[str, str, str]  # name, default, meaning


def shipped() -> dict[str, pathlib.Path]:
    """The configs by name: those of the package, and those in `./configs`, which go before them."""
    package = pathlib.Path(lm_jax.__file__).parent
    inside = package / "configs"  # of a wheel; a checkout has them beside the package
    folders = (inside if inside.is_dir() else package.parent / "configs", pathlib.Path("configs"))
    found = {path.stem: path for folder in folders for path in folder.glob("*.py")}
    return dict(sorted(found.items()))


def meanings() -> dict[str, str]:
    """What each field of the config means, by dotted path: its comments in `fields.py`.

    A comment may stand on the first line of a field or, alone, above it.
    """
    found: dict[str, str] = {}
    section, words = "", []
    for line in inspect.getsource(fields).splitlines():
        code, _, comment = line.partition("# ")
        words += [comment] if comment else []
        if line.startswith("class "):
            section = re.split(r"\W|Config", line)[1].lower()
        if field := re.match(r"    (\w+): ", code):
            found[f"{section}.{field[1]}".lstrip(".")] = " ".join(words)
        if code.strip():
            words = []
    return {path: found[path] for path, _ in marks(Config)}


def show(usage: str, about: str, given: flags.FlagValues, *, fields: bool) -> None:
    """Print the help of a command.

    Args:
        usage: its first line.
        about: what the command does; lines that are indented are examples.
        given: its flags.
        fields: whether it takes a config, whose fields and shipped files are told too.
    """
    console = Console(highlight=False)
    console.width = min(console.width, WIDEST) if console.is_terminal else 80
    console.print(Text(f"usage: {usage}\n"))
    for paragraph in about.strip().split("\n\n"):
        example = paragraph.startswith(" ")
        console.print(Text(f"{paragraph if example else ' '.join(paragraph.split())}\n"))
    _print_rows(console, "Flags", [_flag_row(given[name]) for name in sorted(given)])
    if not fields:
        return
    _print_rows(console, "Configs", [(name, _summary(path)) for name, path in shipped().items()])
    means = meanings()
    for section, paths in itertools.groupby(means, lambda path: path.rpartition(".")[0]):
        title = "Fields of a config, as --config.seed=1 and --config.optim.peak_lr=1e-3"
        if section:
            title = f"{section}: {inspect.getdoc(field_types(Config)[section])}"
        _print_rows(console, title, [_field_row(path, means) for path in paths])


def script_parser(about: str | None) -> argparse.ArgumentParser:
    """A parser whose help tells defaults, and the first two paragraphs of a script's docstring."""
    about = "\n\n".join(inspect.cleandoc(about or "").split("\n\n")[:2])
    return argparse.ArgumentParser(description=about, formatter_class=_WithDefaults)


class _WithDefaults(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Neither fills the description nor names a default that is nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


def _print_rows(console: Console, title: str, rows: Sequence[Sequence[str]]) -> None:
    """A title, and names with what is known of them in columns."""
    console.print(Text(title, style="bold"))
    table = Table.grid(padding=(0, 2, 0, 0))
    *known, _ = rows[0]
    for style, width, _ in zip(("cyan", "green"), (20, 15), known, strict=False):
        table.add_column(style=style, min_width=width)
    table.add_column()
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(Padding(table, (0, 0, 0, 2)))
    console.print()


def _flag_row(flag: Any) -> Row:
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
    default = "" if flag.default in (None, []) else str(flag.default)
    return name, default, flag.help.partition(";\n")[0]  # what absl adds to a repeated one


def _field_row(path: str, means: dict[str, str]) -> Row:
    choices = " | ".join(dict(marks(Config))[path].get("choices", ()))
    meaning = "; ".join(filter(None, (choices, means[path])))
    return path.rpartition(".")[2], str(get(Config(), path)), meaning


def _summary(path: pathlib.Path) -> str:
    """The first line of a module's docstring; the module is not imported."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
