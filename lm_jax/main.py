"""Train and evaluate: `python -m lm_jax.main --config=configs/quickstart.py`.

Any field can be overridden, for instance `--config.optim.peak_lr=1e-3`.
"""

import ctypes
import pathlib
import platform
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from lm_jax import config
from lm_jax.config import rules
from lm_jax.config.flags import define_config, load_config, parse_flags
from lm_jax.data.open import open_data
from lm_jax.rundir import changes, run_name


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


def main(argv: Sequence[str] | None = None) -> None:
    """Run the training that the flags describe; a mistake in them is one sentence."""
    given = flags.FlagValues()
    define_config(given, argv)
    flags.mark_flag_as_required("config", given)
    folder = (
        "Folder of the run; the same folder resumes it. Default: runs/<config>-<seed>, with what "
        "flags change before the seed, but for train.steps: more of them lengthen it."
    )
    flags.DEFINE_string("workdir", None, folder, given)
    parse_flags(given, argv, __doc__)
    keep_freed_memory()

    from lm_jax import preflight, sharding
    from lm_jax.train import train_and_evaluate

    sharding.initialize()
    cfg, spec = given.config, config_flags.get_config_filename(given["config"])
    changed = changes(load_config(spec), cfg)
    workdir = given.workdir or f"runs/{run_name(spec, cfg.seed, changed)}"
    try:
        store = open_data(rules.validate(cfg))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    try:
        train_and_evaluate(cfg, workdir, store)
    except (config.ConfigError, preflight.Unfit) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
