"""Data."""

from lm_jax.doctor.data.examine import examine_data

__all__ = ["examine_data"]
