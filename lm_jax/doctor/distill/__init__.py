"""Distillation."""

from lm_jax.doctor.distill.examine import examine_distillation

__all__ = ["examine_distillation"]
