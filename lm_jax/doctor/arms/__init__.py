"""Runs against each other."""

from lm_jax.doctor.arms.examine import examine_arms

__all__ = ["examine_arms"]
