"""lm_jax: a language-model trainer that proves its numbers.

The names in `__all__` are imported when they are first used, for JAX takes seconds.
"""

import pkgutil
from typing import TYPE_CHECKING, Any

from lm_jax.cuda import name_cuda_folder

if TYPE_CHECKING:
    from lm_jax import doctor
    from lm_jax.compare.compare import compare_runs
    from lm_jax.config import Config
    from lm_jax.config.flags import load_config
    from lm_jax.main import train
    from lm_jax.run import open_run

__all__ = ["Config", "__version__", "compare_runs", "doctor", "load_config", "open_run", "train"]
__version__ = "0.4.0"

_LAZY = {
    "Config": "lm_jax.config:Config",
    "compare_runs": "lm_jax.compare.compare:compare_runs",
    "doctor": "lm_jax.doctor:",
    "load_config": "lm_jax.config.flags:load_config",
    "open_run": "lm_jax.run:open_run",
    "train": "lm_jax.main:train",
}

name_cuda_folder()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pkgutil.resolve_name(_LAZY[name])


def __dir__() -> list[str]:
    return __all__
