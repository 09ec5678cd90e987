"""Command-line flags, and arguments that stand for one; a mistake in them is one sentence."""

import faulthandler
import importlib.util
import inspect
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NoReturn

from absl import flags, logging
from ml_collections import config_flags

from lm_jax.config import manual
from lm_jax.config.fields import Config
from lm_jax.config.section import ConfigError, advice, field_types, get, named_fields, unknown_field
from lm_jax.config.values import Curve, Duration, RopeScaling, Span

# What a command may be about, and what its usage calls it.
SUBJECTS = {"config": "CONFIG", "workdir": "RUN", "log": "LOG"}


def parse_flags(
    given: flags.FlagValues,
    argv: Sequence[str] | None,
    about: str | None,
    *,
    subject: Sequence[str] = (),
    which: Callable[[str], str] | None = None,
    others: str = "",
) -> list[str]:
    """Parse a command's arguments; `--help` ends it with exit code 0, a mistake with 2.

    Args:
        given: the flags that it defined; they have their values afterwards.
        argv: the program's name and its arguments; None: those of the process.
        about: what it does, for `--help`.
        subject: flags of which exactly one must be given, of config (which is defined here, with
            its fields), workdir and log. An argument without a flag is its value.
        which: of several subjects, the one that such an argument is the value of.
        others: what the usage calls arguments that are no flags, if there is no subject.

    Returns:
        These arguments.
    """
    program, *arguments = sys.argv if argv is None else argv
    takes = others or " | ".join(SUBJECTS[name] for name in subject)
    usage = f"{_called(program)} {takes} [--FLAG=VALUE ...]"
    if not {"-h", "--help"}.isdisjoint(arguments):
        if "config" in subject:
            _define_config(given, program, [])
        manual.show(usage, about or "", given, fields=list(subject) == ["config"])
        sys.exit()
    if not arguments and takes:
        misuse(f"usage: {usage}; --help tells more")
    faulthandler.enable(2)
    logging.use_absl_handler()
    try:
        named, rest = _split(arguments, given)
        if subject:
            if len({_name(word) for word in named} & set(subject)) + len(rest) != 1:
                raise ConfigError(f"give exactly one {takes.replace(' |', ' or')}; see --help.")
            choose = which or (lambda _: subject[0])
            named += [f"--{choose(argument)}={argument}" for argument in rest]
            rest = []
        if "config" in subject:
            named = _define_config(given, program, named)
        given.append_flag_values(flags.FLAGS)  # --verbosity and what else libraries define
        flags.FLAGS.mark_as_parsed()
        rest = given([program, *named, "--", *rest])[1:]
    except (ValueError, OSError, flags.Error) as error:
        misuse(_sentence(error, given))
    if rest and not others:
        misuse(f"{rest[0]}: not a flag; see --help.")
    return rest


def _called(program: str) -> str:
    """How a program was called: `python -m lm_jax.main`, `python scripts/sweep.py`, `lm-jax`."""
    path = pathlib.Path(program)
    if path.suffix != ".py":
        return program
    *_, own = ".".join(path.with_suffix("").parts).split("lm_jax.")
    if "lm_jax" in path.parts[:-1]:
        return f"python -m lm_jax.{own.removesuffix('.__main__')}"
    return f"python {program}"


def _name(word: str) -> str:
    """The name of the flag in `--name=value` or `--name`."""
    return word.lstrip("-").partition("=")[0]


def _split(arguments: Sequence[str], given: flags.FlagValues) -> tuple[list[str], list[str]]:
    """The flags, each in one word with its value, and the arguments that are none."""
    alone = {name for known in (given, flags.FLAGS) for name in known if known[name].boolean}
    alone |= {f"config.{path}" for path, value in named_fields(Config()) if isinstance(value, bool)}
    named: list[str] = []
    rest: list[str] = []
    words = [*arguments]
    while words:
        word, *words = words
        if word == "--":
            return named, rest + words
        if not word.startswith("-"):
            rest.append(word)
        elif "=" in word or not {_name(word), _name(word).removeprefix("no")}.isdisjoint(alone):
            named.append(word)
        elif words and not words[0].startswith("--"):
            named.append(f"{word}={words.pop(0)}")
        elif _name(word) in given or _name(word).startswith("config."):
            raise ConfigError(f"{word}: has no value; write {word}=VALUE.")
        else:
            named.append(word)
    return named, rest


def _define_config(given: flags.FlagValues, program: str, named: Sequence[str]) -> list[str]:
    """Define `--config` and what it overrides; returns the flags with that one in front.

    Raises:
        FileNotFoundError: if there is no such file.
        ConfigError: if it is no config, or a field that is overridden does not exist.
    """
    check_names([path for word in named if (path := _name(word).partition("config.")[2])])
    about = "File, or name of a shipped config; FILE:ARM where it has arms."
    specs = [word.partition("=")[2] for word in named if _name(word) == "config"]
    if not specs:
        flags.DEFINE_string("config", None, about, given)
        return [*named]
    spec = find_config(specs[-1])
    cfg = load_config(spec)
    named = [f"--config={spec}", *(word for word in named if _name(word) != "config")]
    for kind in (Duration, Curve, RopeScaling, Span):
        config_flags.register_flag_parser_for_type(kind, flags.ArgumentParser())
    config_flags.DEFINE_config_dataclass(
        "config", cfg, about, given, sys_argv=[program, *named], parse_fn=lambda _: cfg
    )
    return named


