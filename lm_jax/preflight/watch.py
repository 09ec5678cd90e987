"""Examination of a run of this trainer, while it goes on or after its end."""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from lm_jax import metrics
from lm_jax.doctor.facts import require
from lm_jax.doctor.findings import Finding, Report
from lm_jax.doctor.log import examine_log
from lm_jax.doctor.log.read import read_log
from lm_jax.doctor.log.series import Records
from lm_jax.files import write_text
from lm_jax.history import NewRows
from lm_jax.workdir import METRICS, SCORES, WATCH, Record, read_record

_SATURATED = 0.9  # of the updates
_MOST = 10_000  # rows of a metric that a watch keeps


def examine_workdir(
    workdir: str | pathlib.Path, *, references: Mapping[str, float] | None = None
) -> Report:
    """Examine a run by the config, metrics and evaluations that it has written so far.

    Args:
        workdir: folder of the run.
        references: those of the valid split; if None, they are read from `eval_valid.json`.

    Raises:
        FileNotFoundError: if the folder holds no config or no metrics.
        ValueError: if a file in it is not as the trainer writes it.
    """
    workdir = pathlib.Path(workdir)
    record, metrics_file = read_record(workdir), workdir / METRICS
    if not metrics_file.exists():
        raise FileNotFoundError(f"{metrics_file}: no such file; give the workdir of a run.")
    scored = workdir / SCORES.format("valid")
    if references is None and scored.exists():
        references = _references(scored)
    log = read_log(metrics_file, null_is_nan=True)
    return examine_log(log.records, problems=log.problems, references=references, **_facts(record))


def _facts(record: Record) -> dict[str, Any]:
    """What the config and the data of a run say about its metrics."""
    cfg, devices = record.cfg, record.devices
    V, seq_len = record.data["vocab_size"], cfg.data.seq_len
    split_tokens = {name: split["tokens"] for name, split in record.data["splits"].items()}
    return dict(
        vocab_size=V,
        split_tokens=split_tokens,
        train_tokens=split_tokens["train"],
        tokens_per_step=cfg.data.batch_size * seq_len,
        parameters=metrics.flops_per_token(cfg, V, seq_len) / 6,
        peak_flops=metrics.peak_flops(devices[0], cfg.train.compute_dtype, len(devices)),
        lr_peak=cfg.optim.peak_lr,
        lr_end=cfg.optim.peak_lr * (1 if cfg.optim.schedule == "constant" else cfg.optim.end_lr),
        steps=int(cfg.train.steps),
    )


def _references(scored: pathlib.Path) -> dict[str, float]:
    """The references in an `eval_<split>.json`."""
    try:
        references = json.loads(scored.read_text())["references"]
        require(isinstance(references, dict), "references", "they are no object")
    except (LookupError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}".rstrip(".")
        raise ValueError(f"{scored}: no references ({what}); evaluate the run again.") from error
    return references  # type: ignore[no-any-return]


class Watch:
    """Examines the metrics of a run while it goes on, and reports each finding once.

    It reads what was written since it last looked, and keeps at most `_MOST` rows of a metric.
    """

    def __init__(self, workdir: pathlib.Path):
        """Watch the run in `workdir`."""
        self._workdir = workdir
        self._said: set[tuple[str, str]] = set()
        self._records = Records(most=_MOST)
        self._new = NewRows(workdir / METRICS)

    @functools.cached_property
    def _facts(self) -> dict[str, Any]:
        return _facts(read_record(self._workdir))

    def look(self, references: Mapping[str, float]) -> list[str]:
        """Examine the metrics so far, write all findings to `watch.json`, return the new ones."""
        for rows in self._new:
            self._records.extend(rows)
        report = examine_log(self._records, references=references, **self._facts)
        write_text(self._workdir / WATCH, report.to_json() + "\n")
        new = [f for f in report if _notable(f) and (f.check, f.status) not in self._said]
        self._said |= {(f.check, f.status) for f in new}
        return [f"doctor: {f.check} ({_word(f)}): {f.evidence} {f.remedy}".strip() for f in new]


def _notable(finding: Finding) -> bool:
    """True for a failure, a warning, and clipping of nearly all updates, which is often blamed."""
    saturated = finding.check == "log.clipping" and finding.values.get("rate", 0) > _SATURATED
    return finding.status in ("fail", "warn") or saturated


def _word(finding: Finding) -> str:
    return "note" if finding.status == "pass" else finding.status
