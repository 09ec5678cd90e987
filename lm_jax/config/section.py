"""Sections of the config: what a field may hold, and assignment that checks names and types."""

import contextlib
import dataclasses
import difflib
import math
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from lm_jax import page
from lm_jax.config.values import Curve, Duration, RopeScaling, Span

T = TypeVar("T")
Number = TypeVar("Number", int, float)
# Types that are written as text, and what reads them.
_WRITTEN: dict[Any, Any] = {
    Duration: Duration.parts,
    Curve: Curve.points,
    Span: Span.updates,
    RopeScaling: RopeScaling.parts,
}


class ConfigError(ValueError):
    """A config field that is unknown, of the wrong type or impossible."""


@contextlib.contextmanager
def errors_of(field: str) -> Iterator[None]:
    """What is wrong with files inside becomes an error of the field that names them."""
    try:
        yield
    except ConfigError:
        raise
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"{field}: {error}") from error


class Bound(NamedTuple):
    """What must hold of a number, and what an error says otherwise."""

    holds: Callable[[float], bool]
    otherwise: str


def positive(default: Number) -> Number:
    """A field above 0."""
    return _marked(default, bound=Bound(lambda x: x > 0, "must be above 0; give a positive number"))


def not_negative(default: Number) -> Number:
    """A field of 0 or more."""
    return _marked(default, bound=Bound(lambda x: x >= 0, "is negative; give 0 or more"))


def limited(default: int, *, below: int, why: str) -> int:
    """A field of 0 or more that has a limit; `why` completes "is negative, or ..."."""
    otherwise = f"is negative, or {why}; give 0 or more and below {below:,}"
    return _marked(default, bound=Bound(lambda x: 0 <= x < below, otherwise))


def share(default: float) -> float:
    """A field in [0, 1)."""
    otherwise = "is no share; give 0 or more and below 1"
    return _marked(default, bound=Bound(lambda x: 0 <= x < 1, otherwise))


def one_of(choices: str, *, default: str) -> str:
    """A field that is one of a few words, which `choices` lists with spaces between them."""
    return _marked(default, choices=choices.split())


def incidental(default: T) -> T:
    """A field that says where a run lies, how it is fed or what it reports.

    No number of the trained model depends on it but by rounding. `default` may have a bound or
    choices.
    """
    return _marked(default, incidental=True)


def _marked(default: Any, **new: Any) -> Any:
    """A dataclass field with marks; if `default` is such a field, it keeps its own as well."""
    if isinstance(default, dataclasses.Field):
        default, new = default.default, {**default.metadata, **new}
    return dataclasses.field(default=default, metadata=new)


class Section:
    """Base of the config's dataclasses: every assignment checks the name and the type."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field, or raise ConfigError naming it and the remedy."""
        types = field_types(type(self))
        path = ".".join(filter(None, (_place(type(self)), name)))
        if name not in types:
            raise ConfigError(unknown_field(path, list(types)))
        object.__setattr__(self, name, _typed(path, value, types[name]))

    def __repr__(self) -> str:
        """What differs from the defaults, as Python; a section a line."""
        default, name = type(self)(), type(self).__name__
        given = {key: x for key, x in vars(self).items() if x != getattr(default, key)}
        parts = [f"{key}={value!r}" for key, value in given.items()]
        if any(isinstance(value, Section) for value in given.values()):
            return "\n".join([f"{name}(", *(f"    {part}," for part in parts), ")"])
        return f"{name}({', '.join(parts)})"

    def _repr_html_(self) -> str:
        """The same as a table."""
        return page.fragment(fields_html(self))


def _place(section: type[Section]) -> str:
    """The name of the field of `Config` that a section is; empty for `Config` itself."""
    return section.__name__.removesuffix("Config").lower()


def field_types(section: Any) -> dict[str, Any]:
    """The type of each field of a section's class; none if it is no such class."""
    fields = dataclasses.fields(section) if dataclasses.is_dataclass(section) else ()
    return {field.name: field.type for field in fields}


def marks(section: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (dotted path, marks) of every leaf field of a section's class."""
    for field in dataclasses.fields(section):
        if field_types(field.type):
            yield from ((f"{field.name}.{path}", found) for path, found in marks(field.type))
        else:
            yield field.name, field.metadata


def named_fields(section: Section) -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of every leaf field."""
    return ((path, get(section, path)) for path, _ in marks(type(section)))


def field_rows(section: Section) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """All fields as rows of a table, and those that differ from their defaults."""
    default = type(section)()
    rows = [
        {"field": path, "value": str(value), "default": str(get(default, path))}
        for path, value in named_fields(section)
    ]
    return rows, [row for row in rows if row["value"] != row["default"]]


def fields_html(section: Section) -> str:
    """The fields that differ from their defaults as a table, and all of them folded away."""
    table, changed = field_rows(section)
    told = "<p>All fields have their defaults.</p>"
    if changed:
        told = page.table(changed, "Fields that differ from their defaults")
    whole = page.table(table, "All fields")
    return f"{told}<details><summary>All {len(table)} fields</summary>{whole}</details>"


def get(section: Section, path: str) -> Any:
    """The value at a dotted path."""
    return operator.attrgetter(path)(section)


def close(name: str, names: Sequence[str]) -> list[str]:
    """The one of `names` that is spelt nearly like `name`, or none."""
    return difflib.get_close_matches(name, names, n=1)


def advice(name: str, names: Sequence[str]) -> str:
    """The end of the sentence for an unknown name: the near one, or all `names` that there are."""
    if near := close(name, names):
        return f"did you mean {near[0]}?"
    return f"choose from {', '.join(names)}."


def unknown_field(path: str, names: Sequence[str]) -> str:
    """The sentence for an unknown field at dotted `path`; `names` are the fields there are."""
    *parents, last = path.split(".")
    everywhere = [
        (name, ".".join(filter(None, (_place(section), name))))
        for section in Section.__subclasses__()
        for name, kind in field_types(section).items()
        if not field_types(kind)
    ]
    near = close(last, [name for name, _ in everywhere])
    alike = [found for name, found in everywhere if last in name.split("_")]
    meant = (
        [".".join([*parents, name]) for name in close(last, names)]
        or [found for found in alike if found.startswith(f"{'.'.join(parents)}.")]
        or alike
        or [found for name, found in everywhere if name in near]
    )
    if meant:
        advised = f"did you mean {' or '.join(f'config.{found}' for found in meant)}?"
    else:
        advised = f"{'.'.join(['config', *parents])} has {', '.join(names)}."
    return f"config.{path}: there is no such field; {advised}"


def _typed(path: str, value: Any, expected: Any) -> Any:
    """`value` as the type of the field at `path`, or raise ConfigError."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif getattr(value, "shape", None) == ():  # a number of NumPy or JAX
        value = value.item()
    if expected in _WRITTEN:
        try:
            _WRITTEN[expected](expected(value))
        except ValueError as error:
            raise ConfigError(f"config.{path}: {value!r} {error}.") from error
        return expected(str(value).strip())
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise ConfigError(f"config.{path}: {value!r} is no {expected.__name__}; give one.")
    if expected is float and not math.isfinite(value):
        raise ConfigError(f"config.{path}: {value!r} is not finite; give a finite number.")
    return value
