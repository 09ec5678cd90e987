"""Optimisers and schedules."""

from lm_jax.doctor.optimiser.examine import examine_optimiser

__all__ = ["examine_optimiser"]
