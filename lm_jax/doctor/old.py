"""The former way to write a check; goes when every family is rebuilt."""

import functools
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lm_jax.doctor.facts import Skip
from lm_jax.doctor.findings import Finding, Report, Status

__all__ = ["Finding", "Report", "Skip", "Status"]


class Verdict(NamedTuple):
    """What the body of a check returns."""

    status: Status
    evidence: str
    values: dict[str, Any]


def verdict(ok: bool, evidence: str, *, otherwise: Status = "fail", **values: Any) -> Verdict:
    """A pass if `ok`, else a failure, or what is named by `otherwise`."""
    return Verdict("pass" if ok else otherwise, evidence, values)


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


def worst(results: dict[str, tuple[float, float]]) -> tuple[str, float, float]:
    """Name, difference and threshold of the case that exceeds its threshold the most."""

    def excess(name: str) -> float:
        difference, threshold = results[name]
        return math.inf if math.isnan(difference) else difference / max(threshold, 1e-300)

    name = max(results, key=excess)
    return name, *results[name]


def judge(results: dict[str, tuple[float, float]], text: str, **values: Any) -> Verdict:
    """Pass if every difference is within its threshold; `text` tells what was compared."""
    name, difference, threshold = worst(results)
    evidence = f"{text}: largest difference {difference:.3g} ({name}), threshold {threshold:.2g}."
    differences = {name: difference for name, (difference, _) in results.items()}
    return verdict(difference <= threshold, evidence, differences=differences, **values)


def is_floating(x: np.ndarray) -> bool:
    """Also of bfloat16, which NumPy does not know as a float."""
    return bool(jnp.issubdtype(x.dtype, jnp.floating))
