"""A run examined with what the trainer has, before it starts and while it goes on."""

from lm_jax.preflight.run import Unfit, examine_config
from lm_jax.preflight.watch import Watch, examine_workdir

__all__ = ["Unfit", "Watch", "examine_config", "examine_workdir"]
