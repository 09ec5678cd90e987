"""Losses."""

from lm_jax.doctor.loss.examine import examine_loss

__all__ = ["examine_loss"]
