"""How checks are put together: facts, fixtures, gates, errors, and how a report reads."""

import dataclasses
import io
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import pytest
from rich.console import Console

from lm_jax import doctor
from lm_jax.doctor.checks import Case, check, examination, fixture
from lm_jax.doctor.facts import (
    Broken,
    Facts,
    Skip,
    above,
    array,
    call,
    function,
    one_of,
    pair,
    whole,
)
from lm_jax.doctor.findings import (
    Finding,
    Report,
    at_least,
    at_most,
    equals,
    holds,
    none,
    note,
)

DERIVED: list[int] = []  # calls of the fixture


@dataclasses.dataclass
class Subject(Facts):
    """Examine a number."""

    fn: Annotated[Callable[..., Any], "(size) -> number.", function]
    size: Annotated[int, "of the input.", whole(1)]
    limit: Annotated[float | None, "that the number stays below.", above(0)] = None
    kind: Annotated[str, "of the number.", one_of("even", "odd")] = "even"
    twice: Annotated[bool, "whether it is doubled."] = False
    extra: Annotated[Any, "something else."] = None


@fixture
def number(fn, size):
    DERIVED.append(size)
    return call("fn", fn, size)


@check("Return a number.", gate=True)
def output(number):
    """The function returns a number."""
    if not isinstance(number, int):
        raise Broken(f"fn returned a {type(number).__name__}")
    return note("number", number)


@check("Halve it.")
def small(number, limit):
    """The number is below its limit."""
    return [at_most("number", number, limit, where="in row 3"), note("size of it", 1)]


@check("Double it.")
def doubled(number, extra="nothing"):
    """Twice the number is even."""
    return equals(f"rest of twice the number beside {extra}", 2 * number % 2, 0)


@check("Say more.")
def far(small, extra):
    """Only where it is small."""
    return holds(True, "told")


@check("Mend the check.")
def bug(number):
    """This check cannot be made."""
    return {}[number]


examine = examination(Subject, sys.modules[__name__])


def status(report):
    return {f.check.split(".")[1]: f.status for f in report}


def test_a_check_is_its_folder_and_function_and_a_fixture_is_derived_once():
    DERIVED.clear()
    report = examine(lambda n: 4 * n, size=2, limit=9)
    assert report["doctor.output"].evidence == "Number: 8."
    assert DERIVED == [2]
    assert status(report) == dict(
        output="pass", small="pass", doubled="pass", far="skip", bug="error"
    )
    assert report["doctor.small"].values == {"number": 8, "size of it": 1}


def test_what_was_not_given_is_named():
    report = examine(lambda n: n, size=3)
    assert report["doctor.small"].needs == ("limit",)
    assert report["doctor.far"].needs == ("limit", "extra")
    assert "beside nothing" in report["doctor.doubled"].evidence


def test_a_function_that_raises_is_one_error_and_counts_as_failed():
    def boom(n):
        raise RuntimeError("no memory")

    report = examine(boom, size=3, limit=4)
    first = report["doctor.output"]
    assert report.failed == ["doctor.output"] and not report.clean
    assert first.status == "error" and first.remedy == "Return a number."
    assert "fn raised RuntimeError: no memory (test_checks.py:" in first.evidence
    assert set(status(report).values()) == {"error", "skip"}
    assert "Waits for doctor.output" in report["doctor.doubled"].evidence


def test_a_function_that_exits_is_an_error_wherever_it_is_called():
    for body in (number, output):
        stopped = dataclasses.replace(body, body=lambda fn: sys.exit(3))
        case = Case(Subject(lambda n: n, 1), [sys.modules[__name__]])
        kind = case.fixtures if body is number else case.checks
        kind[body.body.__name__] = stopped
        found = case.report().findings[0]
        assert found.status == "error" and "SystemExit: 3" in found.evidence


def test_a_remedy_that_is_not_about_what_was_handed_in_does_not_stand_beside_an_error():
    assert examine(lambda n: n, size=3)["doctor.bug"].remedy == ""


@pytest.mark.parametrize(
    "made, words",
    [
        (None, "None"),
        ("abc", "'abc'"),
        ((1, 2, 3), "a tuple of 3"),
        ({"a": 1}, "a dict"),
        (object(), "an object"),
    ],
)
def test_what_is_no_pair_and_no_array_is_named(made, words):
    with pytest.raises(Broken, match=f"fn returned {words}, not \\(sum, count\\)"):
        pair("fn", made, "(sum, count)")
    if made != (1, 2, 3):
        with pytest.raises(Broken, match=f"fn returned {words}, not an array"):
            array("fn", made)


