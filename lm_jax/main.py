"""Train and evaluate: `python -m lm_jax.main --config=configs/quickstart.py`.

Any field can be overridden, for instance `--config.optim.peak_lr=1e-3`.
"""

import pathlib
import re
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from lm_jax import config

config_flags.register_flag_parser_for_type(config.Duration, flags.ArgumentParser())

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, as configs/quickstart.py.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; the same folder resumes it. Default: runs/<config>-<seed>."
)
flags.mark_flag_as_required("config")


def override_paths(argv: list[str]) -> list[str]:
    """Dotted paths of the `--config.a.b=...` and `--noconfig.a.b` arguments."""
    found = (re.match(r"--?(?:no)?config\.([^=]+)", argument) for argument in argv)
    return [match[1] for match in found if match]


def main(_: list[str]) -> None:
    """Run the training that the flags describe."""
    from lm_jax import sharding
    from lm_jax.train import train_and_evaluate

    if "verbosity" not in {flag.split("=")[0].lstrip("-") for flag in sys.argv[1:]}:
        logging.set_verbosity(logging.WARNING)  # Orbax and Grain tell every step at INFO
    sharding.initialize()
    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = _WORKDIR.value or f"runs/{name}-{_CONFIG.value.seed}"
    train_and_evaluate(_CONFIG.value, workdir)


def run() -> None:
    """Entry point: config errors are one sentence and exit code 2, not a traceback."""
    try:
        config.check_names(override_paths(sys.argv[1:]))
        app.run(main, flags_parser=_parse)
    except config.ConfigError as error:
        sys.exit(f"{error}")


def _parse(argv: list[str]) -> list[str]:
    return flags.FLAGS(argv)


if __name__ == "__main__":
    run()
