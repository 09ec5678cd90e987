"""The doctor on a run of this trainer: before it starts, while it goes on, after its end."""

from lm_jax.preflight.once import examine_once
from lm_jax.preflight.run import examine_config
from lm_jax.preflight.watch import Watch, examine_workdir

__all__ = ["Unfit", "Watch", "examine_config", "examine_once", "examine_workdir"]


class Unfit(RuntimeError):
    """A run that a check refuses."""
