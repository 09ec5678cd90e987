"""Preflight of a config, post-mortem of a run or of any trainer's log.

    python -m lm_jax.doctor --config=FILE [--config.a.b=...] [--level=full]
    python -m lm_jax.doctor --workdir=DIR
    python -m lm_jax.doctor --log=FILE [--map=loss=train_loss,lr=learning_rate] [--vocab_size=V]
        [--steps=N] [--references=unigram=760,kn2=250]

Exit code 0: no check failed; 1: a check failed; 2: the command cannot be followed.
"""

import pathlib
import sys
from typing import Any

from absl import flags
from rich.console import Console

from lm_jax import doctor, preflight
from lm_jax.config.flags import define_config, misuse
from lm_jax.doctor.findings import require
from lm_jax.doctor.log.subject import number, read_log

_CONFIG = define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run.")
_LOG = flags.DEFINE_string("log", None, "JSONL or CSV file with the metrics of any trainer.")
_MAP = flags.DEFINE_list("map", [], "Columns of --log by metric: loss=train_loss,lr=rate.")
_LEVEL = flags.DEFINE_enum("level", "fast", ["fast", "full"], "Checks of --config.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", None, "Ids that the model of --log predicts.")
_SPLIT_TOKENS = flags.DEFINE_integer("split_tokens", None, "Tokens of the valid split of --log.")
_PARAMETERS = flags.DEFINE_float("parameters", None, "Parameters of the model of --log.")
_PEAK_FLOPS = flags.DEFINE_float("peak_flops", None, "FLOP/s of all devices of --log.")
_STEPS = flags.DEFINE_integer("steps", None, "Configured updates of the run of --log.")
_TRAIN_TOKENS = flags.DEFINE_float("train_tokens", None, "Tokens of the train split of --log.")
_TOKENS_PER_STEP = flags.DEFINE_float(
    "tokens_per_step", None, "Tokens an update of --log consumes."
)
_REFERENCES = flags.DEFINE_list(
    "references", [], "Perplexities of the tokens evaluated in --log: unigram=760,kn2=250."
)
_LR_PEAK = flags.DEFINE_float("lr_peak", None, "Configured peak learning rate of --log.")
_LR_END = flags.DEFINE_float("lr_end", None, "Configured last learning rate of --log.")
_OVERFIT = flags.DEFINE_bool("overfit", False, "--log overfits a batch on purpose.")


def examine_file(path: pathlib.Path) -> doctor.Report:
    """Post-mortem of any trainer's log, as the flags describe it."""
    log = read_log(path, _pairs("map", _MAP.value))
    references = _pairs("references", _REFERENCES.value)
    known = ("unigram", "kn2", "entropy_rate")
    for name, value in references.items():
        require(name in known, f"--references: {name}", f"choose from {', '.join(known)}")
        require(number(value) is not None, f"--references: {name}={value}", "give a number")
    return doctor.examine_log(
        log.records,
        problems=log.problems,
        vocab_size=_VOCAB_SIZE.value,
        split_tokens=_SPLIT_TOKENS.value,
        train_tokens=_TRAIN_TOKENS.value,
        tokens_per_step=_TOKENS_PER_STEP.value,
        parameters=_PARAMETERS.value,
        peak_flops=_PEAK_FLOPS.value,
        lr_peak=_LR_PEAK.value,
        lr_end=_LR_END.value,
        steps=_STEPS.value,
        overfit=_OVERFIT.value,
        references={name: float(value) for name, value in references.items()},
    )


def _pairs(flag: str, items: list[str]) -> dict[str, str]:
    """The items name=value of a flag, each name once."""
    found: dict[str, str] = {}
    for item in items:
        name, _, value = item.partition("=")
        require(bool(name and value), f"--{flag}: {item!r}", "give name=value")
        require(name not in found, f"--{flag}: {name} is given twice", "give it once")
        found[name] = value
    return found


def main(argv: list[str]) -> None:
    """Examine what the flags name, print the findings and exit."""
    if argv[1:]:
        misuse(f"{argv[1]}: not a flag; give files as --config=, --workdir= or --log=.")
    given: dict[str, Any] = {
        "config": _CONFIG.value,
        "workdir": _WORKDIR.value,
        "log": _LOG.value,
    }
    if sum(value is not None for value in given.values()) != 1:
        misuse("give one of --config, --workdir and --log.")
    try:
        if _CONFIG.value is not None:
            report = preflight.examine_config(_CONFIG.value, level=_LEVEL.value)
        elif _WORKDIR.value is not None:
            report = preflight.examine_workdir(_WORKDIR.value)
        else:
            report = examine_file(pathlib.Path(_LOG.value or ""))
    except (ValueError, OSError) as error:
        misuse(str(error))
    if _JSON.value:
        print(report.to_json())
    else:
        report.show(Console())
    sys.exit(1 if report.failed else 0)
