"""Facts, fixtures and checks: how an examination is put together and run.

A family of checks is a folder. Its `Subject` names what the user gives, each fact once with the
line that becomes its documentation; a fixture derives something once; a check asks for facts and
fixtures by the names of its parameters, and returns what it measured:

    @dataclasses.dataclass
    class Subject(Facts):
        "Examine a loss."

        loss: Annotated[Callable[..., Any], "(logits, tokens) -> (sum of nats, count).", function]
        vocab_size: Annotated[int, "V.", whole(2)]

    @fixture
    def mean_nats(loss, vocab_size):
        total, count = call("loss", loss, np.zeros((1, 8, vocab_size)), np.zeros((1, 8), int))
        return total / count

    @check("Divide the sum by the weights that went into it.")
    def uniform(mean_nats, vocab_size):
        "Uniform logits cost ln V nats a token."
        return at_most("distance from ln V", abs(mean_nats - math.log(vocab_size)), 1e-5)

    examine_loss = examination(Subject, subject, target)

The name of a check is its folder and its function, `loss.uniform`. A check whose fact was not
given is skipped, by name; one that meets an exception is an error, which counts as a failure.
"""

import dataclasses
import functools
import inspect
import pathlib
import sysconfig
import textwrap
import time
import traceback
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, Generic, ParamSpec, TypeVar

from lm_jax.doctor.facts import Broken, Facts, Skip, annotations, described, give
from lm_jax.doctor.findings import Finding, Measure, Report

P = ParamSpec("P")
T = TypeVar("T")
_HERE = str(pathlib.Path(__file__).parent)
_PYTHON = sysconfig.get_path("stdlib")
_LIBRARIES = ("jax", "jaxlib", "flax", "torch", "numpy", "scipy")


