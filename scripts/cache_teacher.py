"""Keep a teacher's most likely ids for every training window, for runs that learn from them.

    python scripts/cache_teacher.py --config=configs/distill.py:cached --out=DIR \\
        --config.distill.teachers=RUN

The config is the student's, with `distill.support` top_k, `distill.top_k` and a constant
`distill.temperature`. Train with the same config, `--config.distill.teachers=` and
`--config.distill.cache=DIR`. A token takes 4 k + 4 bytes for its log-probabilities and 2 k for its
ids (4 k above 65,536 ids).
"""

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from lm_jax import config, console
from lm_jax import loss as losses
from lm_jax.config import rules
from lm_jax.config.flags import parse_flags
from lm_jax.config.resolve import resolve
from lm_jax.data import windows as pipeline
from lm_jax.data.open import open_data
from lm_jax.distill import cache, teachers
from lm_jax.distill.opening import open_teacher, verify
from lm_jax.door import command
from lm_jax.kernels import divergences


def make_cache(cfg: config.Config, folder: pathlib.Path) -> int:
    """Write the cache of a config as written; returns the number of windows.

    Raises:
        ConfigError: if the config names no teacher, or keeps no top-k at one temperature.
        FileExistsError: if the folder holds a cache.
    """
    store = open_data(rules.validate(cfg))
    windows = pipeline.count_windows(store.split("train"), cfg.data.seq_len, cfg.data.window_offset)
    cfg = resolve(cfg, windows=windows)
    read_back = config.replace(cfg, distill__cache=str(folder), distill__teachers="")
    rules.validate(read_back)
    teacher = open_teacher(cfg, store)
    temperature = cache.describe_cache(cfg, store)["temperature"]

    @jax.jit
    def most_likely(params, batch):
        b = losses.shift(batch)
        reading = teacher.read(params, batch, b, jnp.dtype(cfg.train.compute_dtype), inside=False)

        def row(states):  # so that the logits of one window exist at a time
            members = [
                m._replace(x_BTE=x_TE) for m, x_TE in zip(reading.members, states, strict=True)
            ]
            log_p_TU = teachers.members_log_p(members, temperature)
            return divergences.most_likely(log_p_TU, cfg.distill.top_k)

        return jax.lax.map(row, [m.x_BTE for m in reading.members])

    def on_host(batch):
        return tuple(np.asarray(x) for x in most_likely(teacher.params, batch))

    with console.phase("examining the teacher"):
        told = verify(teacher, cfg, store)
    for line in told:
        console.say(line)
    with jax.default_matmul_precision(cfg.train.matmul_precision):
        return cache.write_cache(folder, cfg, store, on_host, teacher.identity)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Write the cache that the flags describe."""
    given = flags.FlagValues()
    flags.DEFINE_string("out", None, "Folder of the cache.", given, required=True)
    parse_flags(given, argv, __doc__, subject=["config"])
    count = make_cache(given.config, pathlib.Path(given.out))
    print(f"{count:,} windows in {given.out}")


if __name__ == "__main__":
    main()
