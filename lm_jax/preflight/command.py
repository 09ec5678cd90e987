"""Preflight of a config, post-mortem of a run or of any trainer's log.

    python -m lm_jax.doctor configs/quickstart.py --level=full
    python -m lm_jax.doctor runs/quickstart-0
    python -m lm_jax.doctor log.txt --map=loss=train_loss --vocab_size=65

What stands without a flag is a config, a run's folder or a log, by what is there. Fields of a
config are set as for `python -m lm_jax.main`, whose --help lists them.

A log is a CSV, JSON or JSONL file, what a trainer printed, events of TensorBoard, or a folder.

--all tells what passed and what was skipped as well, --json prints them for programs.
Exit code 0: nothing failed; 1: a check failed or nothing could be looked at; 2: the command cannot
be followed.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from lm_jax import console, doctor, preflight, processes
from lm_jax.config.flags import is_config, parse_flags
from lm_jax.doctor.facts import annotations, require
from lm_jax.doctor.log.read import LogFile, number, read_log
from lm_jax.doctor.log.subject import Subject
from lm_jax.door import command
from lm_jax.files import is_url, user_path
from lm_jax.places import pulled
from lm_jax.workdir import METRICS

# Facts of a log that are numbers; their help is that of `examine_log`.
_WHOLE = ("vocab_size", "split_tokens", "steps")
_REAL = ("parameters", "peak_flops", "train_tokens", "tokens_per_step", "lr_peak", "lr_end")
_REFERENCES = ("unigram", "kn2", "entropy_rate")


def _define(given: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "Folder of a run.", given)
    flags.DEFINE_string("log", None, "Log of any trainer: a file or a folder.", given)
    flags.DEFINE_list("map", [], "Columns of --log by metric: loss=train_loss,lr=rate.", given)
    flags.DEFINE_enum("level", "fast", ["fast", "full"], "Checks of --config.", given)
    flags.DEFINE_bool("json", False, "Print JSON.", given)
    flags.DEFINE_bool("all", False, "Tell what passed and what was skipped as well.", given)
    flags.DEFINE_bool("overfit", False, "--log overfits a batch on purpose.", given)
    references = "Perplexities of the tokens evaluated in --log: unigram=760,kn2=250."
    flags.DEFINE_list("references", [], references, given)
    what = {fact.name: f"Of --log: {fact.help}" for fact in annotations(Subject)}
    for name in _WHOLE:
        flags.DEFINE_integer(name, None, what[name], flag_values=given)
    for name in _REAL:
        flags.DEFINE_float(name, None, what[name], flag_values=given)


def examine_file(given: flags.FlagValues) -> tuple[LogFile, doctor.Report]:
    """Any trainer's log and its post-mortem, as the flags describe it."""
    log = read_log(given.log, _pairs("map", given.map))
    references = _pairs("references", given.references)
    for name, value in references.items():
        require(
            name in _REFERENCES, f"--references: {name}", f"choose from {', '.join(_REFERENCES)}"
        )
        require(number(value) is not None, f"--references: {name}={value}", "give a number")
    facts: dict[str, Any] = {name: given[name].value for name in (*_WHOLE, *_REAL)}
    report = doctor.examine_log(
        log.records,
        problems=log.problems,
        columns=log.columns,
        ignored=log.ignored,
        overfit=given.overfit,
        references={name: float(value) for name, value in references.items()},
        **facts,
    )
    return log, report


def _pairs(flag: str, items: list[str]) -> dict[str, str]:
    """The items name=value of a flag, each name once."""
    found: dict[str, str] = {}
    for item in items:
        name, _, value = item.partition("=")
        require(bool(name and value), f"--{flag}: {item!r}", "give name=value")
        require(name not in found, f"--{flag}: {name} is given twice", "give it once")
        found[name] = value
    return found


def _which(argument: str) -> str:
    """Whether an argument without a flag is a config, the folder of a run or a log."""
    if is_config(argument):
        return "config"
    of_run = is_url(argument) or (user_path(argument) / METRICS).exists()
    return "workdir" if of_run else "log"


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Examine what the flags name, print the findings and exit."""
    given = flags.FlagValues()
    _define(given)
    parse_flags(given, argv, __doc__, subject=["config", "workdir", "log"], which=_which)
    processes.only_first("doctor")
    console.use(aside=True)
    log: LogFile | None = None
    if given.config is not None:
        report = preflight.examine_config(given.config, level=given.level)
    elif given.workdir is not None:
        report = preflight.examine_workdir(pulled(given.workdir))
    else:
        log, report = examine_file(given)
    if given.json and log:
        found = {"columns": log.columns, "ignored": log.ignored, "notes": log.notes}
        print(json.dumps({"log": found, **json.loads(report.to_json())}, indent=1))
    elif given.json:
        print(report.to_json())
    else:
        if log:
            print(log.summary)
        report.show(everything=given.all)
    sys.exit(0 if report.clean else 1)
