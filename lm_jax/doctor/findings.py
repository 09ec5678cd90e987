"""What a check says, as plain values, and how a check is run."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Status = Literal["pass", "warn", "fail", "skip"]
_COLOURS = {"pass": "green", "warn": "yellow", "fail": "red", "skip": "dim"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: stable name, `family.check`.
        status: pass; fail; warn, where the evidence is not decisive; skip, where the check could
            not be made.
        evidence: what was measured and the threshold it was held against, or why it was skipped.
        remedy: what to do about a failure or a warning, in one or two sentences; else empty.
        values: the numbers, positions and names behind the evidence, fit for JSON.
        seconds: time the check took.
    """

    check: str
    status: Status
    evidence: str
    remedy: str = ""
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Report:
    """Findings in the order in which the checks were made."""

    findings: tuple[Finding, ...] = ()

    @property
    def failed(self) -> list[str]:
        """Names of the failed checks."""
        return self._with("fail")

    @property
    def warned(self) -> list[str]:
        """Names of the checks that warn."""
        return self._with("warn")

    def _with(self, status: Status) -> list[str]:
        return [finding.check for finding in self.findings if finding.status == status]

    def __iter__(self) -> Iterator[Finding]:
        """Iterate over the findings."""
        return iter(self.findings)

    def __getitem__(self, check: str) -> Finding:
        """The finding of the check of that name; KeyError if it was not made."""
        for finding in self.findings:
            if finding.check == check:
                return finding
        raise KeyError(check)

    def __add__(self, other: "Report") -> "Report":
        """Both reports, one after the other."""
        return Report(self.findings + other.findings)

    def to_json(self) -> str:
        """All findings as JSON text; numbers that JSON lacks become null."""
        rows = [_plain(dataclasses.asdict(finding)) for finding in self.findings]
        return json.dumps({"failed": self.failed, "findings": rows}, indent=1, allow_nan=False)

    def show(self, console: Console, *, everything: bool = True) -> None:
        """Print a table; without `everything`, only failures and warnings."""
        table = Table("check", "status", "evidence", "remedy")
        for f in self.findings:
            if everything or f.status in ("fail", "warn"):
                colour = _COLOURS[f.status]
                status = f"[{colour}]{f.status}[/{colour}]"
                table.add_row(f.check, status, escape(f.evidence), escape(f.remedy))
        if table.row_count:
            console.print(table)
        counts = {s: sum(f.status == s for f in self.findings) for s in _COLOURS}
        seconds = sum(f.seconds for f in self.findings)
        summary = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
        console.print(f"doctor: {summary or 'no checks'}, {seconds:.0f} s")


class Verdict(NamedTuple):
    """What the body of a check returns."""

    status: Status
    evidence: str
    values: dict[str, Any]


def verdict(ok: bool, evidence: str, *, otherwise: Status = "fail", **values: Any) -> Verdict:
    """A pass if `ok`, else a failure, or what is named by `otherwise`."""
    return Verdict("pass" if ok else otherwise, evidence, values)


class Skip(Exception):
    """A check cannot be made; the message says why."""


class Arguments:
    """Arguments of an examination, some of which may be None: not given."""

    def need(self, *names: str) -> None:
        """Raise `Skip` if one of the arguments was not given."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise Skip(f"Not given: {', '.join(missing)}.")


def check(name: str, remedy: str) -> Callable[[Callable[..., Verdict]], Callable[..., Finding]]:
    """Turn a function that returns a `Verdict` into one that returns a `Finding`.

    Args:
        name: stable name, `family.check`.
        remedy: what to do if it fails.
    """

    def decorate(body: Callable[..., Verdict]) -> Callable[..., Finding]:
        @functools.wraps(body)
        def run(*args: Any, **kwargs: Any) -> Finding:
            began = time.perf_counter()
            try:
                status, evidence, values = body(*args, **kwargs)
            except Skip as reason:
                status, evidence, values = "skip", str(reason), {}
            except Exception as error:  # of what was handed in; said, and the other checks go on
                evidence = f"not made, {type(error).__name__}: {error}"
                status, values = "skip", {}
            return Finding(
                check=name,
                status=status,
                evidence=evidence,
                remedy=remedy if status in ("fail", "warn") else "",
                values=values,
                seconds=time.perf_counter() - began,
            )

        run.check_name = name  # type: ignore[attr-defined]
        return run

    return decorate


def run_all(checks: Iterable[Callable[..., Finding]], *args: Any, **kwargs: Any) -> Report:
    """Run checks of the same arguments one after the other."""
    return Report(tuple(check(*args, **kwargs) for check in checks))


def call(what: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function that the user handed in; what it raises becomes a `Skip` that says so.

    Nothing is hidden: the check that needed the function is reported as not made, with the error.
    """
    try:
        return function(*args)
    except Exception as error:
        raise Skip(f"{what} raised {type(error).__name__}: {error}") from error


def require(ok: bool, name: str, remedy: str) -> None:
    """Raise ValueError for an argument that cannot be used."""
    if not ok:
        raise ValueError(f"{name}: {remedy}.")


def whole(value: Any, name: str, least: int) -> None:
    """Raise ValueError for an argument that is no whole number of at least `least`."""
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    remedy = f"give a whole number of {least} or more"
    require(is_whole and value >= least, f"{name}={value!r}", remedy)


def _plain(value: Any) -> Any:
    """The value in the types of JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "__array__"):  # of NumPy, JAX or PyTorch
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
