"""What checks measure and say, as plain values, and how a report of them reads."""

import collections
import dataclasses
import functools
import html
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from lm_jax import page

Status = Literal["pass", "warn", "fail", "error", "skip"]
_COLOURS = {"fail": "red", "error": "red", "warn": "yellow", "pass": "green", "skip": "dim"}
_WORST = ("error", "fail", "warn", "pass")


@dataclasses.dataclass(frozen=True)
class Measure:
    """One quantity that a check looked at, and what it was held against.

    Attributes:
        what: the quantity with its unit, as it begins a clause: "largest change of a logit".
        value: a number, a word, or a list of names.
        limit: what it was held against, as a clause: "at most 1e-06"; empty for a note.
        status: pass, or what it is where the limit does not hold.
        where: further words for a value beyond its limit: the leaf, the row, the step.
        key: name of the value in `Finding.values`; `what` if empty.
    """

    what: str
    value: Any
    limit: str = ""
    status: Status = "pass"
    where: str = ""
    key: str = ""

    def __str__(self) -> str:
        """The clause that stands in the evidence."""
        value = shown(self.value)
        text = f"{self.what}: {value}" if value else self.what
        text += f" ({self.limit})" if self.limit else ""
        return text + (f", {self.where}" if self.where else "")


def note(what: str, value: Any = None, *, key: str = "") -> Measure:
    """A quantity that is told and not judged."""
    return Measure(what, value, key=key)


def holds(
    ok: bool,
    what: str,
    value: Any = None,
    *,
    limit: str = "",
    otherwise: Status = "fail",
    where: str = "",
    key: str = "",
) -> Measure:
    """A quantity that is as it must be if `ok`; `where` is told if it is not."""
    return Measure(
        what, value, limit, "pass" if ok else otherwise, "" if ok else where, key or what
    )


def at_most(what: str, value: float, limit: float, **more: Any) -> Measure:
    """A number that must not exceed a limit; NaN does. See `holds` for `more`.

    A limit that allows anything, infinite or NaN, decides nothing: a warning that says so.
    """
    if not math.isfinite(limit):
        return holds(
            False, what, value, limit="not judged: rounding allows anything", otherwise="warn"
        )
    return holds(bool(value <= limit), what, value, limit=f"at most {shown(limit)}", **more)


def at_least(what: str, value: float, limit: float, **more: Any) -> Measure:
    """A number that must reach a limit; NaN does not. See `holds` for `more`."""
    return holds(bool(value >= limit), what, value, limit=f"at least {shown(limit)}", **more)


def equals(what: str, value: Any, expected: Any, **more: Any) -> Measure:
    """A value that must be the expected one exactly. See `holds` for `more`."""
    same = bool(np.all(value == expected))
    return holds(same, what, value, limit=f"expected {shown(expected)}", **more)


def none(what: str, names: Iterable[Any], *, of: int | None = None, **more: Any) -> Measure:
    """A list of offenders that must be empty, among `of` things looked at. See `holds`."""
    names = list(names)
    ok = not names
    count = f"{len(names)}" + ("" if of is None else f" of {of}")
    finding = holds(ok, f"{what}: {count}" + ("" if ok else f", {listed(names)}"), **more)
    return dataclasses.replace(finding, value=names, key=more.get("key") or what)


def shown(value: Any) -> str:
    """A value as it stands in a sentence; empty for lists, whose names stand there already."""
    if value is None or isinstance(value, list | tuple | dict):
        return ""
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    number = float(value)
    return f"{number:,.0f}" if 1e4 <= abs(number) < 1e9 else f"{number:.4g}"


