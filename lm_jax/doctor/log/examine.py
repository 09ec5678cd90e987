"""Post-mortem of a run from its metrics alone."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lm_jax.doctor.log import evaluation, loop, loss, perplexity
from lm_jax.doctor.log.read import Problem
from lm_jax.doctor.log.subject import Log
from lm_jax.doctor.old import Report, require, run_all, whole

CHECKS = loss.CHECKS + loop.CHECKS + evaluation.CHECKS + perplexity.CHECKS


def examine_log(
    records: Iterable[Mapping[str, Any]],
    *,
    vocab_size: int | None = None,
    split_tokens: int | Mapping[str, int] | None = None,
    train_tokens: float | None = None,
    tokens_per_step: float | None = None,
    parameters: float | None = None,
    peak_flops: float | None = None,
    lr_peak: float | None = None,
    lr_end: float | None = None,
    steps: int | None = None,
    resumes: Sequence[int] = (),
    overfit: bool = False,
    references: Mapping[str, float] | None = None,
    budgets: Sequence[Mapping[str, float]] = (),
    comparisons: Sequence[Mapping[str, Any]] = (),
    measured_on: Mapping[str, Any] | None = None,
    problems: Sequence[Problem] = (),
) -> Report:
    """Say what a run's metrics rule out, and which probe decides what they leave open.

    Every argument is optional: a check that lacks something is skipped and says what.

    Args:
        records: rows like {"step": 10, "train/loss": 9.5}, in the order of the log, with the
            names of `records.METRICS`. A missing key was not logged, None is a non-finite value.
        vocab_size: number of ids the model can predict.
        split_tokens: tokens in the valid split, or in each split by name.
        train_tokens: tokens in the training split.
        tokens_per_step: tokens an update consumes, where data/tokens is not logged.
        parameters: parameters that enter a product for every token (not tables only looked up).
        peak_flops: FLOP/s of all devices together.
        lr_peak: configured peak learning rate.
        lr_end: configured learning rate of the last update, as a rate.
        steps: configured length of the run in updates; a shorter log is not judged by its end.
        resumes: updates after which the run was resumed.
        overfit: the run overfits a batch on purpose.
        references: perplexities `unigram` and `kn2` of the evaluated tokens, and `entropy_rate` of
            their source in nats, as in `eval_<split>.json`.
        budgets: rows like {"stated": 6e9, "steps": 30000, "tokens": 131072}: `stated` must be the
            product of the rest.
        comparisons: perplexities this run is held against, each with `name`, `tokenizer`,
            `corpus` and `unit` (token, word or byte).
        measured_on: `tokenizer`, `corpus` and `unit` of this run's perplexities.
        problems: lines that could not be read, from `read_log`.

    Raises:
        ValueError: for an argument of the wrong type or an impossible value.
    """
    records = _records(records)
    if vocab_size is not None:
        whole(vocab_size, "vocab_size", 2)
    positive = {
        "train_tokens": train_tokens,
        "tokens_per_step": tokens_per_step,
        "parameters": parameters,
        "peak_flops": peak_flops,
        "lr_peak": lr_peak,
        "steps": steps,
    }
    for name, value in positive.items():
        if value is not None:
            _above(value, name)
    if lr_end is not None:
        _above(lr_end, "lr_end", or_equal=True)
    if split_tokens is not None and not isinstance(split_tokens, Mapping):
        split_tokens = {"valid": split_tokens}
    for name, value in (split_tokens or {}).items():
        _above(value, f"split_tokens of {name!r}")
    require(
        references is None or isinstance(references, Mapping),
        f"references={references!r}",
        'give a mapping like {"unigram": 760.0}',
    )
    for name, value in (references or {}).items():
        # A source may be without surprise.
        _above(value, f"references[{name!r}]", or_equal=name == "entropy_rate")
    for at in _rows(resumes, "resumes", "updates"):
        whole(at, "resumes", 0)
    for budget in _rows(budgets, "budgets", "mappings"):
        if not isinstance(budget, Mapping) or "stated" not in budget or len(budget) < 2:
            raise ValueError('budgets: give "stated" and at least one factor in each row.')
        for name, value in budget.items():
            require(_real(value), f"budgets: {name!r} is {value!r}", "give a number")
    for other in _rows(comparisons, "comparisons", "mappings"):
        if not isinstance(other, Mapping) or "name" not in other:
            raise ValueError('comparisons: give "name", and "tokenizer", "corpus" and "unit".')
    require(
        measured_on is None or isinstance(measured_on, Mapping),
        f"measured_on={measured_on!r}",
        'give a mapping with "tokenizer", "corpus" and "unit"',
    )
    for problem in _rows(problems, "problems", "problems"):
        require(isinstance(problem, Problem), "problems", "give those that read_log returned")
    log = Log(
        records=records,
        problems=problems,
        vocab_size=vocab_size,
        split_tokens=split_tokens or {},
        train_tokens=train_tokens,
        tokens_per_step=tokens_per_step,
        parameters=parameters,
        peak_flops=peak_flops,
        lr_peak=lr_peak,
        lr_end=lr_end,
        steps=steps,
        resumes=resumes,
        overfit=overfit,
        references=references or {},
        budgets=budgets,
        comparisons=comparisons,
        measured_on=measured_on or {},
    )
    return run_all(CHECKS, log)


def _records(records: Any) -> list[Mapping[str, Any]]:
    """The rows as a list; ValueError if they are none."""
    iterable = isinstance(records, Iterable) and not isinstance(records, Mapping | str | bytes)
    rows = list(records) if iterable else [records]
    for row in rows:
        if not iterable or not isinstance(row, Mapping):
            raise ValueError(
                f"records: {type(row).__name__} instead of a mapping like "
                '{"step": 1, "train/loss": 9.7}; give a list of such rows, or use read_log.'
            )
        for key in row:
            require(isinstance(key, str), f"records: {key!r} names a metric", "give a string")
    return rows


def _rows(given: Any, name: str, what: str) -> Sequence[Any]:
    """The argument if it is a sequence; ValueError otherwise."""
    is_rows = isinstance(given, Sequence | np.ndarray) and not isinstance(given, str | bytes)
    require(is_rows, f"{name}={given!r}", f"give a list of {what}")
    return given  # type: ignore[no-any-return]


def _real(value: Any) -> bool:
    """Whether a value is a finite real number; scalars of NumPy and JAX are."""
    if isinstance(value, str | bytes | bool) or value is None:
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _above(value: Any, name: str, *, or_equal: bool = False) -> None:
    """Raise ValueError unless a value is a number above 0, or at least 0."""
    ok = _real(value) and (value > 0 or (or_equal and value == 0))
    require(ok, f"{name}: {value!r}", f"give a number {'of 0 or more' if or_equal else 'above 0'}")
