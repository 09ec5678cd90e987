"""Train, evaluate and save a run; the same command again goes on where it stopped.

    python -m lm_jax.main configs/quickstart.py
    python -m lm_jax.main wikitext2 --workdir=runs/a --config.optim.peak_lr=1e-3

Any field of the config can be set by a flag; all of them are listed at the end.
"""

import ctypes
import pathlib
import platform
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from lm_jax import console
from lm_jax.config import rules
from lm_jax.config.flags import load_config, parse_flags
from lm_jax.door import command
from lm_jax.files import read_json
from lm_jax.rundir import SCORES, changes, read_state, run_name
from lm_jax.signals import Interrupted


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


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the training that the flags describe."""
    given = flags.FlagValues()
    folder = (
        "Folder of the run; the same folder resumes it. Default: runs/<config>-<seed>, with what "
        "flags change before the seed, but for train.steps: more of them lengthen it."
    )
    flags.DEFINE_string("workdir", None, folder, given)
    parse_flags(given, argv, __doc__, subject=["config"])
    cfg, spec = given.config, config_flags.get_config_filename(given["config"])
    rules.validate(cfg)
    changed = changes(load_config(spec), cfg)
    workdir = pathlib.Path(given.workdir or f"runs/{run_name(spec, cfg.seed, changed)}")
    state = read_state(workdir)
    console.say(f"{workdir}: {state or 'a new run'}")
    if state is not None and state.finished and state.answers(cfg):
        from lm_jax.evaluate import report

        for split in state.splits:
            report(split, read_json(workdir / SCORES.format(split)))
        console.say("more updates go on from here: raise config.train.steps")
        tell_the_way_on(workdir)
        return
    keep_freed_memory()
    try:
        with console.phase("starting JAX"):
            from lm_jax import sharding
            from lm_jax.train import train_and_evaluate

            sharding.initialize()
        train_and_evaluate(cfg, workdir)
    except Interrupted as stopped:
        state = read_state(workdir)
        stopped.then = f"; {state}, the same command goes on" if state else "; nothing is saved"
        raise
    tell_the_way_on(workdir)


def tell_the_way_on(workdir: pathlib.Path) -> None:
    """Say where everything lies, and which commands follow."""
    console.say(f"{workdir / 'report.html'} shows all of it; sample, examine, compare:")
    for command_line in (
        f"python -m lm_jax.generate --workdir={workdir}",
        f"python -m lm_jax.doctor --workdir={workdir}",
        f"python -m lm_jax.compare {workdir} OTHER_RUN",
    ):
        console.say(f"  {command_line}")


if __name__ == "__main__":
    main()
