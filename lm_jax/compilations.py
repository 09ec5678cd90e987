"""What XLA compiled, kept for the next start."""

import functools
import pathlib
import platform

import jax

from lm_jax import console
from lm_jax.config import Config
from lm_jax.data.files import hash_json
from lm_jax.files import can_write

_MOST = 2 << 30  # bytes; what was not used for longest goes


def keep_compilations(cfg: Config) -> None:
    """Let XLA keep what it compiles, unless the user has named a folder for that already.

    The folder is one for each kind of processor, for XLA uses every instruction that it finds.
    What lies there is run, so `cfg` is the user's and not one that came with a folder.
    """
    if not cfg.train.compilation_cache or jax.config.jax_compilation_cache_dir:
        return
    processor = pathlib.Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.exists() else [platform.processor()]
    kind = hash_json(sorted({line for line in lines if line.startswith(("flags", "model name"))}))
    folder = pathlib.Path(cfg.data.cache_dir).expanduser() / "compilations" / kind[:12]
    if not _usable(folder):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _MOST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@functools.cache
def _usable(folder: pathlib.Path) -> bool:
    """Whether XLA can write there; said once if not."""
    usable = can_write(folder)
    if not usable:
        console.say(f"what XLA compiles is not kept, for {folder} cannot be written into")
    return usable
