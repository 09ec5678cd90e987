"""Post-mortem of a run of this trainer, while it goes on or after its end."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from lm_jax import config, metrics
from lm_jax.doctor.findings import Finding, Report, require
from lm_jax.doctor.log.examine import examine_log
from lm_jax.doctor.log.subject import read_log

_SATURATED = 0.9  # of the updates


def examine_workdir(
    workdir: str | pathlib.Path, *, references: Mapping[str, float] | None = None
) -> Report:
    """Post-mortem of a run from what it left behind so far: config, metrics and evaluations.

    Args:
        workdir: folder of the run.
        references: of the valid split, as in `eval_valid.json`, which is read if there are none.

    Raises:
        FileNotFoundError: if the folder holds no config or no metrics.
        ValueError: if a file in it is not as the trainer writes it.
    """
    workdir = pathlib.Path(workdir)
    path = workdir / "config.json"
    for file in (path, workdir / "metrics.jsonl"):
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such file; give the folder of a run.")
    record = _object(path, "config", "data", "devices")
    try:
        cfg = config.from_record(record)
        vocab_size, splits = record["data"]["vocab_size"], record["data"]["splits"]
        split_tokens = {name: split["tokens"] for name, split in splits.items()}
        train_tokens = split_tokens["train"]
        devices = record["devices"]
        flops = metrics.flops_per_token(cfg, vocab_size)
        peak = metrics.peak_flops(devices[0], cfg.train.compute_dtype, len(devices))
        tokens_per_step = cfg.data.batch_size * cfg.data.seq_len
        lr_end = cfg.optim.peak_lr * (1 if cfg.optim.schedule == "constant" else cfg.optim.end_lr)
        steps = int(cfg.train.steps)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}".rstrip(".")
        raise ValueError(f"{path}: not as a run writes it ({what}); restore the file.") from error
    scored = workdir / "eval_valid.json"
    if references is None and scored.exists():
        references = _object(scored, "references")["references"]
        require(isinstance(references, dict), f"{scored}: references", "evaluate the run again")
    log = read_log(workdir / "metrics.jsonl", null_is_nan=True)
    return examine_log(
        log.records,
        problems=log.problems,
        vocab_size=vocab_size,
        split_tokens=split_tokens,
        train_tokens=train_tokens,
        tokens_per_step=tokens_per_step,
        parameters=flops / 6,
        peak_flops=peak,
        lr_peak=cfg.optim.peak_lr,
        lr_end=lr_end,
        steps=steps,
        references=references,
    )


def _object(path: pathlib.Path, *keys: str) -> dict[str, Any]:
    """The JSON object in a file, which must have the keys."""
    try:
        read = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error}); restore the file.") from error
    require(isinstance(read, dict), str(path), "restore the file, which holds no JSON object")
    missing = [key for key in keys if key not in read]
    require(not missing, str(path), f"restore the file, which lacks {', '.join(missing)}")
    return read  # type: ignore[no-any-return]


class Watch:
    """Examines the metrics of a run while it goes on, and says each finding once."""

    def __init__(self, workdir: pathlib.Path):
        """Watch the run in `workdir`."""
        self._workdir = workdir
        self._said: set[tuple[str, str]] = set()

    def look(self, references: Mapping[str, float]) -> list[str]:
        """Examine the metrics so far, keep the findings in `watch.json`, return what is new.

        Args:
            references: see `examine_workdir`.
        """
        report = examine_workdir(self._workdir, references=references)
        (self._workdir / "watch.json").write_text(report.to_json() + "\n")
        new = [f for f in report if _notable(f) and (f.check, f.status) not in self._said]
        self._said |= {(f.check, f.status) for f in new}
        return [f"doctor: {f.check} ({_word(f)}): {f.evidence} {f.remedy}".strip() for f in new]


def _notable(finding: Finding) -> bool:
    """A failure or a warning; saturated clipping too, which is neither but often blamed."""
    saturated = finding.check == "log.clipping" and finding.values.get("rate", 0) > _SATURATED
    return finding.status in ("fail", "warn") or saturated


def _word(finding: Finding) -> str:
    return "note" if finding.status == "pass" else finding.status