def test_what_is_unfit_is_an_error_and_an_error_in_a_check_leaves_the_others():
    report = examine(lambda n: "a", size=3)
    assert report.failed == ["doctor.output"]
    assert "fn returned a str" in report["doctor.output"].evidence
    report = examine(lambda n: n, size=3)
    assert report.failed == ["doctor.bug"] and "KeyError: 3" in report["doctor.bug"].evidence


def test_a_check_waits_for_the_one_that_it_names():
    report = examine(lambda n: n, size=3, limit=1, extra=1)
    assert status(report)["small"] == "fail" and status(report)["far"] == "skip"
    assert report["doctor.small"].evidence == "Number: 3 (at most 1), in row 3; size of it: 1."
    assert "doctor.small, which failed" in report["doctor.far"].evidence


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(fn=3), "fn=3: give a function"),
        (dict(size=0), "size=0: give a whole number of 1 or more"),
        (dict(size=True), "size=True"),
        (dict(limit=float("nan")), "limit=nan: give a number above 0"),
        (dict(kind="big"), "kind='big': give one of even, odd"),
        (dict(kind=np.zeros(2)), "kind=array.*: give one of even, odd"),
        (dict(twice="yes"), "twice='yes': give True or False"),
    ],
)
def test_impossible_facts_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        examine(**dict(fn=lambda n: n, size=1) | change)


def test_the_signature_and_the_documentation_come_from_the_facts():
    assert "limit: that the number stays below." in examine.__doc__
    assert "Examine a number." in examine.__doc__
    for name in doctor.__all__:
        if name.startswith("examine_"):
            assert "Args:" in getattr(doctor, name).__doc__, name


def test_a_name_that_stands_twice_in_a_family_is_refused():
    with pytest.raises(TypeError, match="stands twice"):
        Case(Subject(lambda n: n, 1), [sys.modules[__name__]] * 2)


# --- findings ----------------------------------------------------------------------------------


def test_the_worst_measure_decides_and_failures_are_told_first():
    rows = [
        at_most("a", 1, 2),
        at_least("b", 1, 2, otherwise="warn"),
        none("c", ["x", "y"], of=7, key="offenders"),
        note("d", 5),
    ]
    found = Finding.of("family.check", rows, "Mend it.")
    assert found.status == "fail" and found.remedy == "Mend it."
    assert found.evidence == "B: 1 (at least 2); c: 2 of 7, x, y; d: 5."
    assert found.values == {"a": 1, "b": 1, "offenders": ["x", "y"], "d": 5}
    assert Finding.of("family.check", at_most("a", 1, 2), "Mend it.").remedy == ""


def test_nan_is_within_no_limit():
    nan = float("nan")
    for measure in (at_most("a", nan, 1), at_least("a", nan, 1), equals("a", nan, nan)):
        assert measure.status == "fail"


def text_of(report, **kwargs):
    out = io.StringIO()
    report.show(Console(file=out, width=80), **kwargs)
    return out.getvalue()


def test_a_report_begins_with_its_verdict():
    report = examine(lambda n: n, size=3, limit=1)
    lines = text_of(report).splitlines()
    assert lines[0] == "doctor: 2 failed: doctor.small, doctor.bug"
    assert lines[1] == "fail  doctor.small"
    assert lines[2].strip() == "Number: 3 (at most 1), in row 3; size of it: 1."
    assert lines[3].strip() == "→ Halve it."
    assert "Double it." not in text_of(report)
    assert lines[-1] == "2 passed, 1 had nothing to look at"
    assert max(map(len, lines)) <= 80
    assert "doctor.doubled" in text_of(report, everything=True)
    assert "To look further, give limit (1), limit and extra (1)." in text_of(
        examine(lambda n: n, size=3)
    )


def test_a_healthy_report_is_one_line():
    report = Report((Finding("a.b", "pass", "Fine."), Finding("a.c", "skip", "None.")))
    assert text_of(report).strip() == "doctor: 1 passed, 1 had nothing to look at"
    assert report.clean


def test_nothing_looked_at_is_not_clean():
    for report in (Report(), Report((Finding("a.c", "skip", "Not given: x.", needs=("x",)),))):
        assert not report.clean
        assert "nothing was examined" in text_of(report)


def test_a_report_as_json():
    found = Finding("a.b", "fail", "Bad.", values={"x": float("inf"), "y": [1.0, float("nan")]})
    read = json.loads(Report((found,)).to_json())
    assert read["failed"] == ["a.b"]
    assert read["findings"][0]["values"] == {"x": None, "y": [1.0, None]}


def test_skip_without_a_fact():
    assert Skip("Nothing there.").needs == ()


def test_the_doctor_loads_none_of_the_trainers_libraries():
    heavy = "flax optax orbax grain absl ml_collections tokenizers torch transformers".split()
    code = f"import sys, lm_jax.doctor; print(sorted({{*sys.modules}} & {{*{heavy}}}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
