"""Train and evaluate: `python -m lm_jax.main --config=configs/quickstart.py`.

Any field can be overridden, for instance `--config.optim.peak_lr=1e-3`.
"""

import ctypes
import pathlib
import platform
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from lm_jax import config
from lm_jax.config import rules
from lm_jax.config.flags import define_config, parse, run_name
from lm_jax.data.open import open_data

_CONFIG = define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; the same folder resumes it. Default: runs/<config>-<seed>."
)
flags.mark_flag_as_required("config")


def keep_freed_memory() -> None:
    """Ask glibc's malloc to reuse freed memory instead of returning it to the kernel.

    XLA on CPUs allocates its temporary buffers anew in every step; without this each step spends
    a tenth to a fifth of its time on page faults. With an NVIDIA GPU, or without glibc, nothing is
    changed.
    """
    if platform.libc_ver()[0] != "glibc" or pathlib.Path("/dev/nvidiactl").exists():
        return
    libc = ctypes.CDLL(None)
    gibibyte = 1 << 30
    for option, value in (  # numbers from malloc.h
        (-8, 1),  # M_ARENA_MAX: one arena, whose top can grow
        (-3, gibibyte),  # M_MMAP_THRESHOLD: no mapping of its own for a buffer below this
        (-1, 2 * gibibyte - 1),  # M_TRIM_THRESHOLD: keep this much free memory
        (-2, gibibyte // 16),  # M_TOP_PAD: grow in steps of this size
    ):
        libc.mallopt(option, value)


def main(_: list[str]) -> None:
    """Run the training that the flags describe; a mistake in them is one sentence."""
    from lm_jax import preflight, sharding
    from lm_jax.train import train_and_evaluate

    if "verbosity" not in {flag.split("=")[0].lstrip("-") for flag in sys.argv[1:]}:
        logging.set_verbosity(logging.WARNING)  # Orbax and Grain tell every step at INFO
    sharding.initialize()
    spec = config_flags.get_config_filename(flags.FLAGS["config"])
    workdir = _WORKDIR.value or f"runs/{run_name(spec, _CONFIG.value.seed)}"
    try:
        store = open_data(rules.validate(_CONFIG.value))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    try:
        train_and_evaluate(_CONFIG.value, workdir, store)
    except (config.ConfigError, preflight.Unfit) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    keep_freed_memory()
    app.run(main, flags_parser=parse)
