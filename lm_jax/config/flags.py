"""Command-line flags that hold a config; a mistake in them is one sentence."""

import faulthandler
import importlib.util
import pathlib
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from absl import flags, logging
from ml_collections import config_flags

from lm_jax.config.fields import Config
from lm_jax.config.section import ConfigError, field_types, unknown_field
from lm_jax.config.values import Curve, Duration


def define_config(given: flags.FlagValues, argv: Sequence[str] | None) -> None:
    """Define `--config=FILE` and `--config.a.b=value`; end with exit code 2 if one is not there.

    Args:
        given: the flags of a command.
        argv: the program's name and its arguments; None: those of the process.
    """
    argv = list(sys.argv if argv is None else argv)
    for argument in argv:
        name, _, path = argument.partition("=")
        # A string for `get_config` may follow the path after a colon.
        if name in ("-config", "--config") and not pathlib.Path(path.split(":")[0]).exists():
            misuse(f"--config={path}: no such file; give a path as configs/quickstart.py.")
    overrides = (re.match(r"--?(?:no)?config\.([^=]+)", argument) for argument in argv)
    try:
        check_names([match[1] for match in overrides if match])
    except ConfigError as error:
        misuse(str(error))
    for kind in (Duration, Curve):
        config_flags.register_flag_parser_for_type(kind, flags.ArgumentParser())
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file, as configs/quickstart.py; its fields are --config.a.b.",
        given,
        sys_argv=argv,
    )


def parse_flags(
    given: flags.FlagValues, argv: Sequence[str] | None, about: str | None, *, others: bool = False
) -> list[str]:
    """Parse a command's arguments; `--help` ends it with exit code 0, a mistake with 2.

    Args:
        given: the flags that it defined; they have their values afterwards.
        argv: the program's name and its arguments; None: those of the process.
        about: what it does, for `--help`.
        others: whether it takes arguments that are no flags.

    Returns:
        These arguments.
    """
    argv = sys.argv if argv is None else argv
    if not {"-h", "--help"}.isdisjoint(argv):
        print(about, given.get_help(include_special_flags=False), sep="\n")
        sys.exit()
    faulthandler.enable(2)
    logging.use_absl_handler()
    given.append_flag_values(flags.FLAGS)  # --verbosity and what else libraries define
    given.set_gnu_getopt()
    flags.FLAGS.mark_as_parsed()
    try:
        rest = given(argv)[1:]
    except (ConfigError, flags.Error) as error:
        # What `get_config` refuses comes with a traceback before it.
        misuse(re.split(r"\n(?:[\w.]*ConfigError|ValueError): ", str(error))[-1].strip())
    if rest and not others:
        misuse(f"{rest[0]}: not a flag; see --help.")
    return rest


def check_names(paths: Sequence[str]) -> None:
    """Raise ConfigError if a dotted path names no field."""
    for path in paths:
        section: Any = Config
        parts = path.split(".")
        for depth, name in enumerate(parts):
            types = field_types(section)
            if name not in types:
                valid = list(types) or [parts[depth - 1]]
                raise ConfigError(unknown_field(".".join(parts[: depth + 1]), valid))
            section = types[name]


def load_config(spec: str) -> Config:
    """The config of FILE or FILE:ARM.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has no such arm.
    """
    path, _, arm = spec.partition(":")
    return load_module(pathlib.Path(path)).get_config(*([arm] if arm else []))


def load_module(path: pathlib.Path) -> ModuleType:
    """A Python file, as of a config, as a module.

    Raises:
        FileNotFoundError: if there is none.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(f"{path}: no such file; give a path as configs/quickstart.py.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def misuse(message: str) -> NoReturn:
    """End the program with the message and exit code 2."""
    print(message, file=sys.stderr)
    sys.exit(2)
