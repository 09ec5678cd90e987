"""What a run needs of the machine, looked at before its data are read."""

import os
import pathlib

import jax

from lm_jax import sharding, writers
from lm_jax.config import Config, ConfigError
from lm_jax.distill.opening import require_teachers
from lm_jax.files import can_write, existing
from lm_jax.kernels.device import choose_dtype
from lm_jax.models.families import require_attention


def check_environment(cfg: Config, workdir: pathlib.Path) -> None:
    """Refuse a valid config that this machine cannot run, in a fraction of a second.

    Args:
        cfg: the config as written.
        workdir: folder of the run, which need not be there.

    Raises:
        ConfigError: if the workdir or the cache cannot be written, if the devices cannot share the
            parameters or rows, for an attention that they do not have, and for a tokenizer or a
            teacher that is not there.
    """
    _require_writable("--workdir", workdir)
    cache = pathlib.Path(cfg.data.cache_dir).expanduser()
    if not os.access(cache / "stores", os.R_OK | os.X_OK):  # what is finished there needs no more
        _require_writable("config.data.cache_dir", cache)
    if cfg.tokenizer.folder:
        for name in ("tokenizer.json", "config.json"):
            if not (pathlib.Path(cfg.tokenizer.folder) / name).is_file():
                what = f"{cfg.tokenizer.folder} holds no {name}; give the folder of a checkpoint."
                raise ConfigError(f"config.tokenizer.folder: {what}")
    with jax.set_mesh(sharding.make_mesh(cfg.mesh)):
        sharding.accumulation(cfg)
    writers.check(cfg)
    require_attention(cfg, choose_dtype(cfg.train.compute_dtype)[0])
    require_teachers(cfg)


def _require_writable(field: str, folder: pathlib.Path) -> None:
    """Raise ConfigError if nothing can be written into a folder, or it cannot be made."""
    there = existing(folder)
    if not there.is_dir():
        raise ConfigError(f"{field}: {there} is a file; give a folder.")
    if not can_write(folder):
        raise ConfigError(f"{field}: {there} cannot be written into; give another folder.")
