"""Post-mortem of a run from its metrics alone."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lm_jax.doctor import log_eval, log_loss, log_optim, log_ppl
from lm_jax.doctor.findings import Report, run_all
from lm_jax.doctor.records import Log, Problem

CHECKS = log_loss.CHECKS + log_optim.CHECKS + log_eval.CHECKS + log_ppl.CHECKS


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
    records = list(records) if isinstance(records, Iterable) else [records]  # type: ignore[list-item]
    for row in records:
        if not isinstance(row, Mapping):
            raise ValueError(
                f"records: {type(row).__name__} instead of a mapping like "
                '{"step": 1, "train/loss": 9.7}; give a list of such rows, or use read_log.'
            )
    if vocab_size is not None and vocab_size < 2:
        raise ValueError(f"vocab_size: {vocab_size!r} leaves nothing to predict; give 2 or more.")
    positive = {
        "train_tokens": train_tokens,
        "tokens_per_step": tokens_per_step,
        "parameters": parameters,
        "peak_flops": peak_flops,
        "lr_peak": lr_peak,
        "steps": steps,
    } | {f"references[{name!r}]": x for name, x in (references or {}).items()}
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}: {value!r} is not above 0; give a positive number or None.")
    for budget in budgets:
        if "stated" not in budget or len(budget) < 2:
            raise ValueError('budgets: give "stated" and at least one factor in each row.')
    for other in comparisons:
        if "name" not in other:
            raise ValueError('comparisons: give "name", and "tokenizer", "corpus" and "unit".')
    if isinstance(split_tokens, int):
        split_tokens = {"valid": split_tokens}
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
