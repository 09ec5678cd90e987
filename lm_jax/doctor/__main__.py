"""Preflight of a config, post-mortem of a run or of any trainer's log.

    python -m lm_jax.doctor --config=FILE [--config.a.b=...] [--level=full]
    python -m lm_jax.doctor --workdir=DIR
    python -m lm_jax.doctor --log=FILE [--map=loss=train_loss,lr=learning_rate] [--vocab_size=V]

Exit code 0: no check failed; 1: a check failed; 2: the command cannot be followed.
"""

import pathlib
import sys
from typing import Any

from absl import app, flags
from rich.console import Console

from lm_jax import doctor
from lm_jax.doctor.records import read_log
from lm_jax.flags import define_config, misuse, parse

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
_LR_END = flags.DEFINE_float("lr_end", None, "Configured last learning rate of --log.")
_OVERFIT = flags.DEFINE_bool("overfit", False, "--log overfits a batch on purpose.")


def examine_file(path: pathlib.Path) -> doctor.Report:
    """Post-mortem of any trainer's log, as the flags describe it."""
    pairs = [item.partition("=") for item in _MAP.value]
    log = read_log(path, {name: column for name, _, column in pairs})
    return doctor.examine_log(
        log.records,
        problems=log.problems,
        vocab_size=_VOCAB_SIZE.value,
        split_tokens=_SPLIT_TOKENS.value,
        parameters=_PARAMETERS.value,
        peak_flops=_PEAK_FLOPS.value,
        lr_end=_LR_END.value,
        overfit=_OVERFIT.value,
    )


def main(_: list[str]) -> None:
    """Examine what the flags name, print the findings and exit."""
    given: dict[str, Any] = {
        "config": _CONFIG.value,
        "workdir": _WORKDIR.value,
        "log": _LOG.value,
    }
    if sum(value is not None for value in given.values()) != 1:
        misuse("give one of --config, --workdir and --log.")
    try:
        if _CONFIG.value is not None:
            report = doctor.examine_config(_CONFIG.value, level=_LEVEL.value)
        elif _WORKDIR.value is not None:
            report = doctor.examine_workdir(pathlib.Path(_WORKDIR.value))
        else:
            report = examine_file(pathlib.Path(_LOG.value or ""))
    except (ValueError, OSError) as error:
        misuse(str(error))
    if _JSON.value:
        print(report.to_json())
    else:
        report.show(Console())
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
