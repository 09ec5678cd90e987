"""Train, evaluate and save a run; the same command again goes on where it stopped.

    python -m lm_jax.main configs/quickstart.py
    python -m lm_jax.main wikitext2 --workdir=runs/a --config.optim.peak_lr=1e-3

Any field of the config can be set by a flag; all of them are listed at the end.
"""

import ctypes
import os
import pathlib
import platform
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import config_flags

from lm_jax import config, console, processes
from lm_jax.config import Config, rules
from lm_jax.config.flags import load_config, parse_flags
from lm_jax.door import command
from lm_jax.files import is_url
from lm_jax.places import trained_in
from lm_jax.rundir import changes, read_scores, read_state, report_is_old, run_name
from lm_jax.signals import Interrupted

if TYPE_CHECKING:
    from lm_jax.run import Run


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


def train(cfg: Config | str | os.PathLike, workdir: str | os.PathLike | None = None) -> "Run":
    """Train, evaluate and save a run, as the command does; called again, it goes on.

    A run that is finished is opened. An interrupt saves the state first.

    Example:
        ```python
        run = lm_jax.train(cfg, "runs/example")
        run.scores["valid"]["loss"], run.scores["valid"]["references"]
        ```

    Args:
        cfg: the config as written, whose durations are resolved here; or the file or the name of
            one, as `load_config` takes it.
        workdir: folder for everything that the run leaves behind, or a URL. None: as the command
            names it, `runs/<config>-<seed>`; a `Config` is named after its corpus and what it
            changes.

    Raises:
        ConfigError: for an impossible config, or one that differs from the workdir's, or if another
            trainer has the workdir.
        FloatingPointError: after `train.max_nonfinite` skipped updates in a row, or one that made
            the parameters infinite.
        Unfit: if the doctor finds the run at fault before it starts.
        Interrupted: after SIGINT, SIGTERM or SIGHUP, once the state is saved; in a notebook it is
            a KeyboardInterrupt like any other.
    """
    if isinstance(cfg, Config):
        spec, usual = cfg.data.corpus, config.replace(Config(), data__corpus=cfg.data.corpus)
    else:
        spec = os.fspath(cfg)
        cfg = usual = load_config(spec)
    rules.validate(cfg)
    with trained_in(workdir or default_folder(spec, usual, cfg), cfg) as folder:
        train_in(folder, cfg)
    from lm_jax.run import open_run

    return open_run(folder)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the training that the flags describe."""
    given = flags.FlagValues()
    folder = (
        "Folder of the run, or a URL; the same one resumes it. Default: runs/<config>-<seed>, with "
        "what flags change before the seed, but for train.steps: more of them lengthen it."
    )
    flags.DEFINE_string("workdir", None, folder, given)
    parse_flags(given, argv, __doc__, subject=["config"])
    cfg, spec = given.config, config_flags.get_config_filename(given["config"])
    rules.validate(cfg)
    named = given.workdir or default_folder(spec, load_config(spec), cfg)
    with trained_in(named, cfg) as workdir:
        if not train_in(workdir, cfg) and not processes.find_place().rank:
            from lm_jax.evaluate import report

            for split, result in read_scores(workdir).items():
                report(split, result)
            console.say("more updates go on from here: raise config.train.steps")
    tell_the_way_on(named if is_url(named) else workdir)


def default_folder(spec: str, usual: Config, cfg: Config) -> str:
    """Where a run of `cfg` lives: `usual`, the config of `spec`, with changes."""
    return f"runs/{run_name(spec, cfg.seed, changes(usual, cfg))}"


def train_in(workdir: pathlib.Path, cfg: Config) -> bool:
    """Say what the folder holds and train there; False if `cfg` is finished there already."""
    others = processes.find_place().rank > 0
    console.use(silent=others)
    state = read_state(workdir)
    console.say(f"{workdir}: {state or 'a new run'}")
    if state is not None and state.finished and state.answers(cfg):
        if report_is_old(workdir) and not others:
            from lm_jax import report

            report.write(workdir)
        return False
    keep_freed_memory()
    try:
        with console.phase("starting JAX"):
            from lm_jax.loop import train_and_evaluate

            processes.join_others(cfg.cluster)
        train_and_evaluate(cfg, workdir)
    except Interrupted as stopped:
        state = read_state(workdir)
        stopped.then = f"; {state}, the same again goes on" if state else "; nothing is saved"
        raise
    return True


def tell_the_way_on(workdir: str | pathlib.Path) -> None:
    """Say where everything lies, and which commands follow."""
    console.say(f"{workdir}/report.html shows all of it; sample, examine, compare:")
    named = shlex.quote(str(workdir))
    for words in ("generate --workdir={}", "doctor --workdir={}", "compare {} OTHER_RUN"):
        console.say(f"  python -m lm_jax.{words.format(named)}")


if __name__ == "__main__":
    main()