def _sentence(error: Exception, given: flags.FlagValues) -> str:
    """What is wrong with the flags."""
    if isinstance(error, flags.UnrecognizedFlagError):
        name = f"--{error.flagname}"
        meant = [path for path, _ in named_fields(Config()) if error.flagname in _words(path)]
        if "config" in given and meant:
            fields = " or ".join(f"--config.{path}" for path in meant)
            return f"{name}: there is no such flag; did you mean {fields}?"
        own = [flag for flag in given if flag not in flags.FLAGS and ("." in name) >= ("." in flag)]
        known = [f"--{flag}" for flag in own]
        return f"{name}: there is no such flag; {advice(name, known)}"
    text = str(error)
    if wrong := re.match(r"flag --(\w+)=(.*): (?:invalid|could not|\('Non-b|value should)", text):
        name, value = wrong.groups()
        if choices := getattr(given[name].parser, "enum_values", None):
            return f"--{name}: {value!r} does not exist; {advice(value, choices)}"
        return f"--{name}: {value!r} is no {given[name].flag_type()}; give one."
    if missing := re.fullmatch(r"flag --(\w+)=None: .* other than None\.", text):
        return f"--{missing[1]} is missing; give it."
    if wrong := re.match(r"flag --config\.([\w.]+)=(.*?): (?!config\.)", text):
        kind = type(get(Config(), wrong[1])).__name__
        return f"config.{wrong[1]}: {wrong[2]!r} is no {kind}; give one."
    return text


def _words(path: str) -> set[str]:
    """What people call the field at a path."""
    name = path.rpartition(".")[2]
    return {name, *name.split("_")}


def check_names(paths: Sequence[str]) -> None:
    """Raise ConfigError if a dotted path names no field."""
    for path in paths:
        section, place = Config, "config"
        for name in path.split("."):
            types = field_types(section)
            if not types:
                raise ConfigError(f"config.{path}: {place} has no fields; give --{place}.")
            place = f"{place}.{name}"
            if name not in types:
                raise ConfigError(unknown_field(place.removeprefix("config."), list(types)))
            section = types[name]
        if types := field_types(section):
            raise ConfigError(
                f"config.{path}: is a section; give one of its fields, as config.{path}."
                f"{next(iter(types))}."
            )


def find_config(spec: str | os.PathLike) -> str:
    """FILE or FILE:ARM for FILE, NAME, FILE:ARM or NAME:ARM, with the name of a shipped config.

    `configs/NAME.py`, which names its file in a checkout, is that name everywhere else.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    path, colon, arm = os.path.expanduser(spec).partition(":")
    known = manual.shipped()
    if pathlib.Path(path).is_file():
        return f"{path}{colon}{arm}"
    name = re.sub(r"configs/(\w+)\.py", r"\1", path)
    if name in known:
        return f"{known[name]}{colon}{arm}"
    hint = advice(pathlib.Path(path).stem, list(known)) if known else "give the path of a file."
    raise FileNotFoundError(f"{path}: no such config; {hint}")


def is_config(spec: str) -> bool:
    """Whether a text names a config, which need not be there, rather than a run or a log."""
    path = spec.partition(":")[0]
    return path.endswith(".py") or path in manual.shipped()


def load_config(spec: str | os.PathLike) -> Config:
    """The config of a file or a shipped name; with arms, of FILE:ARM or NAME:ARM.

    Raises:
        FileNotFoundError: if there is no such file.
        ConfigError: if it has no such arm, or is no config.
    """
    path, _, arm = find_config(spec).partition(":")
    try:
        module = load_module(pathlib.Path(path))
        if not hasattr(module, "get_config"):
            raise ConfigError(f"{path}: has no function get_config, which returns the config.")
        takes = inspect.signature(module.get_config).parameters.values()
        if not takes if arm else any(one.default is one.empty for one in takes):
            remedy = f"has no arms; leave out :{arm}" if arm else f"has arms; name one, {path}:ARM"
            raise ConfigError(f"{path}: {remedy}.")
        cfg = module.get_config(*([arm] if arm else []))
    except ConfigError:
        raise
    except Exception as error:
        passed = traceback.extract_tb(error.__traceback__)
        lines = [at.lineno for at in passed if at.filename == str(pathlib.Path(path).absolute())]
        line = getattr(error, "lineno", None) or [0, *lines][-1]
        what = f"{type(error).__name__}: {getattr(error, 'msg', error)}".rstrip(".")
        raise ConfigError(f"{path}, line {line}: {what}.") from error
    if not isinstance(cfg, Config):
        raise ConfigError(f"{path}: get_config returns a {type(cfg).__name__}; return a Config.")
    return cfg


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