def listed(names: Iterable[Any], most: int = 4) -> str:
    """The first of the names, and how many more there are."""
    names = [str(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@dataclasses.dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: name of the check, `family.function`.
        status: pass; fail; warn, where the evidence is compatible with a healthy run; error, where
            the check could not run because something that was handed in raised or is unfit; skip,
            where there was nothing to look at.
        evidence: what was measured and what it was held against, or why it was not.
        remedy: what to do about a failure, a warning or an error; else empty.
        values: the numbers, positions and names behind the evidence, fit for JSON.
        needs: the facts that would have to be given for a skipped check.
        seconds: time the check took.
    """

    check: str
    status: Status
    evidence: str
    remedy: str = ""
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    needs: tuple[str, ...] = ()
    seconds: float = 0.0

    @classmethod
    def of(cls, check: str, measures: Measure | Iterable[Measure], remedy: str) -> "Finding":
        """The finding of a check from what it measured: the worst of the measures decides."""
        rows = [measures] if isinstance(measures, Measure) else list(measures)
        if not rows:
            raise TypeError(f"{check} returned no measure")
        status = next((s for s in _WORST if any(m.status == s for m in rows)), "pass")
        bad = [m for m in rows if m.status != "pass"]
        # A list without offenders is no news.
        notes = [m for m in rows if not m.limit and not (isinstance(m.value, list) and not m.value)]
        told = bad + [m for m in (notes if bad else rows) if m.status == "pass"]
        return cls(
            check=check,
            status=status,  # type: ignore[arg-type]
            evidence=_sentence("; ".join(map(str, told))),
            remedy=remedy if bad else "",
            values={m.key or m.what: m.value for m in rows if m.value is not None},
        )

    def html(self, when: str = "") -> str:
        """What it says, as a part of a page."""
        return (
            f'<div class="panel finding"><b>{html.escape(f"{self.status}: {self.check}")}</b> '
            f'<span class="soft">{html.escape(when)}</span><p>{html.escape(self.evidence)}</p>'
            f"<p>{html.escape(self.remedy)}</p></div>"
        )


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """Findings in the order in which the checks were made."""

    findings: tuple[Finding, ...] = ()

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed or could not run."""
        return self._with("fail", "error")

    @property
    def warned(self) -> list[str]:
        """Names of the checks that warn."""
        return self._with("warn")

    @property
    def amiss(self) -> list[Finding]:
        """The findings that fail, could not be made or warn, worst first."""
        return [f for status in ("fail", "error", "warn") for f in self if f.status == status]

    @property
    def clean(self) -> bool:
        """Whether something was looked at and nothing failed."""
        return not self.failed and bool(self._with("pass", "warn"))

    def _with(self, *statuses: Status) -> list[str]:
        return [finding.check for finding in self.findings if finding.status in statuses]

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

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The inverse of `to_json`, but that null stays None."""
        rows = json.loads(text)["findings"]
        return cls(tuple(Finding(**row | {"needs": tuple(row.get("needs", ()))}) for row in rows))

    def __repr__(self) -> str:
        """What `show` prints."""
        with (text := Console(width=100, force_jupyter=False)).capture() as shown:
            self.show(text)
        return shown.get().rstrip()

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        told = "".join(finding.html() for finding in self.amiss)
        rest = " ".join([*([f"{self._rest}."] if told else []), self._gaps()])
        return page.fragment(
            f"<p><b>{html.escape(self.verdict)}</b></p>{told}"
            f'<p class="soft">{html.escape(rest)}</p>'
        )

    @property
    def verdict(self) -> str:
        """The report in one line: what failed and what warns, else how much was looked at."""
        failed, warned = self.failed, self.warned
        parts = [f"{len(failed)} failed: {', '.join(failed)}"] if failed else []
        parts += [f"{len(warned)} warned: {', '.join(warned)}"] if warned else []
        return f"doctor: {'; '.join(parts) or self._rest}"

    @property
    def _rest(self) -> str:
        """How much passed, and how much had nothing to look at."""
        passed, skipped = len(self._with("pass")), len(self._with("skip"))
        text = f"{passed} passed" if self._with("pass", "warn", "fail", "error") else ""
        text = text or "nothing was examined"
        return text + (f", {skipped} had nothing to look at" if skipped else "")

    def show(self, console: Console | None = None, *, everything: bool = False) -> None:
        """Print the verdict, then failures, errors and warnings with evidence and remedy.

        Args:
            console: where to; the terminal if None.
            everything: print what passed and what was skipped in the same way.
        """
        say = functools.partial((console or Console()).print, highlight=False)
        say(escape(self.verdict))
        told = self.amiss
        if everything:
            told += [f for status in ("pass", "skip") for f in self if f.status == status]
        for f in told:
            say(f"[{_COLOURS[f.status]}]{f.status:5}[/] [bold]{escape(f.check)}[/]")
            for text in (f.evidence, f.remedy and f"→ {f.remedy}"):
                if text:
                    say(Padding(escape(text), (0, 0, 0, 6), expand=False), highlight=False)
        if told:
            say(self._rest)
        if gaps := self._gaps():
            say(escape(gaps))

    def _gaps(self) -> str:
        """What to give so that more can be looked at, where something was left out or amiss."""
        if self.clean and not self.warned:
            return ""
        needs = collections.Counter(
            " and ".join(f.needs) for f in self.findings if f.status == "skip" and f.needs
        )
        rows = [f"{name} ({n})" for name, n in needs.most_common(4)]
        return f"To look further, give {', '.join(rows)}." if rows else ""


def _sentence(text: str) -> str:
    """Capitalised and with a full stop; a name such as train/loss stays as it is."""
    first = text.split(" ")[0]
    return (text[:1].upper() + text[1:] if first.rstrip(",:;").isalpha() else text) + "."


def _plain(value: Any) -> Any:
    """The value in the types of JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "__array__"):  # of NumPy, JAX or PyTorch
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
