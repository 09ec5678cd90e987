"""Post-mortem of a run of this trainer, while it goes on or after its end."""

import json
import pathlib
from collections.abc import Mapping

from lm_jax import config, metrics
from lm_jax.doctor.findings import Finding, Report
from lm_jax.doctor.log import examine_log
from lm_jax.doctor.records import read_log

_SATURATED = 0.9  # of the updates


def examine_workdir(
    workdir: pathlib.Path, *, references: Mapping[str, float] | None = None
) -> Report:
    """Post-mortem of a run from what it left behind so far: config, metrics and evaluations.

    Args:
        workdir: folder of the run.
        references: of the valid split, as in `eval_valid.json`, which is read if there are none.

    Raises:
        FileNotFoundError: if the folder holds no config or no metrics.
    """
    for name in ("config.json", "metrics.jsonl"):
        if not (workdir / name).exists():
            raise FileNotFoundError(f"{workdir / name}: no such file; give the folder of a run.")
    record = json.loads((workdir / "config.json").read_text())
    cfg = config.from_dict(record["config"])
    log = read_log(workdir / "metrics.jsonl")
    scored = workdir / "eval_valid.json"
    if references is None and scored.exists():
        references = json.loads(scored.read_text())["references"]
    vocab_size = record["data"]["vocab_size"]
    optim, flops = cfg.optim, metrics.flops_per_token(cfg, vocab_size)
    return examine_log(
        log.records,
        problems=log.problems,
        vocab_size=vocab_size,
        split_tokens={name: s["tokens"] for name, s in record["data"]["splits"].items()},
        train_tokens=record["data"]["splits"]["train"]["tokens"],
        tokens_per_step=cfg.data.batch_size * cfg.data.seq_len,
        parameters=flops / 6,
        peak_flops=metrics.peak_flops(
            record["devices"][0], cfg.train.compute_dtype, len(record["devices"])
        ),
        lr_peak=optim.peak_lr,
        lr_end=optim.peak_lr * (1 if optim.schedule == "constant" else optim.end_lr),
        steps=int(cfg.train.steps),
        references=references,
    )


class Watch:
    """What the metrics of a run say while it goes on, each thing once."""

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