@dataclasses.dataclass(frozen=True)
class Check(Generic[P]):
    """A function of facts and fixtures that returns measures; calling it calls the function."""

    body: Callable[P, Measure | Iterable[Measure]]
    remedy: str
    gate: bool

    @property
    def name(self) -> str:
        """Its folder and function."""
        return f"{self.body.__module__.split('.')[-2]}.{self.body.__name__}"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Measure | Iterable[Measure]:
        """What the body measures."""
        return self.body(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Fixture(Generic[P, T]):
    """A function of facts and fixtures whose result is kept; calling it calls the function."""

    body: Callable[P, T]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """What the body derives."""
        return self.body(*args, **kwargs)


def fixture(body: Callable[P, T]) -> Fixture[P, T]:
    """Derive something once for all checks that name it as a parameter."""
    return Fixture(body)


def check(
    remedy: str, *, gate: bool = False
) -> Callable[[Callable[P, Measure | Iterable[Measure]]], Check[P]]:
    """Make a check of a function; its docstring is the claim that it tests.

    A parameter is the name of a fact, of a fixture, of another check that must have passed, or
    `subject`, all the facts. One with a default is handed the default where it cannot be had.

    Args:
        remedy: what to do if it fails.
        gate: the other checks of the family wait for this one to pass.
    """
    return lambda body: Check(body, remedy, gate)


class Case:
    """One examination under way: resolves the parameters of checks, each once."""

    def __init__(self, subject: Facts, modules: Iterable[types.ModuleType]):
        """The checks and fixtures are those that the modules define, in their order."""
        self.subject = subject
        self.facts = {field.name for field in annotations(type(subject))}
        self.fixtures: dict[str, Fixture] = {}
        self.checks: dict[str, Check] = {}
        for module in modules:
            for name, value in vars(module).items():
                if isinstance(value, Fixture | Check) and value.body.__module__ == module.__name__:
                    kind: dict = self.fixtures if isinstance(value, Fixture) else self.checks
                    if name in self.fixtures or name in self.checks:
                        raise TypeError(f"{module.__name__}: {name} stands twice in its family")
                    kind[name] = value
        self.gates = [name for name, made in self.checks.items() if made.gate]
        self.results: dict[str, Any] = {}
        self.errors: dict[str, BaseException] = {}
        self.blamed: dict[str, str] = {}  # an error's text, and the check that reports it
        self.found: dict[str, Finding] = {}

    def report(self) -> Report:
        """All checks, gates first."""
        names = [*self.gates, *(name for name in self.checks if name not in self.gates)]
        return Report(tuple(self.finding(name) for name in names))

    def value(self, name: str) -> Any:
        """The fact, fixture or passed check of that name; raises `Skip` where it cannot be had."""
        if name == "subject":
            return self.subject
        if name in self.errors:
            raise self.errors[name]
        if name in self.results:
            return self.results[name]
        if name in self.fixtures:
            try:
                body = self.fixtures[name].body
                self.results[name] = body(**self.arguments(body))
            except (Exception, SystemExit) as error:
                self.errors[name] = error
                raise
            return self.results[name]
        if name not in self.facts and name in self.checks:
            return self.passed(name)
        if name not in self.facts:
            raise TypeError(f"{name} is no fact, fixture or check of this family")
        value = getattr(self.subject, name)
        if value is None:
            raise give(name)
        return value

    def passed(self, name: str) -> Finding:
        """The finding of another check; `Skip` if that did not pass."""
        found = self.finding(name)
        if found.status in ("fail", "error"):
            raise Skip(f"Waits for {found.check}, which failed.")
        if found.status == "skip":
            raise Skip(f"Waits for {found.check}: {found.evidence}", *found.needs)
        return found

    def arguments(self, body: Callable[..., Any]) -> dict[str, Any]:
        """Values for the parameters of a body; `Skip` names all facts that are missing."""
        found: dict[str, Any] = {}
        missing: list[Skip] = []
        for name, parameter in inspect.signature(body).parameters.items():
            try:
                found[name] = self.value(name)
            except Skip as skip:
                if parameter.default is not parameter.empty:
                    found[name] = parameter.default
                else:
                    missing.append(skip)
        needs = tuple(dict.fromkeys(need for skip in missing for need in skip.needs))
        if missing and needs and all(skip.needs for skip in missing):
            raise give(*needs, why=str(missing[0]) if len(missing) == 1 else "")
        if missing:
            raise missing[0]
        return found

    def finding(self, name: str) -> Finding:
        """The finding of a check, made when it is first asked for."""
        if name not in self.found:
            began = time.perf_counter()
            made = self._make(self.checks[name], waits=name not in self.gates)
            self.found[name] = dataclasses.replace(made, seconds=time.perf_counter() - began)
        return self.found[name]

    def _make(self, made: Check, *, waits: bool) -> Finding:
        try:
            for gate in self.gates if waits else ():
                self.passed(gate)
            return Finding.of(made.name, made.body(**self.arguments(made.body)), made.remedy)
        except Skip as skip:
            return Finding(made.name, "skip", str(skip), needs=skip.needs)
        except (Exception, SystemExit) as error:  # of what was handed in; the others go on
            text = str(error) if isinstance(error, Broken) else described(error)
            told = f"{text}{_place(error)}."
            first = self.blamed.setdefault(told, made.name)
            if first != made.name:
                return Finding(made.name, "skip", f"Waits for {first}, which met this error.")
            # What is amiss is what was handed in: only a gate's remedy is about that.
            return Finding(made.name, "error", told, made.remedy if made.gate else "")


def examination(subject: Callable[P, Facts], *modules: types.ModuleType) -> Callable[P, Report]:
    """The function that users call: facts in, the report of all checks of the modules out.

    Args:
        subject: a `Facts` dataclass; its docstring and its lines of help document the function.
        modules: those that define fixtures and checks, in the order of the report.
    """

    def examine(*args: P.args, **kwargs: P.kwargs) -> Report:
        signature.bind(*args, **kwargs)  # raises TypeError in the words of this function
        return Case(subject(*args, **kwargs), modules).report()

    kind = typing.cast(type, subject)
    lines = [_wrapped(f"{field.name}: {field.help}") for field in annotations(kind)]
    raises = "Raises:\n    ValueError: for an argument of the wrong type or an impossible value."
    doc = inspect.cleandoc(kind.__doc__ or "")
    examine.__doc__ = "\n".join([doc, "", "Args:", *lines, "", raises])
    signature = inspect.signature(subject)
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    examine.__signature__ = inspect.Signature(plain)  # type: ignore[attr-defined]
    return examine


_wrapped = functools.partial(
    textwrap.fill, width=88, initial_indent="    ", subsequent_indent="        "
)


def _place(error: BaseException) -> str:
    """Where it was raised: in the code that was handed in, else in the doctor's own."""
    told, own = isinstance(error, Broken), ""
    while error.__cause__ is not None:
        error = error.__cause__
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = pathlib.Path(frame.filename)
        place = f" ({path.name}:{frame.lineno}, in {frame.name})"
        if frame.filename.startswith(_HERE):
            own = own or place
        elif "site-packages" in path.parts:
            if not any(name in path.parts for name in _LIBRARIES):
                return place
        elif not frame.filename.startswith(("<", _PYTHON)):
            return place
    return "" if told else own
