"""Models: what does a position see, and where does a fresh model start?"""

import functools
from typing import Any

from lm_jax.doctor.checks import Case, examination
from lm_jax.doctor.findings import Report
from lm_jax.doctor.model import causality, init, subject, target

_MODULES = (subject, target, causality, init)


@functools.wraps(examination(subject.Subject, *_MODULES))
def examine_model(*args: Any, **kwargs: Any) -> Report:
    """The report of all checks; `subject.Subject` says of what."""
    facts = subject.Subject(*args, **kwargs)
    try:
        return Case(facts, _MODULES).report()
    finally:
        facts.restore()
