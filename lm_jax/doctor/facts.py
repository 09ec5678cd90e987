"""What the user gives to an examination: facts, each named once with a line of help."""

import dataclasses
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from lm_jax.doctor import trees

T = TypeVar("T")


class Skip(Exception):
    """There is nothing to look at; the message says why."""

    def __init__(self, why: str, *needs: str):
        """`needs` names the facts that would have to be given."""
        super().__init__(why)
        self.needs = needs


class Broken(Exception):
    """What was handed in raised or is unfit; the message says how."""


def give(*names: str, why: str = "") -> Skip:
    """A `Skip` for facts that were not given."""
    return Skip(why or f"Not given: {', '.join(names)}.", *names)


def call(what: str, function: Callable[..., T], *args: Any) -> T:
    """Call something that the user handed in.

    Raises:
        Broken: with the name `what` and the error, if it raises.
    """
    try:
        return function(*args)
    except (Exception, SystemExit) as error:
        raise Broken(f"{what} raised {described(error)}") from error


def pair(what: str, made: Any, parts: str) -> Any:
    """What something that the user handed in returned, which must be a pair of these parts."""
    if isinstance(made, tuple | list) and len(made) == 2:
        return made
    raise Broken(f"{what} returned {kind_of(made)}, not {parts}")


def array(what: str, made: Any) -> np.ndarray:
    """What something that the user handed in returned, which must be an array of numbers."""
    try:
        found = trees.as_array(made)
        if found.dtype.kind not in "OSU":
            return found
    except (TypeError, ValueError, RuntimeError):  # of NumPy and PyTorch, for what is no array
        pass
    raise Broken(f"{what} returned {kind_of(made)}, not an array of numbers")


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    if value is None or isinstance(value, bool | int | float | str):
        return _short(value)
    name = type(value).__name__
    name += f" of {len(value)}" if isinstance(value, tuple | list) else ""
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


@dataclasses.dataclass(frozen=True)
class Bound:
    """What a fact must be, beside its type; stands in its `Annotated`."""

    remedy: str
    holds: Callable[[Any], bool]

    def admits(self, value: Any) -> bool:
        """Whether a value is so; one of which that cannot even be asked is not."""
        try:
            return bool(self.holds(value))
        except (TypeError, ValueError, AttributeError, KeyError, IndexError):
            return False


def whole(least: int = 0) -> Bound:
    """A whole number of at least `least`."""

    def holds(value: Any) -> bool:
        is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        return is_whole and value >= least

    return Bound(f"give a whole number of {least} or more", holds)


def real(value: Any) -> bool:
    """Whether a value is a finite real number; scalars of NumPy, JAX and PyTorch are."""
    if isinstance(value, str | bytes | bool) or value is None:
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def above(least: float, *, or_equal: bool = False) -> Bound:
    """A finite number above `least`, or at least that."""
    remedy = f"give a number {'of at least' if or_equal else 'above'} {least:g}"
    return Bound(remedy, lambda x: real(x) and bool(x > least or (or_equal and x == least)))


def one_of(*choices: str) -> Bound:
    """One of a few words."""
    return Bound(f"give one of {', '.join(choices)}", lambda x: x in choices)


def instance(kind: Any, remedy: str) -> Bound:
    """An instance of a type."""
    return Bound(remedy, lambda x: isinstance(x, kind))


truth = instance(bool | np.bool_, "give True or False")
function = Bound("give a function, or leave it out", callable)
mapping = instance(Mapping, "give a mapping of names to values")


def require(ok: bool, name: str, remedy: str) -> None:
    """Raise ValueError for an argument that cannot be used."""
    if not ok:
        raise ValueError(f"{name}: {remedy}.")


class Facts:
    """Base of the dataclasses that name what the user may give.

    Every field is `Annotated[type, "line of help.", bounds...]`; None stands for "not given".
    """

    def __post_init__(self) -> None:
        """Refuse what no check could use.

        Raises:
            ValueError: naming the argument and the remedy.
        """
        for field in annotations(type(self)):
            value = getattr(self, field.name)
            if value is None and field.optional:
                continue
            for bound in field.bounds:
                if not bound.admits(value):
                    raise ValueError(f"{field.name}={_short(value)}: {bound.remedy}.")

    def rng(self, *stream: int) -> np.random.Generator:
        """Random numbers of their own for every use."""
        return np.random.default_rng((getattr(self, "seed", 0), *stream))


class Field(typing.NamedTuple):
    """A fact as its class declares it."""

    name: str
    help: str
    bounds: tuple[Bound, ...]
    optional: bool  # may be None


def annotations(subject: type) -> list[Field]:
    """The facts of a `Facts` class."""
    hints = typing.get_type_hints(subject, include_extras=True)
    found = []
    for field in dataclasses.fields(subject):
        more = getattr(hints[field.name], "__metadata__", ())
        text = " ".join(x for x in more if isinstance(x, str))
        bounds = tuple(x for x in more if isinstance(x, Bound))
        if typing.get_args(hints[field.name])[:1] == (bool,):
            bounds = (truth, *bounds)
        found.append(Field(field.name, text, bounds, field.default is None))
    return found


def described(error: BaseException) -> str:
    """Type and text of an error, the first line of it."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0].rstrip(".:")


def _short(value: Any, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
